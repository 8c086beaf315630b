"""LoRAs on the base, drawn with: together, at strengths, and in the negative branch of guidance."""

from pathlib import Path

import pytest
import torch

from trainer import adapter, qwen_image
from trainer.adapter import AdapterWeights
from trainer.formats import write_lora
from trainer.formats.asked import Asked, check_files
from trainer.lowrank import LowRank
from trainer.qwen_image import ModelConfig
from trainer.studio import Settings, Studio, Worn, read_worn, together

MODULES = {"transformer_blocks.0.attn.to_q": (128, 128), "transformer_blocks.1.attn.to_v": (128, 128)}
SETTINGS = Settings(size=(64, 64), num_inference_steps=2, true_cfg_scale=1.0)
GUIDED = Settings(size=(64, 64), num_inference_steps=2, true_cfg_scale=4.0)


def lora(seed: int, rank: int = 2, names: tuple[str, ...] = tuple(MODULES)) -> AdapterWeights:
    random = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            name: LowRank(torch.randn(rank, 128, generator=random), torch.randn(128, rank, generator=random) * 0.05)
            for name in names
        }
    )


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    model = ModelConfig(base="demo/model", dtype="fp32")
    return Studio(model, torch.device("cpu"), tmp_path_factory.mktemp("cache"), quiet=True)


def dense(weights: AdapterWeights) -> dict[str, torch.Tensor]:
    return {name: x.b.double() @ x.a.double() for name, x in weights.factors.items()}


def test_together_is_the_weighted_sum() -> None:
    first, second = lora(0), lora(1, 3, ("transformer_blocks.1.attn.to_v",))
    found = dense(together([Worn("a", first, 0.5), Worn("b", second, -2.0), Worn("c", lora(2), 0.0)]))
    one, two = dense(first), dense(second)
    assert found.keys() == MODULES.keys()
    torch.testing.assert_close(found["transformer_blocks.0.attn.to_q"], 0.5 * one["transformer_blocks.0.attn.to_q"])
    name = "transformer_blocks.1.attn.to_v"
    torch.testing.assert_close(found[name], 0.5 * one[name] - 2 * two[name])


def test_worn_loras_draw_what_a_base_with_their_sum_draws(studio: Studio) -> None:
    prompts, seeds = ["a big creature in a meadow"], [3]
    plain = studio.latents(prompts, seeds, SETTINGS)
    worn = [Worn("a", lora(0), 0.5), Worn("b", lora(1), 0.25)]
    with studio.wearing(worn):
        found = studio.latents(prompts, seeds, SETTINGS)
    torch.testing.assert_close(studio.latents(prompts, seeds, SETTINGS), plain, rtol=0, atol=0)
    transformer = qwen_image.load_transformer(studio.model, studio.device)
    for name, change in dense(together(worn)).items():
        transformer.get_submodule(name).weight.data += change.float()
    embeds = studio.encode(prompts)[prompts[0]]
    expected = qwen_image.Sampler("demo/model").latents(
        transformer, [embeds], size=(64, 64), seeds=seeds, num_inference_steps=2
    )
    assert float((found - plain).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_negative_branch_has_its_own_lora(studio: Studio) -> None:
    """As a plain loop with two models computes it: each branch by a base of its own."""
    prompt, other = "a big creature in a meadow", lora(7)
    embeds = studio.encode([prompt, qwen_image.EMPTY_PROMPT])
    latents, sigma = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    velocities = {}
    for name, worn in (("with", lora(0)), ("negative", other)):
        handles = adapter.attach_frozen(studio.transformer, worn)
        text = prompt if name == "with" else qwen_image.EMPTY_PROMPT
        with torch.no_grad():
            velocities[name] = qwen_image.predict_velocity(studio.transformer, latents, sigma, embeds[text][None], None)
        for handle in handles:
            handle.remove()
    with studio.wearing([Worn("a", lora(0))]), studio.with_negative([Worn("b", other)]) as negative:
        with torch.no_grad():
            mine = qwen_image.predict_velocity(studio.transformer, latents, sigma, embeds[prompt][None], None)
            with negative():
                text = qwen_image.EMPTY_PROMPT
                theirs = qwen_image.predict_velocity(studio.transformer, latents, sigma, embeds[text][None], None)
            again = qwen_image.predict_velocity(studio.transformer, latents, sigma, embeds[prompt][None], None)
        guided = studio.latents([prompt], [0], GUIDED, negative)
        plain = studio.latents([prompt], [0], GUIDED)
    with studio.wearing([Worn("b", other)]):
        assert float((guided - studio.latents([prompt], [0], GUIDED)).abs().max()) > 0.05  # not in both branches
    torch.testing.assert_close(mine, velocities["with"], rtol=0, atol=0)
    torch.testing.assert_close(again, mine, rtol=0, atol=0)
    torch.testing.assert_close(theirs, velocities["negative"], rtol=0, atol=0)
    assert float((guided - plain).abs().max()) > 0.05
    with studio.wearing([Worn("a", lora(0))]), studio.with_negative([Worn("a", lora(0))]) as negative:
        torch.testing.assert_close(studio.latents([prompt], [0], GUIDED, negative), plain, rtol=0, atol=1e-5)


def test_an_error_inside_leaves_the_base_as_it_was(studio: Studio) -> None:
    plain = studio.latents(["a creature"], [0], SETTINGS)
    worn, other = studio.wearing([Worn("a", lora(0))]), studio.with_negative([Worn("b", lora(1))])
    with pytest.raises(KeyboardInterrupt), worn, other as negative, negative():
        raise KeyboardInterrupt
    torch.testing.assert_close(studio.latents(["a creature"], [0], SETTINGS), plain, rtol=0, atol=0)


def test_files_are_checked_by_their_headers(tmp_path: Path) -> None:
    good, small, cut = tmp_path / "good.safetensors", tmp_path / "small.safetensors", tmp_path / "cut.safetensors"
    write_lora(good, lora(0), {})
    name = "transformer_blocks.0.attn.to_q"
    write_lora(small, AdapterWeights({name: LowRank(torch.ones(1, 64), torch.ones(128, 1))}), {})
    cut.write_bytes(good.read_bytes()[:200])
    found, problems = check_files([good, small, cut, tmp_path / "none.safetensors", good], MODULES)
    assert [*found] == [good]
    assert len(problems) == 3
    assert (
        f"small.safetensors was made for another model: 1 of its 1 modules do not fit; {name} is 64 -> 128"
        in (problems[0])
    )
    assert "not a whole safetensors file" in problems[1] and "no such file" in problems[2]
    worn = read_worn(Asked(good, found[good], 0.5))
    assert worn.told()["strength"] == 0.5 and worn.told()["sha256"]
    torch.testing.assert_close(dense(worn.weights), dense(lora(0)))
