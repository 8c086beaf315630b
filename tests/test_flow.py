"""Flow matching against formulas written out, and against diffusers' own scheduler."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from trainer import flow
from trainer.flow import FlowConfig, generator

TOKENS = 4096
COUNT = 20_000


def quantiles(config: FlowConfig, probabilities: list[float], tokens: int = TOKENS) -> list[float]:
    sigmas = flow.sample_sigmas(config, COUNT, tokens, generator("test"))
    assert sigmas.shape == (COUNT,) and sigmas.dtype == torch.float32
    assert sigmas.min() >= 0 and sigmas.max() < 1
    return torch.quantile(sigmas, torch.tensor(probabilities)).tolist()


PROBABILITIES = [0.1, 0.25, 0.5, 0.75, 0.9]
NORMAL = [-1.2815516, -0.6744898, 0.0, 0.6744898, 1.2815516]  # the normal distribution's quantiles at these


def test_uniform_sigmas() -> None:
    assert quantiles(FlowConfig(sigma_sampling="uniform"), PROBABILITIES) == pytest.approx(PROBABILITIES, abs=0.015)


def test_logit_normal_sigmas() -> None:
    expected = [1 / (1 + math.exp(-x)) for x in NORMAL]
    assert quantiles(FlowConfig(), PROBABILITIES) == pytest.approx(expected, abs=0.015)


def test_a_fixed_shift_moves_the_logit_by_its_logarithm() -> None:
    expected = [1 / (1 + math.exp(-x) / 3) for x in NORMAL]
    assert quantiles(FlowConfig(sigma_sampling="shift", shift=3.0), PROBABILITIES) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 8192])
def test_resolution_shift_is_the_published_scheduler_s_own(tokens: int, tiny_base: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_base, subfolder="scheduler")
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    assert flow.resolution_mu(tokens) == pytest.approx(mu, rel=1e-9)

    plain = flow.sample_sigmas(FlowConfig(), 1000, tokens, generator(1))
    shifted = flow.sample_sigmas(FlowConfig(sigma_sampling="resolution_shift"), 1000, tokens, generator(1))
    torch.testing.assert_close(shifted, scheduler.time_shift(mu, 1.0, plain), rtol=1e-5, atol=1e-7)
    assert (shifted > plain).all()


def test_a_fixed_shift_is_the_scheduler_s_shift() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.5)
    plain = torch.linspace(1, 1 / 1000, 1000)
    torch.testing.assert_close(flow.shifted(plain, 2.5), scheduler.sigmas[:1000], rtol=1e-5, atol=1e-6)


def test_uniform_sigmas_are_shifted_and_scaled_into_a_range() -> None:
    expected = [0.02 + 0.98 * (3 * p / (1 + 2 * p)) for p in PROBABILITIES]
    config = FlowConfig(sigma_sampling="uniform_shift", shift=3.0, sigma_range=(0.02, 1.0))
    assert quantiles(config, PROBABILITIES) == pytest.approx(expected, abs=0.015)
    half = FlowConfig(sigma_sampling="logit_normal", sigma_range=(0.5, 1.0))
    plain = flow.sample_sigmas(FlowConfig(), 100, TOKENS, generator(1))
    torch.testing.assert_close(flow.sample_sigmas(half, 100, TOKENS, generator(1)), 0.5 + 0.5 * plain)


def test_the_bell_is_diffsynth_s() -> None:
    """Its sigmas: a thousand evenly spread ones, shifted by e^0.8 and stretched to end at 0.02. Its weights there:
    exp(-2 (sigma - 0.5)^2), less the smallest, over their mean."""
    config = FlowConfig(
        sigma_sampling="uniform_shift", shift=math.exp(0.8), sigma_range=(0.02, 1.0), loss_weighting="bell"
    )
    sigmas = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    sigmas = math.exp(0.8) * sigmas / (1 + (math.exp(0.8) - 1) * sigmas)
    sigmas = 1 - (1 - sigmas) * (1 - 0.02) / (1 - sigmas[-1])
    assert float(sigmas.mean()) == pytest.approx(0.638, abs=1e-3)
    raw = torch.exp(-2 * (sigmas - 0.5) ** 2)
    expected = (raw - raw.min()) / (raw - raw.min()).mean()
    found = flow.loss_weights(config, sigmas, TOKENS)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    some = flow.loss_weights(config, torch.tensor([0.1, 0.5, 0.9, 1.0]), TOKENS)
    assert some is not None and some.tolist() == pytest.approx([0.51, 1.68, 0.51, 0.0], abs=5e-3)


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform", "resolution_shift"])
def test_the_mean_of_the_loss_weights_is_one(sampling: str) -> None:
    config = FlowConfig(sigma_sampling=sampling, loss_weighting="bell", sigma_range=(0.1, 0.8))  # type: ignore[arg-type]
    drawn = flow.sample_sigmas(config, COUNT, TOKENS, generator("weights"))
    weights = flow.loss_weights(config, drawn, TOKENS)
    assert weights is not None and float(weights.mean()) == pytest.approx(1, abs=0.01)
    assert flow.loss_weights(FlowConfig(), drawn, TOKENS) is None


def test_impossible_and_idle_settings_are_problems() -> None:
    for low, high in ((0.5, 0.5), (-0.1, 1.0), (0.2, 1.1)):
        assert "sigma_range must be two numbers" in FlowConfig(sigma_range=(low, high)).problems()[0]
    assert "shift must be above 0" in FlowConfig(sigma_sampling="uniform_shift").problems()[0]
    assert FlowConfig().problems() == FlowConfig(sigma_sampling="shift", shift=2.0).problems() == []
    for shift in (None, 0.0, -1.0):
        assert "shift must be above 0" in FlowConfig(sigma_sampling="shift", shift=shift).problems()[0]
    assert "no effect" in FlowConfig(sigma_sampling="uniform", shift=3.0).problems()[0]


def test_interpolation_and_velocity_agree_with_the_scheduler() -> None:
    """A step of the scheduler along the true velocity, from sigma to 0, ends at the latents."""
    latents, noise = torch.randn(2, 3, 4, 1, 6, 6, generator=generator("latents")).unbind(0)
    sigmas = torch.tensor([0.0, 0.3, 1.0])
    noisy = flow.interpolate(latents, noise, sigmas)
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy[1], 0.7 * latents[1] + 0.3 * noise[1])

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(sigmas=[0.3])
    step = scheduler.step(flow.velocity(latents, noise)[1], scheduler.timesteps[0], noisy[1])
    torch.testing.assert_close(step.prev_sample, latents[1], rtol=1e-5, atol=1e-5)
    scaled = scheduler.scale_noise(latents[1:2], scheduler.timesteps[:1], noise[1:2])
    torch.testing.assert_close(scaled[0], noisy[1], rtol=1e-5, atol=1e-6)


def test_the_loss_is_a_mean_for_each_sample_in_fp32() -> None:
    predicted, latents, noise = torch.randn(3, 2, 4, 1, 6, 6, generator=generator("loss")).unbind(0)
    expected = [((p - (n - x)).double() ** 2).mean() for p, x, n in zip(predicted, latents, noise, strict=True)]
    losses = flow.losses(predicted, latents, noise)
    torch.testing.assert_close(losses, torch.stack(expected).float(), rtol=1e-6, atol=0)
    assert flow.losses(predicted.bfloat16(), latents.bfloat16(), noise.bfloat16()).dtype == torch.float32


def test_stratified_sigmas() -> None:
    assert flow.stratified_sigmas(4).tolist() == [0.125, 0.375, 0.625, 0.875]


def test_a_generator_is_a_function_of_its_keys() -> None:
    def draw(*keys: int | str) -> list[float]:
        return torch.randn(4, generator=generator(*keys)).tolist()

    state = torch.random.get_rng_state()
    different = [(0, "noise", 1, 2), (0, "noise", 12), (1, "noise", 1, 2), (0, "sigmas", 1, 2), (0, "noise", "1", 2)]
    assert len({str(draw(*keys)) for keys in different}) == len(different)
    assert draw(*different[0]) == draw(*different[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_inside_seeded_depends_on_its_generator_alone() -> None:
    def drop(seed: int) -> torch.Tensor:
        with flow.seeded(generator(seed), torch.device("cpu")):
            return torch.nn.functional.dropout(torch.ones(100))

    first = drop(0)
    torch.rand(3)
    state = torch.random.get_rng_state()
    assert torch.equal(drop(0), first) and not torch.equal(drop(1), first)
    assert torch.equal(torch.random.get_rng_state(), state)
