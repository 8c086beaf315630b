"""Rank arithmetic, against dense float64 algebra that never looks at the factors' structure."""

import math

import numpy as np
import pytest
import torch

from trainer.flow import generator
from trainer.lowrank import (
    LowRank,
    common_rank,
    concatenate,
    energy_kept,
    nearest,
    norm,
    pad,
    rank,
    ranks_for_energy,
    relative_difference,
    scale,
    singular_values,
    squared_singular_values,
    truncate,
    with_random_directions,
    zeros,
)

FULL_SIZE = [(3072, 3072), (12288, 3072), (3072, 18432)]


def factors(in_features: int, out_features: int, rank: int, key: str = "x") -> LowRank:
    """Random factors of unequal strength with a mean, on which methods that centre columns fail."""
    random = generator(0, key, in_features, out_features, rank)
    strength = torch.linspace(2, 0.1, rank)
    a = (torch.randn(rank, in_features, generator=random) + 0.3) * strength[:, None]
    return LowRank(a, torch.randn(out_features, rank, generator=random) + 0.1)


def dense(x: LowRank) -> torch.Tensor:
    return x.b.double() @ x.a.double()


def error(x: LowRank, y: LowRank, rows: int = 2048) -> float:
    """|dW_x - dW_y|, from dense float64 blocks of rows."""
    pairs = zip(x.b.double().split(rows), y.b.double().split(rows), strict=True)
    a_x, a_y = x.a.double(), y.a.double()
    return math.sqrt(sum(float((b_x @ a_x - b_y @ a_y).square().sum()) for b_x, b_y in pairs))


@pytest.mark.parametrize(
    ("in_features", "out_features", "incoming", "asked"),
    [(40, 60, 12, 5), (60, 40, 12, 1), (8, 50, 20, 6), (50, 8, 20, 6)],
)
def test_truncation_is_the_dense_svd_s_best(in_features: int, out_features: int, incoming: int, asked: int) -> None:
    x = factors(in_features, out_features, incoming)
    u, s, vh = torch.linalg.svd(dense(x), full_matrices=False)
    y, kept = truncate(x, asked)
    assert rank(y) == asked and y.a.dtype == y.b.dtype == torch.float32
    assert torch.allclose(dense(y), u[:, :asked] * s[:asked] @ vh[:asked], atol=1e-5 * float(s[0]))
    assert kept == pytest.approx(float(s[:asked].square().sum() / s.square().sum()), rel=1e-12)


@pytest.mark.parametrize(("in_features", "out_features"), FULL_SIZE)
def test_truncation_is_optimal_on_full_size_shapes(in_features: int, out_features: int) -> None:
    x = factors(in_features, out_features, 96)
    product = (x.b.double().T @ x.b.double()) @ (
        x.a.double() @ x.a.double().T
    )  # its eigenvalues: squared singular values
    squared = np.sort(np.linalg.eigvals(product.numpy()).real)[::-1]
    optimum = math.sqrt(squared[32:].sum())
    y, kept = truncate(x, 32)
    assert rank(y) == 32
    assert abs(error(x, y) - optimum) / optimum <= 1e-5
    assert kept == pytest.approx(squared[:32].sum() / squared.sum(), rel=1e-9)


@pytest.mark.slow
def test_the_optimum_of_a_full_size_shape_from_a_dense_gram_matrix() -> None:
    x = factors(3072, 3072, 96)
    whole = dense(x)
    optimum = math.sqrt(float(torch.linalg.eigvalsh(whole @ whole.T)[:-32].sum()))
    assert abs(error(x, truncate(x, 32)[0]) - optimum) / optimum <= 1e-5


def test_singular_values_are_split_evenly_and_sorted() -> None:
    x = factors(40, 60, 12)
    y, _ = truncate(x, 12)
    s = torch.linalg.svdvals(dense(x))[:12]
    assert torch.allclose(y.a.double().norm(dim=1), s.sqrt(), rtol=1e-5)
    assert torch.allclose(y.b.double().norm(dim=0), s.sqrt(), rtol=1e-5)


