"""The initializer: pictures -> encoders -> experts -> one LoRA."""

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from initializers.i2l import encoders, expert, sources
from initializers.i2l.expert import Factors, merge_pictures
from initializers.i2l.layout import (
    COARSE_TOKENS,
    FILES,
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
from trainer import qwen_image
from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.cache import key
from trainer.files import sample, write_tensors
from trainer.formats import check_lora, read_lora
from trainer.lowrank import LowRank, concatenate, rank, ranks_for_energy, scale
from trainer.pictures import open_picture

ORDER = tuple(FILES)  # style, coarse, fine, bias: the order of the ranks in the result
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
MAX_TRIALS = 8  # pictures on which strengths are tried
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.i2l]`"""

    experts: tuple[str, ...] = ()
    """"style", "coarse", "fine" (only with coarse), "bias" (with coarse and fine), or files in these layouts. Default:
    coarse, fine and bias where `weights` has all three, else style."""
    expert_weights: dict[str, float] = field(default_factory=dict)
    """Of the experts by kind, such as bias = 0.5; 1 for those not named."""
    weights: str = "DiffSynth-Studio/Qwen-Image-i2L"
    """Folder or Hugging Face id that holds the experts that are given by name: Qwen-Image-i2L-Style.safetensors, ..."""
    encoders: str = "DiffSynth-Studio/General-Image-Encoders"
    """Folder or Hugging Face id that holds SigLIP2-G384/model.safetensors and DINOv3-7B/model.safetensors."""
    pictures: int | tuple[str, ...] = 0
    """How many of the training pictures are looked at, spread evenly over them, or which, by file name. 0: all."""
    strength: float | Literal["auto"] = 1.0
    """The seed is multiplied by this: 1 is what the experts predict, 0 is `random`. "auto" compares 0, 0.25, 0.5, 0.75,
    1 and 1.25 by the stable loss of training pictures, each with the seed that the other pictures give."""
    mode: Literal["seed", "merge"] = "seed"
    """seed: truncated to the adapter's rank, the prediction is where the adapter starts. merge: the whole prediction is
    held on the frozen base, and a fresh adapter is trained on top; the saved LoRA holds both."""
    energy: float | None = None
    """Instead of `[adapter] rank`: the smallest rank at which the seed keeps this share of its energy, such as 0.95."""
    rank_per_module: bool = False
    """With `energy`: a rank for each module, the smallest that keeps the share there."""

    def problems(self) -> list[str]:
        found = []
        if len(set(self.experts)) < len(self.experts):
            found.append("experts must not name an expert twice")
        if self.strength != "auto" and not (self.strength >= 0 and math.isfinite(self.strength)):
            found.append('strength must be at least 0, or "auto"')
        for name, value in self.expert_weights.items():
            if name not in ORDER:
                found.append(f'expert_weights: "{name}" is none of {", ".join(ORDER)}')
            elif not math.isfinite(value):
                found.append(f"expert_weights: {name} must be a finite number")
        if isinstance(self.pictures, int) and self.pictures < 0:
            found.append("pictures must not be negative")
        if self.energy is not None and not 0 < self.energy <= 1:
            found.append("energy must be above 0 and at most 1")
        if self.energy is not None and self.mode == "merge":
            found.append('energy has no effect with mode = "merge": the prediction is held whole')
        if self.rank_per_module and self.energy is None:
            found.append("rank_per_module has no effect without energy")
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
        return encoders.RESOLUTIONS.get(self.kind)

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
    for name in _experts(config):
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
    found += [f"expert_weights: {kind} is not among the experts" for kind in config.expert_weights if kind not in kinds]
    if any(kind != "bias" for kind in kinds):
        problems = [sources.problem(config.encoders, file) for file in encoders.ENCODER_FILES]
        found += [f"encoders: {problem}" for problem in problems if problem] or _encoder_problems(config, geometries)
    return found


def downloads(config: Config) -> list[tuple[str, str]]:
    """(Hugging Face id, file) of what `initialize` would download."""
    experts = _experts(config)
    wanted = [_place(config, name) for name in experts]
    if set(experts) != {"bias"}:
        wanted += [(config.encoders, file) for file in encoders.ENCODER_FILES]
    return [(source, file) for source, file in wanted if sources.cached(source, file) is None]


def initialize(context: InitContext, config: Config) -> Seed:
    """The LoRA that the experts predict from `context.images`: all ranks, effective, fp32. ValueError if it cannot be.

    Rank 4 for each picture and expert in the order style, coarse, fine, with `a` divided by the number of pictures;
    then Bias as it is.
    """
    indices = _choose_pictures(context.images, config.pictures)
    pictures = [context.images[i] for i in indices]
    seconds: dict[str, float] = {}
    with _timed(seconds, "locate"):
        found = [_recognise(name, sources.locate(*_place(config, name))) for name in _experts(config)]
        if problems := [*config.problems(), *_combination_problems([source.kind for source in found])]:
            raise ValueError("; ".join(problems))
        found.sort(key=lambda source: ORDER.index(source.kind))
        _check_fit(found, context)
    if "coarse" in (kinds := [source.kind for source in found]) and "fine" not in kinds:
        context.say("i2L: coarse without fine, with few pictures, drags their content into every picture")

    predictions = _predictions(context, config, found, pictures, seconds)
    strength, tried = config.strength, None
    if strength == "auto":
        with _timed(seconds, "strength"):
            strength, tried = _choose_strength(context, config, predictions, indices)
    with _timed(seconds, "merge"):
        whole = predictions.combine(config.expert_weights, range(len(pictures)))
        factors = {module: scale(x, strength) for module, x in whole.items()} if strength else {}
    report: dict[str, Any] = {
        "method": "i2l",
        "mode": config.mode,
        "experts": [{"expert": source.kind, "file": str(source.path), **_fingerprint(source)} for source in found],
        "expert_weights": config.expert_weights,
        "pictures": [path.name for path in pictures],
        "strength": strength,
        "modules": len(whole),
        "incoming_rank": max(rank(x) for x in whole.values()),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
    }
    if tried is not None:
        report["tried"] = tried
    weights = AdapterWeights(factors)
    if config.mode == "merge":
        return Seed(AdapterWeights({}), report, constant=weights if factors else None)
    if config.energy is None or not factors:
        return Seed(weights, report)
    trained = {name: x for name, x in factors.items() if name in context.modules}
    uniform, pattern = ranks_for_energy(trained, config.energy)
    if not config.rank_per_module:
        context.say(f"i2L: rank {uniform} keeps {config.energy:.0%} of the energy")
        return Seed(weights, report, rank=uniform)
    context.say(
        f"i2L: ranks {min(pattern.values())} to {max(pattern.values())} keep {config.energy:.0%} of the energy of each "
        f"module, {sum(pattern.values()) / len(pattern):.1f} on average"
    )
    return Seed(weights, report, rank_pattern=pattern)


def _experts(config: Config) -> tuple[str, ...]:
    """Those that were asked for; else the recommended ones where they can be had, else style."""
    if config.experts:
        return config.experts
    best = ORDER[1:]
    return best if all(sources.problem(config.weights, FILES[name]) is None for name in best) else ORDER[:1]


def _choose_pictures(images: Sequence[Path], wanted: int | tuple[str, ...]) -> list[int]:
    """Positions in `images`. ValueError if a named picture is not among them."""
    if not images:
        raise ValueError("i2L needs at least one picture")
    if isinstance(wanted, int):
        return _spread(len(images), wanted or len(images))
    names = [path.name for path in images]
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"[init.i2l] pictures: {', '.join(missing)}: not among the training pictures")
    return [names.index(name) for name in wanted]


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of 0 .. count - 1, evenly."""
    chosen = min(count, limit)
    return [index * count // chosen for index in range(chosen)]


@dataclass(frozen=True)
class _Predictions:
    """What each expert says to each picture, before anything is chosen."""

    by_picture: dict[str, dict[str, Factors]]
    """kind -> module -> (a: B rank in, b: B out rank)"""
    static: dict[str, LowRank]
    """Bias"""

    def combine(self, weights: Mapping[str, float], pictures: Sequence[int]) -> dict[str, LowRank]:
        """One LoRA: the mean over `pictures` of every expert, then Bias."""
        parts: dict[str, list[LowRank]] = {}
        for kind, predicted in self.by_picture.items():
            for module, pair in predicted.items():
                parts.setdefault(module, []).append(scale(merge_pictures(pair, pictures), weights.get(kind, 1.0)))
        for module, factors in self.static.items():
            parts.setdefault(module, []).append(scale(factors, weights.get("bias", 1.0)))
        return {module: concatenate(group) for module, group in parts.items()}


def _choose_strength(
    context: InitContext, config: Config, predictions: _Predictions, indices: Sequence[int]
) -> tuple[float, dict[str, Any]]:
    """The strength at which the others' seed helps a picture most, and the mean losses of all candidates.

    The seed that is tried on a picture never saw it: else it would be praised for copying. Not truncated.
    """
    if context.try_seed is None:
        raise ValueError('strength = "auto" needs the base and captions; give a number here')
    if len(indices) < 2:
        raise ValueError('strength = "auto" needs at least two pictures: each is tried with the seed of the others')
    places = _spread(len(indices), MAX_TRIALS)
    losses = torch.zeros(len(places), len(STRENGTHS))
    for row, place in enumerate(tqdm(places, "i2L strength", unit="picture", leave=False, disable=None)):
        others = [other for other in range(len(indices)) if other != place]
        whole = predictions.combine(config.expert_weights, others)
        for column, strength in enumerate(STRENGTHS):
            seed = {module: scale(x, strength) for module, x in whole.items()} if strength else {}
            losses[row, column] = context.try_seed(AdapterWeights(seed), indices[place])
    means = losses.mean(0)
    best = STRENGTHS[int(means.argmin())]
    shown = ", ".join(f"{strength:g}: {float(loss):.4f}" for strength, loss in zip(STRENGTHS, means, strict=True))
    context.say(f"i2L: strength {best:g} is best for pictures that the seed has not seen ({shown})")
    return best, {"strengths": STRENGTHS, "losses": means.tolist(), "pictures": len(places)}


def _predictions(
    context: InitContext,
    config: Config,
    found: Sequence[_Source],
    pictures: Sequence[Path],
    seconds: dict[str, float],
) -> _Predictions:
    """From the cache, or predicted now and kept there."""
    by_picture, static, missing = dict[str, dict[str, Factors]](), dict[str, LowRank](), list[_Source]()
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures]
    files = {source.kind: _cache_file(context, config, source, digests) for source in found}
    for source in found:
        if source.geometry is None:
            static = dict(read_lora(source.path)[0].factors)
        elif (file := files[source.kind]) is not None and (cached := _read_predictions(file)) is not None:
            context.say(f"i2L: {source.kind}, as predicted before")
            by_picture[source.kind] = cached
        else:
            missing.append(source)
    embeddings, residuals = _look(context, config, missing, pictures, seconds)
    for source in missing:
        context.say(f"i2L: {source.kind} ({source.path})")
        with _timed(seconds, source.kind):
            residual = residuals[source.resolution] if source.resolution is not None else None
            progress = _progress(f"i2L {source.kind}", "block")
            predicted = expert.factors(source.path, embeddings.to(context.device), residual, progress=progress)
        by_picture[source.kind] = predicted
        if (file := files[source.kind]) is not None:
            halves = {
                f"{name}.{half}": x for name, pair in predicted.items() for half, x in zip("ab", pair, strict=True)
            }
            write_tensors(file, halves)
    return _Predictions({kind: by_picture[kind] for kind in ORDER if kind in by_picture}, static)


def _cache_file(context: InitContext, config: Config, source: _Source, digests: Sequence[str]) -> Path | None:
    """Named by all that the prediction depends on."""
    if context.cache is None or source.geometry is None:
        return None
    looked = encoders.identity(config.encoders)
    if source.resolution is not None:
        looked += qwen_image.identity(context.base)
    name = key("i2l", sample(source.path), looked, context.device.type, list(digests))
    return context.cache / "i2l" / f"{source.kind}-{name[:32]}.safetensors"


def _read_predictions(file: Path) -> dict[str, Factors] | None:
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
    except SafetensorError:
        return None  # cut short: predicted again
    return {name[:-2]: (tensors[name], tensors[f"{name[:-2]}.b"]) for name in tensors if name.endswith(".a")}


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
    context: InitContext,
    config: Config,
    found: Sequence[_Source],
    pictures: Sequence[Path],
    seconds: dict[str, float],
) -> tuple[Tensor, dict[int, Tensor]]:
    """Image embeddings, B embedding_size, and residuals by resolution, as far as the experts need them."""
    if all(source.geometry is None for source in found):
        return torch.empty(0), {}
    resolutions = sorted({source.resolution for source in found if source.resolution is not None})
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    with _timed(seconds, "pictures"):
        squares: dict[int, list[Image.Image]] = {size: [] for size in {encoders.CROP_SIZE, *resolutions}}
        for path in pictures:  # only the squares are kept: a hundred photographs would not fit into memory
            picture = open_picture(path)
            for size, crops in squares.items():
                crops.append(encoders.cover_crop(picture, size))
    context.say(f"i2L: encoding {len(pictures)} pictures")
    with _timed(seconds, "encoders"):
        embeddings = encoders.encode_pictures(squares[encoders.CROP_SIZE], config.encoders, context.device, dtype)
    residuals = {}
    if resolutions:
        context.say("i2L: reading the pictures with Qwen2.5-VL")
        with _timed(seconds, "qwen_vl"):
            wanted = {size: squares[size] for size in resolutions}
            residuals = encoders.qwen_vl_residuals(wanted, context.base, context.device, dtype)
    for name, tensor in (("image embeddings", embeddings), *(("hidden states", t) for t in residuals.values())):
        for path, row in zip(pictures, tensor, strict=True):
            if not bool(row.isfinite().all()):
                raise ValueError(f"{path}: NaN or infinity in its {name}, computed in {dtype}")
    return embeddings, residuals


def _progress(title: str, unit: str) -> Callable[[Iterable[int]], Iterable[int]]:
    """A bar on a terminal, nothing in a log."""
    return lambda items: tqdm(items, desc=title, unit=unit, leave=False, disable=None)


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
