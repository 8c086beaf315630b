"""Files appear whole or not at all: write beside, flush to the disk, rename. Others' files may not be: look first."""

import glob
import hashlib
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from trainer.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Precisions by their name in configurations."""
HEADER_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Precisions by their name in a safetensors header."""
ABANDONED = 3600
"""Seconds after which nobody is writing a file any more that is half written."""


def _flush(path: Path) -> None:
    """Have a file, or a folder's names, on the disk. Windows flushes only what is open for writing, and no folders."""
    if path.is_dir():
        if os.name == "nt":
            return
        flags = os.O_RDONLY
    else:
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_in_the_way(folder: Path) -> Path | None:
    """The file because of which `folder` can never be made: itself, or one above it."""
    return next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _naming(error: OSError, partial: Path, path: Path) -> OSError:
    """The error with the name that the file would have had: a full disk does not say where it is full."""
    name = str(error.filename or path).replace(str(partial), str(path))
    return OSError(error.errno, error.strerror, name)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Create or replace `path` with what `write(temporary_path)` writes. On failure `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        write(partial)
        partial.chmod(0o666 & ~_umask())  # safetensors leaves files that only their owner can read
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
        _remove_abandoned(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise _naming(error, partial, path) from error
        raise


def _remove_abandoned(path: Path) -> None:
    """Delete what killed processes left of a file or folder. Another one may be writing it now: only what nobody has
    changed for an hour."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(FileNotFoundError):  # it has just been finished
            if time.time() - max(one.stat().st_mtime for one in (old, *old.rglob("*"))) > ABANDONED:
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; tensors are copied to contiguous CPU memory. OSError if the disk is full."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storages = [tensor.untyped_storage().data_ptr() for tensor in ready.values()]
    for name, storage in zip(ready, storages, strict=True):
        if storages.count(storage) > 1:  # safetensors refuses to write shared memory
            ready[name] = ready[name].clone()

    def write(partial: Path) -> None:
        try:
            save_file(ready, partial, dict(metadata) if metadata else None)
            _sort_header(partial)
        except SafetensorError as error:  # so it wraps what the system says
            raise OSError(f"{path}: {error}") from error

    write_file(path, write)


CHECKSUM = "crc32"  # of all tensors, in a file's metadata


def checksum(tensor: Tensor, start: int = 0) -> str:
    """CRC-32 of a tensor's bytes on the CPU, in hex; `start`: of the tensors before it."""
    return f"{zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, start):08x}"


def stream_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    *,
    metadata: Mapping[str, str] | None = None,
    summed: bool = False,
) -> None:
    """A safetensors file, its tensors in the order of `shapes`, written one by one as they come: there may be more of
    them than fit into memory. safetensors itself writes all at once. dtype: of all, or of each by its name; summed:
    with their checksum, for `differs`.

    Format: 8 bytes with the header's size, the header as JSON, the tensors (https://huggingface.co/docs/safetensors).
    """
    blank = "0" * 8
    about = {**(metadata or {}), **({CHECKSUM: blank} if summed else {})}
    header, end = dict[str, Any]({"__metadata__": about} if about else {}), 0
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    for name, shape in shapes.items():
        start, end = end, end + dtypes[name].itemsize * math.prod(shape)
        stored = next(key for key, value in HEADER_DTYPES.items() if value == dtypes[name])
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            expected, found = iter(shapes), blank
            for name, tensor in tensors:
                assert name == next(expected) and list(tensor.shape) == header[name]["shape"], name
                stored_tensor = tensor.detach().to(dtypes[name]).cpu().contiguous()
                file.write(stored_tensor.view(-1).view(torch.uint8).numpy().data)
                found = checksum(stored_tensor, int(found, 16)) if summed else blank
            assert next(expected, None) is None
            if summed:  # it is only known now
                file.seek(8 + text.index(f'"{CHECKSUM}":"{blank}"'.encode()) + len(CHECKSUM) + 4)
                file.write(found.encode())

    write_file(path, write)


def differs(path: Path) -> bool:
    """Whether the tensors of a file are not those that its checksum was made of; False if it has none."""
    header, found = read_header(path), 0
    with path.open("rb") as file:
        file.seek(min(header.starts.values(), default=0))
        while block := file.read(1 << 24):
            found = zlib.crc32(block, found)
    return header.metadata.get(CHECKSUM, f"{found:08x}") != f"{found:08x}"


def random_tensors(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A tensor of random numbers for each shape, to `stream_tensors` files that stand in for real weights.

    Normal, with standard deviation 0.02: small enough that what a model computes with them stays finite. All tensors
    are cut from one block of numbers, since neither time nor memory depends on their values.
    """
    largest, random = max(map(math.prod, shapes.values())), torch.Generator().manual_seed(0)
    numbers = (torch.randn(largest, generator=random) * 0.02).to(dtype)
    for name, shape in shapes.items():
        yield name, numbers[: math.prod(shape)].view(tuple(shape))


def _sort_header(path: Path) -> None:
    """safetensors writes metadata in an order left to chance; equal content should be equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            assert len(text) <= size
            file.seek(8)
            file.write(text.ljust(size))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder, which becomes `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            _flush(file)
        _flush(partial)
        if path.exists():  # a folder cannot be replaced in one move: the old one stays until the new one is safe
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
        _flush(path.parent)
        _remove_abandoned(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise _naming(error, partial, path) from error
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half written under `folder`. Not while another process writes there."""
    for path in [*folder.rglob(".*")]:
        if re.fullmatch(r"\..+\.\d+\.(partial|old)", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)  # it may have gone with its folder


def read_json(path: Path) -> Any:
    """UserError, with the file's name, if it is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}). Put it back, or delete it and give the same command again"
        ) from error


