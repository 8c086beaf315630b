"""LoRA files: read any layout in use for Qwen-Image, write the one that i2L writes.

A key is prefix + module + half, and optionally there is an `.alpha` for each module:

    prefix     none | "transformer." | "diffusion_model." | "base_model.model."    module names with dots
               "lora_unet_" (kohya)                                                module names with underscores
    half       lora_A | lora_down | lora.down (rank, in_features);  lora_B | lora_up | lora.up (out_features, rank)
               then optionally ".default", then ".weight"

The effective factors are what the file's own trainer would apply: b is multiplied by alpha / rank, where alpha comes
from `.alpha`, else from PEFT's adapter_config.json beside the file or from diffusers' metadata in it, else is the rank.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainer.adapter import TARGETS, AdapterWeights
from trainer.files import write_tensors
from trainer.lowrank import LowRank

PEFT_FILE, PEFT_CONFIG, DIFFUSERS_FILE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "pytorch_lora_weights.safetensors",
)
OUTER_MODULES = (
    "img_in",
    "txt_in",
    "proj_out",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)
"""Qwen-Image's Linear layers outside of its blocks."""

_PEFT_PREFIX = "base_model.model."
_PREFIXES = (_PEFT_PREFIX, "transformer.", "diffusion_model.")
_KOHYA_PREFIX = "lora_unet_"
_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?(?:\.weight)?|(?P<alpha>alpha))"
)
_IS_A = {"lora_A": True, "lora_down": True, "lora.down": True, "lora_B": False, "lora_up": False, "lora.up": False}
_OTHER_METHODS = {
    "lora_magnitude_vector": "DoRA, whose magnitudes no low-rank change can express",
    "dora_scale": "DoRA, whose magnitudes no low-rank change can express",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
}
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FLAT_TYPES = {name.replace(".", "_"): name for name in TARGETS["all"]}
_FLAT_OUTER = {name.replace(".", "_"): name for name in OUTER_MODULES}


class FormatError(ValueError):
    """A file is no LoRA for Qwen-Image, or a damaged one. The text names the file."""


@dataclass
class _Module:
    """The keys of one module in the file."""

    a: str | None = None
    b: str | None = None
    alpha: str | None = None


def read_lora(path: Path) -> tuple[AdapterWeights, dict[str, str]]:
    """Effective factors in fp32 by module name, and the file's metadata. FormatError if anything is wrong with it.

    `path` is a .safetensors file, or a folder as PEFT or diffusers writes it.
    """
    file = _find(path)
    modules, config = _examine(file)
    factors, problems = {}, []
    with safe_open(file, framework="pt") as tensors:
        metadata = dict(tensors.metadata() or {})
        for name, keys in modules.items():
            assert keys.a and keys.b
            a, b = tensors.get_tensor(keys.a).float(), tensors.get_tensor(keys.b).float()
            alpha = float(tensors.get_tensor(keys.alpha).float().reshape(-1)[0]) if keys.alpha else None
            scale = _scale(name, a.shape[0], alpha, config)
            if not (bool(a.isfinite().all()) and bool(b.isfinite().all()) and math.isfinite(scale)):
                problems.append(f"{name} contains NaN or infinity")
            factors[name] = LowRank(a, b * scale)
    if problems:
        raise FormatError(f"{file}: {_first(problems)}")
    return AdapterWeights(factors), metadata


def check_lora(path: Path) -> dict[str, tuple[int, int, int]]:
    """in_features, out_features and rank of each module, from the header alone. FormatError as from `read_lora`."""
    file = _find(path)
    modules, _ = _examine(file)
    with safe_open(file, framework="pt") as tensors:
        found = {}
        for name, keys in modules.items():
            (rank, in_features), (out_features, _) = (tensors.get_slice(key).get_shape() for key in (keys.a, keys.b))
            found[name] = (in_features, out_features, rank)
    return found


