"""What each expert says to each picture, from the cache or predicted now."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from initializers.i2l.recognise import ORDER, Source
from trainer import qwen_image
from trainer.adapter import InitContext
from trainer.data.cache import Cache, key
from trainer.data.pictures import open_picture
from trainer.files import sample, stream_tensors
from trainer.formats import read_lora
from trainer.lowrank import LowRank, concatenate, rank, scale


@dataclass(frozen=True)
class Predictions:
    """What each expert says to each picture, before anything is chosen. It lies in files, mapped into memory."""

    by_picture: dict[str, dict[str, Factors]]
    """kind -> module -> (a: B rank in, b: B out rank)"""
    static: dict[str, LowRank]
    """Bias"""
    folder: tempfile.TemporaryDirectory[str] | None
    """Where the files are if nobody wants to keep them."""

    def combine(
        self, weights: Mapping[str, float], pictures: Sequence[int], strength: float = 1.0
    ) -> Mapping[str, LowRank]:
        """One LoRA: the mean over `pictures` of every expert, then Bias; all times `strength`. Each module is made when
        it is asked for, so that only as much is in memory as is looked at."""
        return _Combined(self, dict(weights), list(pictures), strength)

    def ranks(self, num_pictures: int) -> dict[str, int]:
        """Of each module, with so many pictures."""
        found: dict[str, int] = {}
        for predicted in self.by_picture.values():
            for module, (a, _) in predicted.items():
                found[module] = found.get(module, 0) + num_pictures * a.shape[1]
        for module, factors in self.static.items():
            found[module] = found.get(module, 0) + rank(factors)
        return found


class _Combined(Mapping[str, LowRank]):
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
    found: Sequence[Source],
    pictures: Sequence[Path],
    seconds: dict[str, float],
) -> Predictions:
    """From the cache, or predicted now and kept there."""
    by_picture, static, missing = dict[str, dict[str, Factors]](), dict[str, LowRank](), list[Source]()
    passing = None if context.cache is not None else tempfile.TemporaryDirectory(prefix="i2l-")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures]
    files = {
        source.kind: _cache_file(context, encoders_from, source, digests)
        for source in found
        if context.cache is not None and source.geometry is not None
    }
    for source in found:
        if source.geometry is None:
            static = dict(read_lora(source.path)[0].factors)
        elif context.cache is not None and (cached := read_predictions(files[source.kind])) is not None:
            context.log(f"i2L: {source.kind}, as predicted before")
            by_picture[source.kind] = cached
        else:
            missing.append(source)
    embeddings, residuals = _look(context, encoders_from, missing, pictures, digests, seconds)
    for source in missing:
        context.log(f"i2L: {source.kind} ({source.path})")
        with timed(seconds, source.kind):
            residual = residuals[source.resolution] if source.resolution is not None else None
            progress = _progress(f"i2L {source.kind}", "block")
            predicted = expert.predict(source.path, embeddings.to(context.device), residual, progress=progress)
            file = files[source.kind] if passing is None else Path(passing.name) / f"{source.kind}.safetensors"
            assert source.geometry is not None
            stream_predictions(file, expert.factor_shapes(source.geometry, len(pictures)), predicted)
        found_now = read_predictions(file)
        assert found_now is not None
        by_picture[source.kind] = found_now
    ordered = {kind: by_picture[kind] for kind in ORDER if kind in by_picture}
    return Predictions(ordered, static, passing)


def stream_predictions(
    file: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    predicted: Iterable[tuple[str, Factors]],
) -> None:
    """As they come: those of many pictures would not fit into memory."""
    halves = {f"{name}.{half}": shape for name, pair in shapes.items() for half, shape in zip("ab", pair, strict=True)}
    tensors = ((f"{name}.{half}", x) for name, pair in predicted for half, x in zip("ab", pair, strict=True))
    stream_tensors(file, halves, tensors)


def _cache_file(context: InitContext, encoders_from: str, source: Source, digests: Sequence[str]) -> Path:
    """Named by all that the prediction depends on."""
    looked = encoders.identity(encoders_from)
    if source.resolution is not None:
        looked += qwen_image.identity(context.base)
    name = key("i2l", sample(source.path), looked, context.device.type, list(digests))
    assert context.cache is not None
    return context.cache / "i2l" / f"{source.kind}-{name[:32]}.safetensors"


def read_predictions(file: Path) -> dict[str, Factors] | None:
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
    except SafetensorError:
        return None  # cut short: predicted again
    return {name[:-2]: (tensors[name], tensors[f"{name[:-2]}.b"]) for name in tensors if name.endswith(".a")}


def _look(
    context: InitContext,
    encoders_from: str,
    found: Sequence[Source],
    pictures: Sequence[Path],
    digests: Sequence[str],
    seconds: dict[str, float],
) -> tuple[Tensor, dict[int, Tensor]]:
    """Image embeddings, B embedding_size, and residuals by resolution, as far as the experts need them. Each is cached
    by itself, so that one more picture or expert does not encode the others again."""
    if all(source.geometry is None for source in found):
        return torch.empty(0), {}
    dtype, where = dtype_for(context.device), context.device.type

    def embed(positions: list[int]) -> list[Tensor]:
        context.log(f"i2L: encoding {len(positions)} pictures")
        paths = [pictures[i] for i in positions]
        squares = [encoders.cover_crop(open_picture(path), encoders.CROP_SIZE) for path in paths]  # photographs are big
        rows = encoders.encode_pictures(squares, encoders_from, context.device, dtype)
        return _finite(rows, paths, f"image embeddings, computed in {dtype}")

    looks = [(source.resolution, i) for source in found if source.resolution is not None for i in range(len(pictures))]

    def read(positions: list[int]) -> list[Tensor]:
        context.log("i2L: reading the pictures with Qwen2.5-VL")
        squares, paths = dict[int, list[Image.Image]](), [pictures[looks[i][1]] for i in positions]
        for (resolution, _), path in zip([looks[i] for i in positions], paths, strict=True):
            squares.setdefault(resolution, []).append(encoders.cover_crop(open_picture(path), resolution))
        states = encoders.qwen_vl_residuals(squares, context.base, context.device, dtype, context.text_encoder)
        rows = [row for resolution in squares for row in states[resolution]]
        return _finite(rows, paths, f"hidden states, computed in {dtype}")

    residuals = dict[int, list[Tensor]]()
    if looks:  # first: Qwen2.5-VL may be loaded still, from reading the captions
        with timed(seconds, "qwen_vl"):
            model = qwen_image.identity(context.base)
            names = [key("i2l residual", model, where, resolution, digests[i]) for resolution, i in looks]
            rows = _cached(context, names, read)
        for (resolution, _), row in zip(looks, rows, strict=True):
            residuals.setdefault(resolution, []).append(row)
    if context.text_encoder is not None:
        context.text_encoder.unload()
    with timed(seconds, "encoders"):
        names = [key("i2l embedding", encoders.identity(encoders_from), where, digest) for digest in digests]
        embeddings = torch.stack(_cached(context, names, embed))
    return embeddings, {resolution: torch.stack(group) for resolution, group in residuals.items()}


def _cached(context: InitContext, names: Sequence[str], compute: Callable[[list[int]], list[Tensor]]) -> list[Tensor]:
    """The tensor of each name; `compute` gets the positions of all that are missing, at once: it loads models."""
    if context.cache is None:
        return compute(list(range(len(names))))
    cache = Cache(context.cache / "i2l" / "pictures")
    return cache.get(names, compute, what="i2L", batch_size=len(names), quiet=True)


def _finite(rows: Iterable[Tensor], paths: Sequence[Path], what: str) -> list[Tensor]:
    """The rows on the CPU. ValueError names the picture whose row is not finite."""
    found = [row.cpu() for row in rows]
    for path, row in zip(paths, found, strict=True):
        if not bool(row.isfinite().all()):
            raise ValueError(f"{path}: NaN or infinity in its {what}")
    return found


def dtype_for(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _progress(title: str, unit: str) -> Callable[[Iterable[int]], Iterable[int]]:
    """A bar on a terminal, nothing in a log."""
    return lambda items: tqdm(items, desc=title, unit=unit, leave=False, disable=None)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
