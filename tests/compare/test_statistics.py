"""What is concluded from curves, checked on curves whose answers are plain."""

from statistics import NormalDist, pstdev

import pytest

from trainer.compare.statistics import Run, area, best_rates, interval, outcomes, summarise


def run(
    arm: str, losses: list[float], *, subject: str = "a", rate: float = 1e-3, seed: int = 0, init_seconds: float = 0.0
) -> Run:
    """A validation every 10 steps; a step takes a tenth of a second."""
    return {
        "group": "g",
        "subject": subject,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "init_seconds": init_seconds,
        "curve": [{"step": 10 * i, "val_loss": loss, "seconds": float(i)} for i, loss in enumerate(losses)],
    }


def test_each_arm_is_taken_at_its_own_best_rate_over_seeds() -> None:
    runs = [
        run("x", [9, 4], rate=1e-4, seed=0),
        run("x", [9, 6], rate=1e-4, seed=1),
        run("x", [9, 1], rate=1e-3, seed=0),
        run("x", [9, 8], rate=1e-3, seed=1),
        run("y", [9, 3], rate=1e-3),
        run("y", [9, 2], rate=1e-2),
    ]
    assert best_rates(runs) == {("a", "x"): 1e-3, ("a", "y"): 1e-2}  # 4.5 against 5.0: the mean, not the best seed


def test_neither_a_lucky_nor_an_unlucky_seed_chooses_the_rate() -> None:
    def chosen(**bests: tuple[float, float]) -> float:
        rates = {"low": 1e-4, "high": 1e-3}
        both = [(rates[name], seed, best) for name, found in bests.items() for seed, best in enumerate(found)]
        return best_rates([run("x", [9, best], rate=rate, seed=seed) for rate, seed, best in both])["a", "x"]

    assert chosen(low=(4, 5), high=(1, 9)) == 1e-4
    assert chosen(low=(1, 6), high=(4, 4)) == 1e-4
    assert chosen(low=(4, 5), high=(5, 4)) == 1e-4  # of equal ones the lower
    assert chosen(low=(4, 5), high=(4, 4)) == 1e-3


