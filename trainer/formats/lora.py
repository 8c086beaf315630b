"""LoRA files: read any layout, write any.

The effective factors are what the file's own trainer would apply: b is multiplied by alpha / rank, where alpha comes
from `.alpha`, else from PEFT's adapter_config.json beside the file or from diffusers' metadata in it, else is the rank.
A LoHa or LoKr becomes the factors of its dW.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import lycoris
from trainer.adapter import AdapterWeights, pattern_of_ranks
from trainer.config import first_few
from trainer.errors import UserError
from trainer.files import write_json, write_tensors
from trainer.formats import kinds, methods, origin
from trainer.formats.layouts import LAYOUTS, ModuleKeys, sort_keys
from trainer.formats.origin import ALPHA_KEY, DIFFUSERS_FILE, OF_BLISSFUL, PEFT_CONFIG, PEFT_FILE, Header
from trainer.hardware.threads import parallel_map
from trainer.lowrank import LowRank, rank

MOST_RANK = 256
"""What a LoHa or LoKr is read at where no rank is given; many have less, and then it is exact."""


class FormatError(UserError):
    """A file is not a LoRA for Qwen-Image, or it is damaged. The text names the file."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, LoHa or LoKr whose header has been read and found in order."""

    path: Path
    modules: dict[str, ModuleKeys]
    shapes: dict[str, tuple[int, ...]]
    scales: dict[str, float]
    """What the file's own trainer multiplies dW by, by module: b a of a LoRA."""
    metadata: dict[str, str]
    notes: list[str] = field(default_factory=list)
    """What a user should know of it: what is left out, and that it was made for another model."""

    @property
    def method(self) -> str:
        """LoRA, LoHa or LoKr; "LoKr and LoRA" if modules differ."""
        return " and ".join(sorted({keys.method for keys in self.modules.values()}))

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """in_features, out_features and rank of each module; of a LoHa or LoKr what its rank is at most."""
        found = dict[str, tuple[int, int, int]]()
        for name, keys in self.modules.items():
            if keys.parts:
                found[name] = methods.size({part: self.shapes[key] for part, key in keys.parts.items()})
            else:
                assert keys.a and keys.b
                found[name] = (self.shapes[keys.a][1], self.shapes[keys.b][0], self.shapes[keys.a][0])
        return found

    def read(self, rank: int | None = None) -> tuple[AdapterWeights, dict[str, str]]:
        """Effective factors in fp32 by module name, and metadata. FormatError names all modules with NaN.

        rank: what a LoHa or LoKr, whose rank may be thousands, is truncated to, exactly; the weights say what is lost.
        Without it all of it is read, which may take fifty times the bytes of the file. A LoRA is read as it is.
        """
        factors, lost, problems = dict[str, LowRank](), dict[str, float](), []
        with safe_open(self.path, framework="pt") as file:
            tensors = (self._tensors(name, file) for name in self.modules)
            computed = parallel_map(partial(self._effective, rank=rank), zip(self.modules, tensors, strict=True))
            for name, found in zip(self.modules, computed, strict=True):
                if found is None:
                    problems.append(f"{name} contains NaN or infinity")
                    continue
                factors[name], cut = found
                if self.modules[name].parts:
                    lost[name] = cut
        if problems:
            raise FormatError(f"{self.path}: {first_few(problems)}")
        return AdapterWeights(factors, lost), self.metadata

    def module(self, name: str) -> LowRank:
        """As `read`, of one module: a file may hold more than fits into memory. FormatError if there is NaN in it."""
        with safe_open(self.path, framework="pt") as file:
            found = self._effective((name, self._tensors(name, file)), None)
        if found is None:
            raise FormatError(f"{self.path}: {name} contains NaN or infinity")
        return found[0]

    def not_finite(self) -> list[str]:
        """The modules with NaN or infinity in them. All of the file is read, a module at a time."""
        with safe_open(self.path, framework="pt") as file:
            return [name for name in self.modules if not _finite(self.scales[name], self._tensors(name, file))]

    def _tensors(self, name: str, file: Any) -> dict[str, Tensor]:
        keys = self.modules[name]
        own = keys.parts or {"a": keys.a or "", "b": keys.b or ""}
        return {part: file.get_tensor(key).float() for part, key in own.items()}

    def _effective(self, module: tuple[str, Mapping[str, Tensor]], rank: int | None) -> tuple[LowRank, float] | None:
        """Factors from the tensors of a module, and the energy that is lost; None if there is NaN in them."""
        name, tensors = module
        scale = self.scales[name]
        if not _finite(scale, tensors):
            return None
        if self.modules[name].parts:
            return lycoris.factors(tensors, scale, rank)
        return LowRank(tensors["a"], tensors["b"] * scale), 0.0


def _finite(scale: float, tensors: Mapping[str, Tensor]) -> bool:
    return math.isfinite(scale) and all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def read_lora(path: Path, rank: int | None = None) -> tuple[AdapterWeights, dict[str, str]]:
    """Effective factors in fp32 by module name, and the file's metadata. FormatError if anything is wrong with it.

    `path` is a .safetensors file, or a folder as PEFT or diffusers writes it; rank: as in `LoraFile.read`.
    """
    return open_lora(path).read(rank)


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


