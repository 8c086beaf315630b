"""LoRA files: read any layout, write any.

The effective factors are what the file's own trainer would apply: b is multiplied by alpha / rank, where alpha comes
from `.alpha`, else from PEFT's adapter_config.json beside the file or from diffusers' metadata in it, else is the rank.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.adapter import AdapterWeights
from trainer.config import first_few
from trainer.errors import UserError
from trainer.files import write_json, write_tensors
from trainer.formats.layouts import LAYOUTS, PEFT_PREFIX, ModuleKeys, sort_keys
from trainer.lowrank import LowRank, rank

PEFT_FILE, PEFT_CONFIG, DIFFUSERS_FILE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "pytorch_lora_weights.safetensors",
)
ALPHA_KEY = "warm_start_alpha"
"""In the metadata of our files: the trainer that the file is for multiplies by this / rank."""
_OTHER_METHODS = {
    "lora_magnitude_vector": "DoRA, whose magnitudes no low-rank change can express",
    "dora_scale": "DoRA, whose magnitudes no low-rank change can express",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
}
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class FormatError(UserError):
    """A file is not a LoRA for Qwen-Image, or it is damaged. The text names the file."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA whose header has been read and found in order."""

    path: Path
    modules: dict[str, ModuleKeys]
    shapes: dict[str, tuple[int, ...]]
    alphas: dict[str, float | None]
    """The alphas that are in the file, by module."""
    config: dict[str, Any]
    """PEFT's, empty if there is none."""
    metadata: dict[str, str]

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """in_features, out_features and rank of each module."""
        found = {}
        for name, keys in self.modules.items():
            assert keys.a and keys.b
            found[name] = (self.shapes[keys.a][1], self.shapes[keys.b][0], self.shapes[keys.a][0])
        return found

    def scale(self, module: str) -> float:
        """What the file's own trainer multiplies b a by."""
        return _scale(module, self.sizes()[module][2], self.alphas.get(module), self.config)

    def read(self) -> tuple[AdapterWeights, dict[str, str]]:
        """Effective factors in fp32 by module name, and metadata. FormatError if there is NaN in them."""
        factors, problems, sizes = {}, [], self.sizes()
        with safe_open(self.path, framework="pt") as tensors:
            for name, keys in self.modules.items():
                a, b = tensors.get_tensor(keys.a).float(), tensors.get_tensor(keys.b).float()
                scale = _scale(name, sizes[name][2], self.alphas.get(name), self.config)
                if not (bool(a.isfinite().all()) and bool(b.isfinite().all()) and math.isfinite(scale)):
                    problems.append(f"{name} contains NaN or infinity")
                factors[name] = LowRank(a, b * scale)
        if problems:
            raise FormatError(f"{self.path}: {first_few(problems)}")
        return AdapterWeights(factors), self.metadata


def read_lora(path: Path) -> tuple[AdapterWeights, dict[str, str]]:
    """Effective factors in fp32 by module name, and the file's metadata. FormatError if anything is wrong with it.

    `path` is a .safetensors file, or a folder as PEFT or diffusers writes it.
    """
    return open_lora(path).read()


def check_lora(path: Path) -> dict[str, tuple[int, int, int]]:
    """in_features, out_features and rank of each module, from the header alone. FormatError as from `read_lora`."""
    return open_lora(path).sizes()


def write_lora(
    path: Path,
    weights: AdapterWeights,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "bare.default",
    alpha: float | None = None,
) -> None:
    """Effective factors in a layout of `LAYOUTS`, at scale 1; by default as i2L writes them. `read_lora` gives the same
    dW again, and at scale 1 the same factors.

    alpha: of every module, instead of its rank; b is multiplied by rank / alpha, so that dW stays for a reader whose
    scale is alpha / rank. Where a layout has no place for it, the file's metadata tells `read_lora`. A module of rank 0
    changes nothing and is left out. The layout "peft" needs the file's name to be adapter_model.safetensors, and puts
    its configuration beside it. FormatError if `dtype` cannot hold a value.
    """
    form = LAYOUTS[layout]
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in weights.factors.items():
        if len(a) == 0:
            continue
        scale = 1.0 if alpha is None else len(a) / alpha
        a_key, b_key, alpha_key = form.keys(name)
        tensors[a_key], tensors[b_key] = a.to(dtype), (b * scale).to(dtype)
        if not (bool(tensors[a_key].isfinite().all()) and bool(tensors[b_key].isfinite().all())):
            raise FormatError(f"{path}: {name} has values that {dtype} cannot hold; write it in fp32 or bf16")
        if form.alpha:
            tensors[alpha_key] = torch.tensor(float(len(a) if alpha is None else alpha))
    if alpha is not None and not form.alpha:
        metadata = {**metadata, ALPHA_KEY: f"{alpha:g}"}
    if layout == "peft":
        assert path.name == PEFT_FILE and alpha is None
        write_json(path.with_name(PEFT_CONFIG), peft_description(weights))
    write_tensors(path, tensors, {"format": "pt", **metadata})


