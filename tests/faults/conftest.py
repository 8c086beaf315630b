"""The world of the faults, made once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.world import copy_of, make_world


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world that no fault touches."""
    folder = tmp_path_factory.mktemp("faults") / "world"
    make_world(folder)
    return folder


@pytest.fixture
def world(original: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, as the current folder."""
    with copy_of(original, tmp_path / "world") as folder:
        yield folder