class LayoutError(UserError):
    """A file of weights is damaged, or its tensors are not those that are expected under its name."""


class Header(NamedTuple):
    """The first bytes of a safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    starts: dict[str, int]
    """The first byte of each tensor in the file."""
    metadata: dict[str, str]
    num_bytes: int


def read_header(path: Path) -> Header:
    """Names, shapes and types without reading a weight; LayoutError if the file is cut short or not safetensors."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= num_bytes - 8:
                raise ValueError("its header is longer than the file")
            entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: entry["dtype"] for name, entry in entries.items()}
        starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}
    except OSError as error:
        raise LayoutError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise LayoutError(f"{path}: not a safetensors file, or cut short ({error})") from error
    if 8 + length + end != num_bytes:
        raise LayoutError(
            f"{path}: the header speaks of {8 + length + end:,} bytes, but the file has {num_bytes:,}. "
            "It was probably not downloaded to its end; download it again."
        )
    return Header(shapes, dtypes, starts, metadata, num_bytes)


def free_bytes(place: Path) -> int:
    """What is free of the disk on which `place` is or will be."""
    return shutil.disk_usage(next(path for path in (place, *place.absolute().parents) if path.exists())).free


def size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def content_hash(path: Path) -> str:
    """The SHA-256 of a file, in hex. Large files are read once: it is kept by path, size and time of change in the
    user's cache folder (XDG_CACHE_HOME, else ~/.cache).

    Trusted is that a file of the same size and time, to the nanosecond, has not been changed. A file that was changed
    within the last seconds is read again.
    """
    path = path.resolve()
    state = path.stat()
    if time.time_ns() - state.st_mtime_ns < 2e9:  # it may be changed once more without a change of its time
        return sha256(path)
    return _kept_hash(path, state.st_size, state.st_mtime_ns)


@cache
def _kept_hash(path: Path, size: int, changed: int) -> str:
    """Kept by the process, and that of a large file on the disk."""
    if size < KEPT_FROM:
        return sha256(path)
    known = {"path": str(path), "size": size, "time": changed}
    kept = cache_folder() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        if {name: found[name] for name in known} == known:
            return str(found["sha256"])
    digest = sha256(path)
    with suppress(OSError):  # without a folder to write to, it is read again next time
        write_json(kept, {**known, "sha256": digest})
    return digest


KEPT_FROM = 1 << 22  # bytes; smaller files are read as quickly as what is kept


def cache_folder() -> Path:
    """This program's in the user's cache folder: XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qwen-image-warm-start"


def sha256(path: Path) -> str:
    digest, total = hashlib.sha256(), path.stat().st_size
    title, quick = f"reading {path.name}, once", total < 1 << 30
    with (
        path.open("rb") as file,
        tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False, disable=quick or None) as bar,
    ):
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
