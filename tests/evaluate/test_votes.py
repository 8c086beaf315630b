"""Votes, counted by hand and held against scipy's intervals and tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from tests.helpers import BAD_INPUT, FINISHED
from trainer.config import ConfigError
from trainer.evaluate import votes
from trainer.evaluate.__main__ import main


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (3, 0), (5, 5), (17, 4), (200, 231)])
def test_intervals_and_tests_are_scipy_s(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses)
    interval = expected.proportion_ci(method="wilson")
    assert votes.wilson(wins, wins + losses) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert votes.sign_test(wins, losses) == pytest.approx(expected.pvalue)


def test_nothing_decided_says_nothing() -> None:
    found = votes.preference(("a", "b"), [None, None])
    assert (found.share, found.low, found.high, found.p, found.ties) == (None, 0.0, 1.0, 1.0, 2)


KEY = {
    "page": "p",
    "pairs": {
        "1": {"prompt": "one", "seed": "0", "left": "a", "right": "b"},
        "2": {"prompt": "two", "seed": "0", "left": "b", "right": "a"},
        "3": {"prompt": "two", "seed": "1", "left": "a", "right": "c"},
    },
}


def ballot(path: Path, name: str, chosen: dict[str, str], **changes: Any) -> Path:
    told = {"page": "p", "ballot": name, "voter": name, "votes": chosen, "saved": "2026-01-01", **changes}
    path.write_text(json.dumps(told))
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key.json"
    path.write_text(json.dumps(KEY))
    return path


def test_votes_are_joined_with_the_key(tmp_path: Path, key: Path) -> None:
    files = [
        ballot(tmp_path / "x.json", "x", {"1": "left", "2": "right", "3": "equal"}),
        ballot(tmp_path / "y.json", "y", {"1": "left", "2": "left"}),
        ballot(tmp_path / "z.json", "", {"1": "equal", "2": "left", "3": "right"}, ballot="z"),
    ]
    read, notes = votes.read_votes(files, key)
    found = votes.count(read)
    assert notes == [] and found["votes"] == 8 and found["voters"] == 3

    def rows(part: str) -> dict[tuple[str, str, str], tuple[int, int, int]]:
        return {(r["of"], r["first"], r["second"]): (r["wins"], r["losses"], r["ties"]) for r in found[part]}

    assert rows("overall") == {("", "a", "b"): (3, 2, 1), ("", "a", "c"): (0, 1, 1)}
    assert rows("prompts") == {
        ("one", "a", "b"): (2, 0, 1),
        ("two", "a", "b"): (1, 2, 0),
        ("two", "a", "c"): (0, 1, 1),
    }
    assert rows("pairs") == {("", "a", "b"): (1, 1, 0), ("", "a", "c"): (0, 1, 0)}, "by the majority of each pair"
    assert rows("by_voter")["x 1", "a", "b"] == (2, 0, 0) and rows("by_voter")["voter 3", "a", "c"] == (0, 1, 0)
    interval = binomtest(3, 5).proportion_ci(method="wilson")
    assert [found["overall"][0][end] for end in ("low", "high")] == pytest.approx([*interval]), "ties do not count"
    text = votes.in_words(found)
    assert "8 votes of 3 voters" in text and "a preferred to b in 60% (3 to 2, 1 equal" in text


def test_of_a_page_that_was_saved_twice_the_later_file_counts(tmp_path: Path, key: Path) -> None:
    late = ballot(tmp_path / "late.json", "x", {"1": "right", "2": "left"}, saved="2026-01-02")
    early = ballot(tmp_path / "early.json", "x", {"1": "left"})
    read, notes = votes.read_votes([late, early], key)
    assert [vote.preferred for vote in read] == ["b", "b"]
    assert len(notes) == 1 and "late.json, counts" in notes[0]


def test_all_that_is_wrong_with_files_is_told_together(tmp_path: Path, key: Path) -> None:
    files = [
        ballot(tmp_path / "other.json", "x", {"1": "left"}, page="q"),
        ballot(tmp_path / "pair.json", "y", {"9": "left"}),
        ballot(tmp_path / "choice.json", "z", {"1": "a"}),
        tmp_path / "missing.json",
        tmp_path / "half.json",
        key,
    ]
    files[4].write_text('{"page": "p", "vo')
    with pytest.raises(ConfigError) as error:
        votes.read_votes(files, key)
    told = error.value.problems
    assert len(told) == len(files)
    for file, text in zip(files, told, strict=True):
        assert str(file) in text
    for expected in ("another page", "no such pair: 9", "neither left", "cannot be read", "damaged", "no votes"):
        assert sum(expected in text for text in told) == 1, expected


def test_the_command(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ballot(tmp_path / "x.json", "x", {"1": "left", "2": "right"})
    output = tmp_path / "count.json"
    assert main(["votes", str(file), "--key", str(key), "--output", str(output)]) == FINISHED
    assert "a preferred to b in 100% (2 to 0, 0 equal; 95 % interval 34% to 100%" in capsys.readouterr().out
    assert json.loads(output.read_text())["overall"][0]["wins"] == 2
    assert main(["votes", str(file), "--key", str(file)]) == BAD_INPUT
    assert main(["votes", str(file), "--key", str(tmp_path / "none.json")]) == BAD_INPUT
