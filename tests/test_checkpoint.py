"""Checkpoints are whole, exact, and never fewer than they should be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import kill_me, killed
from trainer import checkpoint, files
from trainer.checkpoint import CheckpointConfig, CheckpointError, Parts
from trainer.optimizer import TrainConfig, make_optimizer


def parameters(seed: int = 0) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(64, 96, generator=random)) for _ in range(2)]  # 8-bit states need 4096 numbers


def update(tensors: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=random)
        optimizer.step()


def named(tensors: list[nn.Parameter]) -> dict[str, Tensor]:
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def save(root: Path, step: int, keep: int = 2, state: dict[str, Any] | None = None) -> Path:
    tensors = parameters()
    optimizer = torch.optim.AdamW(tensors)
    values = {"course": {}, **(state or {})}
    return checkpoint.save(root, step, Parts(named(tensors), optimizer.state_dict()), values, keep)


def steps(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_settings_that_would_lose_work_are_problems() -> None:
    assert CheckpointConfig().problems() == []
    assert "keep must be at least 2" in CheckpointConfig(keep=1).problems()[0]
    assert "every must be at least 1" in CheckpointConfig(every=0).problems()[0]


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_an_optimizer_goes_on_as_if_it_had_never_stopped(kind: str, tmp_path: Path) -> None:
    config = TrainConfig(optimizer=kind, learning_rate=1e-2)  # type: ignore[arg-type]
    through = parameters()
    update(through, make_optimizer(through, config), range(6))

    tensors = parameters()
    optimizer = make_optimizer(tensors, config)
    update(tensors, optimizer, range(3))
    checkpoint.save(tmp_path, 3, Parts(named(tensors), optimizer.state_dict()), {"course": {}}, 2)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None and saved.step == 3
    tensors = [nn.Parameter(saved.tensors[name]) for name in named(tensors)]
    optimizer = make_optimizer(tensors, config)
    optimizer.load_state_dict(saved.optimizer)
    update(tensors, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(through, tensors, strict=True))

    forgetful = [nn.Parameter(saved.tensors[name]) for name in named(tensors)]
    update(forgetful, make_optimizer(forgetful, config), range(3, 6))
    assert not torch.equal(forgetful[0], through[0])  # the state matters here: the test can fail


def test_a_checkpoint_holds_tensors_step_and_state(tmp_path: Path) -> None:
    state = {"course": {"seed": 1}, "seconds": 1.5, "validations": [{"step": 0, "val_loss": 0.1}]}
    path = save(tmp_path, 12, state=state)
    saved = checkpoint.load(path)
    assert (saved.path, saved.step, saved.state) == (path, 12, state)
    assert torch.equal(saved.tensors["1"], parameters()[1])
    assert {file.name for file in path.iterdir()} == {"trainable.safetensors", "optimizer.safetensors", "state.json"}


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


def test_the_newest_is_found_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 100)
    for name in (".step-00000200.77.partial", ".step-00000300.77.old", "step-400", "step-00000500.bak"):
        shutil.copytree(tmp_path / "step-00000009", tmp_path / name)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None and saved.step == 100


def test_the_oldest_are_deleted_and_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.77.partial").mkdir()
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_the_old_are_deleted_only_when_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    seen: list[list[str]] = []
    rmtree = shutil.rmtree

    def spy(path: Path, **options: bool) -> None:
        if not Path(path).name.startswith("."):
            seen.append(steps(tmp_path))
            assert checkpoint.load(tmp_path / "step-00000003").step == 3
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", spy)
    save(tmp_path, 3)
    assert seen == [["step-00000001", "step-00000002", "step-00000003"]]
    assert steps(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("place", ["write_tensors", "write_json"])
def test_a_full_disk_costs_no_checkpoint(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, place, full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 3)
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("place", "call", "newest"),
    [
        ("save_file", 0, 2),  # before the first file
        ("save_file", 1, 2),
        ("os.fsync", 4, 2),  # while the JSON is being written
        ("os.replace", 2, 2),
        ("os.replace", 3, 2),  # all is written, and the folder has not yet its name
        ("shutil.rmtree", 1, 3),  # the new one is safe, and the oldest not yet deleted
    ],
)
def test_a_kill_while_saving_leaves_a_whole_checkpoint(place: str, call: int, newest: int, tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def die() -> None:
        owner, _, name = place.rpartition(".")
        target = getattr(files, owner) if owner else files
        real, calls = getattr(target, name), []

        def wrapped(*arguments: Any, **options: Any) -> Any:
            calls.append(place)
            if len(calls) > call:
                kill_me()
            return real(*arguments, **options)

        setattr(target, name, wrapped)
        save(tmp_path, 3)

    assert killed(die)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None and saved.step == newest
    save(tmp_path, 3)
    assert steps(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    match damage:
        case "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case "empty":
            file.write_bytes(b"")
        case "missing":
            file.unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.latest(tmp_path)
    assert str(caught.value).startswith(f"{file} cannot be read")
    assert f"Delete the folder {file.parent}" in str(caught.value)
    shutil.rmtree(file.parent)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None and saved.step == 1


def settings(**changes: Any) -> dict[str, Any]:
    tables = {"seed": 0, "train": {"learning_rate": 3e-4, "steps": 9, "shape": {"a": 1}}, "data": {"cache": None}}
    tables["train"] |= changes  # type: ignore[operator]
    return tables


ONE, TWO = ("digest 1", "a cat"), ("digest 2", "a dog")


def test_a_course_is_what_may_not_change() -> None:
    found = checkpoint.course(settings(), [ONE], {}, {"train.steps", "data", "train.shap"})
    assert found == {"seed": 0, "train.learning_rate": 3e-4, "train.shape.a": 1, "pictures": [["digest 1", "a cat"]],
                     "models": {}}  # fmt: skip
    assert json.loads(json.dumps(found)) == found


def test_a_checkpoint_of_another_course_is_refused(tmp_path: Path) -> None:
    root, own = tmp_path / "checkpoints", checkpoint.course(settings(), [ONE, TWO], {})
    path = save(root, 1, state={"course": own})
    for course in (own, None):
        saved = checkpoint.latest(root, course)
        assert saved is not None and saved.step == 1
    other = checkpoint.course({**settings(learning_rate=1e-4, steps=None), "more": [1, 2]}, [ONE, TWO], {})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.latest(root, other)
    assert str(caught.value) == (
        f"Cannot resume from {path}: more is [1, 2], the checkpoint has not set; train.learning_rate is 0.0001, the "
        "checkpoint has 0.0003; train.steps is not set, the checkpoint has 9. Set it back (the run's own settings are "
        f"in {tmp_path / 'run.json'}), or choose another --output."
    )


def test_other_content_of_a_model_is_another_course_and_missing_files_are_not(tmp_path: Path) -> None:
    then = {"model.base": ["a.safetensors 1", "b.safetensors 2"], "init.i2l": ["x 5"], "init.more": None}
    save(tmp_path, 1, state={"course": checkpoint.course(settings(), [ONE], then)})
    for same in (then, {**then, "init.i2l": None}, {**then, "init.more": ["y 1"]}, {"model.base": then["model.base"]}):
        assert checkpoint.latest(tmp_path, checkpoint.course(settings(), [ONE], same))
    other = {**then, "model.base": ["a.safetensors 1", "b.safetensors 3"]}
    with pytest.raises(CheckpointError, match=r"model\.base is another model .* other content in b\.safetensors\. Set"):
        checkpoint.latest(tmp_path, checkpoint.course(settings(), [ONE], other))


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        ([ONE], r"other training pictures \(1\) than those of the checkpoint \(2\)"),
        ([TWO, ONE], "in another order"),
        ([ONE, ("digest 2", "a hog")], '1 captions have changed, such as "a hog", which was "a dog"'),
    ],
)
def test_other_pictures_are_another_course(pictures: list[tuple[str, str]], said: str, tmp_path: Path) -> None:
    save(tmp_path, 1, state={"course": checkpoint.course(settings(), [ONE, TWO], {})})
    with pytest.raises(CheckpointError, match=said):
        checkpoint.latest(tmp_path, checkpoint.course(settings(), pictures, {}))


def test_other_masks_are_another_course(tmp_path: Path) -> None:
    courses = {
        name: checkpoint.course(settings(), [ONE, TWO], {}, (), found)
        for name, found in {
            "none": [],
            "one": [("digest 1", "mask 1")],
            "other": [("digest 1", "mask 2")],
            "both": [("digest 2", "mask 2"), ("digest 1", "mask 1")],
            "both, in another order": [("digest 1", "mask 1"), ("digest 2", "mask 2")],
        }.items()
    }
    assert courses["none"] == checkpoint.course(settings(), [ONE, TWO], {})
    for name, changed in {"none": 1, "one": 0, "other": 1, "both": 1}.items():
        save(tmp_path / name, 1, state={"course": courses[name]})
        if changed:
            with pytest.raises(CheckpointError, match=r"masks of training pictures have .* those of 1 pictures\. Set"):
                checkpoint.latest(tmp_path / name, courses["one"])
        else:
            assert checkpoint.latest(tmp_path / name, courses["one"])
    assert checkpoint.latest(tmp_path / "both", courses["both, in another order"])


def test_a_checkpoint_without_a_course_is_of_an_older_version(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    del state["course"]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="older version"):
        checkpoint.latest(tmp_path, {})


def test_the_state_is_json_a_person_can_read(tmp_path: Path) -> None:
    state = json.loads((save(tmp_path, 5, state={"seconds": 2.0}) / "state.json").read_text())
    assert (state["step"], state["seconds"]) == (5, 2.0)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.01
