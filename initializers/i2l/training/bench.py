"""How long i2L takes at full size, and how much memory: python -m initializers.i2l bench

Experts of the published sizes with random weights are written to the disk, and read as real ones are; how long reading
the file alone takes stands beside. Image embeddings and hidden states are random too; --encoders times SigLIP2 and
DINOv3 as well. Memory is what is beyond the page cache (RssAnon).
"""

import argparse
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import DINOv3ViTModel, SiglipVisionModel

from initializers.i2l import encoders, expert
from initializers.i2l.layout import FILES, PUBLISHED, Geometry, expert_layout
from initializers.i2l.predictions import Predictions, read_predictions, stream_predictions
from trainer.cli import guarded
from trainer.files import random_tensors, stream_tensors, write_json
from trainer.hardware.threads import parallel_map
from trainer.lowrank import truncate

EXPERTS = ("style", "coarse", "fine")
DTYPE = torch.bfloat16  # of the published files
ENCODER_BYTES = 15.8e9  # 1.16 and 6.72 B parameters
CHUNK = 1 << 24  # bytes read at once, when reading alone is measured


class Peak:
    """The most anonymous memory of this process while the block runs, above what it had at its beginning, in bytes."""

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
    """RssAnon of /proc/self/status: what is not backed by a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this needs Linux")


def _bytes_from_disk() -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


def _forget(path: Path) -> None:
    """Out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], quiet: bool) -> None:
    """A file of random weights in the precision of the published ones."""
    tensors = random_tensors(shapes, DTYPE)
    shown = tqdm(tensors, f"write {path.name}", total=len(shapes), unit="tensor", disable=quiet)
    stream_tensors(path, shapes, shown, DTYPE)


def make_encoders(folder: Path, quiet: bool) -> None:
    """SigLIP2 and DINOv3 in the published layout."""
    for name, kind, config, key in (
        (encoders.SIGLIP_FOLDER, SiglipVisionModel, encoders.published_siglip_config(), encoders.siglip_key),
        (encoders.DINOV3_FOLDER, DINOv3ViTModel, encoders.published_dinov3_config(), encoders.dinov3_key),
    ):
        with torch.device("meta"):
            model = kind(config)
        shapes = {key(own): tuple(tensor.shape) for own, tensor in model.state_dict().items()}
        make_weights(folder / name / "model.safetensors", shapes, quiet)
        write_json(folder / name / "config.json", config.to_diff_dict())


def measure_encoders(folder: Path, num_pictures: int, device: torch.device) -> dict[str, Any]:
    """Load one after the other, and encode so many pictures of 1024 x 1024."""
    pictures = [Image.effect_noise((1024, 1024), 64).convert("RGB") for _ in range(num_pictures)]
    began = time.perf_counter()
    with Peak() as peak:
        encoders.encode_pictures(pictures, str(folder), device, DTYPE)
    result = {"pictures": num_pictures, "seconds": time.perf_counter() - began, "peak_bytes": peak.bytes}
    if device.type == "cuda":
        result["peak_bytes_gpu"] = torch.cuda.max_memory_allocated(device)
    return result