def test_rank_deficient_factors_give_their_true_rank() -> None:
    x = factors(40, 60, 3)
    twice = concatenate([x, x, LowRank(torch.zeros(2, 40), torch.randn(60, 2, generator=generator(1)))])
    y, kept = truncate(twice, 6)
    assert rank(y) == 3
    assert kept == pytest.approx(1.0, abs=1e-12)
    assert error(scale(x, 2.0), y) <= 1e-6 * norm(x)
    assert y.a.isfinite().all() and y.b.isfinite().all()


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, 1e-9])
def test_rows_that_nearly_depend_on_one_another_keep_their_singular_values(distance: float) -> None:
    x, noise = factors(40, 60, 6), factors(40, 60, 6, "noise")
    near = LowRank(torch.cat([x.a.double(), x.a + distance * noise.a.double()]), torch.cat([x.b, noise.b], 1).double())
    expected = torch.linalg.svdvals(dense(near))[:12]
    resolved = expected > 1e-7 * expected[0]
    assert torch.allclose(singular_values(near)[resolved], expected[resolved], rtol=1e-6)
    y, _ = truncate(near, 12)
    assert abs(rank(y) - int(resolved.sum())) <= 1
    assert error(near, y) <= 1e-6 * float(expected[0])
    short, _ = truncate(near, 3)
    optimum = math.sqrt(float(expected[3:].square().sum()))
    assert abs(error(near, short) - optimum) <= 1e-5 * optimum


def test_rows_of_unequal_length_keep_their_singular_values() -> None:
    x = factors(40, 60, 6)
    lengths = torch.logspace(-5, 5, 6)
    unequal = LowRank(x.a * lengths[:, None], x.b / lengths)
    assert torch.allclose(singular_values(unequal), torch.linalg.svdvals(dense(unequal))[:6], rtol=1e-6)


ZEROS = [
    zeros(40, 60),
    LowRank(torch.zeros(4, 40), torch.zeros(60, 4)),
    LowRank(torch.ones(4, 40), torch.zeros(60, 4)),
]


@pytest.mark.parametrize("x", ZEROS)
def test_zero_factors_become_rank_zero(x: LowRank) -> None:
    y, kept = truncate(x, 3)
    assert (y.a.shape, y.b.shape, kept) == ((0, 40), (60, 0), 1.0)


def test_very_small_and_very_large_factors_keep_their_rank() -> None:
    x = factors(40, 60, 6)
    for size in (1e-12, 1e12):
        assert rank(truncate(scale(x, size), 6)[0]) == 6


def test_concatenate_adds_and_scale_multiplies() -> None:
    x, y = factors(40, 60, 3, "x"), factors(40, 60, 5, "y")
    both = concatenate([x, scale(y, -0.5)])
    assert rank(both) == 8
    assert torch.allclose(dense(both), dense(x) - 0.5 * dense(y))


@pytest.mark.parametrize("start", [0, 3])
def test_padding_changes_nothing_but_can_learn(start: int) -> None:
    x = factors(50, 60, start) if start else zeros(50, 60)
    y = pad(x, 11, generator(5))
    assert rank(y) == 11
    assert torch.equal(y.a[:start], x.a) and torch.equal(y.b[:, :start], x.b)
    assert torch.count_nonzero(y.b[:, start:]) == 0
    assert 0.9 / math.sqrt(50) < y.a[start:].abs().max() <= 1 / math.sqrt(50)
    assert torch.equal(y.a, pad(x, 11, generator(5)).a)
    assert not torch.equal(y.a, pad(x, 11, generator(6)).a)


