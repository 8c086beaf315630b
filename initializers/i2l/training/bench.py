"""Measure time and memory of i2L at the published sizes: python -m initializers.i2l bench

Writes experts of the published sizes with random weights to the disk and predicts with them as with real ones. The time
that only reading the file takes is printed for comparison. Image embeddings and hidden states are random too;
--encoders also times the image encoders SigLIP2 and DINOv3. Memory does not count the page cache (RssAnon).
"""

import argparse
import math
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import DINOv3ViTModel, SiglipVisionModel

from initializers.i2l import encoders, expert
from initializers.i2l.layout import FILES, PUBLISHED, Geometry, expert_layout
from initializers.i2l.predictions import Predictions, read_predictions, stream_predictions
from trainer.cli import guarded
from trainer.config import ConfigError
from trainer.files import random_tensors, stream_tensors, write_json
from trainer.hardware.threads import parallel_map
from trainer.lowrank import truncate

EXPERTS = ("style", "coarse", "fine")
DTYPE = torch.bfloat16  # of the published files
ENCODER_BYTES = 15.8e9  # 1.16 and 6.72 B parameters
CHUNK = 1 << 24  # bytes read at once, when reading alone is measured


class Peak:
    """Peak of this process's anonymous memory in a `with` block, in bytes above what it was at the beginning."""

    def __enter__(self) -> "Peak":
        self.bytes, self._before, self._done = 0, _anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, _anonymous() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _anonymous() -> int:
    """Bytes of memory that is not backed by a file: RssAnon of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this needs Linux")


def _bytes_from_disk() -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


def _drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A file of random weights in the precision of the published ones."""
    tensors = random_tensors(shapes, DTYPE)
    shown = tqdm(tensors, f"write {path.name}", total=len(shapes), unit="tensor", disable=None)
    stream_tensors(path, shapes, shown, DTYPE)


def make_encoders(folder: Path) -> None:
    """Files of SigLIP2 and DINOv3 in the published layout, with random weights."""
    for name, kind, config, key in (
        (encoders.SIGLIP_FOLDER, SiglipVisionModel, encoders.published_siglip_config(), encoders.siglip_key),
        (encoders.DINOV3_FOLDER, DINOv3ViTModel, encoders.published_dinov3_config(), encoders.dinov3_key),
    ):
        with torch.device("meta"):
            model = kind(config)
        shapes = {key(own): tuple(tensor.shape) for own, tensor in model.state_dict().items()}
        make_weights(folder / name / "model.safetensors", shapes)
        write_json(folder / name / "config.json", config.to_diff_dict())


def measure_encoders(folder: Path, num_pictures: int, device: torch.device) -> dict[str, Any]:
    """Time and memory to load one encoder after the other and encode so many pictures of 1024 x 1024."""
    pictures = [Image.effect_noise((1024, 1024), 64).convert("RGB") for _ in range(num_pictures)]
    began = time.perf_counter()
    with Peak() as peak:
        encoders.encode_pictures(pictures, str(folder), device, DTYPE)
    result = {"pictures": num_pictures, "seconds": time.perf_counter() - began, "peak_bytes": peak.bytes}
    if device.type == "cuda":
        result["peak_bytes_gpu"] = torch.cuda.max_memory_allocated(device)
    return result


def read_alone(path: Path) -> float:
    """Seconds that only reading the file from the disk takes."""
    _drop_from_page_cache(path)
    buffer, began = bytearray(CHUNK), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def measure(kind: str, folder: Path, num_pictures: int, device: torch.device) -> dict[str, Any]:
    """Time and memory of a prediction by the expert in `folder`: with its file read from the disk, then from the page
    cache, then once more with the prediction written to a file."""
    path, geometry = folder / FILES[kind], PUBLISHED[kind].geometry
    embeddings, residual = _random_inputs(geometry, num_pictures, device)
    result: dict[str, Any] = {"expert": kind, "pictures": num_pictures, "seconds_reading_alone": read_alone(path)}
    _drop_from_page_cache(path)
    before = _bytes_from_disk()
    for source in ("disk", "page_cache"):
        began = time.perf_counter()
        with Peak() as peak:
            for _ in expert.predict(path, embeddings, residual):
                pass
        result[f"seconds_from_{source}"] = time.perf_counter() - began
        result[f"peak_bytes_from_{source}"] = peak.bytes
        if source == "disk":
            result["bytes_read"] = _bytes_from_disk() - before
    output, began = _prediction_file(folder, kind), time.perf_counter()
    shapes = expert.factor_shapes(geometry, num_pictures)
    stream_predictions(output, shapes, expert.predict(path, embeddings, residual))
    result["seconds_from_page_cache_and_kept"] = time.perf_counter() - began
    result["bytes_kept"] = output.stat().st_size
    result["ratio_to_reading_alone"] = result["seconds_from_disk"] / result["seconds_reading_alone"]
    return result


