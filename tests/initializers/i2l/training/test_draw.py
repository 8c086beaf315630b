"""Pictures that the base draws by itself: the pipeline's own, whole folders, bad arguments said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image

from initializers.i2l.__main__ import main
from initializers.i2l.training import draw
from trainer import qwen_image
from trainer.data.dataset import DataConfig, scan
from trainer.flow import generator


def test_the_pictures_are_the_pipelines(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a big creature\n\nat night\n")
    arguments = [
        "--base",
        str(tiny_base),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--output",
        str(tmp_path / "out"),
    ]
    arguments += ["--resolution", "64", "--dtype", "fp32", "--num-inference-steps", "3", "--true-cfg-scale", "2"]
    assert main(["draw", *arguments]) == 0
    examples = scan(DataConfig(images=str(tmp_path / "out"), resolution=64), multiple=16, seed=0).train
    assert [(example.path.name, example.caption) for example in examples] == [
        ("00000.png", "a big creature"),
        ("00001.png", "at night"),
    ]
    pipeline = QwenImagePipeline.from_pretrained(tiny_base, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for number, example in enumerate(examples):
        noise = torch.randn(1, 16, 1, 8, 8, generator=generator(number, "sample"))
        drawn = pipeline(
            example.caption,
            negative_prompt=" ",
            true_cfg_scale=2.0,
            width=64,
            height=64,
            num_inference_steps=3,
            latents=qwen_image.pack(noise),
        ).images[0]
        difference = np.asarray(drawn, float) - np.asarray(Image.open(example.path), float)
        assert np.abs(difference).max() <= 1


def test_killed_it_goes_on_with_what_it_has_drawn(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = draw.Settings(size=(64, 64), num_inference_steps=2)
    prompts = ["a big creature", "at night", "in a meadow"]
    draw.draw(str(tiny_base), prompts, tmp_path / "whole", settings)
    plain, calls = qwen_image.Sampler.latents, list[list[int]]()

    def sampled(self: qwen_image.Sampler, *given: Any, **options: Any) -> Any:
        calls.append(options["seeds"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, *given, **options)

    monkeypatch.setattr(qwen_image.Sampler, "latents", sampled)
    with pytest.raises(KeyboardInterrupt):
        draw.draw(str(tiny_base), prompts, tmp_path / "cut", settings)
    assert not (tmp_path / "cut").exists()
    draw.draw(str(tiny_base), prompts, tmp_path / "cut", settings)
    assert calls == [[0], [1], [2], [2]]
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
    assert not [*tmp_path.glob(".*")]


def test_bad_arguments_are_all_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    arguments = ["--base", str(tmp_path), "--prompts", str(tmp_path / "empty.txt"), "--output", str(tmp_path)]
    assert main(["draw", *arguments, "--resolution", "70"]) == 2
    for part in ("not a Qwen-Image folder", "one prompt a line", "exists already", "multiple of 16"):
        assert part in caplog.text
