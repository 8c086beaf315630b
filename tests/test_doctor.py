"""The doctor, with a GPU's answers made up; and the real thing on this machine."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers import FAILED, FINISHED
from trainer import doctor
from trainer.doctor import Outcome, Page


def test_quick_looks_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "run_miniature", lambda *_, **__: pytest.fail("a run"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.main(["--quick", "--output", str(tmp_path / "page.md")]) == FINISHED
    shown, page = capsys.readouterr().out, (tmp_path / "page.md").read_text()
    for text in (f"torch: {torch.__version__}", "GPU: none", "attention that works: native", "HF_HUB_OFFLINE: 1"):
        assert text in shown and text in page
    assert "secret" not in shown and str(Path.home()) not in shown
    assert page.splitlines()[2] == "- nothing that was tried failed"


def card(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"name": "a card", "major": 8, "minor": 9, **options})


@pytest.mark.parametrize(
    ("properties", "free", "problem"),
    [(card(), 23e9, ""), (card(major=7), 23e9, "older than compute capability 8.0"), (card(), 9e9, "nvidia-smi")],
)
def test_what_is_wrong_with_a_card_is_told(
    properties: Any, free: float, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 24e9))
    page = Page()
    doctor.look_at_machine(page)
    assert any("a card, 24.0 GB" in line for line in page.lines)
    assert [problem in found for found in page.problems] == ([True] if problem else [])


GOOD = Outcome(3.0, (0.14, 0.13), 1e-8)


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (Outcome(3.0, (0.141, 0.131), 1e-8), None),
        (Outcome(3.0, (0.141, 0.15), 1e-8), "from the CPU's, more than 3%"),
        (Outcome(3.0, (0.14, float("nan")), 1e-8), "from the CPU's"),
        (Outcome(3.0, (0.14, 0.13), 1e-3), "the seed is off by 1e-03"),
        (Outcome(3.0, (0.14, 0.13), 1e-8, black=True), "its samples are black"),
        (Outcome(3.0, error="CUDA error: no kernel image"), "no kernel image"),
    ],
)
def test_each_run_is_judged(outcome: Outcome, problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(output: Path, options: dict[str, str], **_: Any) -> Outcome:
        return outcome if options.get("model.dtype") == "bf16" and output.name == "bf16" else GOOD

    monkeypatch.setattr(doctor, "run_miniature", run)
    monkeypatch.setattr(doctor, "variants", lambda _: iter([("bf16", {"model.dtype": "bf16"})]))
    page = Page()
    doctor.try_miniature(page, torch.device("cpu"))
    assert ([problem in found for found in page.problems] == [True]) if problem else not page.problems


def test_on_a_gpu_all_precisions_are_tried() -> None:
    assert [name for name, _ in doctor.variants(torch.device("cuda"))] == ["bf16", "nf4", "int8", "fp8"]
    assert [name for name, _ in doctor.variants(torch.device("cpu"))] == ["bf16", "fp8"]


@pytest.mark.slow
def test_a_run_that_crashes_is_told_and_a_black_sample_seen(tmp_path: Path) -> None:
    outcome = doctor.run_miniature(tmp_path / "out", {"train.steps": "0"})
    assert "steps must be at least 1" in outcome.error and outcome.losses == ()
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "step-000000-0.png")
    report = {"validations": [{"step": 0, "val_loss": 0.5}], "init": {"applied": {"largest_error": 0.0}}}
    (tmp_path / "run.json").write_text(json.dumps(report))
    assert doctor._read(tmp_path, 1.0).black


def test_problems_are_at_the_top_and_give_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "look_at_machine", lambda page: page.problem("the card is on fire; put it out"))
    assert doctor.main(["--quick", "--output", str(tmp_path / "page.md")]) == FAILED
    assert (tmp_path / "page.md").read_text().splitlines()[2] == "- the card is on fire; put it out"


def test_what_is_known_is_kept_when_it_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(page: Page) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "look_at_packages", stop)
    assert doctor.main(["--output", str(tmp_path / "page.md")]) != FINISHED
    assert "## Machine" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_the_real_thing(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == FINISHED
    shown = capsys.readouterr().out
    assert shown.count("| good |") == 3 and "the same adapter, to the bit" in shown and "TFLOP/s" in shown
