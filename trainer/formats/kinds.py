"""What a file or folder is that is no plain LoRA of Qwen-Image's transformer, and what to do with it then."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.config import first_few
from trainer.formats.layouts import Sorted, module_name
from trainer.qwen_image import QWEN_IMAGE_21, family_member

DORA = "DoRA, whose magnitudes no low-rank change can express"
_METHODS = {
    r"lora_magnitude_vector|\.(?:dora_scale|magnitude)(?:\.|$)": DORA,
    r"\.lora_mid\.|\.(?:hada|lokr)_t[12](?:\.|$)": "a Tucker decomposition, as convolutions have it",
    r"\.boft_": "BOFT",
    r"\.oft_": "OFT or BOFT",
    r"\.glora_[A-E]|\.[ab][12]\.weight$": "GLoRA",
    r"\.ia3_l|\.on_input$": "(IA)^3",
    r"\.[wb]_norm$": "a file with trained norms",
    r"\.(?:diff|diff_b|set_weight)$": "a file of full-rank differences",
    r"\.lora_E(?:\.|$)": "AdaLoRA",
    r"\.lambda_layer$": "T-LoRA",
    r"\.p?vera_": "VeRA",
    r"\.fourierft_": "FourierFT",
    r"\.waveft_": "WaveFT",
    r"\.vblora_": "VB-LoRA",
    r"\.randlora_": "RandLoRA",
    r"\.c3a_": "C3A",
    r"\.(?:miss|bone)_": "MiSS (Bone)",
    r"\.hra_": "HRA",
    r"\.road_": "RoAd",
    r"\.shira_": "SHiRA",
    r"\.delora_": "DeLoRA",
    r"\.gralora_": "GraLoRA",
    r"\.tinylora_": "TinyLoRA",
    r"\.unilora_": "Uni-LoRA",
}
"""What is in some key, and the method that made the file."""
_READ = ("LORA", "LOHA", "LOKR")
"""`peft_type` of what is read."""
_EXTRACT = (
    "only LoRA, LoHa and LoKr are read: apply it to the base in the program that made it, extract a LoRA from the "
    "difference (python -m trainer.formats extract), and take that"
)

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
CHECKPOINT_FILES = ("trainable.safetensors", "optimizer.safetensors")
"""What a run's checkpoint holds."""
_TEXT_ENCODER = re.compile(
    r"lora_te|lora_clip|text_encoder|text_model|(?:^|[._])te\d?[._]|(?:^|[._])layers[._]\d+[._](?:self_attn|mlp)"
)
_BESIDE = (
    ("a LoRA for the text encoder", _TEXT_ENCODER),
    ("an embedding (textual inversion)", re.compile(r"^bundle_emb\.")),
)
"""What is left out where it lies beside the transformer's LoRA, and what is in its keys."""
_KINDS = (
    (
        r"(?:^|\.)(?:exp_avg\w*|momentum_buffer|state[12]|absmax[12])$",
        "the state of an optimizer",
        "take the file of the LoRA itself, which lies beside it in most programs",
    ),
    (
        r"^blocks\.\d+\.(?:layers\.\d+\.proj_[ab]|proj_residual)\.",
        "an i2L hypernetwork, which predicts LoRAs",
        "start with --init i2l, and name its folder as [init.i2l] weights",
    ),
    (
        r"controlnet|control_model|input_hint_block",
        "a ControlNet",
        "it steers a model while pictures are drawn, and no LoRA can start from it",
    ),
    (
        r"image_proj|ip_adapter",
        "an IP-Adapter",
        "it steers a model while pictures are drawn, and no LoRA can start from it",
    ),
    (
        r"emb_params|string_to_param|bundle_emb|^[^.]+$",
        "an embedding (textual inversion)",
        "it belongs to the text encoder, which is not trained here; a trigger word in the captions takes its place",
    ),
)
"""What is in some key, what the file then is, and what to do."""

_OTHER_MODELS = {
    "gate_layer": QWEN_IMAGE_21,
    "in_layer": QWEN_IMAGE_21,
    "single_stream": QWEN_IMAGE_21,
    "controlnet": "a ControlNet",
    "single_transformer_blocks": "Flux",
    "double_blocks": "Flux",
    "single_blocks": "Flux",
    "down_blocks": "Stable Diffusion or SDXL",
    "up_blocks": "Stable Diffusion or SDXL",
    "input_blocks": "Stable Diffusion or SDXL",
    "output_blocks": "Stable Diffusion or SDXL",
    "joint_blocks": "Stable Diffusion 3",
    "cross_attn": "Wan",
    "self_attn": "Wan or a text model",
}


def beside(keys: Collection[str]) -> dict[str, list[str]]:
    """What a file has beside a LoRA of the transformer and may be left out, and its keys."""
    found: dict[str, list[str]] = {}
    for key in keys:
        if what := next((what for what, pattern in _BESIDE if pattern.search(key)), None):
            found.setdefault(what, []).append(key)
    return found


def other_method(keys: Collection[str]) -> str | None:
    """By which method, none that is read, a file with these keys was made, and what to do."""
    for pattern, method in _METHODS.items():
        if hit := next((key for key in keys if re.search(pattern, key)), None):
            return f"this is {method}, as {hit} shows; {_EXTRACT}"
    return None


