"""What a run leaves to look at: TensorBoard, `metrics.jsonl`, a progress bar or plain lines."""

import io
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from trainer.errors import Interrupted
from trainer.files import write_text

log = logging.getLogger("trainer")
T = TypeVar("T")
PICTURES_FILE = "pictures.jsonl"
QUIET_SECONDS = 30  # between two lines of a quiet run


class Tracker:
    """One writer of one run's curves. `main` is False on all processes but the first: they write nothing. `nested`:
    the run is one of many, whose bar stands above; a short one says nothing when quiet. `stopping` says whether a
    signal has asked the run to stop. `validate_again`: the validation of `start_step` is still to be done, or was not
    known to be done, and what is left of it is dropped."""

    def __init__(
        self,
        output: Path,
        *,
        start_step: int = 0,
        steps: int,
        quiet: bool = False,
        main: bool = True,
        nested: bool = False,
        validate_again: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ):
        self._stopping = stopping
        self._main, self._quiet, self._steps, self._nested = main, quiet, steps, nested
        self._metrics, self._pictures = output / "metrics.jsonl", output / PICTURES_FILE
        self._start, self._start_step = time.monotonic(), start_step
        self._last_line = self._start if nested else 0.0
        if main:
            output.mkdir(parents=True, exist_ok=True)
            for file in (self._metrics, self._pictures):
                _forget_after(file, start_step, validate_again)
            self._file = self._metrics.open("a", encoding="utf-8")
            self._board = _Board(output / "tensorboard", 0 if start_step == 0 and validate_again else start_step + 1)
        self._bar = tqdm(
            total=steps,
            initial=start_step,
            unit="step",
            disable=quiet or not main,
            dynamic_ncols=True,
            leave=not nested,
            position=int(nested),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._main and error is None:
            with _named(self._metrics):
                self._file.close()
            self._board.close()
        elif self._main:  # an error of closing would hide the reason
            for file in (self._file, self._board):
                with suppress(OSError):
                    file.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, and one record with a point for each value in TensorBoard."""
        if not self._main:
            return
        with _named(self._metrics):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        self._board.add(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def pictures(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Lines of `pictures.jsonl`: what is known of single pictures at a step."""
        if self._main:
            lines = "".join(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n" for record in records)
            with _named(self._pictures), self._pictures.open("a", encoding="utf-8") as file:
                file.write(lines)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        if self._main:
            png = io.BytesIO()
            image.convert("RGB").save(png, "PNG")
            height, width = image.height, image.width
            picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.getvalue())
            self._board.add(step, [Summary.Value(tag=name, image=picture)])

    def progress(self, step: int, loss: float) -> None:
        """Advance the bar, or print a line now and then if quiet."""
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update(step - self._bar.n if not self._bar.disable else 0)
        now = time.monotonic()
        last = step == self._steps and not self._nested
        if self._quiet and self._main and (now - self._last_line > QUIET_SECONDS or last):
            self._last_line = now
            rate = (now - self._start) / max(step - self._start_step, 1)
            log.info("step %d/%d  loss %.4f  ETA %s", step, self._steps, loss, duration((self._steps - step) * rate))

    def each(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Go through the items of a validation, with a bar. Interrupted between two if the run is to stop."""
        hidden = self._quiet or self._nested or not self._main or len(items) < 2
        with tqdm(items, what, unit="", leave=False, position=1, dynamic_ncols=True, disable=hidden or None) as bar:
            for item in bar:
                if self._stopping():
                    raise Interrupted("stopped during a validation")
                yield item

    def warn(self, message: str, *values: Any) -> None:
        """A line above the progress bar."""
        if self._main:
            with tqdm.external_write_mode():
                log.warning(message, *values)


def _forget_after(file: Path, step: int, validate_again: bool) -> None:
    """Drop what a killed run wrote after the checkpoint it resumes from (its last line may be half a line)."""
    if not file.exists():
        return
    kept, damaged, lines = [], [], file.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line.decode("utf-8"))
            if found["step"] < step or (
                found["step"] == step and ((step > 0 and "loss" in found) or not validate_again)
            ):
                kept.append(line.decode("utf-8") + "\n")
        except (ValueError, KeyError, TypeError):
            damaged.append(number)
    if damaged and damaged != [len(lines)]:
        log.warning("%s: damaged, and left out: line %s", file, ", ".join(map(str, damaged)))
    write_text(file, "".join(kept))


class _Board:
    """TensorBoard's file, written at once. Its own writer has a thread for it, whose errors come late and unnamed."""

    _numbers = itertools.count()

    def __init__(self, folder: Path, purge_step: int):
        """What older files of the folder have from `purge_step` on is not shown."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}"
        self._path = folder / name
        self._writer = RecordWriter(self._path.open("wb"))
        self._write(Event(step=purge_step, file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: list[Any]) -> None:
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with _named(self._path):
            self._writer.write(event.SerializeToString())
            self._writer.flush()

    def close(self) -> None:
        with _named(self._path):
            self._writer.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk does not say of itself where it is full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def duration(seconds: float) -> str:
    """`1:02:03` or `02:03`"""
    return tqdm.format_interval(seconds)
