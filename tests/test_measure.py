"""Drift and likeness against plain references."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from tests.test_adapter import random_seed, tiny
from trainer import adapter, measure
from trainer.adapter import AdapterConfig
from trainer.flow import generator
from trainer.tracking import Tracker


class Silent(Tracker):
    def __init__(self) -> None:
        pass

    def each(self, items, what):  # type: ignore[no-untyped-def]
        return iter(items)


def test_the_drift_is_that_of_a_plain_reference() -> None:
    model, base = tiny().eval(), tiny().eval()
    adapter.inject(model, AdapterConfig(rank=4))
    adapter.apply_seed(model, random_seed(model, 4, AdapterConfig(rank=4)), random_seed=0)
    prompts = [torch.randn(n, 32, generator=generator("prompt", n)) for n in (3, 5)]
    passes = measure.Passes(model, Accelerator(), torch.float32, 3)
    drift = measure.Drift(passes, prompts, (16, 1, 4, 4), lambda: adapter.switched_off(model))

    def velocity(transformer: QwenImageTransformer2DModel, noisy: Tensor, sigma: float, prompt: Tensor) -> Tensor:
        return measure.qwen_image.predict_velocity(transformer, noisy, torch.tensor([sigma]), prompt[None], None)

    moved, whole = 0.0, 0.0
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            random = generator("drift", row)
            noise = torch.randn(1, 16, 1, 4, 4, generator=random)
            expected = noise - velocity(base, noise, 1.0, prompt)
            other = torch.randn(8, 16, 1, 4, 4, generator=random)
            for i in range(8):
                sigma = (i + 0.5) / 8
                noisy = (1 - sigma) * expected + sigma * other[i : i + 1]
                plain = velocity(base, noisy, sigma, prompt).double()
                moved += float((velocity(model, noisy, sigma, prompt).double() - plain).square().sum())
                whole += float(plain.square().sum())
    assert moved / whole > 0.01
    assert drift(Silent()) == pytest.approx(moved / whole, rel=1e-4)
    adapter.load_tensors(model, {name: torch.zeros_like(t) for name, t in adapter.tensors(model).items()})
    assert drift(Silent()) == pytest.approx(0, abs=1e-10)


def test_likeness_is_the_mean_cosine_of_samples_with_real_pictures() -> None:
    rows = torch.randn(5, 7, generator=generator("rows"))
    found = measure.likeness({"SigLIP2": rows, "DINOv3": 2 * rows}, 2)
    cosines = [torch.cosine_similarity(rows[i], rows[j], dim=0) for i in range(2) for j in range(2, 5)]
    expected = float(torch.stack(cosines).mean())
    assert found == {"likeness siglip2": pytest.approx(expected), "likeness dinov3": pytest.approx(expected)}
