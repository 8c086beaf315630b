"""A run before it starts: what its course is made of."""

from pathlib import Path
from typing import Any

import pytest

import initializers
from trainer.plan import load_config, prepare

CREATURES = Path("configs/creatures.toml")


def course(*overrides: str) -> dict[str, Any]:
    settings, start = load_config(CREATURES, ["output=never made", *overrides], initializers)
    return prepare(settings, start, resume=False).course()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("init.i2l.strength=0.5", "init.i2l.strength"),
        ('init.i2l.experts=["style"]', "models"),  # known by what is in their files
        ("init.i2l.expert_weights={coarse = 0.5}", "init.i2l.expert_weights.coarse"),
        ('init.i2l.mode="merge"', "init.i2l.mode"),
        ("init.i2l.pictures=2", "init.i2l.pictures"),
        ("data.caption_dropout=0.1", "data.caption_dropout"),
        ("train.max_grad_norm=2.0", "train.max_grad_norm"),
    ],
)
def test_settings_of_the_start_and_of_training_are_part_of_the_course(change: str, name: str) -> None:
    first, second = course(), course(change)
    assert first == course()
    assert {key for key in {*first, *second} if first.get(key) != second.get(key)} == {name}


def test_the_table_of_a_start_that_is_not_chosen_is_no_part_of_the_course() -> None:
    assert course("init.method=random") == course("init.method=random", "init.i2l.strength=0.5")
