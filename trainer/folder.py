"""A run's folder while a run is in it: held by one process, and told how the run ended."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from trainer import checkpoint
from trainer.errors import Interrupted, UserError
from trainer.files import file_in_the_way, write_json

RUN_FILE = "run.json"
NEGATIVE_FILE = "negative.safetensors"  # in the output: the LoRA of grey pictures
FROZEN_FILE = "frozen.safetensors"  # in the output: a LoRA beside the one that is trained, to resume and to export


def is_used(folder: Path) -> bool:
    """Whether a run has been started in it."""
    return (folder / RUN_FILE).exists() or (folder / checkpoint.FOLDER).exists()


def is_begun(folder: Path) -> bool:
    """Whether it holds a checkpoint."""
    return checkpoint.newest_step(folder / checkpoint.FOLDER) is not None


def problems(folder: Path, *, resume: bool, steps: int) -> list[str]:
    """Why a run of so many steps cannot begin there, or go on."""
    if way := file_in_the_way(folder):
        return [f"output: {way} is a file: choose another --output"]
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        return [f"output: {there} cannot be written to: change its permissions, or choose another --output"]
    if any(folder.glob(".part-*.lock")):
        return [f"output: {folder} holds a comparison; choose another --output"]
    if is_used(folder) and not resume:
        return [f"output: {folder} already holds a run; continue it with --resume, or choose another --output"]
    if resume and not is_used(folder):
        return [f"output: {folder} holds no run to resume; start it without --resume"]
    if resume and (done := checkpoint.newest_step(folder / checkpoint.FOLDER) or 0) > steps:
        return [f"[train] steps = {steps}: the run in {folder} has done {done} already; set steps to at least {done}"]
    return []


@contextmanager
def occupied(folder: Path, *, main: bool, ended: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While a run is in its folder: no other process is, and its end is told. main: not on other processes of a run.
    ended: called when run.json says how it ended."""
    if not main:
        yield
        return
    with held(folder):
        try:
            with ending_told(folder):
                yield
        finally:
            ended()


@contextmanager
def held(folder: Path, name: str = "run") -> Iterator[None]:
    """Keep other processes out of the folder, or out of the part of it that `name` means, while the block runs.

    UserError says which process is in it. The system gives a lock back when its process ends, however it ends: what a
    killed one leaves behind does not stand in the way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / f".{name}.lock"), folder / f".{name}.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(_in_use(folder, holder)) from None
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        write_json(holder, {"process": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _in_use(folder: Path, holder: Path) -> str:
    who = "another process"
    with suppress(OSError, ValueError, KeyError):  # it may be writing just now
        found = json.loads(holder.read_text(encoding="utf-8"))
        who = f"process {found['process']} on {found['host']}, since {found['since']}"
    return f"output: {folder} is in use by {who}. Wait for its end, stop it, or choose another --output"


@contextmanager
def ending_told(folder: Path) -> Iterator[None]:
    """If the block ends by an error: run.json says so, and a note on the error says how to go on."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        _record(folder, "interrupted" if stopped else "failed", str(error) or type(error).__name__)
        error.add_note(how_to_go_on(folder))
        raise


def _record(folder: Path, status: str, text: str) -> None:
    """Only of a run that has begun, or begun again: a refused one leaves what is there. If run.json cannot be written,
    the error itself is what matters."""
    with suppress(OSError, ValueError):
        file = folder / RUN_FILE
        report = json.loads(file.read_text(encoding="utf-8"))
        if report["status"] == "running":
            write_json(file, {**report, "status": status, "ended_by": text})


def how_to_go_on(folder: Path) -> str:
    """What is safe in the folder, and what to type."""
    step = checkpoint.newest_step(folder / checkpoint.FOLDER)
    if step is not None:
        return f"the checkpoint of step {step} is whole: continue with --resume"
    if is_used(folder):
        return "no checkpoint was saved yet: --resume starts from the beginning"
    return "nothing was saved yet: give the same command again"
