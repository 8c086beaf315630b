"""A full disk at each write of a short run: the message names the file, and the run goes on when there is room."""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trainer.files
from tests.faults.table import Fault
from tests.faults.world import I2L, MERGE, RANDOM, Outcome, adapter, half_written, patched, run
from tests.helpers import FAILED, FINISHED
from trainer import checkpoint, tracking

KIND = "a full disk"


class Disk:
    """Counts the writes of a run; number `full_at` stops halfway with ENOSPC, and writes only half of it."""

    def __init__(self, full_at: int | None = None):
        self.full_at = full_at
        self.written: list[str] = []
        """What was written, in words."""

    def write(self, path: Path, halve: Callable[[], object]) -> None:
        self.written.append(label(path))
        if len(self.written) - 1 == self.full_at:
            halve()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def label(path: Path) -> str:
    """What a file is, in words."""
    name = str(path)
    kinds = {
        r"checkpoints": "a checkpoint",
        r"cache/i2l/\.?style": "a prediction of i2L",
        r"cache": "a shard of the cache",
        r"samples": "a sample",
        r"contact_sheet": "the contact sheet",
        r"run\.json": "run.json",
        r"metrics": "metrics.jsonl",
        r"tensorboard": "TensorBoard's file",
        r"frozen": "frozen.safetensors",
        r"adapter": "the adapter",
    }
    return next((title for pattern, title in kinds.items() if re.search(pattern, name)), "the run's folder")


@contextlib.contextmanager
def on(disk: Disk) -> Iterator[None]:
    """All that a run writes goes through the disk: `trainer.files` flushes each file and folder; the rest is written
    by the tracker, and copied by the export."""
    flush, opened, copyfile = trainer.files._flush, Path.open, shutil.copyfile
    record = tracking.RecordWriter.write

    def flushed(path: Path) -> None:
        disk.write(path, lambda: path.is_file() and path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]))
        flush(path)

    class Curve:
        """metrics.jsonl"""

        def __init__(self, path: Path, file: Any):
            self._path, self._file = path, file

        def write(self, text: str) -> None:
            disk.write(self._path, lambda: self._file.write(text[: len(text) // 2]))
            self._file.write(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    def open_(path: Path, mode: str = "r", *given: Any, **options: Any) -> Any:
        file = opened(path, mode, *given, **options)
        return Curve(path, file) if path.name == "metrics.jsonl" and mode == "a" else file

    def recorded(writer: Any, data: bytes) -> None:
        disk.write(Path("tensorboard"), lambda: writer._writer.write(data[: len(data) // 2]))
        record(writer, data)

    def copied(source: Path, target: Path) -> None:
        copyfile(source, target)
        disk.write(Path(target), lambda: None)

    with (
        patched(trainer.files, "_flush", flushed),
        patched(Path, "open", open_),
        patched(tracking.RecordWriter, "write", recorded),
        patched(shutil, "copyfile", copied),
    ):
        yield


@functools.cache
def writes(toml: str) -> tuple[str, ...]:
    """What a new run writes, in its order."""
    disk = Disk()
    with on(disk):
        assert run(toml, "output=dry").code == FINISHED
    shutil.rmtree("dry")
    return tuple(disk.written)


def full(toml: str, what: str, each: bool) -> Outcome:
    """A disk that is full at a write of `what`: at the first of them, or at each in turn. The last outcome."""
    places = [at for at, title in enumerate(writes(toml)) if title == what]
    assert places, set(writes(toml))
    for at in places if each else places[:1]:
        with on(Disk(at)):
            done = run(toml, "output=new")
        assert done.code == FAILED, (at, done)
        assert re.search(r"No space left on device: '?new/", done.message), (at, done)
        assert half_written() == []
        for folder in Path("new/checkpoints").glob("*"):
            assert checkpoint.load(folder).step in (0, 1, 2)
        _goes_on(toml)
        shutil.rmtree("new")
    return done


def _goes_on(toml: str) -> None:
    """To the bytes of a run that nothing happened to."""
    done = run(toml, "output=new", resume=Path("new/run.json").exists() or Path("new/checkpoints").exists())
    assert done.code == FINISHED, done
    assert adapter(Path("new")) == Path(toml).with_suffix(".done").read_bytes()
    assert [json.loads(line)["step"] for line in Path("new/metrics.jsonl").read_text().splitlines()] == [0, 1, 1, 2, 2]


_Kinds = tuple[str, ...]
PLAIN: _Kinds = (
    "a shard of the cache",
    "run.json",
    "metrics.jsonl",
    "TensorBoard's file",
    "a sample",
    "the contact sheet",
    "a checkpoint",
    "the adapter",
)
OF_I2L: _Kinds = ("a prediction of i2L",)
OF_MERGE: _Kinds = ("frozen.safetensors",)
SLOW = ("a sample", "the contact sheet")  # which are written as all others are
_STEPS = "the steps since the last checkpoint"
_NOTHING_YET = ("a shard of the cache", "a prediction of i2L", "frozen.safetensors", "run.json", "the adapter")


def _fault(toml: str, what: str, each: bool) -> Fault:
    lost = "nothing" if what in _NOTHING_YET else _STEPS
    name = f"at each write of {what}" if each else f"at the first write of {what}"
    do = functools.partial(full, toml, what, each)
    return Fault(KIND, name, do, FAILED, "No space left on device", lost, slow=each or toml != RANDOM or what in SLOW)


FAULTS = [
    _fault(toml, what, each)
    for each in (False, True)
    for toml, kinds in ((RANDOM, PLAIN), (I2L, OF_I2L), (MERGE, OF_MERGE))
    for what in kinds
]
