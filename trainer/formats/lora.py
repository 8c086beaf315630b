"""LoRA files: read any layout, write any.

The effective factors are what the file's own trainer would apply: b is multiplied by alpha / rank, where alpha comes
from `.alpha`, else from PEFT's adapter_config.json beside the file or from diffusers' metadata in it, else is the rank.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.adapter import AdapterWeights, pattern_of_ranks
from trainer.config import first_few
from trainer.errors import UserError
from trainer.files import write_json, write_tensors
from trainer.formats import kinds
from trainer.formats.layouts import LAYOUTS, PEFT_PREFIX, ModuleKeys, sort_keys
from trainer.lowrank import LowRank, rank

PEFT_FILE, PEFT_CONFIG, DIFFUSERS_FILE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "pytorch_lora_weights.safetensors",
)
ALPHA_KEY = "warm_start_alpha"
"""In the metadata of our files: the trainer that the file is for multiplies by this / rank."""
DIFFUSERS_METADATA = "lora_adapter_metadata"
"""PEFT's configuration, in the metadata of files that diffusers writes."""
_PEFT_KEY = re.compile(rf"(?:(?:_orig_mod|module)\.)*{re.escape(PEFT_PREFIX)}")
"""As PEFT itself writes keys: its configuration holds alpha."""
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class FormatError(UserError):
    """A file is not a LoRA for Qwen-Image, or it is damaged. The text names the file."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA whose header has been read and found in order."""

    path: Path
    modules: dict[str, ModuleKeys]
    shapes: dict[str, tuple[int, ...]]
    scales: dict[str, float]
    """What the file's own trainer multiplies b a by, by module."""
    metadata: dict[str, str]

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """in_features, out_features and rank of each module."""
        found = {}
        for name, keys in self.modules.items():
            assert keys.a and keys.b
            found[name] = (self.shapes[keys.a][1], self.shapes[keys.b][0], self.shapes[keys.a][0])
        return found

    def read(self) -> tuple[AdapterWeights, dict[str, str]]:
        """Effective factors in fp32 by module name, and metadata. FormatError if there is NaN in them."""
        factors, problems = {}, []
        with safe_open(self.path, framework="pt") as tensors:
            for name, keys in self.modules.items():
                a, b = tensors.get_tensor(keys.a).float(), tensors.get_tensor(keys.b).float()
                scale = self.scales[name]
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
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = pattern_of_ranks({name: value for name, value in ranks.items() if value != most})
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
        if problem := kinds.other_file(path):
            raise FormatError(f"{path}: {problem}")
        return path
    if not path.is_dir():
        raise FormatError(f"{path}: there is no such file or folder")
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and files[0].name not in kinds.CHECKPOINT_FILES:
        return files[0]
    found = f"{len(files)} other .safetensors files are: name one of them" if files else "no other .safetensors file"
    missing = f"neither {PEFT_FILE} nor {DIFFUSERS_FILE} is in this folder, and {found}"
    raise FormatError(f"{path}: {kinds.other_folder(path) or missing}")


def open_lora(path: Path) -> LoraFile:
    """The header of a file, or of the one in a folder: complete, and of fitting shapes, or FormatError."""
    file = find_lora(path)
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
            metadata = dict(tensors.metadata() or {})
            modules = _sort(shapes)
            _check_shapes(modules, shapes)
            own = float(metadata[ALPHA_KEY]) if ALPHA_KEY in metadata else None
            alphas = {
                name: float(tensors.get_tensor(keys.alpha).float().reshape(-1)[0]) if keys.alpha else own
                for name, keys in modules.items()
            }
            scales = _scales(modules, shapes, alphas, _peft_config(file, modules, metadata))
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{file}: this is not a whole safetensors file ({error}). Download or copy it again."
        ) from error
    return LoraFile(file, modules, shapes, scales, metadata)


def _sort(shapes: Mapping[str, Any]) -> dict[str, ModuleKeys]:
    found = sort_keys(shapes)
    if problem := kinds.other_kind(found, shapes):
        raise FormatError(problem)
    if len(found.adapters) > 1:
        raise FormatError(kinds.several_adapters(found.adapters))
    if found.twice:
        raise FormatError("{} is in it twice, the second time as {}".format(*found.twice[0]))
    if found.unread:
        raise FormatError(f"these tensors are not part of a plain LoRA: {first_few(found.unread)}")
    return found.modules


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


def _peft_config(file: Path, modules: Mapping[str, ModuleKeys], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of a file of PEFT, or diffusers' metadata in the file; empty if neither is
    there. FormatError if PEFT's is needed and missing."""
    beside = file.with_name(PEFT_CONFIG)
    of_peft = [keys for keys in modules.values() if _PEFT_KEY.match(keys.a or "")]
    try:
        if (file.name == PEFT_FILE or of_peft) and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        elif DIFFUSERS_METADATA in metadata:
            entries = json.loads(metadata[DIFFUSERS_METADATA])
            config = {key.removeprefix("transformer."): value for key, value in entries.items()}
        elif any(not keys.alpha for keys in of_peft):
            raise FormatError(f"{PEFT_CONFIG} is missing beside it, and with it alpha: put both into one folder")
        else:
            return {}
        if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
            raise FormatError("its PEFT configuration has no r and lora_alpha: it is not of a LoRA")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise FormatError(f"its PEFT configuration cannot be read ({error})") from error
    if config.get("use_dora"):
        raise FormatError(f"this is {kinds.OTHER_METHODS['dora_scale']}: a plain LoRA is needed")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
        raise FormatError(
            f"it was started by {start}, which changes the base too: convert it to a plain LoRA with PEFT"
        )
    return config


def _scales(
    modules: Mapping[str, ModuleKeys],
    shapes: Mapping[str, tuple[int, ...]],
    alphas: Mapping[str, float | None],
    config: Mapping[str, Any],
) -> dict[str, float]:
    """What the file's own trainer multiplies b a by. Patterns of PEFT are tried one by one, as PEFT does it."""
    try:
        patterns = [
            (re.compile(rf"(.*\.)?({key})$"), alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()
        ]
    except (re.error, AttributeError) as error:
        raise FormatError(f"its PEFT configuration cannot be read (alpha_pattern: {error})") from error
    found = {}
    for name, keys in modules.items():
        assert keys.a
        alpha, rank = alphas[name], shapes[keys.a][0]
        if alpha is None and not config:
            found[name] = 1.0
            continue
        rooted = config.get("use_rslora") and alpha is None
        if alpha is None:
            own = _PEFT_KEY.sub("", keys.a).rpartition(".lora")[0]  # PEFT's name of it, if it wrapped more than ours
            matching = (value for pattern, value in patterns if pattern.match(name) or pattern.match(own))
            alpha = next(matching, config["lora_alpha"])
        if not alpha:
            raise FormatError(f"{name} has alpha 0, which some programs read as no effect, others as rank")
        found[name] = alpha / math.sqrt(rank) if rooted else alpha / rank
    return found
