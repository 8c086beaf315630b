"""`warm_start`: one line in a PEFT or diffusers script."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn

from initializers import registry
from trainer import adapter, config, lycoris
from trainer.adapter import NAME, AdapterConfig, InitContext, Seed
from trainer.data.pictures import SUFFIXES, pictures_in
from trainer.formats.lora import BASE_CHANGING
from trainer.hub import sources

log = logging.getLogger("trainer")

Images = str | Path | Sequence[str | Path] | Sequence[Image.Image]


def warm_start(
    transformer: Any,
    images: Images | None = None,
    *,
    init: str = "i2l",
    rank: int | None = None,
    alpha: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    adapter_name: str | None = None,
    base: str | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Start the adapter of a script from pictures: one line, before the optimizer is made.

        transformer.add_adapter(lora_config)
        report = warm_start(transformer, "pictures/", strength=0.8)

    transformer: a `QwenImageTransformer2DModel`, quantised or not, or a `PeftModel` of one. If it has an adapter (LoRA
    with any rank, alpha, pattern, rslora or DoRA; LoHa; LoKr), that one is seeded; else a LoRA is added, at `rank`
    (16), `alpha` (the rank) and `target_modules` (the 12 types that i2L covers). images: a folder, paths, or PIL
    images; only training pictures. init: an initializer's name, or a LoRA file; `options` are the keys of its table,
    `[init.i2l]` for i2L. base: folder or id of the pipeline, if the transformer does not know it. cache: a folder for
    predictions.

    Returns a report: what the initializer did, which modules are seeded, random or dropped, the energy kept, and the
    proof. A LoRA in half precision is raised to fp32, since a seed would be rounded. ConfigError lists all that is
    wrong with the arguments; AdapterError if the seed cannot be in this adapter.
    """
    model: nn.Module = transformer.get_base_model() if isinstance(transformer, PeftModel) else transformer
    method, preset = registry.resolve(init)
    own = _options(method, {**preset, **options})
    present = _adapters(model)
    problems = [*registry.check(method, own)]
    name = adapter_name or (next(iter(present)) if len(present) == 1 else NAME)
    if len(present) > 1 and adapter_name is None:
        problems.append(f"adapter_name: the model has several adapters ({', '.join(present)}): name one")
    elif adapter_name is not None and present and name not in present:
        problems.append(f"adapter_name: the model has no adapter {name}, only {', '.join(present)}")
    if present:
        given = {"rank": rank, "alpha": alpha, "target_modules": target_modules}
        idle = [key for key, value in given.items() if value is not None]
        problems += [f"{key} has no effect: the model has an adapter already" for key in idle]
        problems += _unfit(model, name, present.get(name, set()))
    if getattr(own, "strength", 1.0) == "auto":
        problems.append('strength = "auto" needs the base and captions, as in train.py; give a number')
    if getattr(own, "mode", "seed") == "merge":
        problems.append('mode = "merge" holds the prediction beside the adapter, which a script knows nothing of')
    if getattr(own, "energy", None) is not None and present:
        problems.append("energy chooses the rank, and the model's adapter has one already")
    with tempfile.TemporaryDirectory() as folder:
        pictures = _pictures(images, Path(folder), problems)
        if method == "i2l" and not pictures and images is None:
            problems.append("images: i2l needs pictures: a folder, paths, or PIL images")
        if problems:
            raise config.ConfigError(problems)
        targets = "i2l" if target_modules is None else target_modules
        targets = targets if isinstance(targets, str) else tuple(targets)
        settings = AdapterConfig(rank=16 if rank is None else rank, alpha=alpha, target_modules=targets)
        if found := [] if present else settings.problems():
            raise config.ConfigError(found)
        modules = _sizes(model, name) if present else adapter.target_modules(model, settings)
        context = InitContext(
            images=pictures,
            modules=modules,
            rank=_rank(model, name) if present else settings.rank,
            seed=seed,
            device=next(model.parameters()).device,
            base=base or str(getattr(model.config, "_name_or_path", "") or "Qwen/Qwen-Image"),
            log=log.info,
            cache=Path(cache) if cache else None,
        )
        sources.fetch(registry.needs(method, own, context.base))
        result = registry.get(method)(context, own)
    return {"init": result.report, **_apply(model, result, settings, name, bool(present), seed)}


def _apply(
    model: nn.Module, seed: Seed, settings: AdapterConfig, name: str, present: bool, random_seed: int
) -> dict[str, Any]:
    if not present:
        adapter.inject(model, adapter.settings_for(seed, settings), name)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = True  # as PEFT has it: the script may put other adapters beside this
    raised = 0
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for part, parameter in layer.named_parameters():
                if f"{part}.".split(".")[1] == name and parameter.dtype != torch.float32:
                    raised += 1
                    parameter.data = parameter.data.float()  # a seed would be rounded, and so would its steps
    if raised:
        log.info("warm start: the adapter was in half precision, and is in fp32 now: a seed would be rounded")
    if any(True for _ in lycoris.layers(model, name)):
        report = lycoris.apply_seed(model, seed.weights, random_seed=random_seed, adapter_name=name)
        return {**report, "raised_to_fp32": raised}
    report = adapter.apply_seed(model, seed, random_seed=random_seed, adapter_name=name)
    return {"adapter": "LoRA", **report, "raised_to_fp32": raised}


def _options(method: str, given: dict[str, Any]) -> Any:
    """The initializer's own settings, as strict as in a configuration file."""
    problems: list[str] = []
    own = config.parse(registry.config_class(method), config.to_dict(given), f"init.{method}", problems)
    if problems:
        raise config.ConfigError(problems)
    return own


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
    problems = []
    for kind in kinds:
        if not issubclass(kind, LoraLayer | LoHaLayer | LoKrLayer) or issubclass(kind, AdaLoraLayer):
            problems.append(f"{kind.__name__}: only LoRA, LoHa and LoKr can take a low-rank start")
    for _, layer in lycoris.layers(model, name):
        if not layer.get_base_layer().weight.is_floating_point():
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
    found = {}
    for module, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            found[module] = (layer.lora_A[name].weight.shape[1], layer.lora_B[name].weight.shape[0])
    for module, layer in lycoris.layers(model, name):
        base = layer.get_base_layer()
        found[module] = (base.in_features, base.out_features)
    return found


def _rank(model: nn.Module, name: str) -> int:
    return max(layer.r[name] for layer in model.modules() if isinstance(layer, BaseTunerLayer) and name in layer.r)


def _pictures(images: Images | None, folder: Path, problems: list[str]) -> tuple[Path, ...]:
    """Paths of pictures; PIL images are written into `folder` first."""
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
            paths.append(folder / f"{number:05d}.png")
            image.convert("RGB").save(paths[-1])
        elif not Path(image).is_file():
            problems.append(f"images: there is no file {image}")
        else:
            paths.append(Path(image))
    return tuple(paths)
