"""The benchmark measures the steps that a run does."""

import json
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import BAD_INPUT, FINISHED
from trainer.bench import adapter as profile
from trainer.bench.__main__ import main
from trainer.bench.loop import TURNS, WARMUP
from trainer.objective import LoraObjective
from trainer.tracking import Tracker


def test_the_parts_and_the_whole(run_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    assert main(["loop", "--config", str(run_toml), "--steps", str(WARMUP + 3), "--output", str(output)]) == FINISHED
    report = json.loads(output.read_text())
    assert report["steps"] == 3 * TURNS
    assert [*report["parts"]] == ["data", "forward", "backward", "optimizer", "logging"]
    assert all(value > 0 for value in report["parts"].values())
    assert report["overhead"] == pytest.approx(sorted(report["overhead_of_turns"])[TURNS // 2])
    assert report["seconds_in_the_loop"] > 0 < report["seconds_bare"]
    assert report["pictures_per_second"] == pytest.approx(2 / report["seconds_in_the_loop"])
    encoding = sum(report["encoding"].values())
    assert [*report["encoding"]] == ["pictures", "captions"] and encoding > 0
    assert report["pictures_per_second_without_caches"] == pytest.approx(2 / (report["seconds_in_the_loop"] + encoding))
    assert "in the loop" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()  # nothing is left in the run's own folder


@pytest.mark.slow
def test_time_is_found_where_it_is_spent(run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 ms more in the log of each step are the loop's; 20 ms more in each forward pass are not."""

    def slower(owner: type, name: str, seconds: float) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (time.sleep(seconds), real(*given))[1])

    slower(Tracker, "scalars", 0.01)
    slower(LoraObjective, "_velocity", 0.02)
    output = tmp_path / "bench.json"
    assert main(["loop", "--config", str(run_toml), "--steps", str(WARMUP + 3), "--output", str(output)]) == FINISHED
    report = json.loads(output.read_text())
    assert report["parts"]["logging"] >= 0.01 and report["parts"]["forward"] >= 0.02
    assert report["seconds_bare"] >= 0.02
    assert 0.01 <= report["seconds_in_the_loop"] - report["seconds_bare"] < 0.05


def test_the_profile_of_an_adapter(run_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ways(dtype: str) -> dict[str, dict[str, float]]:
        output = tmp_path / f"{dtype}.json"
        command = ["adapter", "--config", str(run_toml), "--set", f"model.dtype={dtype}", "--output", str(output)]
        assert main(command) == FINISHED
        report = json.loads(output.read_text())
        assert report["num_layers"] == 12 and report["config"]["model"]["dtype"] == dtype
        return dict(report["ways"])

    for row in (bf16 := ways("bf16")).values():
        assert [*row] == ["kernels", "bytes_moved", "bytes_kept", "forward", "backward"]
        assert all(value > 0 for value in row.values())
    fp32 = ways("fp32")
    for name in ("kernels", "bytes_moved", "bytes_kept"):
        assert bf16[profile.BASE][name] < bf16[profile.HERE][name] < bf16[profile.PEFT][name]
        assert fp32[profile.HERE][name] == fp32[profile.PEFT][name]  # there is nothing to cast
    assert "each of its 12 layers" in capsys.readouterr().out


def test_kernels_are_what_computes_or_copies() -> None:
    x = torch.ones(4, 8)
    with profile._Kernels() as kernels:
        y = x.view(8, 4).T  # no kernel
        y = y @ torch.empty(8, 2)  # one, after one that costs nothing
        y.add_(1)
        y.to(torch.bfloat16).float()
    assert kernels.count == 4
    assert kernels.num_bytes == 4 * (32 + 16 + 8) + 4 * (8 + 8) + 2 * (4 + 2) * 8


def test_bad_arguments_are_told(run_toml: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["loop", "--config", str(run_toml), "--steps", str(WARMUP)]) == BAD_INPUT
    assert main(["loop", "--config", str(run_toml), "--set", "train.stepz=3"]) == BAD_INPUT
    assert "--steps must be more" in caplog.text and "train.stepz" in caplog.text.replace("[train] ", "train.")


def test_an_audit_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    words = ["audit", "--pictures", "20", "--megapixels", "0.06", "--output", str(output)]
    assert main(words) == FINISHED
    report = json.loads(output.read_text())
    assert report["pictures"] == 20 and report["size"] == [300, 200]
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 1e7
    assert "20 pictures of 300 x 200" in capsys.readouterr().out
    assert main(["audit", "--pictures", "0"]) == BAD_INPUT


@pytest.mark.slow
def test_a_thousand_pictures_are_audited_in_a_minute_and_memory_does_not_grow_with_them(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    assert main(["audit", "--output", str(output)]) == FINISHED
    report = json.loads(output.read_text())
    assert report["pictures"] == 1000 and report["size"][0] * report["size"][1] == pytest.approx(2e6, rel=0.01)
    assert report["seconds"] < 60
    grown = report["peak_memory_bytes"] - report["peak_memory_bytes_with_a_tenth"]
    assert grown < 100e6  # pictures are 6 MB each, thumbnails 10 kB
