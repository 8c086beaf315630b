"""The LoRA that each expert predicts from each picture: read from the cache, or computed and kept there."""

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from initializers.i2l import encoders, expert
from initializers.i2l.expert import Factors, mean_over_pictures
from initializers.i2l.recognise import ORDER, ExpertFile
from trainer import qwen_image
from trainer.adapter import InitContext
from trainer.data.cache import Cache, key
from trainer.data.pictures import open_picture
from trainer.errors import UserError
from trainer.files import LayoutError, content_hash, differs, stream_tensors, write_json
from trainer.formats import read_lora
from trainer.lowrank import LowRank, concatenate, rank, scale

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Predictions:
    """The LoRA that each expert predicts from each picture, before they are combined: in files, mapped into memory."""

    by_picture: dict[str, dict[str, Factors]]
    """kind -> module -> (a: B rank in, b: B out rank)"""
    static: dict[str, LowRank]
    """Bias, if it is among the experts."""
    folder: tempfile.TemporaryDirectory[str] | None
    """Where the files are, if no cache keeps them."""
    first_seconds: dict[str, float | None] = field(default_factory=dict)
    """What each stage took when it was computed, now or when it went into the cache; None if that is not known. Empty
    without a cache."""

    def combine(
        self, weights: Mapping[str, float], pictures: Sequence[int], strength: float = 1.0
    ) -> Mapping[str, LowRank]:
        """One LoRA, concatenated on rank: the mean over `pictures` of each expert, then Bias, each times its weight (1
        if `weights` has none); all times `strength`.

        A module's factors are computed when they are asked for, so that all of them are never in memory at once.
        """
        return _Combined(self, dict(weights), list(pictures), strength)

    def ranks(self, num_pictures: int) -> dict[str, int]:
        """The rank of each module when so many pictures are combined."""
        found: dict[str, int] = {}
        for predicted in self.by_picture.values():
            for module, (a, _) in predicted.items():
                found[module] = found.get(module, 0) + num_pictures * a.shape[1]
        for module, factors in self.static.items():
            found[module] = found.get(module, 0) + rank(factors)
        return found


class _Combined(Mapping[str, LowRank]):
    """What `Predictions.combine` returns."""

    def __init__(self, predictions: Predictions, weights: dict[str, float], pictures: list[int], strength: float):
        self._predictions, self._weights, self._pictures, self._strength = predictions, weights, pictures, strength
        self._names = list(dict.fromkeys(chain(*predictions.by_picture.values(), predictions.static)))

    def __getitem__(self, module: str) -> LowRank:
        parts = []
        for kind, found in self._predictions.by_picture.items():
            if module in found:
                a, b = (factor[self._pictures] for factor in found[module])
                parts.append(scale(LowRank(*mean_over_pictures((a, b))), self._weights.get(kind, 1.0)))
        if module in self._predictions.static:
            parts.append(scale(self._predictions.static[module], self._weights.get("bias", 1.0)))
        if not parts:
            raise KeyError(module)
        return scale(concatenate(parts), self._strength)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def predict_pictures(
    context: InitContext,
    encoders_from: str,
    experts: Sequence[ExpertFile],
    paths: Sequence[Path],
    seconds: dict[str, float],
) -> Predictions:
    """What the experts predict from the pictures, read from the cache or computed now and kept there.

    encoders_from: folder or id of the image encoders. The time of each stage is added to `seconds`. ValueError if a
    picture's embedding or a prediction has NaN or infinity.
    """
    temporary: tempfile.TemporaryDirectory[str] | None = None
    if context.cache is not None:
        folder = context.cache / "i2l"
    else:
        temporary = tempfile.TemporaryDirectory(prefix="i2l-", ignore_cleanup_errors=True)
        folder = Path(temporary.name)
    digests = picture_digests(paths)
    files = {one.kind: _cache_file(folder, context, encoders_from, one, digests) for one in experts if one.geometry}
    by_picture, static, missing = dict[str, dict[str, Factors]](), dict[str, LowRank](), list[ExpertFile]()
    for expert_file in experts:
        if expert_file.geometry is None:
            static = dict(read_lora(expert_file.path)[0].factors)
        elif found := read_predictions(files[expert_file.kind]):
            context.log(f"i2L: {expert_file.kind}: predicted before, read from the cache")
            by_picture[expert_file.kind] = found
        else:
            missing.append(expert_file)
    residuals = dict[int, Tensor]()
    if resolutions := [one.resolution for one in missing if one.resolution is not None]:
        with timed(seconds, "qwen_vl"):  # before the image encoders: it may still be loaded, from encoding the captions
            residuals = _residuals(context, resolutions, paths, digests)
    if context.text_encoder is not None:
        context.text_encoder.unload()
    if missing:
        with timed(seconds, "encoders"):
            embeddings = _embeddings(context, encoders_from, paths, digests).to(context.device)
    for expert_file in missing:
        context.log(f"i2L: {expert_file.kind}: predicting with {expert_file.path}")
        with timed(seconds, expert_file.kind):
            residual = None if expert_file.resolution is None else residuals[expert_file.resolution]
            by_picture[expert_file.kind] = _predict(files[expert_file.kind], expert_file, embeddings, residual)
        _keep_seconds(context, expert_file.kind, [files[expert_file.kind].name], seconds[expert_file.kind])
    ordered = {kind: by_picture[kind] for kind in ORDER if kind in by_picture}
    return Predictions(ordered, static, temporary, _first_seconds(context, encoders_from, files, experts, digests))


