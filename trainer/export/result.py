"""The result of a run: the adapter for PEFT and diffusers, in further layouts if asked for, with a model card."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from diffusers import QwenImageTransformer2DModel
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from trainer import adapter, validation
from trainer.adapter import AdapterConfig, AdapterWeights
from trainer.config import first_few
from trainer.files import DTYPES, new_folder, write_json, write_tensors, write_text
from trainer.flow import generator
from trainer.formats.layouts import LAYOUTS
from trainer.formats.lora import interface_metadata, peft_description, plain, write_lora, write_parts
from trainer.formats.origin import DIFFUSERS_FILE, ORIGIN, PEFT_CONFIG, PEFT_FILE
from trainer.hub.sources import plain_id, repository
from trainer.lowrank import concatenate, energy, energy_kept, ordered, rank, truncate

log = logging.getLogger("trainer")

METHOD_LAYOUTS = ("diffusion_model", "kohya")
"""In which programs read a LoHa or LoKr."""
CARD = Path(__file__).with_name("model_card.md.jinja")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`[export]`"""

    layouts: tuple[str, ...] = ()
    """More layouts to write the LoRA in, besides those for PEFT and diffusers: "diffusion_model" (for ComfyUI and
    ai-toolkit), "kohya" (musubi-tuner, OneTrainer), "transformer", "bare", "bare.default". A LoHa or LoKr is written as
    LyCORIS names its parts, in the first two alone."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The precision of the files in those layouts."""
    rank: int | None = None
    """Truncate the saved LoRA to this rank. The log says how much of its energy is kept. By default the rank stays. A
    LoHa or LoKr stays whole, and a LoRA of this rank is written beside it, for diffusers, which cannot read it."""
    push_to_hub: str = ""
    """A Hugging Face repository, such as "me/my-character", to which the finished LoRA is uploaded. If there is none, a
    private one is made. By default nothing leaves this machine."""

    def problems(self) -> list[str]:
        known = [name for name in LAYOUTS if name != "peft"]  # which is always there
        found = [f'layouts: "{name}" is not one of {", ".join(known)}' for name in self.layouts if name not in known]
        if self.rank is not None and self.rank < 1:
            found.append(f"rank must be at least 1, not {self.rank}")
        if self.push_to_hub and self.push_to_hub.count("/") != 1:
            found.append(f'push_to_hub: "{self.push_to_hub}" is not a repository (owner/name)')
        return found


def export(
    transformer: QwenImageTransformer2DModel,
    folder: Path,
    config: ExportConfig,
    settings: AdapterConfig,
    frozen: AdapterWeights | None,
    report: Mapping[str, Any],
) -> None:
    """Write the adapter, with a frozen LoRA concatenated on rank, into `folder`, whole or not at all.

    `PeftModel.from_pretrained` reads adapter_config.json and adapter_model.safetensors. diffusers' `load_lora_weights`
    would find no key of its own in that file, warn and load nothing; given the folder, it takes
    pytorch_lora_weights.safetensors first, where the scale is already in b, so that it needs no alpha. `report` is the
    run's own: what it says of the start goes into the files' metadata, and into the model card README.md.
    """
    base = plain_id(report["config"]["model"]["base"])
    share = (report["init"]["applied"]["energy_kept"] or {}).get("total")
    pictures = [entry["sha256"] for entry in report["data"]["train"]]
    metadata = origin(base, report["init"], share, pictures, report["steps"])
    name = Path(report["config"]["output"]).name
    if bad := [key for key, tensor in adapter.tensors(transformer).items() if not bool(tensor.isfinite().all())]:
        raise adapter.AdapterError(
            f"NaN or infinity in {first_few(bad)}: nothing was exported. Run again with a lower learning rate, or "
            f"delete the newest folder in {folder.parent / 'checkpoints'} and continue with --resume"
        )
    saved = _saved(transformer, config, settings, frozen, base)
    with new_folder(folder) as partial:
        named = {f"base_model.model.{key}": tensor for key, tensor in saved.peft.items()}
        write_tensors(partial / PEFT_FILE, named, {"format": "pt", **metadata})
        if saved.diffusers:
            named = {f"transformer.{key}": tensor for key, tensor in saved.diffusers.items()}
            write_tensors(partial / DIFFUSERS_FILE, named, {"format": "pt", **metadata})
        write_json(partial / PEFT_CONFIG, saved.description)
        for layout in config.layouts:
            file, form = partial / f"{name}-{layout}.safetensors", DTYPES[config.dtype]
            shown = {**metadata, **_shown(layout, name, saved, settings, report["config"]["data"]["trigger"])}
            if saved.parts:
                write_parts(file, saved.parts, adapter.scales(transformer), shown, form, layout=layout)
            else:
                assert saved.weights is not None
                write_lora(file, _ordered(saved.weights), shown, form, layout=layout)
        samples = _samples(Path(report["config"]["output"]), report["steps"], partial)
        write_text(partial / "README.md", model_card(report, samples, config.layouts, name))


