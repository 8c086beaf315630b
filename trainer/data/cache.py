"""Tensors that are expensive to compute, kept on disk under a hash of all that they depend on.

The key holds the picture's or caption's content, the model and every setting, so a changed caption or another
model is a new key, and nothing stale is ever read. Tensors lie in shards of many, so that 40,000 latents are not
40,000 files.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from trainer.errors import UserError
from trainer.files import checksum, write_tensors

log = logging.getLogger("trainer")

SHARD_SIZE, SECONDS_BETWEEN_SHARDS = 4096, 60.0


def key(*parts: Any) -> str:
    """The SHA-256 of the parts, which must be what JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Cache:
    """A folder of shards; safe for several processes, since shards are only ever added, and appear whole."""

    def __init__(self, folder: Path):
        self._folder = folder

    def get(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Sequence[Tensor]],
        *,
        what: str,
        names: Sequence[str] = (),
        batch_size: int = 1,
        quiet: bool = False,
    ) -> list[Tensor]:
        """The tensor of each key, in order. `compute` gets positions that are missing, `batch_size` at a time.

        What is computed is on the disk within a minute, and at any error or Ctrl-C. Raises ValueError if a computed
        tensor holds NaN or infinity: it is not kept. names: what the keys stand for, for that message.
        """
        found = self._read(set(keys))
        first_at = {k: i for i, k in reversed(list(enumerate(keys))) if k not in found}
        missing = sorted(first_at.values())
        with tqdm(total=len(missing), desc=what, unit="", disable=quiet or not missing, dynamic_ncols=True) as bar:
            shard: dict[str, Tensor] = {}
            written = time.monotonic()
            try:
                for start in range(0, len(missing), batch_size):
                    positions = missing[start : start + batch_size]
                    for position, tensor in zip(positions, compute(positions), strict=True):
                        if not torch.isfinite(tensor).all():
                            name = names[position] if names else f"number {position}"
                            raise UserError(
                                f"{what}: NaN or infinity in {name}; nothing of it was kept. Look at it. If it is in "
                                "order, the model's files may be damaged, or its precision too low: use bf16, not fp16"
                            )
                        shard[keys[position]] = tensor.contiguous()
                    bar.update(len(positions))
                    if len(shard) >= SHARD_SIZE or time.monotonic() - written > SECONDS_BETWEEN_SHARDS:
                        found.update(self._write(shard))
                        shard, written = {}, time.monotonic()
            finally:
                found.update(self._write(shard))
        return [found[k] for k in keys]

    def count_missing(self, keys: Sequence[str]) -> int:
        """How many of them `get` would have to compute."""
        return len({*keys} - self._read({*keys}).keys())

    def _write(self, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        if shard:
            sums = {name: checksum(tensor) for name, tensor in shard.items()}
            write_tensors(self._folder / f"{key(sorted(shard))[:32]}.safetensors", shard, sums)
        return shard

    def _read(self, wanted: set[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    sums = file.metadata() or {}  # empty in shards of older versions
                    for name in wanted.intersection(file.keys()):
                        tensor = file.get_tensor(name)
                        if name in sums and sums[name] != checksum(tensor):
                            raise ValueError("a tensor differs from its checksum")
                        found[name] = tensor
            except (SafetensorError, ValueError) as error:
                log.warning("%s is damaged (%s): its tensors are computed again; you can delete it", path, error)
        return found
