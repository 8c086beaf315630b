"""What a run can start from: one module for each method, with a `Config` and `initialize(context, config) -> Seed`.

A module is imported when it is asked for, so that what one needs does not burden the others. To add one, write its
module and add a line to `_MODULES`. A path to a LoRA, where a name is expected, means the method "file".
"""

import difflib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from trainer.adapter import Initializer
    from trainer.hub.sources import Need

_MODULES = {
    "random": "initializers.random",
    "gaussian": "initializers.gaussian",
    "file": "initializers.file",
    "i2l": "initializers.i2l",
}


class UnknownInitializer(ValueError):
    """Neither the name of an initializer nor the path of a LoRA."""


def names() -> tuple[str, ...]:
    return tuple(_MODULES)


def resolve(method: str) -> tuple[str, dict[str, Any]]:
    """A name, or a path of an existing file or folder, as the name and what its table `[init.<name>]` then says."""
    if method in _MODULES:
        return method, {}
    if Path(method).expanduser().exists():
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
    """What can be told of `config` before any model loads, the existence of files included. Empty if all is well."""
    module = _module(method)
    if hasattr(module, "check"):
        return list(module.check(config))
    return list(config.problems()) if hasattr(config, "problems") else []


def needs(method: str, config: Any, base: str) -> "list[Need]":
    """The files of models that the method loads, those of `base` included."""
    module = _module(method)
    return list(module.needs(config, base)) if hasattr(module, "needs") else []


def identity(method: str, config: Any) -> list[str]:
    """Hashes of the files that a method reads, as far as they are on this machine; the time they take is short."""
    module = _module(method)
    return list(module.identity(config)) if hasattr(module, "identity") else []


def embed(method: str, config: Any, pictures: "Sequence[Image]", device: "torch.device") -> dict[str, "Tensor"]:
    """Embeddings of pictures by the encoders of an initializer that has any: name -> N D."""
    module = _module(method)
    return dict(module.embed(pictures, config, device)) if hasattr(module, "embed") else {}


def get(method: str) -> "Initializer":
    return _module(method).initialize


def _module(method: str) -> ModuleType:
    return import_module(_MODULES[resolve(method)[0]])
