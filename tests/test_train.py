"""The command line."""

import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration

import initializers
import train
from tests.helpers import BAD_INPUT, FINISHED, INTERRUPTED, files, metrics, run
from trainer import checkpoint
from trainer.plan import RunConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads weights fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    for kind in (QwenImageTransformer2DModel, AutoencoderKLQwenImage, Qwen2_5_VLForConditionalGeneration):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    monkeypatch.setattr(torch, "load", refuse)


def test_help_names_every_argument_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--config", "--init", "--output", "--resume", "--set", "--plan", "--quiet", "--help-config"):
        assert word in text
    words = " ".join(text.split())
    for code, meaning in ((0, "done"), (1, "training failed"), (2, "something in the configuration"), (3, "stopped")):
        assert f"{code} {meaning}" in words


def test_help_config_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help-config"]) == 0
    text = capsys.readouterr().out
    sections = {field.name for field in fields(RunConfig)} - {"output", "seed", "stages"}
    runs = {"data", "prior", "adapter", "init", "train", "flow", "validation", "checkpoint", "export"}
    assert sections == {"model", *runs}
    for section in sections:
        assert f"[{section}]" in text
    for kind in ("model", "train", "flow"):
        section = next(field for field in fields(RunConfig) if field.name == kind)
        for field in fields(section.type):  # type: ignore[arg-type]
            assert f"\n{field.name} = " in text
    for name in initializers.names():
        assert f"[init.{name}]" in text
    assert "[[stages]]" in text and "sigma_range = (not set)" in text
    assert "strength = 1.0" in text


def test_without_a_configuration_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main([])
    assert stop.value.code == BAD_INPUT
    assert "configs/creatures.toml" in capsys.readouterr().err


def test_plan_says_what_would_be_done_and_does_nothing(
    run_toml: Path, tmp_path: Path, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tmp_path)
    arguments = ["--config", str(run_toml), "--init", "gaussian", "--set", "train.steps=50", "--plan"]
    assert train.main(arguments) == FINISHED
    assert files(tmp_path) == before and not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    for words in ("4 for training, 2 held out", "64x64", "rank 4 on 24 modules", "gaussian", "50 steps", "memory"):
        assert words in text


