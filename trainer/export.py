"""The result of a run: the LoRA for PEFT and diffusers, in further layouts if asked for, with a model card."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from trainer.formats.lora import interface_metadata, peft_description, plain, write_lora
from trainer.formats.origin import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE
from trainer.hub.sources import plain_id, repository
from trainer.lowrank import concatenate, energy, energy_kept, ordered, rank, truncate

log = logging.getLogger("trainer")

CARD = Path(__file__).with_name("model_card.md.jinja")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`[export]`"""

    layouts: tuple[str, ...] = ()
    """More layouts to write the LoRA in, besides those for PEFT and diffusers: "diffusion_model" (for ComfyUI and
    ai-toolkit), "kohya" (musubi-tuner, OneTrainer), "transformer", "bare", "bare.default"."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The precision of the files in those layouts."""
    rank: int | None = None
    """Truncate the saved LoRA to this rank. The log says how much of its energy is kept. By default the rank stays."""
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
    whole = None
    if frozen is not None or config.rank is not None:
        whole = _truncated(_whole(transformer, frozen), config.rank)
        description = peft_description(whole, base)
        halves = {
            f"{module}.lora_{half}.weight": tensor
            for module, factors in whole.factors.items()
            for half, tensor in zip("AB", factors, strict=True)
        }
        peft, diffusers = halves, halves
    else:
        own = {"base_model_name_or_path": base, "inference_mode": True, "target_modules": sorted(settings.module_types)}
        description = plain({**adapter.peft_config(settings).to_dict(), **own})
        peft, diffusers = _as_it_is(transformer, settings)
    if bad := [key for key, tensor in (peft | diffusers).items() if not bool(tensor.isfinite().all())]:
        raise adapter.AdapterError(
            f"NaN or infinity in {first_few(bad)}: nothing was exported. Run again with a lower learning rate, or "
            f"delete the newest folder in {folder.parent / 'checkpoints'} and continue with --resume"
        )
    with new_folder(folder) as partial:
        named = {f"base_model.model.{key}": tensor for key, tensor in peft.items()}
        write_tensors(partial / PEFT_FILE, named, {"format": "pt", **metadata})
        named = {f"transformer.{key}": tensor for key, tensor in diffusers.items()}
        write_tensors(partial / DIFFUSERS_FILE, named, {"format": "pt", **metadata})
        write_json(partial / PEFT_CONFIG, description)
        for layout in config.layouts:
            weights = _ordered(_whole(transformer, None) if whole is None else whole)
            ranks = {len(factors.a) for factors in weights.factors.values()}
            shown = interface_metadata(layout, name, ranks, trigger=report["config"]["data"]["trigger"])
            entries = {**metadata, **shown}
            write_lora(partial / f"{name}-{layout}.safetensors", weights, entries, DTYPES[config.dtype], layout=layout)
        samples = _samples(Path(report["config"]["output"]), report["steps"], partial)
        write_text(partial / "README.md", model_card(report, samples, config.layouts, name))


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
    return {"warm_start": json.dumps(found)}


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
    data = ModelCardData(
        base_model=base if is_id else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "qwen-image", "text-to-image", "diffusers"],
        instance_prompt=trigger or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD.read_text(encoding="utf-8"),
        name=name,
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
            f"[export] push_to_hub: the upload to {repository} failed ({error}). The LoRA is whole in {folder}; "
            f"log in with `hf auth login`, then upload it with `hf upload {repository} {folder}`"
        ) from error
    return address
