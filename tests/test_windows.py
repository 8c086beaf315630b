"""Without what only POSIX systems have, the program starts and writes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trainer import files, loop

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
