"""The state of a run, saved whole: trainable tensors and optimizer in safetensors, the rest in JSON."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from trainer.files import new_folder, write_json, write_tensors

_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`[checkpoint]`"""

    every: int = 100
    """Steps between checkpoints; one more is written at the end, and when the run is interrupted."""
    keep: int = 2
    """Checkpoints kept; at least 2, so that there is always an older one."""

    def problems(self) -> list[str]:
        return [
            *(["every must be at least 1"] if self.every < 1 else []),
            *(["keep must be at least 2: one may be damaged by a failing disk"] if self.keep < 2 else []),
        ]


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-<step>`, then delete all but the newest `keep`, and what a killed run left half written.

    optimizer: its state dict.

    OSError if the disk is full; then nothing was deleted.
    """
    path = root / f"step-{step:08d}"
    optimizer_tensors, optimizer_rest = _split(optimizer)
    with new_folder(path) as folder:
        write_tensors(folder / "trainable.safetensors", tensors)
        write_tensors(folder / "optimizer.safetensors", optimizer_tensors)
        write_json(folder / "state.json", {"step": step, "optimizer": optimizer_rest, **state})
    for old in [*_folders(root)[:-keep], *root.glob(".step-*")]:
        shutil.rmtree(old)
    return path


def latest(root: Path, fingerprint: str | None = None, batches_per_step: int | None = None) -> Checkpoint | None:
    """The newest checkpoint under `root`, or None. CheckpointError if it cannot be read, or was saved with another
    `fingerprint` or other `batches_per_step`, where they are given.

    batches_per_step: gradient_accumulation_steps x processes. As long as it is the same, all that follows is the same.
    """
    folders = _folders(root)
    saved = load(folders[-1]) if folders else None
    if saved and fingerprint is not None and saved.state["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{saved.path} was written by a run with other settings: resume with the configuration in "
            f"{root.parent / 'run.json'}, or choose another --output."
        )
    if saved and batches_per_step is not None and saved.state["batches_per_step"] != batches_per_step:
        raise CheckpointError(
            f"{saved.path} was written by a run with {saved.state['batches_per_step']} batches a step "
            f"(gradient_accumulation_steps x processes), and now there would be {batches_per_step}: other pictures "
            "from here on. Change one of the two so that the product is the same, or choose another --output."
        )
    return saved


def load(path: Path) -> Checkpoint:
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        file = path / "trainable.safetensors"
        tensors = load_file(file)
        file = path / "optimizer.safetensors"
        optimizer = _join(load_file(file), state.pop("optimizer"))
        return Checkpoint(path, state.pop("step"), tensors, optimizer, state)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}). Delete the folder {path} to resume from the checkpoint before it."
        ) from error


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if _NAME.fullmatch(path.name))


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors named `index.name`, and what JSON can hold."""
    flat = dict(_flat(state["state"]))
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in flat.items() if name not in tensors}
    return tensors, {"values": rest, "param_groups": state["param_groups"]}


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """bitsandbytes keeps its tensors in a dict of their own, one level deeper than torch."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["values"]}.items():
        index, *groups, name = key.split(".")
        values = state.setdefault(int(index), {})
        for group in groups:
            values = values.setdefault(group, {})
        values[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}
