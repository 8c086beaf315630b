"""Which runs a comparison has: what each arm is, and what makes a run another one."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import initializers
from trainer import config, qwen_image
from trainer.compare.plan import Comparison, Request, prepare

CREATURES = Path("configs/creatures.toml")


def compared(folder: Path, *overrides: str, method: str = "i2l", **request: Any) -> Comparison:
    given = Request(initializers=("random", method), **{"seeds": 2, "learning_rates": (1e-3,), **request})
    return prepare(CREATURES, [f"output={folder / 'out'}", *overrides], given, initializers)


def fingerprints(found: Comparison) -> dict[str, str]:
    return {f"{cell.arm.name} {cell.seed}": found.fingerprint(cell) for cell in found.cells()}


def test_the_control_bias_only_has_no_other_expert(tmp_path: Path) -> None:
    found = compared(tmp_path, controls=("norm-matched", "bias-only", "no-training"))
    arms = {arm.name: arm for arm in found.arms}
    assert {name: arm.control for name, arm in arms.items()} == {
        "random": None, "i2l": None, "norm-matched": "norm-matched", "bias-only": "bias-only",
        "no-training": "no-training",
    }  # fmt: skip
    assert arms["bias-only"].start.options.experts == ("bias",)
    for name in ("i2l", "norm-matched", "no-training"):
        assert arms[name].start.options.experts == ("coarse", "fine")
    assert {cell.arm.name for cell in found.cells()} == arms.keys() - {"no-training"}


@pytest.mark.parametrize(
    "change",
    [
        "init.i2l.strength=0.5",
        'init.i2l.experts=["style"]',
        'init.i2l.mode="merge"',
    ],
)
def test_the_table_of_an_initializer_is_part_of_its_own_runs_fingerprints(change: str, tmp_path: Path) -> None:
    first, second = fingerprints(compared(tmp_path)), fingerprints(compared(tmp_path, change))
    assert first == fingerprints(compared(tmp_path))
    assert {name for name in first if first[name] != second[name]} == {"i2l 0", "i2l 1"}


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=100",
        "train.gradient_accumulation_steps=2",
        "train.batch_size=3",
        "validation.every=10",
        "validation.seed=1",
        "data.held_out=1",
        "adapter.rank=4",
        "model.dtype=bf16",
    ],
)
def test_a_setting_of_all_runs_is_part_of_all_fingerprints(change: str, tmp_path: Path) -> None:
    first, second = fingerprints(compared(tmp_path)), fingerprints(compared(tmp_path, change))
    assert first.keys() == second.keys() and not {*first.values()} & {*second.values()}


def test_runs_of_one_comparison_have_different_fingerprints(tmp_path: Path) -> None:
    found = compared(tmp_path, controls=("norm-matched", "bias-only"), learning_rates=(1e-3, 3e-3))
    assert len(fingerprints(found)) == 4 * 2  # by arm and seed
    assert len({found.fingerprint(cell) for cell in found.cells()}) == len(found.cells()) == 4 * 2 * 2


def test_a_run_has_the_rate_the_seed_and_the_start_of_its_cell(tmp_path: Path) -> None:
    found = compared(tmp_path, learning_rates=(1e-3, 3e-3))
    for cell in found.cells():
        plan = found.plan_of(cell)
        assert (plan.config.train.learning_rate, plan.config.seed) == (cell.learning_rate, cell.seed)
        assert plan.start is cell.arm.start and plan.config.init.method == cell.arm.start.method
        assert plan.output == cell.folder
        rest = config.to_dict(plan.config.train) | {"learning_rate": None}
        assert rest == config.to_dict(found.config.train) | {"learning_rate": None}


def test_other_models_of_the_same_names_make_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprints(compared(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("initializers.i2l.identity", lambda options: ["another"])
        second = fingerprints(compared(tmp_path))
    assert {name for name in first if first[name] != second[name]} == {"i2l 0", "i2l 1"}
    monkeypatch.setattr(qwen_image, "identity", lambda *_: ["another"])
    third = fingerprints(compared(tmp_path))
    assert {name for name in first if first[name] != third[name]} == {*first}


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    """Two groups of two subjects, with two pictures for training and one held out each."""
    for number, name in enumerate(("g/x", "g/y", "h/v", "h/w")):
        folder = tmp_path / "subjects" / name
        (folder / "held_out").mkdir(parents=True)
        for place, index in ((folder, 2 * number), (folder, 2 * number + 1), (folder / "held_out", 2 * number + 2)):
            for suffix in (".png", ".txt"):
                shutil.copy(f"demo/images/zorp/{index % 8}{suffix}", place)
    return tmp_path / "subjects"


def test_wrong_pictures_are_those_of_the_next_subject_of_the_group(subjects: Path, tmp_path: Path) -> None:
    found = compared(tmp_path, subjects=subjects, controls=("wrong-pictures",))
    others = {subject.name: found.other(subject) for subject in found.subjects}
    names = {name: other.name for name, other in others.items() if other is not None}
    assert names == {"g/x": "g/y", "g/y": "g/x", "h/v": "h/w", "h/w": "h/v"}


def of_subjects(found: Comparison) -> dict[tuple[str, str], str]:
    return {(cell.subject.name, cell.arm.name): found.fingerprint(cell) for cell in found.cells()}


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("h/v/4.png", {("h/v", "random"), ("h/v", "i2l"), ("h/v", "wrong-pictures"), ("h/w", "wrong-pictures")}),
        ("h/v/held_out/6.png", {("h/v", "random"), ("h/v", "i2l"), ("h/v", "wrong-pictures")}),
        ("h/v/4.txt", {("h/v", "random"), ("h/v", "i2l"), ("h/v", "wrong-pictures"), ("h/w", "wrong-pictures")}),
    ],
)
def test_another_picture_or_caption_makes_other_runs_of_those_who_see_it(
    file: str, changed: set[tuple[str, str]], subjects: Path, tmp_path: Path
) -> None:
    given = {"subjects": subjects, "controls": ("wrong-pictures",), "seeds": 1}
    first = of_subjects(compared(tmp_path, **given))
    with (subjects / file).open("ab") as content:
        content.write(b" more")
    second = of_subjects(compared(tmp_path, **given))
    assert {name for name in first if first[name] != second[name]} == changed
