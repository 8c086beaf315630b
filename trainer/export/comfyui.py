"""A LoRA for ComfyUI, with the settings of its workflow in plain text; and a run's result as a folder for the Hub."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.export.request import output_problems
from trainer.files import DTYPES, new_folder, read_json, write_text
from trainer.folder import RUN_FILE
from trainer.formats.lora import FormatError, LoraFile, interface_metadata, open_lora, write_lora
from trainer.formats.origin import TRIGGER, read_origin, without_stale
from trainer.qwen_image import EMPTY_PROMPT, PROMPT_LIMIT, is_2512

LAYOUT = "diffusion_model"
SETTINGS_FILE = "comfyui.txt"
STEPS, CFG = 50, 4.0
"""The published example's: https://huggingface.co/Qwen/Qwen-Image"""
SHIFT, SAMPLER, SCHEDULER = 3.1, "euler", "simple"
"""ComfyUI's own workflow for Qwen-Image has these: Comfy-Org/workflow_templates, templates/image_qwen_image.json. Its
first version had a shift of 3.5."""
SIZE = 1328
"""The published example's square."""


@dataclass(frozen=True)
class Delivery:
    """What is delivered: a LoRA, and what is known of how it was trained."""

    file: LoraFile
    name: str
    ready: Path | None = None
    """The same in ComfyUI's layout, where the run has written it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration, from run.json; empty if there is no run around the file."""

    @property
    def base(self) -> str:
        """The model it was trained on; "" if that is not known."""
        if self.config:
            return str(self.config["model"]["base"])
        return str(read_origin(self.file.metadata).get("base_model") or "")

    @property
    def trigger(self) -> str:
        return str(self.config["data"]["trigger"] if self.config else self.file.metadata.get(TRIGGER, ""))


def find(path: Path, output: Path, *, with_card: bool = False) -> Delivery:
    """From a LoRA file, a run's folder, or a folder with a result in it. ConfigError lists all that is wrong.

    with_card: only a folder with a model card will do.
    """
    problems = output_problems(output)
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if (path / RUN_FILE).is_file() and folder == path:
        problems.append(f"{path}: this run has no result yet: there is no folder adapter in it")
    elif with_card and not (folder.is_dir() and (folder / "README.md").is_file()):
        problems.append(f"{path}: no model card README.md is there: give the folder of a finished run")
    try:
        file = open_lora(folder)
    except FormatError as error:
        raise ConfigError([*problems, str(error)]) from error
    config = read_json(folder.parent / RUN_FILE)["config"] if (folder.parent / RUN_FILE).is_file() else {}
    name = Path(config["output"]).name if config else path.stem
    ready = folder / f"{name}-{LAYOUT}.safetensors"
    found = Delivery(file, name, ready if ready.is_file() else None, config)
    if file.method != "LoRA" and found.ready is None:
        problems.append(
            f"{file.path} is a {file.method}: the run itself writes it for ComfyUI, with [export] layouts = "
            f'["{LAYOUT}"]; or `python -m trainer.formats convert --layout {LAYOUT} --rank N` makes a LoRA of it'
        )
    if names := file.not_finite():
        problems.append(f"{file.path}: NaN or infinity in {len(names)} modules, such as {names[0]}")
    if problems:
        raise ConfigError(problems)
    return found


def write_comfyui(found: Delivery, output: Path, dtype: str) -> None:
    """Write the LoRA and its settings into a new folder, whole or not at all. FormatError if `dtype` cannot hold it."""
    with new_folder(output) as partial:
        _fill(found, partial, dtype)


def write_hub(found: Delivery, output: Path, dtype: str) -> None:
    """A folder for the Hub, whole or not at all: all that is in the result's folder, with its model card and samples,
    and what `write_comfyui` writes. `found`: with a model card."""
    folder = found.file.path.parent
    with new_folder(output) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        name = _fill(found, partial, dtype)
        card = (partial / "README.md").read_text(encoding="utf-8").rstrip()
        about = f"`{name}` is for ComfyUI. The settings of its workflow are in `{SETTINGS_FILE}`."
        write_text(partial / "README.md", f"{card}\n\n## ComfyUI\n\n{about}\n")