@pytest.mark.parametrize(("in_features", "out_features"), [(16, 900), (900, 16)])
def test_random_rows_follow_the_law_of_a_linear_layer(in_features: int, out_features: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.nn.Linear(in_features, 400, bias=False).weight.detach()
    rows = pad(zeros(in_features, out_features), 400, generator(5)).a
    assert rows.shape == expected.shape
    for of in (torch.std, torch.max, torch.min):
        assert float(of(rows)) == pytest.approx(float(of(expected)), rel=0.03)
    assert abs(float(rows.mean())) < 0.05 * float(rows.std())


def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it() -> None:
    parts = {"x": factors(40, 60, 7, "x"), "y": factors(30, 50, 12, "y"), "nothing": zeros(40, 60)}
    squares = {name: torch.linalg.svdvals(dense(x)).square() for name, x in parts.items()}
    whole = sum(float(s.sum()) for s in squares.values())
    for share in (0.3, 0.9, 0.99, 1.0):
        uniform, own = ranks_for_energy(parts.items(), share)
        kept = [sum(float(s[:rank].sum()) for s in squares.values()) for rank in (uniform - 1, uniform)]
        assert kept[0] < share * whole <= kept[1] * (1 + 1e-9)
        for name in ("x", "y"):
            total = float(squares[name].sum())
            below, at = (float(squares[name][:rank].sum()) for rank in (own[name] - 1, own[name]))
            assert below < share * total <= at * (1 + 1e-9)
        assert own["nothing"] == 1


@pytest.mark.parametrize(("out_features", "in_features"), [(40, 60), (60, 40), (50, 50)])
def test_the_nearest_of_a_whole_change_is_the_dense_svd_s_best(out_features: int, in_features: int) -> None:
    change = torch.randn(out_features, in_features, dtype=torch.float64, generator=generator(1))
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    for asked in (1, 7, 100):
        y, kept = nearest(change, asked)
        assert rank(y) == min(asked, len(s)) and y.a.dtype == y.b.dtype == torch.float32
        assert torch.allclose(dense(y), u[:, :asked] * s[:asked] @ vh[:asked], atol=1e-6 * float(s[0]))
        assert kept == pytest.approx(float(s[:asked].square().sum() / s.square().sum()), rel=1e-12)
        lengths = y.a.double().norm(dim=1)
        assert torch.allclose(lengths, s[:asked].sqrt(), rtol=1e-6) and torch.allclose(
            y.b.double().norm(dim=0), lengths
        )
    assert torch.allclose(squared_singular_values(change), s.square(), rtol=1e-9)


def test_the_nearest_of_a_change_of_low_rank_has_no_more_than_that() -> None:
    x = factors(40, 60, 5)
    y, kept = nearest(dense(x), 12)
    assert rank(y) == 5 and kept == pytest.approx(1, abs=1e-12)
    assert relative_difference(x, y) < 1e-6
    nothing, kept = nearest(torch.zeros(4, 6, dtype=torch.float64), 3)
    assert rank(nothing) == 0 and kept == 1 and (nothing.a.shape, nothing.b.shape) == ((0, 6), (4, 0))
    assert common_rank([squared_singular_values(torch.zeros(4, 6, dtype=torch.float64))], 0.9) == 1


def test_what_is_kept_of_several_layers_is_weighted_by_their_energy() -> None:
    assert energy_kept({"x": 0.5, "y": 1.0, "zero": 1.0}, {"x": 3.0, "y": 5.0, "zero": 0.0, "other": 9.0}) == {
        "total": pytest.approx(6.5 / 8),
        "min": 0.5,
    }
    assert energy_kept({}, {}) == {"total": 1.0, "min": 1.0}


def test_norm_and_relative_difference_equal_the_dense_ones() -> None:
    x, y = factors(40, 60, 3, "x"), factors(40, 60, 5, "y")
    assert norm(x) == pytest.approx(float(dense(x).norm()), rel=1e-12)
    assert relative_difference(x, y) == pytest.approx(float((dense(x) - dense(y)).norm() / dense(x).norm()), rel=1e-10)


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6])
def test_small_differences_are_resolved(share: float) -> None:
    x = factors(40, 60, 6)
    doubles = LowRank(x.a.double(), x.b.double())
    assert relative_difference(doubles, scale(doubles, 1 + share)) == pytest.approx(share, rel=1e-2)


def test_a_difference_from_zero_is_none_or_infinite() -> None:
    x, zero = factors(40, 60, 3), zeros(40, 60)
    assert relative_difference(zero, LowRank(torch.ones(2, 40), torch.zeros(60, 2))) == 0
    assert relative_difference(zero, x) == math.inf
    assert relative_difference(x, zero) == pytest.approx(1)


def test_random_directions_keep_the_singular_values_and_nothing_else() -> None:
    random = torch.Generator().manual_seed(0)
    x = LowRank(torch.randn(5, 40, generator=random), torch.randn(30, 5, generator=random))
    y = with_random_directions(x, torch.Generator().manual_seed(1))
    assert torch.allclose(singular_values(y), singular_values(x), rtol=1e-5)
    dx, dy = (z.b.double() @ z.a.double() for z in (x, y))
    assert abs(float((dx * dy).sum())) < 0.2 * norm(x) * norm(y)
    again = with_random_directions(x, torch.Generator().manual_seed(1))
    assert torch.equal(again.a, y.a) and torch.equal(again.b, y.b)
