"""The benchmark's files are experts, and its numbers are of what it ran."""

import json
from pathlib import Path

import pytest
import torch
from test_i2l_expert import COARSE, STYLE

from initializers.i2l import bench, expert
from initializers.i2l.__main__ import main
from initializers.i2l.layout import Published


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, geometry in (("style", STYLE), ("coarse", COARSE)):
        monkeypatch.setitem(bench.PUBLISHED, kind, Published("x.safetensors", geometry, "0"))


def test_what_it_writes_is_an_expert(tmp_path: Path) -> None:
    bench.make_expert(tmp_path / "x.safetensors", STYLE, quiet=True)
    assert expert.read_geometry(tmp_path / "x.safetensors") == STYLE
    weights = expert.load_expert(tmp_path / "x.safetensors").state_dict()
    assert all(0.005 < float(weight.std()) < 0.05 for weight in weights.values())


def test_the_report_has_every_number(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--experts", "style", "coarse", "--pictures", "1", "3", "--rank", "6"]
    assert main([*arguments, "--folder", str(tmp_path), "--output", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(run["expert"], run["pictures"]) for run in report["experts"]] == [
        ("style", 1), ("coarse", 1), ("style", 3), ("coarse", 3),
    ]  # fmt: skip
    for run in report["experts"]:
        assert run["seconds_from_disk"] > 0 and run["seconds_from_page_cache"] > 0 and run["seconds_reading_alone"] > 0
    assert [(merge["from_rank"], merge["to_rank"]) for merge in report["merges"]] == [(8, 6), (24, 6)]
    assert "from the page cache" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_full_disk_is_told_before_anything_is_written(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert main(["bench", "--folder", str(tmp_path)]) == 2
    assert "choose --folder" in caplog.text and not [*tmp_path.iterdir()]
    assert main(["bench", "--pictures", "0"]) == 2


def test_memory_is_what_a_block_takes() -> None:
    with bench.Peak() as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        for _ in range(20):
            held.add_(1)
    assert 60e6 < peak.bytes < 200e6
