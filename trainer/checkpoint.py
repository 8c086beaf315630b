"""The state of a run, saved whole: trainable tensors and optimizer in safetensors, the rest in JSON."""

import hashlib
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_bytes
from torch import Tensor

from trainer.config import first_few
from trainer.errors import UserError
from trainer.files import new_folder, sha256, write_json, write_tensors

FOLDER = "checkpoints"  # in the output
PICTURES, MASKS, MODELS = "pictures", "masks", "models"  # the keys of a course that are not settings
TRAINABLE, OPTIMIZER, AVERAGE = "trainable.safetensors", "optimizer.safetensors", "average.safetensors"
_NAME = re.compile(r"step-(\d{8})")
_TENSOR, _FLOAT = "tensor", "float"  # keys that stand for what JSON has not in an optimizer's state


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`[checkpoint]`"""

    every: int = 100
    """The number of steps between checkpoints. One more is written before each validation, at the end, and when the run
    is interrupted."""
    keep: int = 2
    """How many checkpoints are kept: at least 2, so that there is always an older one."""

    def problems(self) -> list[str]:
        return [
            *(["every must be at least 1"] if self.every < 1 else []),
            *(["keep must be at least 2: one may be damaged by a failing disk"] if self.keep < 2 else []),
        ]


@dataclass(frozen=True)
class Parts:
    """What a checkpoint is made of, besides its state."""

    tensors: Mapping[str, Tensor]
    """What is trained."""
    optimizer: Mapping[str, Any]
    """The optimizer's state dict."""
    average: Mapping[str, Tensor] | None = None
    """The moving average of what is trained, if there is one."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor]
    """Empty if there is none."""
    state: dict[str, Any]

    @property
    def result(self) -> dict[str, Tensor]:
        """What is validated and exported."""
        return self.average or self.tensors


def path_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save(root: Path, step: int, parts: Parts, state: Mapping[str, Any], keep: int, chosen: Path | None = None) -> Path:
    """Write `root/step-<step>`, then delete all but the newest `keep` and the chosen one, and what a killed run left
    half written.

    state: `course`, and what else is to be read back, as JSON. OSError if the disk is full; then nothing was deleted.
    """
    path = path_of(root, step)
    found: dict[str, Tensor] = {}
    optimizer = _without_tensors(parts.optimizer, "", found)
    written = {TRAINABLE: parts.tensors, OPTIMIZER: found}
    if parts.average is not None:
        written[AVERAGE] = parts.average
    with new_folder(path) as folder:
        for name, values in written.items():
            write_tensors(folder / name, values)
        hashes = {name: sha256(folder / name) for name in written}
        write_json(folder / "state.json", {"step": step, "optimizer": optimizer, "sha256": hashes, **state})
    for old in [*_folders(root)[:-keep], *root.glob(".step-*")]:
        if old != chosen:
            shutil.rmtree(old)
    return path


def add_to_state(path: Path, values: Mapping[str, Any]) -> None:
    """Replace some of what the checkpoint at `path` keeps in its state."""
    file = path / "state.json"
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **values})


def course(
    settings: Mapping[str, Any],
    pictures: Iterable[Sequence[str]],
    models: Mapping[str, Sequence[str] | None],
    free: Collection[str] = (),
    masks: Iterable[tuple[str, str]] = (),
) -> dict[str, Any]:
    """All that decides the course of a training: a checkpoint belongs to one, and `latest` compares it key by key.

    settings: a configuration as nested tables, without the keys and tables that `free` names by their dotted names,
    which may change when a run is resumed. pictures: hash and captions of each training picture, in their order.
    models: hashes of the files of each, by the key that names it; None if the files are not on this machine: then they
    are not compared. masks: hashes of a training picture and of its mask.
    """
    found = dict(_dotted(settings))
    kept = {name: value for name, value in found.items() if not any(f"{name}.".startswith(f"{key}.") for key in free)}
    hashes = {name: None if files is None else sorted(files) for name, files in models.items()}
    if masks := sorted({*masks}):
        kept[MASKS] = masks
    return json.loads(json.dumps({**kept, PICTURES: list(pictures), MODELS: hashes}))


def _dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def newest_step(root: Path) -> int | None:
    """The step of the newest checkpoint under `root`, without reading it."""
    folders = _folders(root)
    return int(folders[-1].name.removeprefix("step-")) if folders else None


def paths(root: Path) -> dict[int, Path]:
    """The folders of the checkpoints under `root` by their step."""
    return {int(path.name.removeprefix("step-")): path for path in _folders(root)}


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
        if name == MODELS:
            found += _different_models(now.get(MODELS, {}), then.get(MODELS, {}))
        elif here != there and name == PICTURES:
            found.append(_different_pictures(now[PICTURES], then[PICTURES]))
        elif here != there and name == MASKS:
            found.append(_different_masks(now.get(MASKS, ()), then.get(MASKS, ())))
        elif here != there:
            here, there = (text if text != "null" else "not set" for text in (here, there))
            found.append(f"{name} is {here}, the checkpoint has {there}")
    return found


def _different_models(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    found = []
    for name, here in now.items():
        there = then.get(name)
        if here and there and here != there:
            files = {text for text in (*here, *there) if text not in here or text not in there}
            changed = first_few(sorted({text.split()[0] for text in files}))
            found.append(f"{name} is another model than that of the checkpoint: other content in {changed}")
    return found


def _different_pictures(now: Sequence[Sequence[str]], then: Sequence[Sequence[str]]) -> str:
    if sorted(digest for digest, *_ in now) != sorted(digest for digest, *_ in then):
        return f"there are other training pictures ({len(now)}) than those of the checkpoint ({len(then)})"
    before: dict[str, list[Sequence[str]]] = defaultdict(list)  # copies of a picture in their order
    for digest, *texts in then:
        before[digest].append(texts)
    pairs = [(texts, before[digest].pop(0)) for digest, *texts in now]
    changed = [(here, there) for here, there in pairs if here != there]
    if not changed:
        return "the training pictures are in another order, by their file names, than those of the checkpoint"
    new, old = ('" or "'.join(texts) for texts in changed[0])
    return f'{len(changed)} captions have changed, such as "{new}", which was "{old}"'


def _different_masks(now: Sequence[Sequence[str]], then: Sequence[Sequence[str]]) -> str:
    changed = {tuple(pair) for pair in now} ^ {tuple(pair) for pair in then}
    pictures = {digest for digest, _ in changed}
    return f"masks of training pictures have changed, come or gone: those of {len(pictures)} pictures"


def load(path: Path) -> Checkpoint:
    """Read all of it, not mapped: on Windows, a folder with a file that is mapped cannot be deleted later."""
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        found = dict[str, dict[str, Tensor]]()
        for name, digest in state.pop("sha256").items():
            data = (file := path / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("its content is not what was written")
            found[name] = dict(sorted(load_bytes(data).items()))  # which has no order: all processes need the same
        optimizer = _with_tensors(state.pop("optimizer"), found[OPTIMIZER])
        optimizer["state"] = {int(index): values for index, values in optimizer["state"].items()}
        return Checkpoint(path, state.pop("step"), found[TRAINABLE], optimizer, found.get(AVERAGE, {}), state)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}). Delete the folder {path} to resume from the checkpoint before it."
        ) from error


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if _NAME.fullmatch(path.name))


def _without_tensors(value: Any, name: str, found: dict[str, Tensor]) -> Any:
    """An optimizer's state as JSON can hold it. Each tensor in it goes to `found`, and its name there takes its place:
    optimizers keep them at any depth, in `state` and in `param_groups`."""
    if isinstance(value, Tensor):
        found[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(one, f"{name}.{key}".lstrip("."), found) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(one, f"{name}.{number}", found) for number, one in enumerate(value)]
    return {_FLOAT: str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: _with_tensors(one, tensors) for key, one in value.items()}
    return [_with_tensors(one, tensors) for one in value] if isinstance(value, list) else value
