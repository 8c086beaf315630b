"""Files of weights without weights: a safetensors header, and behind it a hole in the file, of whatever size.

Headers are read as those of real files are; a tensor comes out of one as a fake one. Installed before transformers and
diffusers take `safe_open` from safetensors.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.pretended_gpu.device import current

STORED = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "I64": torch.int64}
MARK = "hollow"  # in the metadata
SMALL = 1024  # bytes
_real_open = safetensors.safe_open


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """tensors: on any device, the meta device, too. The content of small ones that are real is in the header."""
    entries, names, end = dict[str, Any](), {dtype: name for name, dtype in STORED.items()}, 0
    for name, x in tensors.items():
        entries[name] = {"dtype": names[x.dtype], "shape": [*x.shape], "data_offsets": [end, end := end + x.nbytes]}
        if x.device.type == "cpu" and not isinstance(x, FakeTensor) and x.nbytes < SMALL:
            entries[name]["content"] = x.tolist()
    text = json.dumps({"__metadata__": {**(metadata or {}), MARK: "true"}, **entries}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return dict(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


def is_hollow(path: Path) -> bool:
    return MARK in header(path).get("__metadata__", {})


class Hollow:
    """What `safetensors.safe_open` gives, of a hollow file."""

    def __init__(self, entries: dict[str, Any]):
        self._metadata = entries.pop("__metadata__")
        self._entries = entries

    def __enter__(self) -> "Hollow":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def keys(self) -> list[str]:
        return [*self._entries]

    offset_keys = keys

    def metadata(self) -> dict[str, str]:
        return dict(self._metadata)

    def get_tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        if "content" in entry:
            return torch.tensor(entry["content"], dtype=STORED[entry["dtype"]]).view(entry["shape"])
        return current().on_cpu(entry["shape"], STORED[entry["dtype"]])

    def get_tensors(self) -> dict[str, Tensor]:
        return {name: self.get_tensor(name) for name in self._entries}

    def get_slice(self, name: str) -> "Slice":
        return Slice(self, name, self._entries[name])


class Slice:
    """What `safe_open(...).get_slice` gives."""

    def __init__(self, file: Hollow, name: str, entry: dict[str, Any]):
        self._file, self._name, self._entry = file, name, entry

    def get_shape(self) -> list[int]:
        return list(self._entry["shape"])

    def get_dtype(self) -> str:
        return str(self._entry["dtype"])

    def __getitem__(self, part: Any) -> Tensor:
        return self._file.get_tensor(self._name)[part]


def safe_open(path: Any, *args: Any, **options: Any) -> Any:
    return Hollow(header(Path(path))) if is_hollow(Path(path)) else _real_open(path, *args, **options)


def install() -> None:
    """Of a file that is not hollow everything is as it was."""
    safetensors.safe_open = safe_open
    safetensors.torch.safe_open = safe_open
