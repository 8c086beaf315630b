"""SIGKILL at random moments of a run: it goes on, and ends with the same bytes and losses."""

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.table import Fault
from tests.faults.world import RANDOM, Outcome, adapter, half_written, patched, run
from tests.helpers import FINISHED, fork
from trainer import files
from trainer.data import cache
from trainer.files import ABANDONED

KIND = "a kill"
LONGER = ("train.steps=4", "checkpoint.every=2", "validation.every=2")


def _curve(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def _resumable(output: str) -> bool:
    return (Path(output) / "run.json").exists() or (Path(output) / "checkpoints").exists()


def _go(output: str) -> Outcome:
    """A run, or what is left to do of it."""
    return run(RANDOM, f"output={output}", *LONGER, resume=_resumable(output))


def _child() -> int:
    """A run in a copy of this process, in which all is imported already."""
    child = fork()
    if child == 0:
        try:
            done = _go("new")
            print(f"the run was over: {done}", file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    return child


def _was_killed(child: int) -> bool:
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _let_an_hour_pass() -> None:
    """A run that cannot be resumed yet deletes nothing that another process may be writing."""
    for name in half_written():
        os.utime(name, (time.time() - 2 * ABANDONED,) * 2)


def killed(moments: int, seed: int) -> Outcome:
    """Kill new runs at so many moments, spread over the length of one; each is ended and compared."""
    began = time.monotonic()
    assert _go("through").code == FINISHED
    length = time.monotonic() - began
    expected, curve = adapter(Path("through")), _curve(Path("through"))
    order, alive = random.Random(seed), 0
    for moment in range(moments):
        child = _child()
        time.sleep(length * (moment + order.random()) / moments)
        os.kill(child, signal.SIGKILL)
        alive += _was_killed(child)
        if not _resumable("new"):
            _let_an_hour_pass()
        done = _go("new")
        assert done.code == FINISHED, (moment, done)
        assert adapter(Path("new")) == expected, f"other bytes after moment {moment}"
        assert _curve(Path("new")) == curve, f"another curve after moment {moment}"
        assert half_written() == [], f"left after moment {moment}"
        shutil.rmtree("new")
    assert alive > moments // 2, "the run was over before it was killed"
    return done


def killed_while_it_encodes() -> Outcome:
    """In the middle of a shard, when there is no run to resume yet: what is half written goes when the shard is written
    again, if no process has changed it for an hour."""

    def die(path: Path, *_: object) -> None:
        path.parent.mkdir(parents=True)
        path.with_name(f".{path.name}.{os.getpid()}.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    with patched(cache, "write_tensors", die):
        assert _was_killed(_child())
    left = half_written()
    assert len(left) == 1 and left[0].startswith("new/cache/"), left
    _let_an_hour_pass()
    done = _go("new")
    assert adapter(Path("new")) == _through()
    return done


def killed_while_it_saves() -> Outcome:
    """A file is half written in a folder that is half written."""
    flush = files._flush

    def die(path: Path) -> None:
        if path.name.startswith(".optimizer"):
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    with patched(files, "_flush", die):
        assert _was_killed(_child())
    assert len(half_written()) == 2, half_written()
    done = _go("new")
    assert done.code == FINISHED and adapter(Path("new")) == _through(), done
    return done


def _through() -> bytes:
    assert _go("through").code == FINISHED
    return adapter(Path("through"))


_STEPS = "the steps since the last checkpoint"
ROWS: list[tuple[str, Callable[[], Outcome], str]] = [
    ("SIGKILL while the first shard of the cache is written", killed_while_it_encodes,
     "what was encoded in the last minute"),
    ("SIGKILL while a file of a checkpoint is written", killed_while_it_saves, _STEPS),
    ("SIGKILL at 10 random moments", functools.partial(killed, 10, 10), _STEPS),
    ("SIGKILL at 100 random moments", functools.partial(killed, 100, 100), _STEPS),
]  # fmt: skip
FAULTS = [
    Fault(KIND, what, do, FINISHED, "", lost, slow="10 " in what, by_command="100" in what, posix=True)
    for what, do, lost in ROWS
]