def interface_metadata(
    layout: str, title: str, ranks: Collection[int], *, alpha: float | None = None, trigger: str = ""
) -> dict[str, str]:
    """What interfaces show of a file: ModelSpec (https://github.com/Stability-AI/ModelSpec), and kohya's keys, which
    have one rank and one alpha for a whole file."""
    spec = {"sai_model_spec": "1.0.0", "architecture": "qwen-image/lora", "title": title, "trigger_phrase": trigger}
    found = {f"modelspec.{key}": value for key, value in spec.items() if value}
    if LAYOUTS[layout].alpha:
        dim = str(max(ranks)) if len(set(ranks)) == 1 else "Dynamic"
        found["ss_network_module"] = "networks.lora_qwen_image"
        found |= {"ss_network_dim": dim, "ss_network_alpha": dim if alpha is None else f"{alpha:g}"}
    return found


def peft_description(weights: AdapterWeights, base: str | None = None) -> dict[str, Any]:
    """adapter_config.json of effective factors, whose ranks may differ."""
    ranks = {name: rank(x) for name, x in weights.factors.items() if rank(x)}
    most = max(set(ranks.values()), key=[*ranks.values()].count)
    others = {name: value for name, value in ranks.items() if value != most}
    config = LoraConfig(r=most, lora_alpha=most, rank_pattern=others, alpha_pattern=others)
    own = {"base_model_name_or_path": base, "inference_mode": True, "target_modules": sorted(ranks)}
    return plain({**config.to_dict(), **own})


def plain(value: Any) -> Any:
    """A PEFT configuration as JSON has it; sets sorted, so that equal runs write equal files."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return getattr(value, "value", value)


def find_lora(path: Path) -> Path:
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


def open_lora(path: Path) -> LoraFile:
    """The header of a file, or of the one in a folder: complete, and of fitting shapes, or FormatError."""
    file = find_lora(path)
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
            metadata = dict(tensors.metadata() or {})
            try:
                modules = _sort(shapes)
                _check_shapes(modules, shapes)
                config = _peft_config(file, metadata)
                if not config and any((m.a or "").startswith(PEFT_PREFIX) and not m.alpha for m in modules.values()):
                    raise FormatError(
                        f"{PEFT_CONFIG} is missing beside it, and with it alpha: put both into one folder"
                    )
            except FormatError as error:
                raise FormatError(f"{file}: {error}") from None
            own = float(metadata[ALPHA_KEY]) if ALPHA_KEY in metadata else None
            alphas = {
                name: float(tensors.get_tensor(keys.alpha).float().reshape(-1)[0]) if keys.alpha else own
                for name, keys in modules.items()
                if keys.alpha or own
            }
            if none := [name for name, alpha in alphas.items() if not alpha]:
                raise FormatError(
                    f"{file}: {none[0]} has alpha 0, which some programs read as no effect, others as rank"
                )
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{file}: this is not a whole safetensors file ({error}). Download or copy it again."
        ) from error
    return LoraFile(file, modules, shapes, alphas, config, metadata)


def _sort(shapes: Mapping[str, Any]) -> dict[str, ModuleKeys]:
    for mark, method in _OTHER_METHODS.items():
        if any(mark in key for key in shapes):
            raise FormatError(f"this is {method}: a plain LoRA is needed")
    found = sort_keys(shapes)
    if found.twice:
        raise FormatError("{} is in it twice, the second time as {}".format(*found.twice[0]))
    if not found.modules and not found.foreign:
        raise FormatError(f"this is not a LoRA: {first_few(found.unread) or 'it is empty'}")
    if found.foreign:
        names = list(dict.fromkeys(found.foreign))
        raise FormatError(f"Qwen-Image has no such modules: {first_few(names)}. {_other_model(names)}")
    if found.unread:
        raise FormatError(f"these tensors are not part of a plain LoRA: {first_few(found.unread)}")
    return found.modules


_OTHER_MODELS = {
    "single_transformer_blocks": "Flux",
    "double_blocks": "Flux",
    "single_blocks": "Flux",
    "down_blocks": "Stable Diffusion or SDXL",
    "up_blocks": "Stable Diffusion or SDXL",
    "input_blocks": "Stable Diffusion or SDXL",
    "output_blocks": "Stable Diffusion or SDXL",
    "joint_blocks": "Stable Diffusion 3",
    "lora_te": "another model's text encoder",
    "text_model": "another model's text encoder",
    "self_attn": "Wan or a text model",
}


def _other_model(names: list[str]) -> str:
    for mark, model in _OTHER_MODELS.items():
        if any(mark in name for name in names):
            return f"It looks like a LoRA for {model}."
    return "Is it for another model?"


def _check_shapes(modules: Mapping[str, ModuleKeys], shapes: Mapping[str, tuple[int, ...]]) -> None:
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
        raise FormatError(first_few(problems, "; "))


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
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
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