def test_every_problem_comes_in_one_message(
    run_toml: Path, tmp_path: Path, no_weights: None, caplog: pytest.LogCaptureFixture
) -> None:
    text = run_toml.read_text()
    for old, new in (
        ("steps = 4\n", "step = 4\n"),  # unknown
        ("learning_rate = 1e-3", 'learning_rate = "fast"'),  # wrong type
        ("every = 2\nprompts", "every = 0\nprompts"),  # impossible
        ("held_out = 2", 'held_out = "nowhere"'),  # missing folder
        ("[validation]", '[flow]\nsigma_sampling = "uniform"\nshift = 3.0\n[validation]'),  # without effect
        ("rank = 4", 'rank = 4\ntarget_modules = "atention"'),  # no such set
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    text = text.replace(f'base = "{run_toml}', "").replace('dtype = "fp32"', 'dtype = "float32"')  # no such choice
    run_toml.write_text(text + "[init.i2l]\nstrenght = 2.0\n")
    assert run(run_toml, tmp_path / "out") == BAD_INPUT
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    lines = record.getMessage().splitlines()
    for where, *words in (
        ("[train]", "step:", "unknown key", "steps"),
        ("[train]", "learning_rate", '"fast"'),
        ("[validation]", "every must be at least 1"),
        ("[data]", "held_out", "there is no folder", "nowhere"),
        ("[flow]", "shift has no effect"),
        ("[adapter]", "target_modules", '"atention"'),
        ("[model]", "dtype", '"float32"', "fp32"),
        ("[init.i2l]", "strenght", "unknown key", "strength"),
    ):
        assert [line for line in lines if line.startswith(where) and all(word in line for word in words)], words
    assert len(lines) == 8
    assert not (tmp_path / "out").exists()


def test_a_missing_model_folder_is_told_with_the_rest(
    run_toml: Path, tmp_path: Path, no_weights: None, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = ("model.base=./no_model", "train.batch_size=0", f"data.images={tmp_path / 'no_pictures'}")
    assert run(run_toml, tmp_path / "out", *wrong) == BAD_INPUT
    for words in ("there is no folder", "no_model", "batch_size must be at least 1", "no_pictures"):
        assert words in caplog.text


def test_an_unknown_start_is_told_with_the_nearest(
    run_toml: Path, tmp_path: Path, no_weights: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert train.main(["--config", str(run_toml), "--init", "gausian"]) == BAD_INPUT
    assert '"gausian" is neither an initializer' in caplog.text and 'did you mean "gaussian"' in caplog.text


@pytest.mark.parametrize("word", ["2026-01-01", "7", "true", 'quo"ted', "a=b c"])
def test_folders_may_have_any_name(word: str, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--output is text, and no TOML value."""
    monkeypatch.chdir(tmp_path)
    seen: list[RunConfig] = []
    monkeypatch.setattr("trainer.plan_words.plan_text", lambda plan: seen.append(plan.config) or "")
    assert train.main(["--config", str(run_toml), "--output", word, "--plan"]) == FINISHED
    assert seen[0].output == word


def test_quiet_prints_no_bars(
    run_toml: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(run_toml, tmp_path / "loud", quiet=False) == FINISHED
    loud = capfd.readouterr()
    assert "4/4" in loud.err and "loss=" in loud.err and "encode pictures" in loud.err
    assert "Loading" not in loud.err  # the libraries' bars are off
    caplog.set_level("INFO")
    assert run(run_toml, tmp_path / "quiet") == FINISHED
    assert capfd.readouterr() == ("", "")
    messages = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("step 4/4  loss ") for message in messages)
    assert any(message.startswith("LoRA initialised at random") for message in messages)
    assert any(message.startswith("done in ") for message in messages)


def test_a_real_process_stops_on_sigterm_and_is_continued(run_toml: Path, tmp_path: Path) -> None:
    """Exit code 3 through the shell; all else is tested without the price of a new process."""
    output = tmp_path / "out"
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(run_toml), "--quiet"]
    endless = ["--set", "train.steps=1000000", "--set", "validation.every=1000000", "--set", "checkpoint.every=1000000"]
    process = subprocess.Popen([*command, *endless], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 500
        while not (output / "metrics.jsonl").exists() or len(metrics_so_far(output)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        _, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED
    assert "SIGTERM: finishing this step" in error and "continue with --resume" in error
    saved = checkpoint.latest(output / "checkpoints")
    assert saved is not None and saved.step >= 2
    assert run(run_toml, output, f"train.steps={saved.step + 1}", "validation.every=1000000", resume=True) == FINISHED
    assert [line["step"] for line in metrics(output) if "loss" in line] == [*range(1, saved.step + 2)]


def metrics_so_far(output: Path) -> list[dict[str, float]]:
    whole = (output / "metrics.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def test_a_wrong_initializer_is_reported_beside_all_other_problems(
    run_toml: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--config", str(run_toml), "--init", "i2k", "--set", "train.steps=many", "--set", "adapter.rnk=3"]
    assert train.main([*arguments, "--set", "nonsense"]) == 2
    for part in ('did you mean "i2l"', '"many"', "did you mean rank", "nonsense"):
        assert part in caplog.text, part


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "2"], "--seeds: only with --compare"),
        (["--controls"], "--controls: only with --compare"),
        (["--part", "1/2", "--learning-rates", "1e-3"], "--learning-rates, --part: only with --compare"),
        (["--subjects", "demo"], "--subjects: only with --compare"),
        (["--compare", "random", "--part", "3"], "3 is not I/N, such as 1/4"),
        (["--compare", "random", "--init", "i2l"], "leave --init out"),
    ],
)
def test_arguments_without_effect_are_refused(
    words: list[str], said: str, run_toml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(run_toml), *words])
    assert stop.value.code == BAD_INPUT and said in capsys.readouterr().err
