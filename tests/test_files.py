"""Files appear whole or not at all."""

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import kill_me, killed
from trainer import files

WRITERS: dict[str, Callable[[Path, int], None]] = {
    "text": lambda path, size: files.write_text(path, "x" * size),
    "json": lambda path, size: files.write_json(path, ["x" * size]),
    "tensors": lambda path, size: files.write_tensors(path, {"x": torch.zeros(size)}),
}


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system itself refuses to write further, as it does when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def no_space(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_refused_write_is_an_oserror_and_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    WRITERS[kind](path, 10)
    old = path.read_bytes()
    with largest_file(4096), pytest.raises(OSError, match="too large"):
        WRITERS[kind](path, 100_000)
    assert path.read_bytes() == old
    assert [*path.parent.iterdir()] == [path]
    WRITERS[kind](path, 100_000)
    assert path.stat().st_size > 4096


@pytest.mark.parametrize("kind", WRITERS)
def test_a_refused_first_write_leaves_nothing(kind: str, tmp_path: Path) -> None:
    with largest_file(4096), pytest.raises(OSError, match="too large"):
        WRITERS[kind](tmp_path / "file", 100_000)
    assert [*tmp_path.iterdir()] == []


def test_content_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut could leave the name without the content."""
    done: list[str] = []
    opened: dict[int, object] = {}
    system_open, fsync, replace = os.open, os.fsync, os.replace

    def opening(path: Path, *rest: int) -> int:
        descriptor = system_open(path, *rest)
        opened[descriptor] = path
        return descriptor

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(f"fsync {opened[fd]}"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"replace {b}"), replace(a, b)))
    files.write_text(tmp_path / "a", "text")
    flushed, renamed, folder = done
    assert flushed.startswith(f"fsync {tmp_path}/.a.") and flushed.endswith(".partial")
    assert (renamed, folder) == (f"replace {tmp_path / 'a'}", f"fsync {tmp_path}")

    done.clear()
    with files.new_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("text")
    position = done.index(f"replace {tmp_path / 'new'}")
    assert f"fsync {partial / 'file'}" in done[:position] and f"fsync {partial}" in done[:position]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert [*tmp_path.iterdir()] == []


def test_tensors_may_be_views_and_share_memory(tmp_path: Path) -> None:
    """bitsandbytes gives all parameters one table of quantisation steps."""
    table = torch.arange(6.0).view(2, 3)
    files.write_tensors(tmp_path / "a", {"x": table, "y": table, "t": table.T, "part": table[1]}, {"format": "pt"})
    saved = load_file(tmp_path / "a")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {
        "x": table.tolist(),
        "y": table.tolist(),
        "t": table.T.tolist(),
        "part": table[1].tolist(),
    }


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for names in (("a", "b"), ("b", "c")):
        with files.new_folder(path) as partial:
            for name in names:
                (partial / name).write_text(str(names))
            assert partial.parent == path.parent
        assert sorted(file.name for file in path.iterdir()) == [*names]
        assert (path / "b").read_text() == str(names)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("existing", [True, False])
def test_an_error_while_filling_a_folder_leaves_the_old_one(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "folder"
    if existing:
        path.mkdir()
        (path / "old").write_text("old")
    with pytest.raises(OSError, match="No space"), files.new_folder(path) as partial:
        (partial / "new").write_text("new")
        no_space()
    assert [file.name for file in tmp_path.rglob("*")] == (["folder", "old"] if existing else [])


@pytest.mark.parametrize("existing", [True, False])
def test_a_folder_that_cannot_be_flushed_does_not_count(
    tmp_path: Path, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    if existing:
        path.mkdir()
        (path / "old").write_text("old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"), files.new_folder(path) as partial:
        (partial / "new").write_text("new")
    assert [file.name for file in tmp_path.rglob("*")] == (["folder", "old"] if existing else [])


def test_what_a_killed_process_left_is_not_mixed_in(tmp_path: Path) -> None:
    def fill(name: str, then: Callable[[], object]) -> None:
        with files.new_folder(tmp_path / "folder") as partial:
            (partial / name).write_text(name)
            then()

    assert killed(lambda: fill("first", kill_me))
    (left,) = tmp_path.iterdir()
    left.rename(left.with_name(f".folder.{os.getpid()}.partial"))  # process numbers come again
    fill("second", lambda: None)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["second"]
    assert [*tmp_path.iterdir()] == [tmp_path / "folder"]


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [".hidden", "a.partial", ".a.partial", "sub/step-00000001/state.json", "sub/.git.old/x"]
    gone = [".a.json.77.partial", "sub/.step-00000001.77.partial/state.json", "sub/.adapter.78.old/x"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    files.remove_leftovers(tmp_path)
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in gone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_file_is_what_safetensors_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(2, 2, 2).transpose(0, 2), "none": torch.zeros(0, 4)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    files.stream_tensors(tmp_path / "x.safetensors", shapes, iter(tensors.items()), dtype)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(dtype))
    with pytest.raises(AssertionError):  # what was announced must come
        files.stream_tensors(tmp_path / "y.safetensors", shapes, iter([("b", tensors["b"])]))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_streamed_tensors_may_differ_in_their_precision(tmp_path: Path) -> None:
    tensors, path = {"a": torch.randn(3), "b": torch.randn(2, 3)}, tmp_path / "x.safetensors"
    dtypes, about = {"a": torch.bfloat16, "b": torch.float32}, {"format": "pt"}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    files.stream_tensors(path, shapes, tensors.items(), dtypes, metadata=about, summed=True)
    found = load_file(path)
    assert all(torch.equal(found[name], tensor.to(dtypes[name])) for name, tensor in tensors.items())
    assert files.read_header(path).metadata["format"] == "pt" and not files.differs(path)


def test_a_folder_that_a_killed_process_left_goes_an_hour_later(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".x.77.partial", tmp_path / ".x.78.partial"
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        os.utime(folder, (0, 0))
    os.utime(old / "half", (0, 0))
    with files.new_folder(tmp_path / "x") as partial:
        (partial / "whole").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, "x"]


def test_what_a_killed_process_left_goes_an_hour_later(tmp_path: Path) -> None:
    old, fresh, other = (tmp_path / f".{name}.partial" for name in ("x.json.77", "x.json.78", "y.json.77"))
    for path in (old, fresh, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    files.write_json(tmp_path / "x.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["x.json", fresh.name, other.name])


def test_a_changed_byte_is_seen_by_the_checksum(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    for summed in (True, False):
        files.stream_tensors(path, {n: x.shape for n, x in tensors.items()}, tensors.items(), summed=summed)
        assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in tensors.items())
        assert not files.differs(path)
        path.write_bytes(path.read_bytes()[:-2] + b"??")
        assert files.differs(path) == summed
