"""The stable loss against its definition; samples and their sheet."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import qwen_image, validation
from trainer.flow import generator
from trainer.qwen_image import ModelConfig
from trainer.validation import Item, Sample, ValidationConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def transformer(tiny_base: Path) -> torch.nn.Module:
    return qwen_image.load_transformer(ModelConfig(base=str(tiny_base), dtype="fp32"), CPU)


def item(number: int, height: int = 8) -> Item:
    random = generator("item", number)
    latents, prompt = torch.randn(16, 1, height, 8, generator=random), torch.randn(5 + number, 64, generator=random)
    return Item(f"{number}.png", f"digest {number}", latents, prompt)


def loss(transformer: torch.nn.Module, *items: Item) -> float:
    return float(validation.stable_errors(transformer, items, CPU, torch.float32).mean())


def test_samples_come_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    validation.save_samples(tmp_path, 20, samples(20, list("abcdefghijkl")))
    validation.save_samples(tmp_path, 100, samples(100, list("abc")))
    found = validation.sample_files(tmp_path)
    assert [*found] == [20, 100]
    assert [path.name for path in found[20]] == [f"step-000020-{row}.png" for row in range(12)]


def test_the_stable_loss_is_the_mean_over_eight_sigmas(transformer: torch.nn.Module) -> None:
    items = [item(1), item(2, height=6)]
    expected = []
    for one in items:
        noises = torch.randn(8, *one.latents.shape, generator=generator("stable loss", one.digest))
        for index, noise in enumerate(noises):
            sigma = (2 * index + 1) / 16
            noisy = (1 - sigma) * one.latents + sigma * noise
            with torch.no_grad():
                predicted = qwen_image.predict_velocity(
                    transformer, noisy[None], torch.tensor([sigma]), one.prompt[None], None
                )
            expected.append(float((predicted[0] - (noise - one.latents)).square().mean()))
    assert len(expected) == 16
    assert loss(transformer, *items) == pytest.approx(sum(expected) / 16, rel=1e-5)


def test_the_stable_loss_is_the_same_whenever_it_is_measured(transformer: torch.nn.Module) -> None:
    torch.rand(7)
    first, state = loss(transformer, item(1), item(2)), torch.random.get_rng_state()
    assert loss(transformer, item(1), item(2)) == first
    assert loss(transformer, item(2), item(1)) == pytest.approx(first, rel=1e-6)
    assert (loss(transformer, item(1)) + loss(transformer, item(2))) / 2 == pytest.approx(first, rel=1e-6)
    assert loss(transformer, item(1)) != loss(transformer, item(2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_settings() -> None:
    assert ValidationConfig().problems() == []
    bad = ValidationConfig(every=0, num_inference_steps=1, num_pictures=0, true_cfg_scale=0.5)
    names = ["every", "num_inference_steps", "num_pictures", "true_cfg_scale"]
    assert [problem.split()[0] for problem in bad.problems()] == names


def test_each_prompt_is_drawn_from_its_own_fixed_noise(transformer: torch.nn.Module, tiny_base: Path) -> None:
    prompts = [item(1).prompt, item(1).prompt, item(2).prompt]

    def draw(seed: int = 3, scale: float = 1.0) -> list[Image.Image]:
        latents = qwen_image.Sampler(str(tiny_base)).latents(
            transformer,  # type: ignore[arg-type]
            prompts,
            size=(48, 64),
            seeds=[seed + row for row in range(3)],
            num_inference_steps=2,
            true_cfg_scale=scale,
            negative_prompt=item(3).prompt,
        )
        vae = qwen_image.load_vae(str(tiny_base), torch.device("cpu"))
        return [picture for one in latents for picture in qwen_image.decode_latents(vae, one[None])]

    pictures = draw()
    assert [picture.size for picture in pictures] == [(48, 64)] * 3
    data = [picture.tobytes() for picture in pictures]
    assert len(set(data)) == 3
    assert [picture.tobytes() for picture in draw()] == data
    assert next(picture.tobytes() for picture in draw(seed=4)) == data[1]  # the noise of row r is that of seed + r
    assert [picture.tobytes() for picture in draw(scale=4.0)] != data


# --- pictures ---------------------------------------------------------------------------------------------


def swatch(step: int, row: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (step, 40 * row, 200))


def colours(sheet: Image.Image) -> set[tuple[int, ...]]:
    pixels = np.asarray(sheet).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(value.tolist()) for value, count in zip(values, counts, strict=True) if count > 5000}


def samples(step: int, prompts: Sequence[str]) -> list[Sample]:
    return [Sample(text, row, swatch(step, row)) for row, text in enumerate(prompts)]


def test_the_sheet_has_a_row_for_each_prompt_and_a_column_for_each_step(tmp_path: Path) -> None:
    for step in (0, 20, 100):
        validation.save_samples(tmp_path, step, samples(step, ["a", "b"]))
    assert len([*tmp_path.iterdir()]) == 6
    sheet = validation.contact_sheet(tmp_path)
    assert sheet is not None
    expected = {(step, 40 * row, 200) for step in (0, 20, 100) for row in range(2)}
    assert colours(sheet) >= expected
    where = {colour: np.argwhere((np.asarray(sheet) == colour).all(-1)).mean(0) for colour in expected}
    for row in range(2):  # steps go from left to right, prompts from top to bottom
        assert where[0, 40 * row, 200][1] < where[20, 40 * row, 200][1] < where[100, 40 * row, 200][1]
    assert where[0, 0, 200][0] < where[0, 40, 200][0]


def test_a_long_run_s_sheet_shows_the_first_and_the_last(tmp_path: Path) -> None:
    for step in range(0, 250, 10):
        validation.save_samples(tmp_path, step, samples(step, ["a"]))
    sheet = validation.contact_sheet(tmp_path)
    assert sheet is not None
    shown = {colour for colour in colours(sheet) if colour[1:] == (0, 200)}
    assert len(shown) == 10 and {(0, 0, 200), (240, 0, 200)} <= shown


def test_samples_carry_their_prompt_and_a_changed_one_begins_a_new_row(tmp_path: Path) -> None:
    """When a run goes on with other prompts, what was drawn before is not relabelled."""
    (before, kept), after = samples(0, ["gone", '小明, "kept"']), swatch(10, 4)
    validation.save_samples(tmp_path, 0, [before, kept])
    validation.save_samples(tmp_path, 10, [Sample("new", 0, after), replace(kept, picture=swatch(10, 1))])
    assert validation.sample_rows(tmp_path) == {0: ("gone", "0"), 1: ('小明, "kept"', "1"), 2: ("new", "0")}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-000000-0.png", "step-000000-1.png", "step-000010-1.png", "step-000010-2.png"}
    sheet = validation.contact_sheet(tmp_path)
    assert sheet is not None
    found = {colour for colour in colours(sheet) if colour[2] == 200}
    assert found == {(0, 0, 200), (0, 40, 200), (10, 40, 200), (10, 160, 200)}
    assert validation.contact_sheet(tmp_path / "empty") is None


def test_the_same_prompt_from_other_noise_is_another_row(tmp_path: Path) -> None:
    validation.save_samples(tmp_path, 0, [Sample("a", 0, swatch(0, 0)), Sample("a", 1, swatch(0, 1))])
    validation.save_samples(tmp_path, 5, [Sample("a", 1, swatch(5, 1)), Sample("a", 2, swatch(5, 2))])
    assert validation.sample_rows(tmp_path) == {0: ("a", "0"), 1: ("a", "1"), 2: ("a", "2")}


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (1024, 512)])
def test_small_pictures_are_enlarged_and_large_ones_made_smaller(size: tuple[int, int]) -> None:
    sheet = validation.grid([[swatch(9, 0, size)] * 2] * 3, ["x", "y"], ["long " * 100] * 3)
    cells = (np.asarray(sheet) == (9, 0, 200)).all(-1)
    longest = int(cells.any(0).sum()) // 2, int(cells.any(1).sum()) // 3
    assert 128 <= max(longest) <= 320
    assert max(longest) / min(longest) == pytest.approx(max(size) / min(size), rel=0.03)