def _fill(found: Delivery, folder: Path, dtype: str) -> str:
    """Write both files; the name of the LoRA's."""
    name = f"{found.name}-{LAYOUT}.safetensors"
    if found.ready is not None:
        if not (folder / name).is_file():
            shutil.copyfile(found.ready, folder / name)
    else:
        weights, metadata = found.file.read()
        ranks = {len(factors.a) for factors in weights.factors.values()}
        shown = interface_metadata(LAYOUT, found.name, ranks, trigger=found.trigger)
        write_lora(folder / name, weights, {**without_stale(metadata), **shown}, DTYPES[dtype], layout=LAYOUT)
    write_text(folder / SETTINGS_FILE, settings(found, name))
    return name


def settings(found: Delivery, name: str) -> str:
    """The text beside the LoRA: where files go, and each setting with where it comes from."""
    model = "qwen_image_2512" if found.base and is_2512(found.base) else "qwen_image"
    base = f"It was trained on {found.base}." if found.base else "On which model it was trained is not known."
    files = [
        ("models/loras", name),
        ("models/diffusion_models", f"{model}_bf16.safetensors, or {model}_fp8_e4m3fn.safetensors"),
        ("models/text_encoders", "qwen_2.5_vl_7b.safetensors, or qwen_2.5_vl_7b_fp8_scaled.safetensors"),
        ("models/vae", "qwen_image_vae.safetensors"),
    ]
    rows = [f"{what:<16}{value:<12}{source}" for what, value, source in _rows(found)]
    lines = [
        f"{found.name} in ComfyUI",
        "",
        base,
        "",
        "Files, in ComfyUI's folder (but for the LoRA from https://huggingface.co/Comfy-Org/Qwen-Image_ComfyUI):",
        *(f"  {folder:<26}{file}" for folder, file in files),
        "",
        "Nodes:",
        "  Load Diffusion Model -> LoraLoaderModelOnly -> ModelSamplingAuraFlow -> KSampler -> VAE Decode",
        '  Load CLIP (type "qwen_image") -> two CLIP Text Encode, for the prompt and the negative prompt -> KSampler',
        "  EmptySD3LatentImage -> KSampler",
        "",
        "Settings, and where each comes from:",
        *(f"  {row}".rstrip() for row in rows),
        "",
        f"Prompts: the first {PROMPT_LIMIT} tokens were read in training; keep them shorter than that.",
    ]
    return "\n".join(lines) + "\n"


def _rows(found: Delivery) -> list[tuple[str, str, str]]:
    """Setting, value, and where it comes from."""
    drawn = found.config.get("validation", {})
    own = [("steps", "num_inference_steps", STEPS), ("cfg", "true_cfg_scale", CFG)]
    of_comfyui, published = "ComfyUI's workflow for Qwen-Image", "published example of Qwen-Image"
    rows = [("strength_model", "1", "at which it was trained")]
    for name, key, usual in own:
        if key in drawn and drawn[key] != usual:
            also = f"[validation] {key} of the run, with which its samples were drawn ({published}: {usual:g})"
            rows.append((name, f"{drawn[key]:g}", also))
        else:
            rows.append((name, f"{usual:g}", published))
    rows += [
        ("shift", f"{SHIFT:g}", of_comfyui),
        ("sampler_name", SAMPLER, of_comfyui),
        ("scheduler", SCHEDULER, of_comfyui),
        ("denoise", "1", "a picture from noise"),
    ]
    given = found.config.get("data", {}).get("resolution")
    side = max(given) if isinstance(given, list) else given
    where = "[data] resolution of the run: other shapes of about as many pixels do as well"
    rows.append(("width, height", f"{side or SIZE}", where if side else published))
    trigger = found.trigger
    rows.append(("trigger word", trigger or "none", "[data] trigger" if trigger else "none is known"))
    rows.append(("negative", json.dumps(EMPTY_PROMPT), "a space, as the published example and this program have it"))
    return rows
