"""Where faults happen: a folder with all that the program reads and writes, and the program, run in it."""

import contextlib
import io
import logging
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import train
from initializers.i2l import encoders
from tests import tiny
from tests.helpers import FINISHED
from trainer import qwen_image

RANDOM, I2L, MERGE = "run.toml", "i2l.toml", "merge.toml"
TRACEBACK = -1  # in place of an exit code
I2L_TABLE = """
[init]
method = "i2l"
[init.i2l]
weights = "i2l"
encoders = "encoders"
experts = ["style", "bias"]
"""


@dataclass(frozen=True)
class Outcome:
    """What the program did: its exit code, and what it said."""

    code: int
    message: str


def make_world(folder: Path) -> None:
    """Models, pictures, three configurations, and what a finished run of each leaves. All paths are relative, so that
    the folder may be copied."""
    tiny.make_base(folder / "model")
    tiny.make_pictures(folder / "pictures")
    tiny.make_i2l(folder / "i2l", folder / "encoders")
    plain = tiny.RUN.replace("steps = 4", "steps = 2").replace("every = 2", "every = 1")
    for name, output, more in ((RANDOM, "out", ""), (I2L, "out-i2l", I2L_TABLE), (MERGE, "out-merge", I2L_TABLE)):
        text = plain.format(output=output, base="model", images="pictures") + more
        (folder / name).write_text(text + ('mode = "merge"\n' if name == MERGE else ""))
    with contextlib.chdir(folder):
        for name in (RANDOM, I2L, MERGE):
            done = run(name)
            assert done.code == FINISHED, done
            Path(name).with_suffix(".done").write_bytes(adapter(output_of(name)))


def output_of(toml: str) -> Path:
    return {RANDOM: Path("out"), I2L: Path("out-i2l"), MERGE: Path("out-merge")}[toml]


def adapter(output: Path) -> bytes:
    """Of the best step and of the last one."""
    return b"".join((output / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "adapter_last"))


@contextlib.contextmanager
def copy_of(world: Path, folder: Path) -> Iterator[Path]:
    """A copy of a world, as the current folder."""
    shutil.copytree(world, folder, symlinks=True)
    try:
        with contextlib.chdir(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(toml: str, *settings: str, resume: bool = False, plan: bool = False) -> Outcome:
    """`train.py --config TOML --set ...` in the current folder."""
    words = [word for setting in settings for word in ("--set", setting)]
    flags = [*(["--resume"] if resume else []), *(["--plan"] if plan else [])]
    return say("--config", toml, "--quiet", *words, *flags)


def say(*arguments: str) -> Outcome:
    """`train.py` with these arguments, its exit code and what it says: warnings and errors, and notes on the data."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.levelno >= logging.WARNING or "note" in text[:5]:
                lines.append(text)

    listener, output, before = Listener(), io.StringIO(), inputs()
    root = logging.getLogger()
    root.addHandler(listener)
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = train.main([*arguments])
    except SystemExit as stop:  # of argparse
        code = int(stop.code or 0)
        lines.append(output.getvalue().strip().splitlines()[-1])
    except Exception as error:
        code = TRACEBACK
        lines.append(f"{type(error).__name__}: {error}")
    finally:
        root.removeHandler(listener)
    assert inputs() == before, "the user's own files were changed"
    lines += [line for line in output.getvalue().splitlines() if line.startswith("note ")]
    if "Traceback (most recent call last)" in output.getvalue():
        code = TRACEBACK
    return Outcome(code, stable("\n".join(lines)))


def inputs() -> dict[str, bytes]:
    """The user's own files in the current folder: no run may change them."""
    folders = ("pictures", "model", "i2l", "encoders")
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("*"))]
    found = {}
    for path in paths:
        if stat.S_ISREG(path.lstat().st_mode):
            with path.open("rb") as file:
                found[str(path)] = file.read()
    return found


def stable(text: str) -> str:
    """Without what is another one each time: the folder, hashes, process ids."""
    text = text.replace(str(Path.cwd().resolve()), "FOLDER").replace(str(Path.cwd()), "FOLDER")
    text = re.sub(r"\b[0-9a-f]{32,64}\b", "HASH", text)
    text = re.sub(r"events\.out\.tfevents\.[\w.-]+", "events.out.tfevents", text)
    return re.sub(rf"\.{os.getpid()}\.partial", ".PID.partial", text)


def half_written() -> list[str]:
    """What was begun under the current folder and not finished."""
    return [str(path) for path in Path().rglob(".*") if path.name.endswith((".partial", ".old"))]


@contextlib.contextmanager
def no_model_loads() -> Iterator[None]:
    """The program may not load weights in the block."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    places: list[tuple[object, str]] = [(qwen_image, "load_transformer"), (qwen_image, "load_vae"), (encoders, "_load")]
    places.append((qwen_image.TextEncoder, "model"))
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(patched(owner, name, refuse))
        yield


@contextlib.contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)
