"""Metrics against torchmetrics' own, scikit-image's and plain loops, on the same tensors."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from trainer.evaluate import metrics
from trainer.flow import generator


def rows(count: int, dim: int, name: str, shift: float = 0.0) -> Tensor:
    return torch.randn(count, dim, generator=generator(name), dtype=torch.float64) + shift


class Features(torch.nn.Module):
    """Embeddings stand in the place of pictures."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor]:
    random = generator("pictures")
    real = torch.nn.functional.interpolate(torch.rand(3, 3, 5, 4, generator=random), (40, 32), mode="bicubic").clamp(
        0, 1
    )
    return (real + 0.1 * torch.randn(real.shape, generator=random)).clamp(0, 1), real


def test_psnr_and_ssim_are_the_library_s_and_scikit_image_s(pictures: tuple[Tensor, Tensor]) -> None:
    drawn, real = pictures
    psnr, ssim = metrics.psnr(drawn, real), metrics.ssim(drawn, real)
    assert psnr.shape == ssim.shape == (3,)
    for i in range(3):
        one = drawn[i : i + 1], real[i : i + 1]
        assert float(psnr[i]) == pytest.approx(float(PeakSignalNoiseRatio(data_range=1.0)(*one)), rel=1e-6)
        assert float(ssim[i]) == pytest.approx(float(StructuralSimilarityIndexMeasure(data_range=1.0)(*one)), rel=1e-6)
        a, b = drawn[i].double().numpy(), real[i].double().numpy()
        assert float(psnr[i]) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), rel=1e-5)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
        everywhere = structural_similarity(a, b, channel_axis=0, data_range=1, **options)[1]  # at the border, too
        assert float(ssim[i]) == pytest.approx(float(everywhere.mean()), abs=1e-3)
    assert len({*psnr.tolist()}) == 3


def test_equal_pictures_have_a_psnr_that_json_can_say(pictures: tuple[Tensor, Tensor]) -> None:
    real = pictures[1]
    assert metrics.psnr(real, real).tolist() == [metrics.BEST_PSNR] * 3
    assert metrics.ssim(real, real).tolist() == pytest.approx([1] * 3)


@pytest.mark.parametrize(("n", "m"), [(60, 50), (7, 5), (9, 60)])
def test_the_frechet_distance_is_the_library_s(n: int, m: int) -> None:
    """With fewer rows than numbers, too, where covariances are singular."""
    dim = 12
    x, y = rows(n, dim, "x"), 1.5 * rows(m, dim, "y", 0.3)
    library = FrechetInceptionDistance(Features(dim))
    library.set_dtype(torch.float64)
    library.update(x, real=False)
    library.update(y, real=True)
    assert metrics.frechet(x, y) == pytest.approx(float(library.compute()), rel=1e-6)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_few_is_biased_upwards() -> None:
    """As the notes of an evaluation say: all are drawn alike, and the distance is far from 0."""
    few, many = (
        sum(metrics.frechet(rows(n, 16, f"x {n} {i}"), rows(n, 16, f"y {n} {i}")) for i in range(5)) / 5
        for n in (6, 400)
    )
    assert few > 8 > 0.5 > many


@pytest.mark.parametrize("count", [4, 30])
def test_the_kernel_distance_is_the_library_s(count: int) -> None:
    x, y = rows(count, 10, "x"), rows(count, 10, "y", 0.5)
    library = KernelInceptionDistance(Features(10), subsets=1, subset_size=count)
    library.update(x, real=False)
    library.update(y, real=True)
    found = metrics.kernel_distance(x, y)
    assert found.value == pytest.approx(float(library.compute()[0]), rel=1e-6) and found.count == count


def plain(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return float(((a * b).sum() / len(a) + 1) ** 3)

    def within(z: Tensor) -> float:
        return sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))

    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_its_error_is_the_jackknife_s_by_a_plain_loop() -> None:
    x, y = rows(5, 6, "x"), rows(4, 6, "y", 0.4)
    found = metrics.kernel_distance(x, y)
    assert found.value == pytest.approx(plain(x, y))
    variance = 0.0
    for mine, without in (
        (x, [plain(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(5)]),
        (y, [plain(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(4)]),
    ):
        middle = sum(without) / len(mine)
        variance += (len(mine) - 1) / len(mine) * sum((value - middle) ** 2 for value in without)
    assert found.error == pytest.approx(math.sqrt(variance))
    assert metrics.kernel_distance(x[:2], y).error is None


def test_the_kernel_distance_of_few_is_not_biased() -> None:
    values = torch.tensor([metrics.kernel_distance(rows(4, 8, f"x{i}"), rows(5, 8, f"y{i}")).value for i in range(300)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(300)
    assert float(values.std()) > 0.1 and bool((values < 0).any())


def test_a_mean_has_a_standard_error() -> None:
    values = torch.tensor([1.0, 2.0, 4.0])
    found = metrics.mean(values)
    deviation = math.sqrt(sum((v - 7 / 3) ** 2 for v in (1, 2, 4)) / 2)
    assert found == metrics.Value(pytest.approx(7 / 3), pytest.approx(deviation / math.sqrt(3)), 3)
    assert metrics.mean(values[:1]) == metrics.Value(1.0, None, 1)
