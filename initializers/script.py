"""`warm_start`: one line in a PEFT or diffusers script that starts the script's LoRA from pictures."""

import difflib
import logging
import tempfile
from collections.abc import Sequence, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn

import initializers
from trainer import adapter, config
from trainer.adapter import NAME, AdapterConfig, InitContext, Seed
from trainer.data.pictures import SUFFIXES, DataError, pictures_in, upright
from trainer.formats.origin import BASE_CHANGING
from trainer.hub import sources

log = logging.getLogger("trainer")

Images = str | Path | Sequence[str | Path] | Sequence[Image.Image]


@dataclass(frozen=True, kw_only=True)
class WarmStartOptions:
    """Options of `warm_start` that do not depend on the initializer. None: not given."""

    rank: int | None = None
    """Rank of the LoRA that is added where the model has no adapter. Default: 16."""
    alpha: float | None = None
    """Alpha of the LoRA that is added. Default: its rank."""
    target_modules: str | tuple[str, ...] | None = None
    """Modules that get the LoRA that is added, as `[adapter] target_modules`; default: "i2l" (12 types)."""
    base: str | None = None
    """Folder or id of the pipeline. Needed if the transformer does not know where it was loaded from."""
    seed: int = 0
    """Seed of the random values in modules that the initializer does not cover."""
    cache: str | None = None
    """Folder in which predictions are kept, so that the next start need not compute them again. Default: not kept."""


@dataclass(frozen=True)
class _Adapter:
    """The adapter that gets the seed."""

    name: str
    settings: AdapterConfig
    """How it is made, if the model does not have it yet."""
    present: bool