@dataclass(frozen=True)
class _Saved:
    """What is written, and how PEFT describes it; keys are without the prefixes of PEFT and diffusers."""

    peft: Mapping[str, Tensor]
    description: Mapping[str, Any]
    diffusers: Mapping[str, Tensor]
    weights: AdapterWeights | None = None
    """What further layouts hold."""
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """The same of a LoHa or LoKr."""


def _saved(
    transformer: QwenImageTransformer2DModel,
    config: ExportConfig,
    settings: AdapterConfig,
    frozen: AdapterWeights | None,
    base: str,
) -> _Saved:
    if settings.kind == "lora" and (frozen is not None or config.rank is not None):
        whole = _truncated(_whole(transformer, frozen), config.rank)
        return _Saved(_halves(whole), peft_description(whole, base), _halves(whole), whole)
    own = {"base_model_name_or_path": base, "inference_mode": True, "target_modules": sorted(settings.module_types)}
    description = plain({**adapter.peft_config(settings).to_dict(), **own})
    if settings.kind == "lora":
        peft, diffusers = _as_it_is(transformer, settings)
        return _Saved(peft, description, diffusers, _whole(transformer, None) if config.layouts else None)
    assert frozen is None
    parts = adapter.parts(transformer)
    peft = {f"{module}.{part}": tensor for module, found in parts.items() for part, tensor in found.items()}
    halves = {} if config.rank is None else _halves(_as_lora(transformer, config.rank, adapter.KINDS[settings.kind]))
    return _Saved(peft, description, halves, parts=parts)


def _halves(weights: AdapterWeights) -> dict[str, Tensor]:
    return {
        f"{module}.lora_{half}.weight": tensor
        for module, factors in weights.factors.items()
        for half, tensor in zip("AB", factors, strict=True)
    }


def _as_lora(transformer: QwenImageTransformer2DModel, limit: int, kind: str) -> AdapterWeights:
    """A LoHa or LoKr, truncated to the rank."""
    found = adapter.read(transformer, limit=limit)
    kept = found.kept()["total"]
    log.info("the LoRA of rank %d beside the %s keeps %.2f %% of its energy", limit, kind, 100 * kept)
    return AdapterWeights({name: factors for name, factors in found.factors.items() if len(factors.a)})


