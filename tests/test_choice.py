"""The choice of the best step, against SciPy's paired test and on curves whose answer is known."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from trainer.choice import choose, difference
from trainer.flow import generator


def noisy(mean: float, spread: float = 0.0, seed: int = 0) -> Tensor:
    """2 8"""
    return mean + spread * torch.randn(2, 8, generator=generator("errors", seed), dtype=torch.float64)


def test_the_standard_error_is_that_of_a_stratified_sample() -> None:
    """The pictures are drawn, the sigmas are not: var = sum over sigmas of (1/8)^2 s^2 / 3."""
    one = 1.0 + torch.randn(3, 8, generator=generator("a"), dtype=torch.float64)
    other = 1.1 + torch.randn(3, 8, generator=generator("b"), dtype=torch.float64)
    pairs = (one - other).T.tolist()  # by sigma
    expected = math.sqrt(sum(statistics.variance(own) / 3 for own in pairs) / 64)
    mean, error = difference(one, other)
    assert mean == pytest.approx(statistics.mean(statistics.mean(own) for own in pairs))
    assert error == pytest.approx(expected)
    # what is alike in all pictures is no error, however it differs between sigmas
    by_sigma = torch.linspace(0, 5, 8, dtype=torch.float64)
    assert difference(one + by_sigma, other)[1] == pytest.approx(expected)
    # a single picture has only its sigmas
    assert difference(one[:1], other[:1])[1] == pytest.approx(
        statistics.stdev((one - other)[0].tolist()) / math.sqrt(8)
    )
    assert difference(torch.ones(1, 1), torch.zeros(1, 1)) == (1.0, 0.0)


def test_a_later_step_must_be_better_by_more_than_the_error_of_the_difference() -> None:
    first = noisy(1.0)
    clearly = {0: first, 10: first - 0.1 - 0.05 * noisy(0, 1, 3)}
    hardly = {0: first, 10: first - 0.001 - 0.05 * noisy(0, 1, 3)}
    assert difference(hardly[0], hardly[10])[0] > 0  # lower, by noise
    assert (choose(clearly) or pytest.fail()).step == 10 and (choose(hardly) or pytest.fail()).step == 0


def test_small_improvements_add_up() -> None:
    """None of them is clear against the step before; against the chosen one they are in the end."""
    wiggle = 0.04 * noisy(0, 1, 5)
    errors = {step: noisy(1.0) - 0.004 * step + wiggle * (step % 2) for step in range(10)}
    found = choose(errors)
    assert found is not None and found.step >= 8


def test_the_pictures_differ_by_more_than_the_steps() -> None:
    """Paired: how hard a picture or a sigma is says nothing about steps."""
    hard = torch.linspace(0.01, 3, 16).view(2, 8)
    found = choose({0: hard, 10: hard * 0.98})
    assert found is not None and found.step == 10


def test_verdicts() -> None:
    wiggle = [0.01 * noisy(0, 1, seed) for seed in range(20)]

    def verdict(curve: list[float], scale: float = 1.0) -> str:
        found = choose({10 * i: noisy(loss) + scale * wiggle[i] for i, loss in enumerate(curve)})
        assert found is not None
        return found.verdict

    assert verdict([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]) == "still learning"
    assert verdict([1.0, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5]) == "converged"
    assert verdict([1.0, 0.6, 0.5, 0.55, 0.6, 0.65, 0.7]) == "overfitting"
    assert verdict([1.0, 0.6]) == ""  # too few to say
    # a rise of less than the standard error is no overfitting
    best, last = noisy(0.5), noisy(0.5) + 0.1 * noisy(0, 1, 9)
    higher, error = difference(last, best)
    last = last + (0.9 * error - higher)
    found = choose({0: noisy(1.0), 10: best, 20: best, 30: last})
    assert found is not None and (found.step, found.verdict) == (10, "converged")


def test_the_words_say_which_step_by_how_much_and_what_came_after() -> None:
    errors = {0: noisy(1.0), 10: noisy(0.5), 20: noisy(0.625), 30: noisy(0.75)}
    found = choose(errors)
    assert found is not None and (found.step, found.last, found.waited) == (10, 30, 2)
    assert found.text == (
        "the best step is 10 of 30, with a held-out loss of 0.5000; at the end it is 0.7500, +0.2500 with a standard "
        "error of 0.0000. Overfitting since step 10: what came after made it worse."
    )
    assert choose({}) is None