def picture_digests(paths: Iterable[Path]) -> list[str]:
    """sha256 of each file, in hex."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def _predict(file: Path, expert_file: ExpertFile, embeddings: Tensor, residual: Tensor | None) -> dict[str, Factors]:
    """Predict into `file`, and map it into memory."""
    assert expert_file.geometry is not None
    predicted = expert.predict(
        expert_file.path, embeddings, residual, progress=_progress(f"i2L {expert_file.kind}", "block")
    )
    stream_predictions(file, expert.factor_shapes(expert_file.geometry, len(embeddings)), predicted)
    return _mapped(file)


def stream_predictions(
    file: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    predicted: Iterable[tuple[str, Factors]],
) -> None:
    """Write predictions module by module, as they are computed: those of many pictures would not fit into memory."""
    halves = {f"{name}.{half}": shape for name, pair in shapes.items() for half, shape in zip("ab", pair, strict=True)}
    tensors = ((f"{name}.{half}", x) for name, pair in predicted for half, x in zip("ab", pair, strict=True))
    stream_tensors(file, halves, tensors, summed=True)


def _cache_file(
    folder: Path, context: InitContext, encoders_from: str, expert_file: ExpertFile, digests: Sequence[str]
) -> Path:
    """The file of an expert's prediction, named by a hash of all that it depends on."""
    read_by = encoders.identity(encoders_from)
    if expert_file.resolution is not None:
        read_by += _reader(context)
    name = key("i2l", content_hash(expert_file.path), read_by, context.device.type, list(digests))
    return folder / f"{expert_file.kind}-{name[:32]}.safetensors"


def _reader(context: InitContext) -> list[str]:
    """What caches know Qwen-VL by."""
    return qwen_image.identity(context.base) if context.text_encoder is None else context.text_encoder.identity()


def read_predictions(file: Path) -> dict[str, Factors] | None:
    """Module -> (a, b), mapped into memory; None if there is no whole file, and a warning if it is damaged."""
    if not file.is_file():
        return None
    try:
        if differs(file):
            raise LayoutError("its tensors differ from their checksum")
        return _mapped(file)
    except (LayoutError, SafetensorError) as error:
        log.warning("%s is damaged (%s): the LoRA is predicted again", file, error)
        return None


def _mapped(file: Path) -> dict[str, Factors]:
    tensors = load_file(file)
    return {name[:-2]: (tensors[name], tensors[f"{name[:-2]}.b"]) for name in tensors if name.endswith(".a")}


def _residuals(
    context: InitContext, resolutions: Sequence[int], paths: Sequence[Path], digests: Sequence[str]
) -> dict[int, Tensor]:
    """Resolution -> hidden states of Qwen2.5-VL for each picture, B num_tokens width. Each picture is cached by itself,
    so that one more picture or expert does not encode the others again."""
    device, dtype = context.device, dtype_for(context.device)
    wanted = [(resolution, i) for resolution in resolutions for i in range(len(paths))]

    def encode(positions: list[int]) -> list[Tensor]:
        context.log("i2L: encoding the pictures with Qwen2.5-VL")
        chosen = [wanted[position] for position in positions]
        squares = dict[int, list[Image.Image]]()
        for resolution, i in chosen:
            squares.setdefault(resolution, []).append(encoders.cover_crop(open_picture(paths[i]), resolution))
        states = encoders.qwen_vl_residuals(squares, context.base, device, dtype, context.text_encoder)
        rows = [row for resolution in squares for row in states[resolution]]
        return _finite(rows, [paths[i] for _, i in chosen], f"hidden states, computed in {dtype}")

    rows = _cached(context, "qwen_vl", _residual_names(context, resolutions, digests), encode)
    return {
        size: torch.stack([x for (own, _), x in zip(wanted, rows, strict=True) if own == size]) for size in resolutions
    }