def _shown(layout: str, name: str, saved: _Saved, settings: AdapterConfig, trigger: str) -> dict[str, str]:
    """What interfaces show of a file."""
    if saved.weights is not None:
        ranks = {len(factors.a) for factors in saved.weights.factors.values()}
        return interface_metadata(layout, name, ranks, trigger=trigger)
    ranks = {settings.rank_of(module) for module in saved.parts}
    found = interface_metadata(layout, name, ranks, alpha=settings.alpha, trigger=trigger)
    if "ss_network_module" in found:
        found |= {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": settings.kind})}
    return found


def _whole(transformer: QwenImageTransformer2DModel, frozen: AdapterWeights | None) -> AdapterWeights:
    parts = [weights.factors for weights in (frozen, adapter.read(transformer)) if weights is not None]
    names = sorted({*chain(*parts)})
    return AdapterWeights({name: concatenate([part[name] for part in parts if name in part]) for name in names})


def _truncated(weights: AdapterWeights, limit: int | None) -> AdapterWeights:
    if limit is None:
        return weights
    short = {name: truncate(factors, limit) for name, factors in weights.factors.items()}
    energies = {name: energy(factors) for name, factors in weights.factors.items()}
    kept = energy_kept({name: share for name, (_, share) in short.items()}, energies)["total"]
    log.info("exported at rank %d: truncation kept %.2f %% of the energy", limit, 100 * kept)
    return AdapterWeights({name: factors for name, (factors, _) in short.items() if len(factors.a)})


def _ordered(weights: AdapterWeights) -> AdapterWeights:
    return AdapterWeights(
        {name: ordered(x, rank(x), generator("export", name))[0] for name, x in weights.factors.items()}
    )


def _as_it_is(transformer: QwenImageTransformer2DModel, settings: AdapterConfig) -> tuple[dict[str, Tensor], ...]:
    """PEFT's tensors, and diffusers', by module and half: with DoRA there are magnitudes among them."""
    peft, diffusers = {}, {}
    scales = adapter.scales(transformer)
    for name, tensor in adapter.tensors(transformer).items():
        # `x.lora_A.default.weight` -> `x.lora_A.weight`; there is no ".weight" after the magnitude
        module, _, part = name.rpartition(".lora_")
        half = part.split(".")[0]
        key = f"{module}.lora_magnitude_vector" if half == "magnitude_vector" else f"{module}.lora_{half}.weight"
        peft[key] = tensor
        diffusers[key] = tensor * scales[module] if half == "B" else tensor
    return peft, diffusers


def origin(
    base: str, init: Mapping[str, Any], energy_kept: float | None, pictures: Sequence[str], steps: int
) -> dict[str, str]:
    """Where a LoRA comes from, as metadata of its files: one key, `warm_start`, with JSON in it.

    init: the initializer's report; pictures: their SHA-256.
    """
    found = {
        "base_model": base,
        "initializer": init["method"],
        "experts": [expert["expert"] for expert in init.get("experts", [])],
        "strength": init.get("strength"),
        "energy_kept": energy_kept,
        "pictures": list(pictures),
        "steps": steps,
    }
    return {ORIGIN: json.dumps(found)}


def _samples(output: Path, step: int, folder: Path) -> list[tuple[str, str]]:
    """Copy a run's samples of that step, or of the last one before it, into `folder`; prompt and name of each."""
    steps, rows = validation.sample_files(output / "samples"), validation.sample_rows(output / "samples")
    found, drawn = [], [one for one in steps if one <= step]
    for file in steps[max(drawn)] if drawn else []:
        (folder / "samples").mkdir(exist_ok=True)
        shutil.copyfile(file, folder / "samples" / file.name)
        found.append((rows[int(file.stem.split("-")[2])][0], f"samples/{file.name}"))
    return found


def model_card(report: Mapping[str, Any], samples: list[tuple[str, str]], layouts: tuple[str, ...], name: str) -> str:
    """README.md for Hugging Face: YAML with what the Hub reads, then how the LoRA was made and how to load it."""
    config = report["config"]
    base, trigger = config["model"]["base"], config["data"]["trigger"]
    base, is_id = plain_id(base), repository(base) is not None
    kind = config["adapter"].get("kind", "lora")
    data = ModelCardData(
        base_model=base if is_id else None,
        library_name="diffusers" if kind == "lora" else "peft",
        pipeline_tag="text-to-image",
        tags=[kind, "qwen-image", "text-to-image", "diffusers" if kind == "lora" else "peft"],
        instance_prompt=trigger or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD.read_text(encoding="utf-8"),
        name=name,
        kind=adapter.KINDS[kind],
        lora_rank=config.get("export", {}).get("rank"),
        base=base,
        trigger=trigger,
        config=config,
        init=report["init"],
        pictures=len(report["data"]["train"]),
        steps=report["steps"],
        validations=report.get("validations", []),
        samples=samples,
        files=[f"{name}-{layout}.safetensors" for layout in layouts],
    )
    return str(card)


def push(folder: Path, repository: str) -> str:
    """Upload the folder to Hugging Face, into a private repository if it is new; its address. OSError if that fails."""
    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="LoRA with its model card")
    except (HfHubHTTPError, OSError) as error:
        raise OSError(
            f"the upload to {repository} failed ({error}). The LoRA is whole in {folder}; "
            f"log in with `hf auth login`, then upload it with `hf upload {repository} {folder}`"
        ) from error
    return address
