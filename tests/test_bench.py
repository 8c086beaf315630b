"""The benchmark measures the steps that a run does."""

import json
from pathlib import Path

import pytest
from helpers import BAD_INPUT, FINISHED

from trainer.bench import TURNS, WARMUP, main


def test_the_parts_and_the_whole(run_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    assert main(["--config", str(run_toml), "--steps", str(WARMUP + 3), "--output", str(output)]) == FINISHED
    report = json.loads(output.read_text())
    assert report["steps"] == 3 * TURNS
    assert [*report["parts"]] == ["data", "forward", "backward", "optimizer", "logging"]
    assert all(value > 0 for value in report["parts"].values())
    assert report["overhead"] == pytest.approx(report["seconds_in_the_loop"] / report["seconds_bare"] - 1)
    assert report["pictures_per_second"] == pytest.approx(2 / report["seconds_in_the_loop"])
    assert "in the loop" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()  # nothing is left in the run's own folder


def test_bad_arguments_are_told(run_toml: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["--config", str(run_toml), "--steps", str(WARMUP)]) == BAD_INPUT
    assert main(["--config", str(run_toml), "--set", "train.stepz=3"]) == BAD_INPUT
    assert "--steps must be more" in caplog.text and "train.stepz" in caplog.text.replace("[train] ", "train.")
