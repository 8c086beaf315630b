"""What `tests.tiny` makes, as fixtures."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import tiny
from trainer import files

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Runs collect garbage: what the imports have made need not be looked through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_hashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept of files' hashes does not go into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("hashes")
        patch.setattr(files, "cache_folder", lambda: folder)
        patch.setattr("trainer.qwen_image.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in diffusers' layout."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.make_base(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of one creature with captions beside them."""
    folder = tmp_path / "pictures"
    tiny.make_pictures(folder)
    return folder


@pytest.fixture
def run_toml(tmp_path: Path, tiny_base: Path, pictures: Path) -> Path:
    """A small run's configuration."""
    path = tmp_path / "run.toml"
    path.write_text(tiny.RUN.format(output=tmp_path / "out", base=tiny_base, images=pictures))
    return path
