"""The diagnosis of training pictures: on errors whose fault is known, and against a reference of its scores."""

import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import diagnosis
from trainer.diagnosis import THRESHOLD, Diagnosis, diagnose
from trainer.errors import UserError

SIGMAS = 8
Record = dict[str, Any]
CAPTION, SUBJECT = "is the caption right?", "is it the same subject?"


def folder(
    count: int = 12,
    *,
    seed: int = 0,
    start: str = "i2l",
    worth: Mapping[int, float] | None = None,
    others: Mapping[int, float] | None = None,
    gains: Mapping[int, Sequence[float]] | None = None,
    base: Mapping[int, float] | None = None,
) -> list[Record]:
    """Records of a folder in which all pictures are alike, but for the log ratios that are given by picture: base / no
    caption, others' seed / base, adapter / base at the steps 20, 40 ..., and base / that of the other pictures."""
    random, found = np.random.default_rng(seed), list[Record]()

    def noisy(value: float, spread: float) -> Any:
        return value + random.normal(0, spread) + random.normal(0, spread / 2, SIGMAS)

    def add(step: int, number: int, what: str, logs: Any) -> None:
        errors = np.exp(np.asarray(logs)).tolist()
        found.append({"step": step, "part": "train", "picture": f"{number}.png", "what": what, "errors": errors})

    for number in range(count):
        plain = noisy((base or {}).get(number, 0.0), 0.2) + np.linspace(-2, 0, SIGMAS)
        add(0, number, "base", plain)
        add(0, number, "no caption", plain - noisy((worth or {}).get(number, -0.5), 0.1))
        if start == "i2l":
            add(0, number, "others' seed", plain + noisy((others or {}).get(number, -0.6), 0.1))
        add(0, number, "adapter", plain)
        for step, gain in enumerate((gains or {}).get(number, (-0.1, -0.2, -0.25)), 1):
            add(20 * step, number, "adapter", plain + noisy(gain, 0.01))
    return found


def names(found: Diagnosis) -> list[str]:
    return [one.picture for one in found.pictures]


def reasons(found: Diagnosis) -> dict[str, tuple[str, ...]]:
    return {one.picture: one.reasons for one in found.pictures if one.reasons}


def test_a_wrong_caption_and_another_subject_are_named_first_each_with_its_reason() -> None:
    found = diagnose(folder(worth={3: 0.4}, others={9: 0.3}))
    assert {*names(found)[:2]} == {"3.png", "9.png"}
    assert {one.picture for one in found.doubtful} == {"3.png", "9.png"} == {*reasons(found)}
    assert reasons(found)["3.png"][0] == f"its caption explains it no better than no caption does: {CAPTION}"
    assert reasons(found)["9.png"][0] == f"the seed of the other pictures makes it worse than the base is: {SUBJECT}"


def test_a_caption_or_a_seed_that_helps_less_than_usual_is_told_in_other_words() -> None:
    found = reasons(diagnose(folder(60, worth={3: -0.1}, others={9: -0.15})))
    assert found["3.png"] == (f"its caption explains it less than those of the other pictures explain them: {CAPTION}",)
    assert found["9.png"] == (f"the seed of the other pictures helps it less than it helps them: {SUBJECT}",)


def test_a_wrong_caption_that_no_seed_can_fit_is_not_taken_for_another_subject() -> None:
    found = diagnose(folder(worth={3: 0.2}, others={3: 1.5}))
    assert names(found)[0] == "3.png" and len(reasons(found)) == 1
    assert reasons(found)["3.png"][0].endswith(CAPTION) and not any(SUBJECT in text for text in reasons(found)["3.png"])


def test_without_seeds_the_picture_that_is_learned_least_is_doubted() -> None:
    found = diagnose(folder(start="random", worth={3: 0.4}, gains={9: (0.0, 0.0, 0.0)}))
    assert {*names(found)[:2]} == {"3.png", "9.png"}
    assert reasons(found)["9.png"][0] == "it is learned least of all: is it the same subject?"
    with_seeds = diagnose(folder(worth={3: 0.4}, gains={9: (0.0, 0.0, 0.0)}))
    assert names(with_seeds)[0] == "3.png" and "9.png" not in reasons(with_seeds)


