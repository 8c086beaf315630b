"""Curves and metrics: each step once, whatever happened to the run before."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.tracking import Tracker, duration


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output: Path, name: str) -> dict[int, float]:
    """A TensorBoard curve as it is shown; the last point of a step wins nothing: there must be only one."""
    events = EventAccumulator(str(output / "tensorboard"), {"images": 0, "scalars": 0}).Reload().Scalars(name)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def write(output: Path, steps: range, *, start: int = 0, offset: float = 0.0) -> None:
    with Tracker(output, start_step=start, steps=10, quiet=True, validate_again=start == 0) as tracker:
        for step in steps:
            tracker.scalars(step, {"loss": step + offset})


def test_scalars_go_to_both_places(tmp_path: Path) -> None:
    with Tracker(tmp_path, steps=2, quiet=True) as tracker:
        tracker.scalars(0, {"val_loss": 2.5, "seconds": 0.5})
        tracker.scalars(1, {"loss": 1.5, "lr": 0.25, "grad_norm": 2.0})
        assert len(lines(tmp_path)) == 2  # at once, not only at the end
    assert lines(tmp_path) == [
        {"step": 0, "val_loss": 2.5, "seconds": 0.5},
        {"step": 1, "loss": 1.5, "lr": 0.25, "grad_norm": 2.0},
    ]
    assert curve(tmp_path, "val_loss") == {0: 2.5} and curve(tmp_path, "loss") == {1: 1.5}


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(6, 11), start=5, offset=0.5)
    expected = {**{step: float(step) for step in range(1, 6)}, **{step: step + 0.5 for step in range(6, 11)}}
    assert {line["step"]: line["loss"] for line in lines(tmp_path)} == expected
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, 11)]
    assert curve(tmp_path, "loss") == expected


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, range(0, 4))
    write(tmp_path, range(0, 3), offset=0.5)
    assert [line["loss"] for line in lines(tmp_path)] == [0.5, 1.5, 2.5]
    assert curve(tmp_path, "loss") == {0: 0.5, 1: 1.5, 2: 2.5}


@pytest.mark.parametrize("half", ['{"step": 6, "lo', "{", '{"ste'])
def test_a_half_written_last_line_is_dropped(tmp_path: Path, half: str) -> None:
    write(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    write(tmp_path, range(6, 8), start=5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_pictures_go_to_tensorboard(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (24, 16), (255, 0, 0, 255))
    with Tracker(tmp_path, steps=1, quiet=True) as tracker:
        tracker.image(3, "samples/a creature", picture)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
    (event,) = events.Images("samples/a creature")
    assert (event.step, event.width, event.height) == (3, 24, 16)


def test_other_processes_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Tracker(tmp_path / "out", steps=1, quiet=True, main=False) as tracker:
        tracker.scalars(1, {"loss": 1.0})
        tracker.image(1, "name", Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)))
        tracker.progress(1, 1.0)
        tracker.warn("hello")
    assert not (tmp_path / "out").exists() and caplog.text == ""


def test_quiet_is_lines_and_loud_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shown = {}
    for quiet in (True, False):
        with Tracker(tmp_path / str(quiet), start_step=2, steps=4, quiet=quiet) as tracker:
            tracker.progress(3, 0.5)
            tracker.progress(4, 0.25)
            tracker.warn("a word on %s", "the way")
        shown[quiet] = capsys.readouterr()
    assert shown[True] == ("", "")
    assert "4/4" in shown[False].err and "loss=0.2500" in shown[False].err and shown[False].out == ""
    messages = [record.getMessage() for record in caplog.records]
    assert messages[1].startswith("step 4/4  loss 0.2500  ETA 00:00")  # the last step is always said
    assert messages.count("a word on the way") == 2 and len(messages) == 4


def test_a_short_run_among_many_says_nothing_when_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Tracker(tmp_path, steps=2, quiet=True, nested=True) as tracker:
        for step in (1, 2):
            tracker.progress(step, 0.5)
    assert not caplog.records


def test_duration() -> None:
    assert (duration(3723), duration(123)) == ("1:02:03", "02:03")
