"""What a file says of how it was made: PEFT's configuration beside it, the scale of its dW, the base it was made for.

All problems are UserError without the file's name.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.formats import kinds, methods
from trainer.formats.layouts import PEFT_PREFIX, ModuleKeys
from trainer.qwen_image import QWEN_IMAGE_21

PEFT_FILE, PEFT_CONFIG, DIFFUSERS_FILE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "pytorch_lora_weights.safetensors",
)
ALPHA_KEY = "warm_start_alpha"
"""In the metadata of our files: the trainer that the file is for multiplies by this / rank."""
ORIGIN = "warm_start"
"""In the metadata of our files: where the LoRA comes from, as JSON."""
TRIGGER = "modelspec.trigger_phrase"
MADE_OF = "warm_start_made_of"
"""In the metadata of files that were made of others: of which, and what of their energy is kept, as JSON."""
DIFFUSERS_METADATA = "lora_adapter_metadata"
"""PEFT's configuration, in the metadata of files that diffusers writes."""
STALE_METADATA = (
    DIFFUSERS_METADATA,
    "ss_network_",
    "global_step",  # at which SimpleTuner would go on counting
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash",
    ALPHA_KEY,
)
"""Beginnings of keys that speak of the training and the tensors as they were, or of a scale that is now in b."""
_MODEL_KEYS = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
"""In the metadata of other programs' files: the model that a LoRA was made for."""
OF_BLISSFUL = "lokr_factor"
"""In a LoKr of Blissful Tuner, which divides alpha by the longer side of w2 where w2 is whole."""
_PEFT_KEY = re.compile(rf"(?:(?:_orig_mod|module)\.)*{re.escape(PEFT_PREFIX)}")
"""As PEFT itself writes keys: its configuration holds alpha."""
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_origin(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `trainer.export.result.origin` has put there; empty in files of other programs."""
    try:
        return dict(json.loads(metadata.get(ORIGIN, "{}")))
    except (ValueError, TypeError):
        return {}


def without_stale(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata for a file whose tensors are other ones."""
    return {key: value for key, value in metadata.items() if not key.startswith(STALE_METADATA)}


@dataclass(frozen=True)
class Header:
    """What is known of a file before its weights are read."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    config: dict[str, Any]
    """What PEFT's adapter_config.json says of a file of PEFT, or diffusers' metadata in the file; empty if neither is
    there."""


def description(file: Path, keys: Collection[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """`Header.config`. UserError if it is of a method that is not read."""
    beside = file.with_name(PEFT_CONFIG)
    try:
        if (file.name == PEFT_FILE or any(map(_PEFT_KEY.match, keys))) and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        elif DIFFUSERS_METADATA in metadata:
            entries = json.loads(metadata[DIFFUSERS_METADATA])
            config = {key.removeprefix("transformer."): value for key, value in entries.items()}
        else:
            return {}
        if problem := kinds.other_peft(config):
            raise UserError(problem)
        alpha = config.get(_alpha_name(config))
        if not isinstance(config.get("r"), int) or not isinstance(alpha, int | float):
            raise UserError(f"its PEFT configuration has no r and {_alpha_name(config)}: it is not of a LoRA")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"its PEFT configuration cannot be read ({error})") from error
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
        raise UserError(f"it was started by {start}, which changes the base too: convert it to a plain LoRA with PEFT")
    return dict(config)


def _alpha_name(config: Mapping[str, Any]) -> str:
    return "alpha" if str(config.get("peft_type")).upper() in ("LOHA", "LOKR") else "lora_alpha"


def scales(modules: Mapping[str, ModuleKeys], header: Header, alphas: Mapping[str, float]) -> dict[str, float]:
    """What the file's own trainer multiplies dW by."""
    own, config, found = header.metadata.get(ALPHA_KEY), header.config, {}
    if not config and any(_PEFT_KEY.match(keys.first) and not keys.alpha for keys in modules.values()):
        raise UserError(f"{PEFT_CONFIG} is missing beside it, and with it alpha: put both into one folder")
    patterns = {name: _patterns(config, name) for name in ("alpha_pattern", "rank_pattern")}
    for name, keys in modules.items():
        alpha = divisor = 1.0
        if keys.alpha or own:
            if rank := _rank(keys, header):
                alpha, divisor = alphas[name] if keys.alpha else float(own or 0), rank
        elif config:
            names = (name, re.split(r"\.(?:lora|hada|lokr)_", _PEFT_KEY.sub("", keys.first))[0])
            alpha = _by_pattern(patterns["alpha_pattern"], names, config[_alpha_name(config)])
            if keys.parts:  # the rank that was asked for, also where a matrix is whole
                divisor = _by_pattern(patterns["rank_pattern"], names, config["r"])
            else:
                rank = _rank(keys, header) or 1
                divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        if not alpha:
            raise UserError(f"{name} has alpha 0, which some programs read as no effect, others as rank")
        found[name] = alpha / divisor
    return found


def _rank(keys: ModuleKeys, header: Header) -> int | None:
    """What `.alpha` is divided by; None if it has no effect."""
    if not keys.parts:
        return header.shapes[keys.a or ""][0]
    shapes = {part: header.shapes[key] for part, key in keys.parts.items()}
    return max(shapes["lokr_w2"]) if OF_BLISSFUL in header.shapes and "lokr_w2" in shapes else methods.divisor(shapes)


def _patterns(config: Mapping[str, Any], name: str) -> list[tuple[re.Pattern[str], float]]:
    try:
        return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in (config.get(name) or {}).items()]
    except (re.error, AttributeError) as error:
        raise UserError(f"its PEFT configuration cannot be read ({name}: {error})") from error


def _by_pattern(patterns: list[tuple[re.Pattern[str], float]], names: Sequence[str], default: float) -> float:
    """Patterns are tried one by one, as PEFT does it, on our name and on its own, if it wrapped more than ours."""
    return next((value for pattern, value in patterns if any(map(pattern.match, names))), default)


def family_notes(file: Path, header: Header) -> list[str]:
    """A note, if it was made for another model of the family. UserError if for one of another architecture."""
    said: dict[str, Any] = {key: header.metadata[key] for key in _MODEL_KEYS if key in header.metadata}
    said["base_model_name_or_path"] = header.config.get("base_model_name_or_path")
    said["README.md beside it"] = _model_card(file.with_name("README.md")).get("base_model")
    if (found := kinds.made_for(said)) is None:
        return []
    member, by = found
    if member == QWEN_IMAGE_21:
        raise UserError(f"it was made for {member} ({by}): choose a LoRA for Qwen-Image")
    return [f"it was made for {member} ({by}): the modules are the same, how well it fits another model is not known"]


def _model_card(path: Path) -> dict[str, Any]:
    """What stands between the lines --- of a model card; empty if there is none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
        return found if isinstance(found, dict) else {}
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return {}