def test_a_caption_that_is_not_doubtful_counts_half_beside_the_subject() -> None:
    """Worth varies from caption to caption: without seeds, that would hide the picture that is learned least."""
    records = folder(start="random", seed=1, gains={9: (-0.07, -0.15, -0.19)})
    found = {one.picture: one.score for one in diagnose(records).pictures}
    logs = {r["picture"]: np.log(r["errors"]) for r in records if r["what"] == "base"}
    none = {r["picture"]: np.log(r["errors"]) for r in records if r["what"] == "no caption"}
    doubts = reference({name: (logs[name] - none[name]).tolist() for name in logs})
    least = {r["picture"]: np.full(SIGMAS, np.inf) for r in records}
    for record in records:
        if record["what"] == "adapter" and record["step"]:
            name = record["picture"]
            least[name] = np.minimum(least[name], np.log(record["errors"]) - logs[name])
    others = reference({name: values.tolist() for name, values in least.items()})
    assert max(doubts.values()) < THRESHOLD
    assert found == pytest.approx({name: max(doubts[name] / 2, others[name], 0) for name in found})
    assert any(doubts[name] / 2 > max(others[name], 0) for name in found)


def reference(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Robust z scores of few pictures, with the standard library."""
    means = {name: statistics.fmean(row) for name, row in values.items()}
    middle = statistics.median(means.values())
    mad = 1.4826 * statistics.median(abs(mean - middle) for mean in means.values())
    columns = [statistics.median(column) for column in zip(*values.values(), strict=True)]
    spreads = [
        statistics.stdev([x - column for x, column in zip(row, columns, strict=True)]) for row in values.values()
    ]
    scale = max(mad, statistics.median(spreads) / SIGMAS**0.5) * (1 + 4 / len(means))
    return {name: (mean - middle) / scale for name, mean in means.items()}


@pytest.mark.parametrize("count", [4, 12, 40])
def test_clean_folders_are_mostly_left_alone(count: int) -> None:
    """False alarms, with normal deviations: a few in a hundred, of whatever number of pictures."""
    found = [diagnose(folder(count, seed=seed)) for seed in range(100)]
    assert sum(bool(one.doubtful) for one in found) <= 5
    assert 0.5 < statistics.median(one.pictures[0].score for one in found) < 3


def test_numbers() -> None:
    def record(step: int, what: str, value: float) -> Record:
        errors = [value * factor for factor in (0.5, 0.7, 0.9, 1.0, 1.0, 1.1, 1.3, 1.5)]  # of mean 1
        return {"step": step, "part": "train", "picture": "a.png", "what": what, "errors": errors}

    course = {0: 0.8, 20: 0.75, 40: 0.6, 60: 0.5, 80: 0.55}
    records = [record(0, "base", 0.8), record(0, "no caption", 1.0), record(0, "others' seed", 0.6)]
    records += [record(step, "adapter", value) for step, value in reversed(course.items())]
    (one,) = diagnose(records).pictures
    assert (one.learned_at, one.best_step) == (40, 60)
    told = (one.base_error, one.caption_worth, one.start_error, one.last_error, one.gain, one.rise)
    assert told == pytest.approx((0.8, 0.2, 0.8, 0.55, 1 - 0.55 / 0.8, 0.1))
    assert one.others_seed_gain == pytest.approx(0.25)
    (never,) = diagnose([record(0, "adapter", 0.5), record(20, "adapter", 0.6)]).pictures
    assert never.learned_at is None and never.best_step == 0 and never.rise == pytest.approx(0.2)
    assert never.caption_worth is None and never.others_seed_gain is None and never.score == 0


def test_a_picture_that_gets_worse_is_told_of_but_need_not_be_at_fault() -> None:
    found = diagnose(folder(start="random", gains={5: (-0.2, -0.25, -0.1)}))
    assert reasons(found)["5.png"][-1] == "it gets worse since step 40"
    assert all("gets worse" not in text for name, texts in reasons(found).items() if name != "5.png" for text in texts)
    small = diagnose(folder(start="random", gains={5: (-0.2, -0.25, -0.23)}))
    assert "5.png" not in reasons(small)


def test_a_picture_that_the_base_explains_already_teaches_little() -> None:
    easy = {5: -3.0}
    found = diagnose(folder(base=easy, gains={5: (-0.01, -0.02, -0.02)}))
    assert reasons(found)["5.png"] == ("the base already explains it: it teaches little",)
    assert "5.png" not in {one.picture for one in found.doubtful}
    assert "5.png" not in reasons(diagnose(folder(base=easy)))  # it is learned as the others are


def test_the_last_to_be_learned_is_told_of_only_if_it_is_doubtful() -> None:
    late = {3: (-0.01, -0.1, -0.25)}
    assert reasons(diagnose(folder(gains=late))) == {}
    found = reasons(diagnose(folder(worth={3: 0.4}, gains=late)))
    assert found["3.png"][1:] == ("it is learned last: half of its gain came by step 60",)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("start", ["i2l", "random"])
def test_of_few_pictures_only_a_caption_that_does_harm_is_told(count: int, start: str) -> None:
    for seed in range(20):
        found = diagnose(folder(count, seed=seed, start=start, gains={0: (0.0, 0.1, 0.2)}, others={0: 0.5}))
        assert len(found.pictures) == count and reasons(found) == {}
    harmed = diagnose(folder(count, start=start, worth={0: 0.5}))
    assert [one.picture for one in harmed.doubtful] == ["0.png"] == names(harmed)[:1]


def test_captions_that_do_harm_are_told_though_most_do() -> None:
    wrong = {number: 0.5 for number in range(7)}
    assert {one.picture for one in diagnose(folder(worth=wrong)).doubtful} == {f"{number}.png" for number in wrong}


def test_equal_pictures_are_not_divided_by_zero() -> None:
    one = folder(1)
    same = [{**record, "picture": f"{number}.png"} for number in range(6) for record in one]
    assert all(picture.score == 0 and picture.reasons == () for picture in diagnose(same).pictures)


def test_only_training_pictures_are_diagnosed_and_a_resumed_run_counts_once() -> None:
    records = folder(worth={3: 0.4})
    held_out = [{**record, "part": "held_out", "picture": "held.png"} for record in records[:3]]
    earlier = [{**record, "errors": [9.0] * SIGMAS} for record in records if record["step"] == 60]
    assert diagnose([*held_out, *earlier, *records]) == diagnose(records)


def test_what_is_missing_or_not_finite_is_not_compared() -> None:
    records = folder(worth={3: 0.4}, others={9: 0.3})
    for record in records:
        if record["picture"] == "5.png" and record["what"] in ("no caption", "others' seed"):
            record["errors"] = [float("nan")] * SIGMAS
    thinned = [r for r in records if not (r["picture"] == "6.png" and r["what"] == "adapter" and r["step"] == 40)]
    found = diagnose(thinned)
    assert {*names(found)[:2]} == {"3.png", "9.png"} and len(found.pictures) == 12
    five = next(one for one in found.pictures if one.picture == "5.png")
    assert five.caption_worth is None and five.score == 0


def test_no_training_picture_is_an_error() -> None:
    with pytest.raises(UserError, match="tells of no training picture"):
        diagnose([])


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    def write(end: str) -> Path:
        lines = [json.dumps(record) for record in folder(worth={3: 0.4}, others={9: 0.3})]
        (tmp_path / "pictures.jsonl").write_text("\n".join(lines) + "\n" + end, encoding="utf-8")
        return tmp_path

    yield write


def test_a_diagnosis_is_written_and_read(written: Callable[[str], Path]) -> None:
    run = written("")
    found = diagnosis.write_diagnosis(run)
    assert found == diagnosis.read(run) == diagnose(folder(worth={3: 0.4}, others={9: 0.3}))
    rows = json.loads((run / "diagnosis.json").read_text())["pictures"]
    assert [row["picture"] for row in rows] == names(found) and rows[0]["reasons"] == [*found.pictures[0].reasons]
    assert {"score", "base_error", "caption_worth", "gain", "learned_at", "rise", "others_seed_gain"} <= {*rows[0]}


def test_the_half_line_of_a_killed_run_is_left_out_and_others_are_warned_of(
    written: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    whole = diagnosis.write_diagnosis(written(""))
    with caplog.at_level(logging.WARNING, "trainer"):
        assert diagnosis.write_diagnosis(written('{"step": 80, "part": "tr')) == whole
        assert not caplog.records
        count = len(diagnosis.read_records(written("")))
        assert diagnosis.write_diagnosis(written('{"step": 1}\n[]\n')) == whole
    assert f"left out: line {count + 1}, {count + 2}" in caplog.text


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pictures\.jsonl is missing"):
        diagnosis.write_diagnosis(tmp_path)
    with pytest.raises(UserError, match=r"diagnosis\.json cannot be read"):
        diagnosis.read(tmp_path)
    for text in ("{", '{"pictures": [{}]}', "[]"):
        (tmp_path / "diagnosis.json").write_text(text)
        with pytest.raises(UserError, match=r"diagnosis\.json"):
            diagnosis.read(tmp_path)


def test_the_table_names_all_pictures_in_order() -> None:
    found = diagnose(folder(worth={3: 0.4}))
    lines = diagnosis.table(found).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == names(found)
    assert len({line.count("|") for line in lines}) == 1 and CAPTION in lines[2]
