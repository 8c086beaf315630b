"""Comparisons: paired, resumable, told whole; on the tiny world, and with i2L and its controls on the demo's."""

import errno
import html
import json
import logging
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, SiglipConfig, SiglipModel

import train
from demo import creatures, painter
from initializers import gaussian
from tests.helpers import BAD_INPUT, FAILED, FINISHED, INTERRUPTED, files, kill_me, killed
from trainer import folder, loop, objective, text_image
from trainer.adapter import AdapterConfig, AdapterWeights, Seed
from trainer.compare import execute as compare
from trainer.compare import measures as samples
from trainer.compare import plan as comparison
from trainer.compare.__main__ import main
from trainer.compare.runs import norm_matched, start_seconds
from trainer.lowrank import LowRank

ARGUMENTS = ("--seeds", "2", "--learning-rates", "1e-3", "1e-2", "--quiet")


def go(config: Path, output: Path, *arguments: str) -> int:
    return train.main(["--config", str(config), "--output", str(output), *ARGUMENTS, *arguments])


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def curves(output: Path) -> dict[tuple[str, str, float, int], list[dict[str, float]]]:
    """The curve of each run, without what a clock says."""
    found = {
        (run["subject"], run["arm"], run["learning_rate"], run["seed"]): [
            {name: value for name, value in point.items() if name != "seconds"} for point in run["curve"]
        ]
        for run in report_of(output)["runs"]
    }
    assert found
    return found


@pytest.fixture
def loras(run_toml: Path, tmp_path: Path) -> tuple[str, str]:
    """The same weights in two files that differ in their metadata."""
    assert train.main(["--config", str(run_toml), "--output", str(tmp_path / "made"), "--quiet"]) == FINISHED
    paths = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    made = tmp_path / "made" / "adapter" / "pytorch_lora_weights.safetensors"
    shutil.copy(made, paths[0])
    save_file(load_file(made), paths[1], {"by": "hand"})
    return str(paths[0]), str(paths[1])


@pytest.mark.slow
def test_arms_are_paired_and_do_not_disturb_one_another(run_toml: Path, tmp_path: Path, loras: tuple[str, str]) -> None:
    output = tmp_path / "compared"
    assert go(run_toml, output, "--compare", "random", loras[0]) == FINISHED
    before = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    first = curves(output)
    assert len(before) == len(first) == 2 * 2 * 2

    assert go(run_toml, output, "--compare", "random", "gaussian", *loras) == FINISHED
    second = curves(output)
    assert len(second) == 4 * 2 * 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # not run again
    for name, curve in first.items():
        assert second[name] == curve
    for (subject, arm, rate, seed), curve in second.items():
        if arm == "one":
            assert second[subject, "two", rate, seed] == curve

    assert go(run_toml, tmp_path / "turned", "--compare", loras[1], "random") == FINISHED
    for name, curve in curves(tmp_path / "turned").items():
        assert second[name] == curve
    assert report_of(tmp_path / "turned")["baseline"] == "random"


@pytest.mark.slow
def test_a_run_of_a_comparison_is_the_run_that_train_does(run_toml: Path, tmp_path: Path) -> None:
    assert go(run_toml, tmp_path / "compared", "--compare", "random", "gaussian") == FINISHED
    alone = ["--config", str(run_toml), "--init", "gaussian", "--output", str(tmp_path / "alone"), "--quiet"]
    assert train.main([*alone, "--set", "train.learning_rate=1e-2"]) == FINISHED
    expected = json.loads((tmp_path / "alone" / "run.json").read_text())["validations"]
    found = curves(tmp_path / "compared")["pictures", "gaussian", 1e-2, 0]
    assert [(p["step"], p["val_loss"], p["train_stable_loss"]) for p in found] == [
        (p["step"], p["val_loss"], p["train_stable_loss"]) for p in expected
    ]
    assert len(found) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 1])
