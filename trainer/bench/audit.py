"""How long an audit of many pictures takes, without the extra, and how its memory grows.

The pictures are painted first, which does not count: JPEGs with soft fields of colour and a fine grain, so that they
take as long to decode as photographs do.
"""

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from tqdm import tqdm

from trainer.data.audit.rules import Rules
from trainer.data.audit.run import Audit, audit
from trainer.data.dataset import DataConfig
from trainer.hardware import machine
from trainer.hardware.threads import parallel_map
from trainer.qwen_image import PICTURE_MULTIPLE, PROMPT_LIMIT

FEW = 10  # the audit of one in FEW pictures tells how much memory many take more


def measure(count: int, megapixels: float) -> dict[str, Any]:
    """Seconds of an audit of `count` pictures, and the peak of memory with them and with a tenth of them."""
    with tempfile.TemporaryDirectory() as folder:
        few, all_of_them = Path(folder) / "few", Path(folder) / "all"
        size = _paint(all_of_them, count, megapixels)
        few.mkdir()
        for path in sorted(all_of_them.iterdir())[: max(count // FEW, 1)]:
            (few / path.name).hardlink_to(path)
        _, few_bytes = _timed(few)
        seconds, peak_bytes = _timed(all_of_them)
        num_bytes = sum(path.stat().st_size for path in all_of_them.iterdir())
    return {
        "pictures": count,
        "size": size,
        "bytes_a_picture": num_bytes / count,
        "seconds": seconds,
        "peak_memory_bytes": peak_bytes,
        "peak_memory_bytes_with_a_tenth": few_bytes,
        "hardware": machine.hardware(torch.device("cpu")),
    }


def _paint(folder: Path, count: int, megapixels: float) -> tuple[int, int]:
    """Pictures of 3:2; returns their size."""
    folder.mkdir()
    height = round((megapixels * 1e6 / 1.5) ** 0.5)
    size = (round(height * 1.5), height)
    grain = np.random.default_rng(0).normal(0, 5, (height + 256, size[0] + 256, 1)).astype(np.float32)

    def paint(number: int) -> None:
        random = np.random.default_rng(number + 1)
        fields = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        top, left = random.integers(0, 256, 2)
        pixels = np.asarray(fields, np.float32) + grain[top : top + height, left : left + size[0]]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)

    for _ in tqdm(parallel_map(paint, range(count)), "paint pictures", count, leave=False, disable=None):
        pass
    return size


def _timed(folder: Path) -> tuple[float, int]:
    """Seconds, and the peak of this process's memory."""
    asked = Audit(
        DataConfig(images=str(folder), default_caption="a picture"), Rules(), PICTURE_MULTIPLE, PROMPT_LIMIT, quick=True
    )
    process, done, peak = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        audit(asked, folder.parent / f"{folder.name} audited")
        return time.perf_counter() - start, peak
    finally:
        done.set()
        watcher.join()


def report_text(report: dict[str, Any]) -> str:
    more = report["peak_memory_bytes"] - report["peak_memory_bytes_with_a_tenth"]
    size = "{} x {}".format(*report["size"])
    return "\n".join(
        [
            f"{report['pictures']} pictures of {size}, {report['bytes_a_picture'] / 1e6:.2f} MB each",
            f"{report['seconds']:.1f} s, {report['pictures'] / report['seconds']:.1f} pictures a second",
            f"peak of memory: {report['peak_memory_bytes'] / 1e6:.0f} MB, {more / 1e6:+.0f} MB against a tenth of them",
        ]
    )