def _residual_names(context: InitContext, resolutions: Sequence[int], digests: Sequence[str]) -> list[str]:
    """What the cache knows the hidden states by: all pictures at the first resolution, then at the next."""
    model, device = _reader(context), context.device.type
    return [key("i2l residual", model, device, resolution, digest) for resolution in resolutions for digest in digests]


def _embeddings(context: InitContext, encoders_from: str, paths: Sequence[Path], digests: Sequence[str]) -> Tensor:
    """Image embeddings, B embedding_size; cached like `_residuals`."""
    device, dtype = context.device, dtype_for(context.device)

    def encode(positions: list[int]) -> list[Tensor]:
        context.log(f"i2L: encoding {len(positions)} pictures with SigLIP2 and DINOv3")
        chosen = [paths[i] for i in positions]
        # photographs are large: each is cropped as soon as it is read
        squares = [encoders.cover_crop(open_picture(path), encoders.CROP_SIZE) for path in chosen]
        rows = encoders.encode_pictures(squares, encoders_from, device, dtype)
        return _finite(rows, chosen, f"image embeddings, computed in {dtype}")

    return torch.stack(_cached(context, "encoders", _embedding_names(context, encoders_from, digests), encode))


def _embedding_names(context: InitContext, encoders_from: str, digests: Sequence[str]) -> list[str]:
    model = encoders.identity(encoders_from)
    return [key("i2l embedding", model, context.device.type, digest) for digest in digests]


def _cached(
    context: InitContext, stage: str, names: Sequence[str], compute: Callable[[list[int]], list[Tensor]]
) -> list[Tensor]:
    """The tensor of each name. `compute` gets the positions of all missing ones at once, since it loads models."""
    if context.cache is None:
        return compute(list(range(len(names))))

    def computed(positions: list[int]) -> list[Tensor]:
        spent: dict[str, float] = {}
        with timed(spent, stage):
            rows = compute(positions)
        if len(positions) == len(set(names)):  # of a part of them it would not be what all cost
            _keep_seconds(context, stage, names, spent[stage])
        return rows

    cache = Cache(context.cache / "i2l" / "pictures")
    return cache.get(names, computed, what="i2L", batch_size=len(names), quiet=True)


# --- seconds: kept beside what was computed, so that who finds it in the cache still knows its price -------


def _seconds_file(context: InitContext, stage: str, names: Sequence[str]) -> Path | None:
    """Where the seconds of a stage are kept that gave what the cache knows by these names, in whatever order."""
    if context.cache is None:
        return None
    return context.cache / "i2l" / "seconds" / f"{stage}-{key(sorted(set(names)))[:32]}.json"


def _keep_seconds(context: InitContext, stage: str, names: Sequence[str], seconds: float) -> None:
    """Only after computing all that `names` stand for: the time of reading it from the cache is none."""
    if file := _seconds_file(context, stage, names):
        write_json(file, {"seconds": seconds})


def _first_seconds(
    context: InitContext,
    encoders_from: str,
    files: Mapping[str, Path],
    experts: Sequence[ExpertFile],
    digests: Sequence[str],
) -> dict[str, float | None]:
    """What `Predictions.first_seconds` says."""
    if context.cache is None:
        return {}
    stages = {kind: [file.name] for kind, file in files.items()}
    if files:
        stages["encoders"] = _embedding_names(context, encoders_from, digests)
    if resolutions := [one.resolution for one in experts if one.resolution is not None]:
        stages["qwen_vl"] = _residual_names(context, resolutions, digests)
    found: dict[str, float | None] = {}
    for stage, names in stages.items():
        file = _seconds_file(context, stage, names)
        found[stage] = json.loads(file.read_text(encoding="utf-8"))["seconds"] if file and file.exists() else None
    return found


def _finite(rows: Iterable[Tensor], paths: Sequence[Path], what: str) -> list[Tensor]:
    """The rows, on the CPU. ValueError names the first picture whose row is not finite."""
    found = [row.cpu() for row in rows]
    for path, row in zip(paths, found, strict=True):
        if not bool(row.isfinite().all()):
            raise UserError(f"{path}: NaN or infinity in its {what}. Look at it, or leave it out of the pictures")
    return found


def dtype_for(device: torch.device) -> torch.dtype:
    """The precision that encoders run in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _progress(title: str, unit: str) -> Callable[[Iterable[int]], Iterable[int]]:
    """A bar on a terminal, nothing in a log."""
    return lambda items: tqdm(items, desc=title, unit=unit, leave=False, disable=None)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Store how long the block takes under `stage`."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