def read_alone(path: Path) -> float:
    """Seconds for the file's bytes, and nothing else, from the disk."""
    _forget(path)
    buffer, began = bytearray(CHUNK), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def measure(
    kind: str, path: Path, geometry: Geometry, num_pictures: int, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Predict for so many pictures, first from the disk, then from the page cache, then once more and keep it."""
    random = torch.Generator().manual_seed(1)
    embeddings = torch.randn(num_pictures, geometry.embedding_size, generator=random).to(device) * 0.1
    residual = None
    if geometry.residual is not None:
        size = (num_pictures, geometry.residual.num_tokens, geometry.residual.width)
        residual = torch.randn(size, generator=random) * 0.05
    result: dict[str, Any] = {"expert": kind, "pictures": num_pictures, "seconds_reading_alone": read_alone(path)}
    output = folder / f"{kind}.predicted.safetensors"
    _forget(path)
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
    began = time.perf_counter()
    shapes = expert.factor_shapes(geometry, num_pictures)
    stream_predictions(output, shapes, expert.predict(path, embeddings, residual))
    result["seconds_from_page_cache_and_kept"] = time.perf_counter() - began
    result["bytes_kept"] = output.stat().st_size
    result["ratio_to_reading_alone"] = result["seconds_from_disk"] / result["seconds_reading_alone"]
    return result


def measure_merge(kinds: list[str], folder: Path, num_pictures: int, rank: int) -> dict[str, Any]:
    """Combine what the experts gave, and truncate every module to `rank`."""
    found = {kind: read_predictions(folder / f"{kind}.predicted.safetensors") for kind in kinds}
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


def bench(
    kinds: list[str],
    pictures: list[int],
    rank: int,
    folder: Path,
    quiet: bool,
    device: torch.device,
    with_encoders: bool = False,
) -> dict[str, Any]:
    """ValueError if the disk is too small. What was made is deleted again."""
    geometries = {kind: PUBLISHED[kind].geometry for kind in kinds}
    sizes = {
        kind: sum(a * b for a, b in expert_layout(geometry).values()) * DTYPE.itemsize
        for kind, geometry in geometries.items()
    }
    predicted = (
        4
        * max(pictures)
        * sum(
            sum(x[-1] * x[-2] for pair in expert.factor_shapes(g, 1).values() for x in pair)
            for g in geometries.values()
        )
    )
    needed, free = sum(sizes.values()) + predicted + with_encoders * ENCODER_BYTES, shutil.disk_usage(folder).free
    if needed > free * 0.95:
        raise ValueError(f"{folder}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free: choose --folder")
    runs, merges, looks = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="i2l-bench-", dir=folder) as name:
        place = Path(name)
        for kind in kinds:
            make_weights(place / FILES[kind], expert_layout(geometries[kind]), quiet)
        for count in pictures:
            for kind in kinds:
                runs.append(measure(kind, place / FILES[kind], geometries[kind], count, place, device))
                print(_line(runs[-1], sizes[kind]), flush=True)
            merges.append({"pictures": count, **measure_merge(kinds, place, count, rank)})
            print("truncate {modules} modules from rank {from_rank} to {to_rank}: {seconds:.1f} s".format(**merges[-1]))
        if with_encoders:
            make_encoders(place, quiet)
            for count in pictures:
                looks.append(measure_encoders(place, count, device))
                shown = "{pictures} pictures: {seconds:.1f} s, SigLIP2 and DINOv3 loaded and freed".format(**looks[-1])
                print(f"{shown}; memory {looks[-1]['peak_bytes'] / 1e9:.1f} GB", flush=True)
    hardware = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    hardware |= {"threads": torch.get_num_threads(), "device": str(device)}
    return {"hardware": hardware, "experts": runs, "merges": merges, "encoders": looks}


def _line(run: dict[str, Any], size: int) -> str:
    memory = max(run["peak_bytes_from_disk"], run["peak_bytes_from_page_cache"])
    seconds = {name.removeprefix("seconds_"): f"{value:.1f} s" for name, value in run.items() if "seconds" in name}
    return (
        f"{run['expert']}, {run['pictures']} pictures: {seconds['from_disk']} from the disk, "
        f"{run['ratio_to_reading_alone']:.2f} x reading alone ({seconds['reading_alone']}), "
        f"{seconds['from_page_cache']} from the page cache, {seconds['from_page_cache_and_kept']} with "
        f"{run['bytes_kept'] / 1e9:.2f} GB of predictions written; {size / 1e9:.2f} GB, "
        f"read {run['bytes_read'] / 1e9:.2f} GB; memory {memory / 1e6:.0f} MB"
    )


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m initializers.i2l bench", description=__doc__, formatter_class=raw)
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=["style"], help="default: style (4.8 GB)")
    parser.add_argument("--pictures", nargs="+", type=int, default=[1, 8], metavar="N", help="default: 1 8")
    parser.add_argument("--rank", type=int, default=32, help="to which the result is truncated (default: 32)")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: cpu)")
    parser.add_argument("--encoders", action="store_true", help="time the image encoders too (16 GB of disk more)")
    parser.add_argument("--folder", type=Path, default=Path(), help="for the files (default: here); they are deleted")
    parser.add_argument("--output", type=Path, help="a JSON file for the report")
    options = parser.parse_args(arguments)

    def program() -> None:
        if min(options.pictures) < 1 or options.rank < 1:
            raise ValueError("--pictures and --rank must be at least 1")
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: there is no CUDA GPU here")
        settings = (options.experts, options.pictures, options.rank, options.folder)
        report = bench(*settings, quiet=False, device=device, with_encoders=options.encoders)
        if options.output:
            write_json(options.output, report)

    return guarded(program, again="give the same command again")