def test_steps_and_seconds_to_the_baselines_best() -> None:
    runs = [
        run("random", [10, 8, 6, 7], init_seconds=0.5),
        run("i2l", [9, 6, 5, 5.5], init_seconds=3),
        run("late", [12, 11, 10, 9]),
        run("ready", [6, 7, 7, 7]),
    ]
    found = {row.arm: row for row in outcomes(runs, "random")}
    assert (found["i2l"].steps, found["i2l"].seconds, found["i2l"].baseline_step) == (10, 4.0, 20)
    assert (found["i2l"].best, found["i2l"].best_step, found["i2l"].end) == (5, 20, 5.5)
    assert found["i2l"].baseline_seconds == 2.5
    assert (found["late"].steps, found["late"].seconds) == (None, None)
    assert found["ready"].steps == 0
    assert found["random"].steps == found["random"].baseline_step == 20

    summary = {arm: summarise([row]) for arm, row in found.items()}
    assert summary["i2l"]["steps"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert summary["i2l"]["seconds"]["value"] == 4.0 / 2.5
    assert summary["i2l"]["best_lower_by"]["value"] == pytest.approx(1 / 6)
    assert summary["late"]["never"] == 1 and summary["late"]["steps"]["value"] == 30 / 20  # all of its run
    assert summary["ready"]["below_at_step_0"] == 1 and summary["ready"]["steps"]["value"] == 0
    assert summary["random"]["best_lower_by"]["value"] == 0


def test_seconds_that_were_not_measured_are_none_and_not_0() -> None:
    runs = [run("random", [10, 8]), run("i2l", [9, 7]), {**run("later", [9, 7]), "init_seconds": None}]
    summary = {row.arm: summarise([row]) for row in outcomes(runs, "random")}
    assert summary["later"]["seconds"] == {"value": None, "low": None, "high": None}
    assert summary["later"]["start_seconds"] is None and not summary["later"]["seconds_known"]
    assert summary["later"]["steps"] == summary["i2l"]["steps"]
    assert summary["i2l"]["start_seconds"] == 0 and summary["i2l"]["seconds_known"]
    assert not summarise(outcomes(runs, "later")[:1])["seconds_known"]  # held against what is not known


def test_a_rate_at_which_a_run_failed_is_not_taken() -> None:
    runs = [run("x", [9, 4], rate=1e-4, seed=seed) for seed in (0, 1)]
    assert best_rates([*runs, run("x", [9, 1], rate=1e-2, seed=0)]) == {("a", "x"): 1e-4}


def test_a_run_that_never_gets_there_counts_whole_with_its_initializer() -> None:
    runs = [run("random", [10, 8, 6], init_seconds=0.5), run("i2l", [9, 8, 7], init_seconds=3)]
    (row,) = (row for row in outcomes(runs, "random") if row.arm == "i2l")
    assert (row.length, row.length_seconds, row.baseline_seconds) == (20, 3 + 2.0, 0.5 + 2.0)
    found = summarise([row])
    assert found["seconds"]["value"] == 5 / 2.5 and found["steps"]["value"] == 20 / 20 and found["never"] == 1
    assert found["area_ratio"]["value"] == pytest.approx(8 / 8)


def test_the_ratio_of_areas_is_the_arm_s_by_the_baseline_s() -> None:
    rows = [row for row in outcomes([run("random", [8, 8]), run("i2l", [4, 2])], "random") if row.arm == "i2l"]
    assert summarise(rows)["area_ratio"]["value"] == 3 / 8


def test_a_seed_is_compared_with_the_baseline_of_the_same_seed() -> None:
    runs = [
        run("random", [10, 8], seed=0),
        run("random", [10, 4], seed=1),
        run("i2l", [7, 7], seed=0),
        run("i2l", [7, 7], seed=1),
        run("i2l", [7, 7], seed=2),  # whose baseline failed
    ]
    rows = [row for row in outcomes(runs, "random") if row.arm == "i2l"]
    assert [(row.seed, row.steps) for row in rows] == [(0, 0), (1, None)]
    assert summarise(rows)["never"] == 1 and summarise(rows)["best_lower_by_range"] == [1 - 7 / 4, 1 - 7 / 8]


def test_a_baseline_that_is_best_at_step_0_has_no_ratio() -> None:
    rows = [row for row in outcomes([run("random", [5, 6]), run("i2l", [4, 3])], "random") if row.arm == "i2l"]
    assert summarise(rows)["steps"] == {"value": None, "low": None, "high": None}


def test_the_area_is_the_mean_of_the_broken_line() -> None:
    curve = [{"step": 0, "val_loss": 4.0}, {"step": 10, "val_loss": 2.0}, {"step": 40, "val_loss": 2.0}]
    assert area(curve) == (3 * 10 + 2 * 30) / 40
    assert area(curve[:1]) == 4.0


def test_the_interval_is_over_subjects_and_not_over_their_many_seeds() -> None:
    """Two subjects that differ, each with seeds that agree: as many seeds as one likes tell nothing new."""
    runs = []
    for subject, gain in (("a", 0.1), ("b", 0.3)):
        for seed in range(20):
            runs += [
                run("random", [1, 1], subject=subject, seed=seed),
                run("i2l", [1 - gain] * 2, subject=subject, seed=seed),
            ]
    rows = [row for row in outcomes(runs, "random") if row.arm == "i2l"]
    found = interval(rows, lambda some: sum(1 - row.best for row in some) / len(some))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.1, 0.3))
    assert found == interval(rows, lambda some: sum(1 - row.best for row in some) / len(some))


def test_the_interval_holds_95_of_100() -> None:
    """Of many subjects, it is the mean and 1.96 of its standard errors to each side."""
    gains = [0.1 + 0.05 * NormalDist().inv_cdf((i + 0.5) / 60) for i in range(60)]
    runs = []
    for number, share in enumerate(gains):
        runs += [run("random", [1, 1], subject=f"{number}"), run("i2l", [1 - share] * 2, subject=f"{number}")]
    rows = [row for row in outcomes(runs, "random") if row.arm == "i2l"]
    found = interval(rows, lambda some: sum(1 - row.best for row in some) / len(some))
    reach = 1.96 * pstdev(gains) / 60**0.5
    expected = (0.1, 0.1 - reach, 0.1 + reach)
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=0.08 * reach)


def test_a_subject_with_many_seeds_counts_as_one_of_few_when_resampled() -> None:
    """Seeds of one subject that disagree are drawn anew, too: alone it has an interval, and not a point."""
    runs = [run("random", [1, 1], seed=seed) for seed in range(9)]
    runs += [run("i2l", [1 - 0.1 * (seed % 3)] * 2, seed=seed) for seed in range(9)]
    rows = [row for row in outcomes(runs, "random") if row.arm == "i2l"]
    found = interval(rows, lambda some: sum(1 - row.best for row in some) / len(some))
    assert found.low is not None and found.high is not None
    assert 0.02 < found.low < 0.08 < 0.12 < found.high < 0.18 and found.value == pytest.approx(0.1)