def warm_start(
    transformer: Any,
    images: Images | None = None,
    *,
    init: str = "i2l",
    adapter_name: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Start the adapter of a script from pictures: one line, before the optimizer is made.

        transformer.add_adapter(lora_config)
        report = warm_start(transformer, "pictures/", strength=0.8)

    transformer: a `QwenImageTransformer2DModel`, quantised or not, or a `PeftModel` of one. Its adapter is seeded: LoRA
    with any rank, alpha, pattern, rslora or DoRA; LoHa; LoKr. If it has none, a LoRA is added.
    images: a folder, paths, or PIL images. Give only training pictures.
    init: the name of an initializer, or a LoRA file to start from.
    adapter_name: which adapter, if the model has several; or the name of the one that is added.
    options: the fields of `WarmStartOptions` (rank, alpha and target_modules of a LoRA that is added; base, seed,
    cache), and all keys of the initializer's table in a configuration, `[init.i2l]` for i2L.

    Returns a report: what the initializer did, which modules are seeded, random or dropped, the energy kept, and the
    largest error found when the seed was verified. An adapter in half precision is raised to fp32, which a seed needs.
    ConfigError lists everything that is wrong with the arguments; AdapterError if the seed does not fit the adapter.
    """
    model: nn.Module = transformer.get_base_model() if isinstance(transformer, PeftModel) else transformer
    method, preset = initializers.resolve(init)
    problems: list[str] = []
    chosen, own = _parse(method, {**preset, **options}, problems)
    target = _choose_adapter(model, adapter_name, chosen, problems)
    if own is not None:
        problems += initializers.check(method, own)
        problems += _training_only(own, target)
    with tempfile.TemporaryDirectory() as folder:
        pictures = _picture_paths(images, Path(folder), problems)
        if method == "i2l" and images is None:
            problems.append("images: i2l needs pictures: a folder, paths, or PIL images")
        if problems:
            raise config.ConfigError(problems)
        context = _context(model, target, chosen, pictures)
        for note in initializers.notes(method, own):
            log.warning("warm start: %s", note)
        sources.fetch(initializers.needs(method, own, context.base))
        seed = initializers.get(method)(context, own)
    return {"init": seed.report, **_apply(model, seed, target, chosen.seed)}


def _parse(method: str, given: dict[str, Any], problems: list[str]) -> tuple[WarmStartOptions, Any]:
    """The options, and the initializer's table, parsed as strictly as a configuration file.

    If there are problems, the first have their defaults and the second is None. A name that both have is the option of
    `warm_start`.
    """
    general = {field.name for field in fields(WarmStartOptions)}
    cls = initializers.config_class(method)
    known = {*general, *(field.name for field in fields(cls))}
    for key in [*given]:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            problems.append(f"{key}: unknown option of warm_start with init = {method}; {advice}")
            del given[key]
    table = {key: _plain(value) for key, value in given.items()}
    mine = {key: value for key, value in table.items() if key in general and value is not None}
    chosen = config.parse(WarmStartOptions, mine, "", problems)
    rest = {key: value for key, value in table.items() if key not in general}
    return chosen or WarmStartOptions(), config.parse(cls, rest, f"init.{method}", problems)


def _plain(value: Any) -> Any:
    """The value as a configuration file would hold it: lists for sets and tuples, text for paths, Python's numbers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Set | Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return config.to_dict(value)


def _choose_adapter(model: nn.Module, wanted: str | None, options: WarmStartOptions, problems: list[str]) -> _Adapter:
    """The adapter to seed; what is wrong with it, or with the options for it, is added to `problems`."""
    present = _adapters(model)
    name = wanted or (next(iter(present)) if len(present) == 1 else NAME)
    if len(present) > 1 and wanted is None:
        problems.append(f"adapter_name: the model has several adapters ({', '.join(present)}): name one")
    elif wanted is not None and present and name not in present:
        problems.append(f"adapter_name: the model has no adapter {name}, only {', '.join(present)}")
    settings = AdapterConfig(
        rank=16 if options.rank is None else options.rank,
        alpha=options.alpha,
        target_modules="i2l" if options.target_modules is None else options.target_modules,
    )
    if not present:
        problems += settings.problems()
        return _Adapter(name, settings, present=False)
    for key in ("rank", "alpha", "target_modules"):
        if getattr(options, key) is not None:
            problems.append(f"{key} has no effect: the model has an adapter already")
    problems += _unfit(model, name, present.get(name, set()))
    return _Adapter(name, settings, present=True)


def _training_only(own: Any, target: _Adapter) -> list[str]:
    """Problems of keys of the initializer that only a training run can use."""
    found = []
    if getattr(own, "strength", 1.0) == "auto":
        found.append('strength = "auto" compares losses on the base, as train.py does; here give a number')
    if getattr(own, "mode", "seed") == "merge":
        found.append('mode = "merge" needs the prediction attached beside the adapter, as train.py does; use "seed"')
    if getattr(own, "energy", None) is not None and target.present:
        found.append("energy chooses the rank, and the model's adapter has one already")
    return found


def _context(model: nn.Module, target: _Adapter, options: WarmStartOptions, pictures: tuple[Path, ...]) -> InitContext:
    """What the initializer may know of the model and the pictures. AdapterError if a target module does not exist."""
    ranks = _ranks(model, target.name) if target.present else target.settings.rank_pattern
    return InitContext(
        images=pictures,
        modules=_sizes(model, target.name) if target.present else adapter.target_modules(model, target.settings),
        rank=max(ranks.values()) if target.present else target.settings.rank,
        rank_pattern=ranks,
        seed=options.seed,
        device=next(model.parameters()).device,
        base=options.base or str(getattr(model.config, "_name_or_path", "") or "Qwen/Qwen-Image"),
        log=log.info,
        cache=Path(options.cache) if options.cache else None,
    )


def _apply(model: nn.Module, seed: Seed, target: _Adapter, random_seed: int) -> dict[str, Any]:
    """Add the adapter if it is not there, write the seed into it, and verify that. Returns a report."""
    if not target.present:
        adapter.inject(model, adapter.settings_for(seed, target.settings), target.name)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = True  # PEFT's own value: the script may add other adapters
    raised = _raise_to_fp32(model, target.name)
    report = adapter.apply_seed(model, seed, random_seed=random_seed, adapter_name=target.name)
    return {**report, "raised_to_fp32": raised}


def _raise_to_fp32(model: nn.Module, name: str) -> int:
    """Bring the adapter's parameters to fp32: a seed would be rounded, and so would its steps. Returns how many."""
    raised = 0
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for part, parameter in layer.named_parameters():
                if f"{part}.".split(".")[1] == name and parameter.dtype != torch.float32:
                    raised += 1
                    parameter.data = parameter.data.float()
    if raised:
        log.info("warm start: the adapter was in half precision, and is in fp32 now: a seed would be rounded")
    return raised


def _adapters(model: nn.Module) -> dict[str, set[type]]:
    """Adapter name -> the kinds of its layers."""
    found: dict[str, set[type]] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            names = layer.lora_A if isinstance(layer, LoraLayer) else getattr(layer, "_available_adapters", ())
            for name in [*names] or ["default"]:
                found.setdefault(name, set()).add(type(layer))
    return found


def _unfit(model: nn.Module, name: str, kinds: set[type]) -> list[str]:
    """Problems of an adapter of these kinds of layers that cannot take a seed."""
    problems = []
    for kind in kinds:
        if not issubclass(kind, LoraLayer | LoHaLayer | LoKrLayer) or issubclass(kind, AdaLoraLayer):
            problems.append(f"{kind.__name__}: only LoRA, LoHa and LoKr can take a low-rank start")
    for _, layer in adapter.layers(model, name):
        if not isinstance(layer, LoraLayer) and not layer.get_base_layer().weight.is_floating_point():
            problems.append("LoHa and LoKr of PEFT do not work on a quantised base: take a LoRA")
            break
    found = getattr(model, "peft_config", {}).get(name)
    start = getattr(found, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
        problems.append(
            f'init_lora_weights = "{start}" has changed the base weights to fit its own start: take True or "gaussian"'
        )
    return problems


def _sizes(model: nn.Module, name: str) -> dict[str, tuple[int, int]]:
    """in_features and out_features of the layers that have this adapter."""
    bases = ((module, layer.get_base_layer()) for module, layer in adapter.layers(model, name))
    return {module: (base.in_features, base.out_features) for module, base in bases}


def _ranks(model: nn.Module, name: str) -> dict[str, int]:
    """The rank of each layer that has this adapter."""
    return {module: layer.r[name] for module, layer in adapter.layers(model, name)}


def _picture_paths(images: Images | None, folder: Path, problems: list[str]) -> tuple[Path, ...]:
    """Paths of pictures; PIL images are written into `folder` first, as `open_picture` would see their files."""
    if images is None:
        return ()
    if isinstance(images, str | Path):
        path = Path(images)
        if path.is_dir():
            found = pictures_in(path)
            if not found:
                problems.append(f"images: no picture in {path} ({', '.join(sorted(SUFFIXES))})")
            return tuple(found)
        images = [path]
    paths = []
    for number, image in enumerate(images):
        if isinstance(image, Image.Image):
            path = folder / f"{number:05d}.png"
            try:
                upright(image, f"images: picture {number + 1}").save(path)
            except DataError as error:
                problems += error.problems
            paths.append(path)
        elif not Path(image).is_file():
            problems.append(f"images: there is no file {image}")
        else:
            paths.append(Path(image))
    return tuple(paths)