def _random_inputs(geometry: Geometry, num_pictures: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Image embeddings, and the residual that the expert takes, if it takes one."""
    random = torch.Generator().manual_seed(1)
    embeddings = torch.randn(num_pictures, geometry.embedding_size, generator=random).to(device) * 0.1
    if geometry.residual is None:
        return embeddings, None
    size = (num_pictures, geometry.residual.num_tokens, geometry.residual.width)
    return embeddings, torch.randn(size, generator=random) * 0.05


def _prediction_file(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.predicted.safetensors"


def measure_merge(kinds: list[str], folder: Path, num_pictures: int, rank: int) -> dict[str, Any]:
    """Time and memory to combine what the experts predicted and truncate every module to `rank`."""
    found = {kind: read_predictions(_prediction_file(folder, kind)) for kind in kinds}
    predictions = Predictions({kind: pair for kind, pair in found.items() if pair is not None}, {}, None)
    whole = predictions.combine({}, range(num_pictures))
    began = time.perf_counter()
    with Peak() as peak:
        modules = tqdm(whole, "truncate", unit="module", leave=False, disable=None)
        for _ in parallel_map(lambda module: truncate(whole[module], rank), modules):
            pass
    incoming = max(predictions.ranks(num_pictures).values())
    seconds = time.perf_counter() - began
    return {"modules": len(whole), "from_rank": incoming, "to_rank": rank, "seconds": seconds, "peak_bytes": peak.bytes}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is measured, and where."""

    kinds: list[str]
    pictures: list[int]
    rank: int
    folder: Path
    device: torch.device
    encoders: bool = False

    def problems(self) -> list[str]:
        found = []
        if min(*self.pictures, self.rank) < 1:
            found.append("--pictures and --rank must be at least 1")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            found.append(f"--device {self.device}: there is no CUDA GPU here")
        needed, free = self.num_bytes, shutil.disk_usage(self.folder).free
        if needed > free * 0.95:
            sizes = f"{needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free"
            found.append(f"--folder {self.folder}: {sizes}; choose another --folder")
        return found

    @property
    def num_bytes(self) -> float:
        """Bytes of all files that are written: experts, the largest predictions, encoders."""
        weights = sum(expert_bytes(kind) for kind in self.kinds)
        factors = [
            x
            for kind in self.kinds
            for pair in expert.factor_shapes(PUBLISHED[kind].geometry, 1).values()
            for x in pair
        ]
        predicted = 4 * max(self.pictures) * sum(map(math.prod, factors))
        return weights + predicted + self.encoders * ENCODER_BYTES


def expert_bytes(kind: str) -> int:
    """Size of an expert's file of weights."""
    return sum(map(math.prod, expert_layout(PUBLISHED[kind].geometry).values())) * DTYPE.itemsize


def bench(request: Request) -> dict[str, Any]:
    """Measure, print a line for each measurement, and delete the files again. Returns the report."""
    runs, merges, encoded = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="i2l-bench-", dir=request.folder) as name:
        folder = Path(name)
        for kind in request.kinds:
            make_weights(folder / FILES[kind], expert_layout(PUBLISHED[kind].geometry))
        for count in request.pictures:
            for kind in request.kinds:
                runs.append(measure(kind, folder, count, request.device))
                print(_line(runs[-1], expert_bytes(kind)), flush=True)
            merges.append({"pictures": count, **measure_merge(request.kinds, folder, count, request.rank)})
            print("truncate {modules} modules from rank {from_rank} to {to_rank}: {seconds:.1f} s".format(**merges[-1]))
        if request.encoders:
            make_encoders(folder)
            for count in request.pictures:
                encoded.append(measure_encoders(folder, count, request.device))
                text = "encode {pictures} pictures with SigLIP2 and DINOv3, loading included: {seconds:.1f} s"
                print(f"{text.format(**encoded[-1])}; memory {encoded[-1]['peak_bytes'] / 1e9:.1f} GB", flush=True)
    return {"hardware": _hardware(request.device), "experts": runs, "merges": merges, "encoders": encoded}


def _hardware(device: torch.device) -> dict[str, Any]:
    found = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    return {**found, "threads": torch.get_num_threads(), "device": str(device)}


def _line(run: dict[str, Any], size: int) -> str:
    memory = max(run["peak_bytes_from_disk"], run["peak_bytes_from_page_cache"])
    seconds = {name.removeprefix("seconds_"): f"{value:.1f} s" for name, value in run.items() if "seconds" in name}
    return (
        f"{run['expert']}, {run['pictures']} pictures: {seconds['from_disk']} from the disk, "
        f"{run['ratio_to_reading_alone']:.2f} times reading the file alone ({seconds['reading_alone']}); "
        f"{seconds['from_page_cache']} from the page cache; {seconds['from_page_cache_and_kept']} with "
        f"{run['bytes_kept'] / 1e9:.2f} GB of predictions written. The file has {size / 1e9:.2f} GB, "
        f"{run['bytes_read'] / 1e9:.2f} GB of it were read from the disk; memory {memory / 1e6:.0f} MB"
    )


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m initializers.i2l bench", description=__doc__, formatter_class=raw)
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=["style"], help="default: style (4.8 GB)")
    parser.add_argument(
        "--pictures", nargs="+", type=int, default=[1, 8], metavar="N", help="numbers of pictures (default: 1 8)"
    )
    parser.add_argument("--rank", type=int, default=32, help="rank that the result is truncated to (default: 32)")
    parser.add_argument("--device", default="cpu", help="device that computes, such as cuda (default: cpu)")
    parser.add_argument("--encoders", action="store_true", help="time the image encoders too (16 GB more on the disk)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="folder for the files, which are deleted again (default: this one)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there, as JSON")
    options = parser.parse_args(arguments)

    def program() -> None:
        request = Request(
            kinds=options.experts,
            pictures=options.pictures,
            rank=options.rank,
            folder=options.folder,
            device=torch.device(options.device),
            encoders=options.encoders,
        )
        if problems := request.problems():
            raise ConfigError(problems)
        report = bench(request)
        if options.output:
            write_json(options.output, report)

    return guarded(program)
