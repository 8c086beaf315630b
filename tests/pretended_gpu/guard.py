"""The library with which a torch without CUDA has fake tensors on "cuda": built once, loaded before torch."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def obstacle() -> str | None:
    """Why it cannot be had on this machine; None if it can."""
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built with CUDA: the pretended GPU is for one without"
    if not _library().exists() and _compiler() is None:
        return "there is no C++ compiler (c++, g++ or clang++) to build the pretended GPU with"
    return None


def load() -> None:
    assert "torch" not in sys.modules, "the guard must be loaded before torch"
    library = _library()
    if not library.exists():
        _build(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def _compiler() -> str | None:
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _library() -> Path:
    """Another torch or another source is another file."""
    key = hashlib.sha256(importlib.metadata.version("torch").encode() + SOURCE.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "qwen-image-warm-start" / "pretended_gpu" / f"{key}.so"


def _build(library: Path) -> None:
    torch, compiler = _torch(), _compiler()
    assert compiler is not None
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.partial")
    places = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", f"-L{torch / 'lib'}"]
    libraries = ["-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
    subprocess.run([*command, *places, *libraries], check=True)
    os.replace(partial, library)