def other_peft(config: Mapping[str, Any]) -> str | None:
    """The same, from PEFT's adapter_config.json."""
    if config.get("use_dora"):
        return f"this is {DORA}; {_EXTRACT}"
    kind = str(config.get("peft_type") or _READ[0])
    return None if kind.upper() in _READ else f"this is {kind} of PEFT; {_EXTRACT}"


def made_for(said: Mapping[str, object]) -> tuple[str, str] | None:
    """The model of the family that a file was made for, if it is another than the first, and who says so.

    said: what metadata, PEFT's configuration and a model card say, by where they say it.
    """
    for where, name in said.items():
        if member := family_member(str(name)):
            return member, f"{where} says {name}"
    return None


def other_kind(found: Sorted) -> str | None:
    """What a file with these keys is, and what to do, or None if it may be a LoRA of the transformer."""
    for pattern, what, advice in _KINDS:
        if hits := [key for key in found.unread if re.search(pattern, key)]:
            return _told(found, hits, what, advice)
    if others := [name for name in found.foreign if not _TEXT_ENCODER.search(name)]:
        return f"Qwen-Image has no such modules: {first_few(others)}. {_other_model(others)}"
    if hits := [*found.foreign]:
        advice = "only the transformer is trained here, so choose one without it"
        return _told(found, hits, "a LoRA for a text encoder", advice)
    if not found.modules:
        return _whole_model(found.unread) or f"this is not a LoRA: {first_few(found.unread) or 'it is empty'}"
    return None


def _told(found: Sorted, hits: list[str], what: str, advice: str) -> str:
    """Beside a LoRA of the transformer, or alone."""
    if not found.modules:
        return f"this is {what}, as {hits[0]} shows; {advice}"
    return (
        f"beside the transformer's LoRA it holds {what} ({len(hits)}, as {hits[0]}); {advice}, or write a file that "
        "has the transformer's keys alone, with load_file and save_file of safetensors.torch"
    )


def _whole_model(keys: list[str]) -> str | None:
    weights = [key for key in keys if key.endswith((".weight", ".bias"))]
    if not weights:
        return None
    if any(module_name(key.rpartition(".")[0]) for key in weights):
        return (
            f"this is a whole transformer of Qwen-Image, not a LoRA, as {weights[0]} shows: to train on top of it, "
            "name the folder of its pipeline as [model] base; to make a LoRA of it, python -m trainer.formats extract"
        )
    return f"this is a whole model, not a LoRA, as {weights[0]} shows: choose a LoRA of Qwen-Image"


def _other_model(names: list[str]) -> str:
    for mark, model in _OTHER_MODELS.items():
        if any(mark in name for name in names):
            return f"It looks like a LoRA for {model}."
    return "Is it for another model?"


def several_adapters(names: list[str]) -> str:
    named = ", ".join(name or "one without a name" for name in names)
    return (
        f"it holds {len(names)} adapters ({named}): write a file of the one that you want, with the keys that have its "
        "name, by load_file and save_file of safetensors.torch"
    )


def other_file(path: Path) -> str | None:
    """Why the file is not read, or None."""
    if path.name in CHECKPOINT_FILES:
        return _checkpoint(path.parent)
    if path.suffix in PICKLES:
        return (
            "this is a pickle, and to read one can run any program that is in it, so only .safetensors files are read: "
            "load it by torch with weights_only=True, and write it with save_file of safetensors.torch"
        )
    if path.suffix != ".safetensors":
        return "only .safetensors files are read; convert it, or choose another file"
    return None


def other_folder(path: Path) -> str | None:
    """What the folder is, if it is none of a LoRA, and what to do."""
    if (path / CHECKPOINT_FILES[0]).is_file():
        return _checkpoint(path)
    if next(path.glob(f"step-*/{CHECKPOINT_FILES[0]}"), None):
        return _checkpoint(path / "step")
    if (path / "run.json").is_file():
        return f"this is the folder of a run: {_result(path)}"
    if (path / "model_index.json").is_file() or (path / "transformer").is_dir():
        return "this is the folder of a whole model, not of a LoRA: it can be [model] base"
    pickles = sorted(file.name for file in path.glob("*") if file.suffix in PICKLES)
    if pickles and next(path.glob("*.safetensors"), None) is None:
        return f"there is no .safetensors file in it, only {first_few(pickles)}: {other_file(path / pickles[0])}"
    return None


def _checkpoint(folder: Path) -> str:
    return (
        "this is a checkpoint, from which a run is resumed. What makes a LoRA of it is not in the file but in the "
        f"run's configuration: alpha, and with it how strong it is. {_result(folder.parent.parent)}"
    )


def _result(run: Path) -> str:
    """Where the LoRA of the run in this folder is."""
    if (run / "adapter").is_dir():
        return f"take {run / 'adapter'}"
    if (run / "run.json").is_file():
        return f"the run in {run} is not finished: go on with --resume, then take {run / 'adapter'}"
    return "take the folder adapter/ of its run, and if there is none, finish the run with --resume"
