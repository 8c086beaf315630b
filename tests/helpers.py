"""What tests of whole runs share: start one in this process, look at what it left, kill one."""

import json
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import train

FINISHED, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 3  # exit codes


def run(config: Path, output: Path, *settings: str, resume: bool = False, quiet: bool = True) -> int:
    """`train.py --config ... --output ... --set ...`; returns the exit code."""
    arguments = ["--config", str(config), "--output", str(output)]
    arguments += [word for setting in settings for word in ("--set", setting)]
    return train.main([*arguments, *(["--resume"] if resume else []), *(["--quiet"] if quiet else [])])


def adapter_bytes(output: Path) -> dict[str, bytes]:
    """The result's files, of the best step and of the last one; their model cards name the run's folder."""
    kept = (".safetensors", ".json")
    paths = [path for folder in output.glob("adapter*") for path in folder.iterdir() if path.suffix in kept]
    files = {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}
    assert "adapter/adapter_model.safetensors" in files
    return files


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines
    return lines


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fork() -> int:
    """os.fork. torch's threads are not in the copy, and it says so at the first time that their number is set."""
    child = os.fork()
    if child == 0:
        with suppress(RuntimeError):
            torch.set_num_threads(1)
    return child


def killed(work: Callable[[], object]) -> bool:
    """Do `work` in a copy of this process; whether it was ended by SIGKILL. Imports need not be paid for again."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    child = fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    status = os.waitpid(child, 0)[1]
    if not (ended := os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        print(f"the child was not killed: it ended with {os.waitstatus_to_exitcode(status)}")
    return ended


def kill_me(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
