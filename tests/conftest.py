"""A tiny Qwen-Image of the real classes with random weights, and a folder of painted pictures."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image

from demo import base, build, painter, text_encoder
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
        patch.setattr(files, "_hashes", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in diffusers' layout: 2 blocks of width 64, tiny VAE, the demo's text encoder."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    text_encoder.save(folder)
    base.save_scheduler(folder / "scheduler")
    build.write_model_index(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder / "vae")
        QwenImageTransformer2DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=32,
            axes_dims_rope=(8, 12, 12),
            in_channels=64,
            out_channels=16,
            joint_attention_dim=text_encoder.HIDDEN_SIZE,
        ).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of one creature with captions beside them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        where = painter.scene(number)
        Image.fromarray(painter.paint(painter.identity("new", 0), where)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(painter.caption(where))
    return folder


@pytest.fixture
def run_toml(tmp_path: Path, tiny_base: Path, pictures: Path) -> Path:
    """A small run's configuration."""
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
output = "{tmp_path / "out"}"
[model]
base = "{tiny_base}"
dtype = "fp32"
[data]
images = "{pictures}"
resolution = 64
held_out = 2
[adapter]
rank = 4
[train]
steps = 4
batch_size = 2
learning_rate = 1e-3
[validation]
every = 2
prompts = ["a big creature in the middle, in a meadow"]
num_inference_steps = 2
[checkpoint]
every = 2
"""
    )
    return path
