"""Without what only POSIX systems have, the program starts and writes."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.helpers import FINISHED, run
from trainer import checkpoint, files, loop
from trainer.hub import sources

ROOT = Path(__file__).parents[1]
POSIX_ONLY = ("resource", "fcntl", "pwd", "grp", "termios", "syslog")
IMPORT_ALL = f"""
import builtins, importlib, pkgutil

real = builtins.__import__

def without(name, globals=None, *rest, **options):
    importer = (globals or {{}}).get("__name__", "").split(".")[0]  # libraries know both kinds of systems
    if name in {POSIX_ONLY} and importer in ("trainer", "initializers", "demo", "train"):
        raise ImportError(name)
    return real(name, globals, *rest, **options)

builtins.__import__ = without
count = 0
for package in ("trainer", "initializers", "demo"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
        count += 1
import train
print(count)
"""


def test_every_module_is_imported_without_what_only_posix_has() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 60


def test_files_are_written_where_folders_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules of Windows: only what is open for writing can be flushed, and no folder can be opened."""
    opened: dict[int, tuple[str, int]] = {}
    real_open, real_sync = os.open, os.fsync

    def strict_open(path: str, flags: int, *rest: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = real_open(path, flags, *rest)
        opened[descriptor] = (str(path), flags)
        return descriptor

    def strict_sync(descriptor: int) -> None:
        if descriptor in opened and not opened[descriptor][1] & (os.O_RDWR | os.O_WRONLY):
            raise OSError(9, "Bad file descriptor")
        real_sync(descriptor)

    class Windows:
        """The module os, but for its name, which pathlib must not see."""

        name = "nt"

        def __getattr__(self, name: str) -> object:
            return {"open": strict_open, "fsync": strict_sync}.get(name) or getattr(os, name)

    monkeypatch.setattr(files, "os", Windows())
    files.write_text(tmp_path / "a" / "b.txt", "text")
    with files.new_folder(tmp_path / "c") as folder:
        files.write_json(folder / "d.json", {"a": 1})
    assert (tmp_path / "a" / "b.txt").read_text() == "text" and (tmp_path / "c" / "d.json").exists()
    assert opened  # files were flushed all the same


def test_a_run_in_another_thread_goes_without_signals() -> None:
    """Notebooks and servers have no main thread to spare."""
    found = []

    def work() -> None:
        with loop._stop_signals() as stop:
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]


FORBIDDEN = re.compile(r'[<>:"\\|?*\x00-\x1f]|[ .]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def test_names_of_files_are_such_that_windows_takes(run_toml: Path, tmp_path: Path) -> None:
    """Also where prompts and trigger have letters that no file's name may have there."""
    words = 'aux: a "cat"? <b>|* c\\d .'
    texts = [f"validation.prompts=[{json.dumps(words)}]", f"data.trigger={json.dumps('nul: <zorp>')}"]
    layouts = 'export.layouts=["diffusion_model", "kohya"]'
    assert run(run_toml, tmp_path / "out", *texts, layouts, "train.steps=2") == FINISHED
    names = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "out").rglob("*")]
    assert len(names) > 20 and not [name for name in names if any(map(FORBIDDEN.search, name.split("/")))]
    assert len({name.casefold() for name in names}) == len(names)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_no_file_of_a_checkpoint_stays_mapped(tmp_path: Path) -> None:
    """Windows cannot delete what is mapped, and older checkpoints are deleted while the run goes on."""
    path = checkpoint.save(tmp_path, 1, checkpoint.Parts({"a": torch.ones(1 << 16)}, {"state": {}}), {}, 2)
    saved = checkpoint.load(path)
    assert saved.tensors["a"].sum() == 1 << 16
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "name", [r"C:\models\Qwen-Image", r"models\Qwen-Image", r"\\server\share\Qwen-Image", "C:/models/x"]
)
def test_a_windows_path_is_no_id_of_a_hub(name: str) -> None:
    assert sources.repository(name) is None and "there is no folder" in (sources.problem(name) or "")