def write_parts(
    path: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    scales: Mapping[str, float],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    *,
    layout: str,
) -> None:
    """A LoHa or LoKr, its parts by PEFT's names, which are LyCORIS' names too, with the module names of a layout of
    `LAYOUTS`. `read_lora` gives its dW.

    scales: what PEFT multiplies each module's product by. Other programs take alpha / rank, and 1 for a LoKr of whole
    matrices, where the scale goes into the first. FormatError if `dtype` cannot hold a value.
    """
    tensors: dict[str, Tensor] = {}
    for name, own in parts.items():
        divisor = methods.divisor({part: tuple(tensor.shape) for part, tensor in own.items()})
        in_first = scales[name] if divisor is None else 1.0
        for part, tensor in own.items():
            key = f"{LAYOUTS[layout].stem(name)}.{part}"
            tensors[key] = (tensor * in_first if part == "lokr_w1" else tensor).to(dtype)
            if not bool(tensors[key].isfinite().all()):
                raise FormatError(f"{path}: {name} has values that {dtype} cannot hold; write it in fp32 or bf16")
        alpha = 1.0 if divisor is None else scales[name] * divisor
        tensors[f"{LAYOUTS[layout].stem(name)}.alpha"] = torch.tensor(alpha)
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
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            shapes = {key: tuple(own.get_shape()) for key, own in slices.items()}
            dtypes = {key: own.get_dtype() for key, own in slices.items()}
            metadata = dict(tensors.metadata() or {})
            header = Header(shapes, dtypes, metadata, origin.description(file, shapes, metadata))
            modules, notes = _sort(header)
            _check_shapes(modules, shapes)
            alphas = {
                name: float(tensors.get_tensor(keys.alpha).float().reshape(-1)[0])
                for name, keys in modules.items()
                if keys.alpha
            }
            scales = origin.scales(modules, header, alphas)
            notes += origin.family_notes(file, header)
    except UserError as error:
        raise FormatError(f"{file}: {error}") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{file}: this is not a whole safetensors file ({error}). Download or copy it again."
        ) from error
    return LoraFile(file, modules, shapes, scales, metadata, notes)


def _sort(header: Header) -> tuple[dict[str, ModuleKeys], list[str]]:
    """The keys by module, and a note on each kind that is left out."""
    left_out = kinds.beside(header.shapes)
    own = sorted(header.shapes.keys() - {OF_BLISSFUL, *chain(*left_out.values())})
    found = sort_keys(own)
    if not found.modules:
        left_out, found = {}, sort_keys(header.shapes)  # and what it is instead is told
    if problem := kinds.other_method(own) or kinds.other_kind(found):
        raise FormatError(problem)
    if len(found.adapters) > 1:
        raise FormatError(kinds.several_adapters(found.adapters))
    if found.twice:
        raise FormatError("{} is in it twice, the second time as {}".format(*found.twice[0]))
    if found.unread:
        raise FormatError(f"these tensors are not part of a plain LoRA: {first_few(found.unread)}")
    return found.modules, [_left_out(what, keys, header) for what, keys in left_out.items()]


def _left_out(what: str, keys: list[str], header: Header) -> str:
    num_bytes = sum(math.prod(header.shapes[key]) * _bits(header.dtypes[key]) / 8 for key in keys)
    count = f"{len(keys)} tensor{'s' if len(keys) > 1 else ''}, {num_bytes / 1e6:.1f} MB, as {keys[0]}"
    return f"{what} is left out ({count}): only the transformer's part is read"


def _bits(dtype: str) -> int:
    """The bits of a number, by its type in a safetensors header: "BF16", "F8_E4M3", "BOOL"."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def _check_shapes(modules: Mapping[str, ModuleKeys], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems = []
    for name, keys in modules.items():
        problem: str | None
        if keys.alpha and math.prod(shapes[keys.alpha]) != 1:
            problems.append(f"{keys.alpha} is not one number")
        if keys.parts and (keys.a or keys.b):
            problem = f"is both LoRA and {keys.method}"
        elif keys.parts:
            problem = methods.problem({part: shapes[key] for part, key in keys.parts.items()})
        else:
            problem = _misfit(keys, shapes)
        if problem:
            problems.append(f"{name} {problem}")
    if problems:
        raise FormatError(first_few(problems, "; "))


def _misfit(keys: ModuleKeys, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    if keys.a is None or keys.b is None:
        return f"lacks {' and '.join(half for half, key in (('lora_A', keys.a), ('lora_B', keys.b)) if key is None)}"
    a, b = shapes[keys.a], shapes[keys.b]
    if len(a) != 2 or len(b) != 2:
        return f"has factors of shapes {a} and {b}: two dimensions each are needed"
    if 0 in (*a, *b):
        return f"has empty factors of shapes {a} and {b}"
    if a[0] != b[1]:
        return f"has rank {a[0]} in {keys.a} and {b[1]} in {keys.b}"
    return None
