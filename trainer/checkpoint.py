"""The state of a run, saved whole: trainable tensors and optimizer in safetensors, the rest in JSON."""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from trainer.files import new_folder, write_json, write_tensors

PICTURES = "pictures"  # the key of a course that is not a setting
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`[checkpoint]`"""

    every: int = 100
    """The number of steps between checkpoints. One more is written at the end, and when the run is interrupted."""
    keep: int = 2
    """How many checkpoints are kept: at least 2, so that there is always an older one."""

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

    optimizer: its state dict. state: `course`, and what else is to be read back, as JSON. OSError if the disk is full;
    then nothing was deleted.
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


def course(
    settings: Mapping[str, Any], pictures: Iterable[tuple[str, str]], free: Collection[str] = ()
) -> dict[str, Any]:
    """All that decides the course of a training: a checkpoint belongs to one, and `latest` compares it key by key.

    settings: a configuration as nested tables, without the keys and tables that `free` names by their dotted names,
    which may change when a run is resumed. pictures: hash and caption of each training picture, in their order.
    """
    found = dict(_dotted(settings))
    kept = {name: value for name, value in found.items() if not any(f"{name}.".startswith(f"{key}.") for key in free)}
    return json.loads(json.dumps({**kept, PICTURES: list(pictures)}))


def _dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def latest(root: Path, course: Mapping[str, Any] | None = None) -> Checkpoint | None:
    """The newest checkpoint under `root`, or None.

    CheckpointError if it cannot be read, or belongs to another course than `course`: names each key that differs, with
    both values.
    """
    folders = _folders(root)
    saved = load(folders[-1]) if folders else None
    if saved is None or course is None:
        return saved
    if "course" not in saved.state:
        raise CheckpointError(f"{saved.path} is from an older version of this program. Choose another --output.")
    if different := _differences(course, saved.state["course"]):
        raise CheckpointError(
            f"Cannot resume from {saved.path}: {'; '.join(different)}. Set it back (the run's own settings are in "
            f"{root.parent / 'run.json'}), or choose another --output."
        )
    return saved


def _differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """A phrase for each key that differs."""
    found = []
    for name in sorted({*now, *then}):
        here, there = (json.dumps(values.get(name), ensure_ascii=False) for values in (now, then))
        if here != there and name == PICTURES:
            found.append(_different_pictures(now[PICTURES], then[PICTURES]))
        elif here != there:
            here, there = (text if text != "null" else "not set" for text in (here, there))
            found.append(f"{name} is {here}, the checkpoint has {there}")
    return found


def _different_pictures(now: Sequence[Sequence[str]], then: Sequence[Sequence[str]]) -> str:
    if sorted(digest for digest, _ in now) != sorted(digest for digest, _ in then):
        return f"there are other training pictures ({len(now)}) than those of the checkpoint ({len(then)})"
    before = {digest: text for digest, text in then}
    changed = [(text, before[digest]) for digest, text in now if text != before[digest]]
    if not changed:
        return "the training pictures are in another order, by their file names, than those of the checkpoint"
    return f'{len(changed)} captions have changed, such as "{changed[0][0]}", which was "{changed[0][1]}"'


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