def write_lora(
    path: Path, weights: AdapterWeights, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """`{module}.lora_{A,B}.default.weight` at scale 1, as i2L writes it. `read_lora` gives the same factors again.

    A module of rank 0 changes nothing and is left out.
    """
    tensors = {}
    for name, (a, b) in weights.factors.items():
        if len(a) == 0:
            continue
        tensors[f"{name}.lora_A.default.weight"] = a.to(dtype)
        tensors[f"{name}.lora_B.default.weight"] = b.to(dtype)
    write_tensors(path, tensors, {"format": "pt", **metadata})


def _find(path: Path) -> Path:
    """The file to read: `path`, or the one in this folder."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise FormatError(f"{path}: only .safetensors files are read; convert it, or choose another file")
        return path
    if not path.is_dir():
        raise FormatError(f"{path}: there is no such file or folder")
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise FormatError(
            f"{path}: neither {PEFT_FILE} nor {DIFFUSERS_FILE} is in this folder, and "
            + (
                f"{len(files)} other .safetensors files are: name one of them"
                if files
                else "no other .safetensors file"
            )
        )
    return files[0]


def _examine(file: Path) -> tuple[dict[str, _Module], dict[str, Any]]:
    """The keys of each module, complete and of fitting shapes, and the PEFT configuration, empty if there is none."""
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file}: this is no whole safetensors file ({error}). Download or copy it again.") from error
    try:
        modules = _sort(shapes)
        _check_shapes(modules, shapes)
        config = _peft_config(file, metadata)
        if not config and any(
            (module.a or "").startswith(_PEFT_PREFIX) and not module.alpha for module in modules.values()
        ):
            raise FormatError(f"{PEFT_CONFIG} is missing beside it, and with it alpha: put both into one folder")
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from None
    return modules, config


def _sort(shapes: Mapping[str, Any]) -> dict[str, _Module]:
    for mark, method in _OTHER_METHODS.items():
        if any(mark in key for key in shapes):
            raise FormatError(f"this is {method}: a plain LoRA is needed")
    modules: dict[str, _Module] = {}
    foreign, unread = [], []
    for key in sorted(shapes):
        match = _KEY.fullmatch(key)
        if match is None:
            unread.append(key)
        elif (name := module_name(match["module"])) is None:
            foreign.append(match["module"])
        else:
            part = "alpha" if match["alpha"] else "a" if _IS_A[match["half"]] else "b"
            if getattr(modules.setdefault(name, _Module()), part) is not None:
                raise FormatError(f"{name} is in it twice, the second time as {key}")
            setattr(modules[name], part, key)
    if not modules and not foreign:
        raise FormatError(f"this is no LoRA: {_first(unread) or 'it is empty'}")
    if foreign:
        raise FormatError(f"Qwen-Image has no such modules: {_first(dict.fromkeys(foreign))}. Is it for another model?")
    if unread:
        raise FormatError(f"these tensors are not part of a plain LoRA: {_first(unread)}")
    return modules


def module_name(name: str) -> str | None:
    """The transformer's own name of a module in a file, or None if Qwen-Image has no such module."""
    if name.startswith(_KOHYA_PREFIX):
        flat = name.removeprefix(_KOHYA_PREFIX)
        if match := re.fullmatch(r"transformer_blocks_(\d+)_(.+)", flat):
            kind = _FLAT_TYPES.get(match[2])
            return f"transformer_blocks.{match[1]}.{kind}" if kind else None
        return _FLAT_OUTER.get(flat)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    match = re.fullmatch(r"transformer_blocks\.\d+\.(.+)", name)
    known = match[1] in TARGETS["all"] if match else name in OUTER_MODULES
    return name if known else None


def _check_shapes(modules: Mapping[str, _Module], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems = []
    for name, keys in modules.items():
        if keys.a is None or keys.b is None:
            missing = [half for half, key in (("lora_A", keys.a), ("lora_B", keys.b)) if key is None]
            problems.append(f"{name} lacks {' and '.join(missing)}")
            continue
        a, b = shapes[keys.a], shapes[keys.b]
        if len(a) != 2 or len(b) != 2:
            problems.append(f"{name} has factors of shapes {a} and {b}: two dimensions each are needed")
        elif 0 in (*a, *b):
            problems.append(f"{name} has empty factors of shapes {a} and {b}")
        elif a[0] != b[1]:
            problems.append(f"{name} has rank {a[0]} in {keys.a} and {b[1]} in {keys.b}")
        elif keys.alpha and math.prod(shapes[keys.alpha]) != 1:
            problems.append(f"{keys.alpha} is not one number")
    if problems:
        raise FormatError(_first(problems, "; "))


def _peft_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of a file of PEFT, or diffusers' metadata in the file."""
    beside = file.with_name(PEFT_CONFIG)
    try:
        if file.name == PEFT_FILE and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        elif "lora_adapter_metadata" in metadata:
            entries = json.loads(metadata["lora_adapter_metadata"])
            config = {key.removeprefix("transformer."): value for key, value in entries.items()}
        else:
            return {}
        if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
            raise FormatError("its PEFT configuration has no r and lora_alpha: it is not of a LoRA")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise FormatError(f"its PEFT configuration cannot be read ({error})") from error
    if config.get("use_dora"):
        raise FormatError(f"this is {_OTHER_METHODS['dora_scale']}: a plain LoRA is needed")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise FormatError(
            f"it was started by {start}, which changes the base too: convert it to a plain LoRA with PEFT"
        )
    return config


def _scale(module: str, rank: int, alpha: float | None, config: Mapping[str, Any]) -> float:
    if alpha is not None:
        return alpha / rank
    if not config:
        return 1.0
    alpha = config["lora_alpha"]
    if patterns := config.get("alpha_pattern"):
        from peft.utils.other import get_pattern_key

        alpha = patterns.get(get_pattern_key(list(patterns), module), alpha)
    assert alpha is not None
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _first(names: Any, separator: str = ", ", count: int = 3) -> str:
    listed = list(names)
    rest = len(listed) - count
    return separator.join(listed[:count]) + (f" and {rest} more" if rest > 0 else "")