def test_killed_in_the_middle_it_ends_with_the_same_report(
    number: int, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the `number`th run, after a checkpoint of it."""
    arguments = ("--compare", "random", "gaussian")
    assert go(run_toml, tmp_path / "whole", *arguments) == FINISHED
    update, calls = loop._Training.update, [0]

    def dying(*given: Any) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 4 * (number - 1) + 4:  # the last of its four steps; checkpoints are after each second
            kill_me()
        return update(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "update", dying)
        assert killed(lambda: go(run_toml, tmp_path / "cut", *arguments))
    assert not (tmp_path / "cut" / "report.json").exists()
    assert len([*(tmp_path / "cut").rglob("result.json")]) == number - 1
    assert len([*(tmp_path / "cut").rglob("step-00000002")]) == 1
    assert go(run_toml, tmp_path / "cut", *arguments) == FINISHED
    assert curves(tmp_path / "cut") == curves(tmp_path / "whole")
    assert not [name for name in files(tmp_path / "cut") if "checkpoints" in name or "partial" in name]
    assert {re.sub(r"tfevents.*", "", name) for name in files(tmp_path / "cut")} == {
        re.sub(r"tfevents.*", "", name) for name in files(tmp_path / "whole")
    }


def test_stopped_by_ctrl_c_it_says_how_to_go_on(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update = loop._Training.update

    def interrupted(*given: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return update(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "update", interrupted)
        assert go(run_toml, tmp_path / "cut", "--compare", "random") == INTERRUPTED
    assert "stopped after step 1; give the same command again" in caplog.text
    assert go(run_toml, tmp_path / "cut", "--compare", "random") == FINISHED


@pytest.mark.slow
def test_parts_make_the_whole(run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    arguments = ("--compare", "random", "gaussian")
    assert go(run_toml, tmp_path / "whole", *arguments) == FINISHED
    assert go(run_toml, tmp_path / "parts", *arguments, "--part", "2/2") == FINISHED
    assert not (tmp_path / "parts" / "report.json").exists()
    assert "4 runs of other parts are missing" in caplog.text
    assert go(run_toml, tmp_path / "parts", *arguments, "--part", "1/2") == FINISHED
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")


def test_parts_share_few_subjects() -> None:
    @dataclass
    class Wanted:
        request: comparison.Request
        subjects = tuple("abcde")
        seeds = (0, 1, 2)

    for count in (1, 2, 4, 7, 20):
        parts = [
            compare.own_units(Wanted(comparison.Request(initializers=(), part=(number, count))))  # type: ignore[arg-type]
            for number in range(1, count + 1)
        ]
        assert [*chain(*parts)] == [(subject, seed) for subject in "abcde" for seed in range(3)]
        assert sum(len({subject for subject, _ in part}) for part in parts) <= 5 + count - 1


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({}, 5.0),
        ({"seconds": {"encoders": 3.0, "merge": 1.0}, "first_seconds": {"encoders": 3.0}}, 5.0),  # computed now
        (
            {"seconds": {"encoders": 0.5}, "first_seconds": {"encoders": 30.0, "style": 8.0}},
            4.5 + 38.0,
        ),  # cached
        ({"seconds": {"encoders": 0.5}, "first_seconds": {"encoders": 30.0, "style": None}}, None),
    ],
)
def test_a_start_costs_what_it_would_alone(report: dict[str, Any], expected: float | None) -> None:
    assert start_seconds(5.0, report) == expected


def test_under_accelerate_launch_each_process_takes_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare.own_part() == (1, 1)
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert compare.own_part() == (3, 4)
    assert "WORLD_SIZE" not in os.environ and "MASTER_PORT" not in os.environ  # else accelerate would join them


def test_a_run_that_fails_is_in_the_report(run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rates = ("--learning-rates", "1e-3", "1e30")
    assert go(run_toml, tmp_path / "out", "--compare", "random", "gaussian", *rates, "--seeds", "1") == FINISHED
    status = {(run["arm"], run["learning_rate"]): run["status"] for run in report_of(tmp_path / "out")["runs"]}
    assert status == {
        (arm, rate): "failed" if rate == 1e30 else "finished" for arm in ("random", "gaussian") for rate in (1e-3, 1e30)
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Runs that failed" in page and "1e+30" in page and "gradient norm" in page
    assert "gradient norm" in caplog.text


@pytest.mark.slow
def test_an_initializer_that_fails_fails_its_own_runs(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> None:
        raise ValueError("no seed for these pictures")

    with monkeypatch.context() as patch:
        patch.setattr("initializers.gaussian.initialize", failing)
        assert go(run_toml, tmp_path / "out", "--compare", "random", "gaussian", "--seeds", "1") == FAILED
    runs = report_of(tmp_path / "out")["runs"]
    assert {run["arm"]: run["status"] for run in runs} == {"random": "finished", "gaussian": "failed"}
    assert all(run["error"] == "ValueError: no seed for these pictures" for run in runs if run["arm"] == "gaussian")
    assert "all 2 runs of gaussian failed, the first by ValueError: no seed for these pictures" in caplog.text

    assert go(run_toml, tmp_path / "out", "--compare", "random", "gaussian", "--seeds", "1") == FINISHED
    runs = report_of(tmp_path / "out")["runs"]
    assert all(run["status"] == "finished" and run["init_seconds"] is not None for run in runs)


class Unforeseen(Exception):
    """Of no kind that the program knows."""


@pytest.mark.slow
def test_whatever_fails_in_a_run_fails_that_run_alone(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update, output = loop._Training.update, tmp_path / "out"
    arguments = ("--compare", "random", "gaussian", "--learning-rates", "1e-3")
    calls = [0]

    def failing(*given: Any) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 4 + 3:  # in the second run, after a checkpoint of it
            raise Unforeseen("such a thing")
        return update(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "update", failing)
        assert go(run_toml, output, *arguments) == FINISHED
    report = report_of(output)
    (failed,) = (run for run in report["runs"] if run["status"] == "failed")
    assert (failed["arm"], failed["seed"], failed["error"]) == ("gaussian", 0, "Unforeseen: such a thing")
    trace = output / "runs" / "pictures" / "gaussian" / "0.001-0" / "error.txt"
    assert output / failed["traceback"] == trace and "in failing" in trace.read_text() and str(trace) in caplog.text
    page = (output / "report.html").read_text()
    assert "1 of 4 runs failed" in page and failed["error"] in page and failed["traceback"] in page
    rows = {row["arm"]: (row["runs"], row["failed"]) for row in report["summary"]}
    assert rows == {"random": (2, 0), "gaussian": (1, 1)}
    assert "1 of 4 runs failed and are left out; given again" in caplog.text

    assert go(run_toml, output, *arguments) == FINISHED  # tried again, from its beginning
    assert go(run_toml, tmp_path / "whole", *arguments) == FINISHED
    assert curves(output) == curves(tmp_path / "whole") and not trace.exists()
    lines = [
        len((folder / trace.parent.relative_to(output) / "metrics.jsonl").read_text().splitlines())
        for folder in (output, tmp_path / "whole")
    ]
    assert lines[0] == lines[1] > 4


def test_a_full_disk_stops_the_whole(run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    def full(*_: object) -> None:
        calls[0] += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop._Training, "update", full)
    assert go(run_toml, tmp_path / "out", "--compare", "random", "gaussian") == FAILED
    assert calls == [1] and not [*tmp_path.rglob("result.json")]


def test_a_subject_that_cannot_be_encoded_fails_alone(
    run_toml: Path, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for group in "ab":  # two of one name
        shutil.copytree(pictures, tmp_path / "subjects" / group / "same")
    encode = objective.encode

    def failing(plan: Any, *given: Any, **more: Any) -> Any:
        if Path(plan.config.data.images).parent.name == "b":
            raise RuntimeError("not this one")
        return encode(plan, *given, **more)

    monkeypatch.setattr(objective, "encode", failing)
    arguments = ("--compare", "random", "--subjects", str(tmp_path / "subjects"), "--seeds", "1")
    assert go(run_toml, tmp_path / "out", *arguments) == FAILED
    status = {run["subject"]: run["status"] for run in report_of(tmp_path / "out")["runs"]}
    assert status == {"a/same": "finished", "b/same": "failed"}
    assert "all 2 runs of b/same failed, the first by RuntimeError: not this one" in caplog.text


def test_more_than_ten_prompts_with_any_characters(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples lie with their own prompts, and the page shows them as they are written."""
    prompts = [f"creature number {number}" for number in range(9)]
    prompts += ["a \"big\" one, and 'that' <b>too</b> & more", "long " * 60, "creature number 11"]
    seen = list[tuple[str, bytes]]()

    def cosines(_: str, pictures: list[Image.Image], texts: list[str], *__: object) -> torch.Tensor:
        seen.extend((text, picture.tobytes()) for text, picture in zip(texts, pictures, strict=True))
        return torch.zeros(len(pictures))

    monkeypatch.setattr(samples, "text_image_cosines", cosines)
    monkeypatch.setattr(comparison, "text_image_problems", lambda _: [])
    monkeypatch.setattr("trainer.hub.sources.fetch", lambda *_, **__: None)
    settings = [f"validation.prompts={json.dumps(prompts)}", "validation.text_image_model=siglip", "train.steps=2"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    rates = ("--seeds", "1", "--learning-rates", "1e-3")
    assert go(run_toml, tmp_path / "out", "--compare", "random", *rates, *arguments) == FINISHED
    folder = tmp_path / "out" / "runs" / "pictures" / "random" / "0.001-0" / "samples"
    assert len(seen) == 2 * 12 * 2  # steps, prompts, noises
    for place, (text, pixels) in enumerate(seen):
        step, row, number = place // 24 * 2, place // 2 % 12, place % 2
        assert text == prompts[row]
        assert pixels == Image.open(folder / f"step-{step:06d}-{row}-{number}.png").tobytes()
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert "<b>too</b>" not in (tmp_path / "out" / "report.html").read_text()
    for prompt in prompts:
        assert json.dumps(prompt) in page


@pytest.mark.slow
def test_the_page_is_made_again_from_the_json(
    run_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert go(run_toml, output, "--compare", "random", "gaussian") == FINISHED
    made = {name: (output / name).read_bytes() for name in ("report.json", "report.html", "curves.png")}
    for name in ("report.html", "curves.png", "contact_sheet.png"):
        (output / name).unlink()
    assert main(["report", str(output)]) == FINISHED
    assert {name: (output / name).read_bytes() for name in made} == made
    assert str(output / "report.html") in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == BAD_INPUT
    page = made["report.html"].decode()
    assert "<td>0</td>" in page and "not measured" not in page  # what random costs
    report = report_of(output)
    report["runs"] = [{**run, "init_seconds": None} if run["arm"] == "gaussian" else run for run in report["runs"]]
    (output / "report.json").write_text(json.dumps(report))
    assert main(["report", str(output)]) == FINISHED
    assert (output / "report.html").read_text().count("<td>not measured</td>") == 2  # the ratio, and the start
    assert page.count("data:image/png;base64,") == 3  # a figure in two themes, one contact sheet
    assert not re.search(r'(src|href|srcset)="(?!data:)', page)  # nothing is fetched


def test_all_that_is_wrong_is_told_at_once(
    run_toml: Path, tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subjects = tmp_path / "subjects"
    shutil.copytree(pictures, subjects / "leaking")
    (subjects / "leaking" / "held_out").mkdir()
    shutil.copy(pictures / "0.png", subjects / "leaking" / "held_out")
    (subjects / "leaking" / "held_out" / "0.txt").write_text("again")
    (subjects / "empty").mkdir()
    wrong = ("--compare", "random", "i2k", "gaussian", "random", "--subjects", str(subjects), "--seeds", "0")
    wrong += ("--learning-rates", "0", "-1", "nan", "inf", "1e-3", "1.0000001e-3")
    wrong += ("--controls", "norm-matched", "nothing", "--set", "validation.every=9")
    assert go(run_toml, tmp_path / "out", *wrong) == BAD_INPUT
    for part in (
        '"i2k" is neither an initializer',
        "random is there twice",
        "--seeds must be at least 1",
        *(f"{rate} must be a finite number above 0" for rate in ("0.0", "-1.0", "nan", "inf")),
        "--learning-rates: 0.001 is there twice",
        "nothing is not one of norm-matched",
        "--controls are of i2l",
        "every = 9 is more than [train] steps = 4",
        f"{subjects / 'empty'}: there is no picture in it",
        "is the same picture; remove one of them",
    ):
        assert part in caplog.text, part
    assert not (tmp_path / "out").exists()

    caplog.clear()
    assert go(run_toml, tmp_path / "out", "--compare", "random", "--set", "data.held_out=0") == BAD_INPUT
    assert "there is no held-out picture" in caplog.text
    assert go(run_toml, tmp_path / "out", "--compare", "random", "--subjects", str(tmp_path / "nowhere")) == BAD_INPUT
    assert "there is no folder" in caplog.text
    assert go(run_toml, tmp_path / "out", "--compare", "random", "--part", "3/2") == BAD_INPUT
    assert go(run_toml, tmp_path / "out", "--compare", "random", "--set", "model.compile=true") == BAD_INPUT
    assert "[model] compile: each run of --compare" in caplog.text
    run_toml.write_text(run_toml.read_text().replace("steps = 4\n", "", 1))
    stages = "stages=[{steps = 2}, {steps = 2, learning_rate = 1e-3}]"
    assert go(run_toml, tmp_path / "out", "--compare", "random", "--set", stages) == BAD_INPUT
    assert "[stages.1] learning_rate: --compare sets the rate of each run" in caplog.text


def test_starts_that_cannot_be_told_apart_are_refused(
    run_toml: Path, tmp_path: Path, loras: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    copies = [str(tmp_path / "copy.safetensors"), str(tmp_path / "random.safetensors")]
    for copy in copies:
        shutil.copy(loras[0], copy)
    shutil.copy(loras[1], tmp_path / "other" / "one.safetensors")
    given = ("--compare", *loras, str(tmp_path / "other" / "one.safetensors"), *copies)
    assert go(run_toml, tmp_path / "out", *given) == BAD_INPUT
    assert f"one is the name of several starts ({loras[0]}, {tmp_path / 'other' / 'one.safetensors'})" in caplog.text
    assert f"{loras[0]} and {copies[0]} are the same LoRA; leave one out" in caplog.text
    assert f"{copies[1]} is called as another start is, random; rename the file" in caplog.text
    assert f"{loras[0]} and {loras[1]} are the same" not in caplog.text

    bias = ("--set", 'init.i2l.experts=["bias"]', "--set", "init.i2l.strength=1")
    controlled = ("--compare", "i2l", "--controls", "bias-only", *bias)
    assert go(Path("configs/creatures.toml"), tmp_path / "out", *controlled) == BAD_INPUT
    assert "--controls bias-only: i2l has no other expert" in caplog.text


def test_a_subject_with_one_picture_is_told(
    run_toml: Path, tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Held out by number, nothing would be left to train on; with a folder of its own, nothing to try strengths on."""
    for name in ("alone", "tried"):
        (tmp_path / "subjects" / name).mkdir(parents=True)
        for suffix in ("png", "txt"):
            shutil.copy(pictures / f"0.{suffix}", tmp_path / "subjects" / name)
    (tmp_path / "subjects" / "tried" / "held_out").mkdir()
    for suffix in ("png", "txt"):
        shutil.copy(pictures / f"1.{suffix}", tmp_path / "subjects" / "tried" / "held_out")
    wanted = ("--compare", "random", "i2l", "--subjects", str(tmp_path / "subjects"))
    assert go(Path("configs/creatures.toml"), tmp_path / "out", *wanted) == BAD_INPUT
    assert "alone: [data] held_out = 2 leaves nothing to train on" in caplog.text
    assert 'tried: [init.i2l] strength = "auto" needs at least two pictures' in caplog.text
    assert go(run_toml, tmp_path / "out", "--compare", "random", "--subjects", str(pictures)) == BAD_INPUT
    assert "has pictures itself: it must hold a folder for each subject" in caplog.text
    assert not (tmp_path / "out").exists()


def test_wrong_pictures_need_another_subject(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = ("--compare", "random", "i2l", "--controls")
    assert go(Path("configs/creatures.toml"), tmp_path / "out", *wrong) == BAD_INPUT
    assert "zorp is alone in its group" in caplog.text and not (tmp_path / "out").exists()


def test_results_of_other_settings_are_not_mixed_in(
    run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert go(run_toml, tmp_path / "out", "--compare", "random") == FINISHED
    before = (tmp_path / "out" / "report.json").read_bytes()
    assert go(run_toml, tmp_path / "out", "--compare", "random", "--set", "train.batch_size=1") == BAD_INPUT
    assert "were made with other settings" in caplog.text
    assert (tmp_path / "out" / "report.json").read_bytes() == before


@pytest.mark.slow
def test_results_of_other_files_of_one_name_are_not_mixed_in(
    run_toml: Path, tmp_path: Path, loras: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert go(run_toml, tmp_path / "out", "--compare", "random", loras[0]) == FINISHED
    weights = load_file(loras[0])
    save_file({name: 2 * tensor for name, tensor in weights.items()}, loras[0])
    assert go(run_toml, tmp_path / "out", "--compare", "random", loras[0]) == BAD_INPUT
    assert "4 runs there were made with other settings" in caplog.text and "/one/" in caplog.text


def test_the_plan_of_a_comparison(run_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(run_toml, tmp_path / "out", "--compare", "random", "gaussian", "--plan") == FINISHED
    text = capsys.readouterr().out
    assert "8 of 4 steps, 0 of them done" in text and "random, gaussian; compared with random" in text
    assert not (tmp_path / "out").exists()


def test_subjects_may_lie_in_folders_of_groups(tmp_path: Path) -> None:
    for name in ("a/x", "a/y", "b"):
        (tmp_path / name / "held_out").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    problems: list[str] = []
    found = [path.relative_to(tmp_path).as_posix() for path in comparison._subject_folders(tmp_path, problems)]
    assert found == ["a/x", "a/y", "b"] and not problems


@pytest.fixture
def demo_comparison(tmp_path: Path) -> Path:
    """Two creatures never seen, all controls, the demo's own models."""
    folder = tmp_path
    for index in (300, 301):
        creatures.paint(folder / "subjects", "new", index)
    arguments = ["--config", "configs/creatures.toml", "--compare", "random", "i2l", "--controls", "--quiet"]
    arguments += ["--subjects", str(folder / "subjects"), "--output", str(folder / "out"), "--seeds", "1"]
    short = ("train.steps=4", "validation.every=2", "validation.num_inference_steps=2", "data.held_out=1")
    for setting in (*short, "init.i2l.strength=1", "init.i2l.experts=['style']", f"data.cache={folder / 'cache'}"):
        arguments += ["--set", setting]
    assert train.main([*arguments, "--learning-rates", "3e-4"]) == FINISHED
    return folder / "out"


@pytest.mark.slow
def test_i2l_against_its_controls(demo_comparison: Path) -> None:
    """One test, so that only one process has to make the comparison."""
    check_outcomes(report_of(demo_comparison))
    check_seconds(report_of(demo_comparison))
    check_measures(report_of(demo_comparison))
    check_contact_sheet(demo_comparison)


def check_outcomes(report: dict[str, Any]) -> None:
    rows = {row["arm"]: row for row in report["summary"]}
    assert rows.keys() == {"random", "i2l", *comparison.CONTROLS}
    assert all(row["runs"] == row["subjects"] == 2 for row in rows.values())
    assert rows["i2l"]["below_at_step_0"] == 2 and rows["i2l"]["steps"]["value"] == 0
    for control in ("norm-matched", "wrong-pictures"):
        assert rows[control]["never"] == 2 and rows[control]["step_0"] > 1.3 * rows["random"]["step_0"]
    assert rows["no-training"]["step_0"] == rows["no-training"]["end"] == rows["i2l"]["step_0"]
    assert rows["i2l"]["seconds"]["value"] > 0  # the initializer's own time counts


def check_seconds(report: dict[str, Any]) -> None:
    """The encoders and the expert ran once for each subject; each start that needs them is charged for them."""
    runs = {(run["subject"], run["arm"]): run for run in report["runs"]}
    for subject, other in (("new/300", "new/301"), ("new/301", "new/300")):
        first = runs[subject, "i2l"]["init"]["first_seconds"]
        assert first.keys() == {"encoders", "style"} and min(first.values()) > 0.01
        assert runs[subject, "norm-matched"]["init"]["first_seconds"] == first
        assert runs[other, "wrong-pictures"]["init"]["first_seconds"] == first
        for arm in ("i2l", "norm-matched"):
            assert runs[subject, arm]["init_seconds"] > 0.99 * sum(first.values())
        assert runs[other, "wrong-pictures"]["init_seconds"] > 0.99 * sum(first.values())
        assert runs[subject, "random"]["init_seconds"] < 0.05
    rows = {row["arm"]: row for row in report["summary"]}
    assert rows["no-training"]["start_seconds"] == rows["i2l"]["start_seconds"]


@pytest.mark.slow
def test_wrong_pictures_start_as_i2l_does_on_them(tmp_path: Path) -> None:
    """With strengths tried on them, and as many of them as there are, which need not be as many as the subject has."""
    for index, count in ((300, 2), (301, 5)):
        folder = creatures.paint(tmp_path / "subjects", "new", index)
        for number in range(count, 6):
            (folder / f"{number}.png").unlink(), (folder / f"{number}.txt").unlink()
    arguments = ["--config", "configs/creatures.toml", "--compare", "i2l", "--controls", "wrong-pictures", "--quiet"]
    arguments += ["--subjects", str(tmp_path / "subjects"), "--output", str(tmp_path / "out"), "--seeds", "1"]
    for setting in ("train.steps=2", "validation.every=2", "validation.prompts=[]", "init.i2l.experts=['style']"):
        arguments += ["--set", setting]
    assert train.main([*arguments, "--set", "validation.unrelated_prompts=[]", "--learning-rates", "3e-4"]) == FINISHED
    runs = {(run["subject"], run["arm"]): run["init"] for run in report_of(tmp_path / "out")["runs"]}
    for subject, other in (("new/300", "new/301"), ("new/301", "new/300")):
        own, wrong = runs[other, "i2l"], runs[subject, "wrong-pictures"]
        for name in ("strength", "tried", "pictures", "incoming_rank", "first_seconds"):
            assert wrong[name] == own[name], name


@pytest.mark.slow
def test_the_first_time_of_a_start_counts_whatever_is_given_again(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize, calls = gaussian.initialize, [0]

    def slow_at_first(*given: Any) -> Seed:
        calls[0] += 1
        if calls[0] == 1:
            time.sleep(1)
        return initialize(*given)

    monkeypatch.setattr(gaussian, "initialize", slow_at_first)
    rate = ("--learning-rates", "1e-3")
    assert go(run_toml, tmp_path / "out", "--compare", "gaussian", *rate, "--seeds", "1") == FINISHED
    assert go(run_toml, tmp_path / "out", "--compare", "gaussian", *rate, "--part", "2/2") == FINISHED
    seconds = [run["init_seconds"] for run in report_of(tmp_path / "out")["runs"]]
    assert len(seconds) == 2 and seconds[0] == seconds[1] > 1


def test_a_control_of_equal_norm_has_equal_norm() -> None:
    """At the adapter's rank, of what is trained, and of what stays frozen: only directions differ."""
    random, config = torch.Generator().manual_seed(0), AdapterConfig(rank=4, rank_pattern={"b": 2})
    weights = {
        name: LowRank(torch.randn(7, 20, generator=random), torch.randn(30, 7, generator=random)) for name in "abc"
    }
    control = norm_matched(Seed(AdapterWeights(weights), {}, frozen=AdapterWeights(weights)), config, 0)
    assert control.frozen is not None
    for name, x in weights.items():
        values = torch.linalg.svdvals((x.b @ x.a).double())
        for found, rank in ((control.weights.factors[name], config.rank_of(name)), (control.frozen.factors[name], 7)):
            dense = (found.b @ found.a).double()
            assert float(dense.norm()) == pytest.approx(float(values[:rank].norm()), rel=1e-5)
            assert torch.linalg.svdvals(dense)[:rank] == pytest.approx(values[:rank], rel=1e-4)
            cosine = float((dense * (x.b @ x.a)).sum() / dense.norm() / (x.b @ x.a).norm())
            assert abs(cosine) < 0.3
    again = norm_matched(Seed(AdapterWeights(weights), {}), config, 1).weights.factors["a"]
    assert not torch.allclose(again.b @ again.a, control.weights.factors["a"].b @ control.weights.factors["a"].a)


def check_measures(report: dict[str, Any]) -> None:
    for run in report["runs"]:
        for point in run["curve"]:
            assert {"similarity DINOv3", "similarity SigLIP2", "diversity DINOv3", "drift"} <= point.keys()
    start = {(run["subject"], run["arm"]): run["curve"][0] for run in report["runs"]}
    for subject in ("new/300", "new/301"):
        assert start[subject, "random"]["drift"] == 0.0  # nothing but the base
        assert start[subject, "i2l"]["drift"] > 0
    for subject in report["subjects"]:
        assert 0 < subject["training_pictures"]["similarity DINOv3"] <= 1


def test_fidelity_is_the_cosine_of_picture_and_prompt(tiny_base: Path, tmp_path: Path) -> None:
    """Against the two towers' own projections, picture by picture; and a model without a text tower is refused."""
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": 2000, "max_position_embeddings": 24, "projection_size": 16}
    settings = SiglipConfig(text_config=text, vision_config={**shared, "image_size": 32, "patch_size": 16})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(settings).eval()
    model.save_pretrained(tmp_path / "siglip")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "siglip")
    pictures = [Image.fromarray(painter.paint(painter.identity("new", i), painter.scene(i))) for i in range(3)]
    texts = ["a big creature", "a small creature on the left", "at night"]
    found = text_image.text_image_cosines(str(tmp_path / "siglip"), pictures, texts, torch.device("cpu"))
    for picture, words, value in zip(pictures, texts, found, strict=True):
        pixels = torch.from_numpy(np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 127.5 - 1).float()
        tokens = tokenizer(words, padding="max_length", max_length=24, return_tensors="pt").input_ids
        with torch.no_grad():
            image = model.get_image_features(pixels.permute(2, 0, 1)[None]).pooler_output[0]
            word = model.get_text_features(tokens).pooler_output[0]
        assert float(value) == pytest.approx(float(image @ word / image.norm() / word.norm()), abs=1e-5)
    assert len({round(float(value), 6) for value in found}) == 3
    assert not text_image.text_image_problems(str(tmp_path / "siglip"))
    assert "text tower is needed" in text_image.text_image_problems("demo/encoders/SigLIP2-G384")[0]
    assert text_image.text_image_problems(str(tmp_path / "nothing"))


def check_contact_sheet(demo_comparison: Path) -> None:
    """A row for each arm."""
    sheet = Image.open(demo_comparison / "contact_sheet.png")
    side = 128  # 64 pixels, enlarged
    assert sheet.height // (side + 26) == 6  # random, i2l, three controls that are run, real pictures; titles and gaps
    assert sheet.width // side == 3  # steps 0, 2, 4


def test_a_part_is_done_by_one_process(run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["--config", str(run_toml), "--output", str(tmp_path / "out"), "--compare", "random", "gaussian"]
    with folder.held(tmp_path / "out", "part-1-of-2"):
        assert train.main([*arguments, "--part", "1/2", "--quiet"]) == BAD_INPUT
    assert "is in use by process" in caplog.text
    assert not (tmp_path / "out" / "runs").exists()
