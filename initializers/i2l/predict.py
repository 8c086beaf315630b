"""The initializer: pictures -> encoders -> experts -> one LoRA."""

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from initializers.i2l import encoders, expert, sources
from initializers.i2l.layout import (
    COARSE_TOKENS,
    FINE_TOKENS,
    PUBLISHED,
    Geometry,
    Header,
    LayoutError,
    describe,
    header_rank,
    infer_geometry,
    is_expert,
    is_lora,
    layout_md5,
    module_shapes,
    read_header,
)
from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.formats import check_lora, read_lora
from trainer.lowrank import LowRank, concatenate, rank
from trainer.pictures import open_picture

FILES = {
    **{name: published.file for name, published in PUBLISHED.items()},
    "bias": "Qwen-Image-i2L-Bias.safetensors",
}
ORDER = tuple(FILES)  # style, coarse, fine, bias: the order of the ranks in the result
_RESOLUTIONS = {"coarse": encoders.COARSE_RESOLUTION, "fine": encoders.FINE_RESOLUTION}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.i2l]`"""

    experts: tuple[str, ...] = ("style",)
    """"style", "coarse", "fine" (only with coarse), "bias" (with coarse and fine), or files in these layouts."""
    weights: str = "DiffSynth-Studio/Qwen-Image-i2L"
    """Folder or Hugging Face id that holds the experts that are given by name: Qwen-Image-i2L-Style.safetensors, ..."""
    encoders: str = "DiffSynth-Studio/General-Image-Encoders"
    """Folder or Hugging Face id that holds SigLIP2-G384/model.safetensors and DINOv3-7B/model.safetensors."""
    strength: float = 1.0
    """The seed is multiplied by this: 1 is what the experts predict."""

    def problems(self) -> list[str]:
        found = []
        if not self.experts:
            found.append(f"experts must name at least one of {', '.join(ORDER)}, or a file")
        if len(set(self.experts)) < len(self.experts):
            found.append("experts must not name an expert twice")
        if not (self.strength > 0 and math.isfinite(self.strength)):
            found.append('strength must be above 0; to start without i2L, choose method = "random"')
        return found


@dataclass(frozen=True)
class _Source:
    """One expert, found and recognised, but not loaded."""

    kind: str  # one of ORDER
    path: Path
    header: Header
    geometry: Geometry | None  # None for Bias

    @property
    def resolution(self) -> int | None:
        """Of the pictures that its residual is made from, if it has one."""
        return _RESOLUTIONS.get(self.kind)

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """in_features and out_features of what it covers."""
        if self.geometry is not None:
            return module_shapes(self.geometry)
        return {name: (inside, out) for name, (inside, out, _) in check_lora(self.path).items()}


def check(config: Config) -> list[str]:
    """What can be told before any model loads; nothing is downloaded. Empty if all is well."""
    found = list(config.problems())
    kinds: list[str] = []
    geometries: dict[str, Geometry] = {}
    for name in config.experts:
        try:
            folder, file = _place(config, name)
            if (why := sources.problem(folder, file)) is not None:
                found.append(f"experts: {why}")
            elif (path := sources.cached(folder, file)) is not None:
                source = _recognise(name, path)
                kinds.append(source.kind)
                if source.geometry is not None:
                    geometries[name] = source.geometry
            else:
                kinds.append(name)  # to be downloaded, and looked at then
        except ValueError as error:
            found.append(f"experts: {error}")
    if not found:
        found += [f"experts: {problem}" for problem in _combination_problems(kinds)]
    if any(kind != "bias" for kind in kinds):
        problems = [sources.problem(config.encoders, file) for file in encoders.ENCODER_FILES]
        found += [f"encoders: {problem}" for problem in problems if problem] or _encoder_problems(config, geometries)
    return found


def downloads(config: Config) -> list[tuple[str, str]]:
    """(Hugging Face id, file) of what `initialize` would download."""
    wanted = [_place(config, name) for name in config.experts]
    if set(config.experts) != {"bias"}:
        wanted += [(config.encoders, file) for file in encoders.ENCODER_FILES]
    return [(source, file) for source, file in wanted if sources.cached(source, file) is None]


def initialize(context: InitContext, config: Config) -> Seed:
    """The LoRA that the experts predict from `context.images`: all ranks, effective, fp32. ValueError if it cannot be.

    Rank 4 for each picture and expert in the order style, coarse, fine, with `a` divided by the number of pictures;
    then Bias as it is.
    """
    if not context.images:
        raise ValueError("i2L needs at least one picture")
    seconds: dict[str, float] = {}
    with _timed(seconds, "locate"):
        found = [_recognise(name, sources.locate(*_place(config, name))) for name in config.experts]
        if problems := [*config.problems(), *_combination_problems([source.kind for source in found])]:
            raise ValueError("; ".join(problems))
        found.sort(key=lambda source: ORDER.index(source.kind))
        _check_fit(found, context)
    if "coarse" in (kinds := [source.kind for source in found]) and "fine" not in kinds:
        context.say("i2L: coarse without fine, with few pictures, drags their content into every picture")

    embeddings, residuals = _look(context, config, found, seconds)
    merged: dict[str, list[LowRank]] = {}
    reports = []
    for source in found:
        context.say(f"i2L: {source.kind} ({source.path})")
        with _timed(seconds, source.kind):
            reports.append({"expert": source.kind, "file": str(source.path), **_fingerprint(source)})
            for module, factors in _predict(source, embeddings, residuals, context.device).items():
                merged.setdefault(module, []).append(factors)
    with _timed(seconds, "merge"):
        factors_of = {module: _scaled(concatenate(parts), config.strength) for module, parts in merged.items()}
    report = {
        "method": "i2l",
        "experts": reports,
        "num_pictures": len(context.images),
        "strength": config.strength,
        "modules": len(factors_of),
        "incoming_rank": max(rank(factors) for factors in factors_of.values()),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
    }
    return Seed(AdapterWeights(factors_of), report)


def _place(config: Config, name: str) -> tuple[str, str]:
    """Folder or hub id, and file, of an expert given by name or path. ValueError if there is no such expert."""
    if name in FILES:
        return config.weights, FILES[name]
    path = Path(name).expanduser()
    if path.is_file():
        return str(path.parent), path.name
    raise ValueError(f'"{name}" is neither an expert ({", ".join(ORDER)}) nor a file')


def _recognise(name: str, path: Path) -> _Source:
    """What the file is, by its layout; its name must agree. ValueError if damaged, incomplete or something else."""
    header = read_header(path)
    if not is_expert(header.shapes):
        if is_lora(header.shapes) and name not in PUBLISHED:
            check_lora(path)
            return _Source("bias", path, header, None)
        raise LayoutError(f"{path}: no i2L expert; `python -m initializers.i2l inspect {path}` tells what it is")
    try:
        geometry = infer_geometry(header.shapes, header_rank(header))
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from None
    kind = geometry.kind.lower()
    if kind not in PUBLISHED:
        assert geometry.residual is not None
        raise LayoutError(
            f"{path}: its residual has {geometry.residual.num_tokens} tokens; that of Coarse has {COARSE_TOKENS}, "
            f"of Fine {FINE_TOKENS}"
        )
    if name in FILES and name != kind:
        raise LayoutError(f'{path}: expected the expert "{name}", found the {describe(geometry)}')
    return _Source(kind, path, header, geometry)


def _combination_problems(kinds: Sequence[str]) -> list[str]:
    found = []
    if "fine" in kinds and "coarse" not in kinds:
        found.append('fine works only together with coarse: add "coarse"')
    found += [f"more than one {kind} expert" for kind in ORDER[:3] if kinds.count(kind) > 1]
    return found


def _encoder_problems(config: Config, geometries: dict[str, Geometry]) -> list[str]:
    """Encoders and experts must have been trained together: their embeddings must at least have one size."""
    try:
        size = encoders.embedding_size(config.encoders)
    except LayoutError as error:
        return [f"encoders: {error}"]
    return [
        f'encoders: {config.encoders} gives image embeddings of {size} numbers, the expert "{name}" takes '
        f"{geometry.embedding_size}"
        for name, geometry in geometries.items()
        if size not in (None, geometry.embedding_size)
    ]


def _check_fit(found: Sequence[_Source], context: InitContext) -> None:
    """ValueError if an expert was made for another transformer than the one that shall be trained."""
    for source in found:
        made_for = source.modules
        common = made_for.keys() & context.modules.keys()
        if not common:
            raise ValueError(
                f"{source.path}: predicts none of the modules that are to be trained. It covers {_first(made_for)}; "
                f"to be trained are {_first(context.modules)}"
            )
        for module in sorted(common):
            if made_for[module] != tuple(context.modules[module]):
                raise ValueError(
                    f"{source.path}: made for another model: {module} is {_shape(made_for[module])} in the expert and "
                    f"{_shape(context.modules[module])} in {context.base}"
                )
        blocks = max((int(match[1]) + 1 for name in context.modules if (match := _BLOCK.match(name))), default=0)
        if source.geometry is not None and blocks > (num_blocks := source.geometry.num_blocks):
            raise ValueError(f"{source.path}: made for a model of {num_blocks} blocks, but {context.base} has {blocks}")


def _look(
    context: InitContext, config: Config, found: Sequence[_Source], seconds: dict[str, float]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Image embeddings, B embedding_size, and residuals by resolution, as far as the experts need them."""
    if all(source.geometry is None for source in found):
        return torch.empty(0), {}
    resolutions = sorted({source.resolution for source in found if source.resolution is not None})
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    with _timed(seconds, "pictures"):
        squares: dict[int, list[Image.Image]] = {size: [] for size in {encoders.CROP_SIZE, *resolutions}}
        for path in context.images:  # only the squares are kept: a hundred photographs would not fit into memory
            picture = open_picture(path)
            for size, crops in squares.items():
                crops.append(encoders.cover_crop(picture, size))
    context.say(f"i2L: encoding {len(context.images)} pictures")
    with _timed(seconds, "encoders"):
        embeddings = encoders.encode_pictures(squares[encoders.CROP_SIZE], config.encoders, context.device, dtype)
    residuals = {}
    if resolutions:
        context.say("i2L: reading the pictures with Qwen2.5-VL")
        with _timed(seconds, "qwen_vl"):
            wanted = {size: squares[size] for size in resolutions}
            residuals = encoders.qwen_vl_residuals(wanted, context.base, context.device, dtype)
    for name, tensor in (("image embeddings", embeddings), *(("hidden states", t) for t in residuals.values())):
        for path, row in zip(context.images, tensor, strict=True):
            if not bool(row.isfinite().all()):
                raise ValueError(f"{path}: NaN or infinity in its {name}, computed in {dtype}")
    return embeddings, residuals


def _predict(
    source: _Source, embeddings: Tensor, residuals: dict[int, Tensor], device: torch.device
) -> dict[str, LowRank]:
    if source.geometry is None:
        weights, _ = read_lora(source.path)
        return dict(weights.factors)
    residual = residuals[source.resolution] if source.resolution is not None else None
    found = expert.factors(
        source.path, embeddings.to(device), residual, progress=_progress(f"i2L {source.kind}", "block")
    )
    return {module: LowRank(factors.a.cpu(), factors.b.cpu()) for module, factors in found.items()}


def _progress(title: str, unit: str) -> Callable[[Iterable[int]], Iterable[int]]:
    """A bar on a terminal, nothing in a log."""
    return lambda items: tqdm(items, desc=title, unit=unit, leave=False, disable=None)


def _scaled(factors: LowRank, strength: float) -> LowRank:
    """dW times `strength`, all of it in b."""
    return LowRank(factors.a, factors.b * strength)


def _fingerprint(source: _Source) -> dict[str, Any]:
    with source.path.open("rb") as file:
        content = hashlib.file_digest(file, "md5").hexdigest()
    return {"md5": content, "layout_md5": layout_md5(source.header.shapes), "bytes": source.header.num_bytes}


def _first(names: Iterable[str], count: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "") or "nothing"


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} -> {shape[1]}"


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
