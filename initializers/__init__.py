"""What a LoRA can start from: one module for each method, with a `Config` and `initialize(context, config) -> Seed`.

To add an initializer, write its module and add a line to `_MODULES`; CONTRIBUTING.md has an example. A module may also
have `check(config)`, `check_run(config, facts)`, `needs(config, base)`, `work(config, model, facts)`, `notes(config)`,
`identity(config)`, `FILE_KEYS`, `grey(context, config)`, `embed(pictures, config, device)` and `embed_needs(config)`:
the functions below say what each is. A module is imported when it is asked for, so that importing this package costs
nothing.
"""

import difflib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from trainer.adapter import AdapterWeights, InitContext, Initializer, RunFacts, Work
    from trainer.hub.sources import Need
    from trainer.qwen_image import ModelConfig

__all__ = [
    "UnknownInitializer",
    "check",
    "check_run",
    "config_class",
    "embed",
    "embed_needs",
    "embeds",
    "file_keys",
    "get",
    "grey",
    "greys",
    "identity",
    "names",
    "needs",
    "notes",
    "resolve",
    "warm_start",
    "work",
]

_MODULES = {
    "random": "initializers.random",
    "gaussian": "initializers.gaussian",
    "file": "initializers.file",
    "i2l": "initializers.i2l",
}


class UnknownInitializer(UserError):
    """Neither the name of an initializer nor the path of a LoRA."""


def names() -> tuple[str, ...]:
    return tuple(_MODULES)


def resolve(method: str) -> tuple[str, dict[str, Any]]:
    """The initializer's name, and keys to set in its table `[init.<name>]`.

    The path of a LoRA, in place of a name, means the initializer "file" with that `path`, whose check tells if it is
    not there. UnknownInitializer if `method` is neither.
    """
    if method in _MODULES:
        return method, {}
    path = Path(method).expanduser()
    if path.exists() or path.suffix == ".safetensors":
        return "file", {"path": method}
    near = difflib.get_close_matches(method, _MODULES, n=1)
    raise UnknownInitializer(
        f'"{method}" is neither an initializer ({", ".join(_MODULES)}) nor an existing LoRA file or folder'
        + (f'; did you mean "{near[0]}"?' if near else "")
    )


def config_class(method: str) -> type[Any]:
    """The dataclass of `[init.<name>]`."""
    return _module(method).Config


def check(method: str, config: Any) -> list[str]:
    """Problems of `config` that can be found before any model loads, such as missing files. Empty if there are none."""
    module = _module(method)
    if hasattr(module, "check"):
        return list(module.check(config))
    return list(config.problems()) if hasattr(config, "problems") else []


def check_run(method: str, config: Any, facts: "RunFacts") -> list[str]:
    """Problems of `config` in a run of which the pictures and the adapter are known. Empty if there are none."""
    module = _module(method)
    return list(module.check_run(config, facts)) if hasattr(module, "check_run") else []


def needs(method: str, config: Any, base: str) -> "list[Need]":
    """The files of models that the initializer loads, those of `base` included."""
    module = _module(method)
    return list(module.needs(config, base)) if hasattr(module, "needs") else []


def work(method: str, config: Any, model: "ModelConfig", facts: "RunFacts") -> "Work":
    """What the initializer reads and computes in a run, for an estimate of its time; nothing by default."""
    from trainer.adapter import Work

    module = _module(method)
    found: Work = module.work(config, model, facts) if hasattr(module, "work") else Work()
    return found


def notes(method: str, config: Any) -> list[str]:
    """What is worth a word in the files of `config`, in which `check` has found no problem."""
    module = _module(method)
    return list(module.notes(config)) if hasattr(module, "notes") else []


def identity(method: str, config: Any) -> list[str]:
    """Hashes of the files that the initializer reads, as far as they are on this machine."""
    module = _module(method)
    return list(module.identity(config)) if hasattr(module, "identity") else []


def file_keys(method: str) -> tuple[str, ...]:
    """The keys of its table that only say where the files of `identity` are."""
    return tuple(getattr(_module(method), "FILE_KEYS", ()))


def embeds(method: str) -> bool:
    """Whether the initializer has image encoders."""
    return hasattr(_module(method), "embed")


def embed_needs(method: str, config: Any) -> "list[Need]":
    """The files of the initializer's image encoders. Empty if it has none."""
    module = _module(method)
    return list(module.embed_needs(config)) if hasattr(module, "embed_needs") else []


def embed(method: str, config: Any, pictures: "Sequence[Image]", device: "torch.device") -> dict[str, "Tensor"]:
    """Embeddings of RGB pictures by the initializer's image encoders: encoder's name -> N D. Empty if it has none."""
    module = _module(method)
    return dict(module.embed(pictures, config, device)) if hasattr(module, "embed") else {}


def greys(method: str) -> bool:
    """Whether the initializer can say what it makes of grey pictures."""
    return hasattr(_module(method), "grey")


def grey(method: str, config: Any, context: "InitContext") -> "AdapterWeights":
    """What the initializer makes of grey pictures of the sizes and number of `context.images`, of all ranks."""
    found: AdapterWeights = _module(method).grey(context, config)
    return found


def get(method: str) -> "Initializer":
    """The function `initialize(context, config) -> Seed` of the initializer."""
    return _module(method).initialize


def _module(method: str) -> ModuleType:
    return import_module(_MODULES[resolve(method)[0]])


def __getattr__(name: str) -> Any:
    """`warm_start` needs PEFT, which takes seconds to import: it is imported when it is asked for."""
    if name == "warm_start":
        return import_module("initializers.script").warm_start
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
