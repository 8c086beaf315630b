"""Which runs a comparison has: what each arm is, and what makes a run another one."""

from pathlib import Path
from typing import Any

import pytest

import initializers
from trainer import config
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
