"""The benchmark's files are experts, and its numbers are of what it ran."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import DINOv3ViTConfig, SiglipVisionConfig

from initializers.i2l import encoders, expert
from initializers.i2l.__main__ import main
from initializers.i2l.layout import Published, expert_layout
from initializers.i2l.training import bench
from tests.initializers.i2l.test_expert import COARSE, STYLE


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, geometry in (("style", STYLE), ("coarse", COARSE)):
        monkeypatch.setitem(bench.PUBLISHED, kind, Published("x.safetensors", geometry, "0"))


def test_what_it_writes_is_an_expert(tmp_path: Path) -> None:
    bench.make_weights(tmp_path / "x.safetensors", expert_layout(STYLE))
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


def test_encoders_are_timed(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipVisionConfig(**size, image_size=32, patch_size=16)
    dinov3 = DINOv3ViTConfig(**size, image_size=32, patch_size=16, use_gated_mlp=True)
    monkeypatch.setattr(encoders, "published_siglip_config", lambda: siglip)
    monkeypatch.setattr(encoders, "published_dinov3_config", lambda: dinov3)
    monkeypatch.setattr(bench, "ENCODER_BYTES", 0)
    arguments = ["bench", "--experts", "style", "--pictures", "2", "--encoders"]
    assert main([*arguments, "--folder", str(tmp_path), "--output", str(tmp_path / "report.json")]) == 0
    (encoded,) = json.loads((tmp_path / "report.json").read_text())["encoders"]
    assert encoded["pictures"] == 2 and encoded["seconds"] > 0
    assert "encode 2 pictures" in capsys.readouterr().out
    assert main(["bench", "--device", "cuda", "--folder", str(tmp_path)]) == (0 if torch.cuda.is_available() else 2)


def test_a_full_disk_is_told_before_anything_is_written(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert main(["bench", "--folder", str(tmp_path)]) == 2
    assert "choose another --folder" in caplog.text and not [*tmp_path.iterdir()]
    assert main(["bench", "--pictures", "0"]) == 2


def test_memory_is_what_a_block_takes_and_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that /proc said while the block ran, above what it said before."""
    told = iter([5e9, 6e9, 9e9, 7e9, *[5e9] * 10_000])
    monkeypatch.setattr(bench, "_anonymous", lambda: next(told))
    with bench.Peak() as peak:
        time.sleep(0.5)
    assert peak.bytes == 4e9


def test_proc_tells_what_is_not_backed_by_a_file() -> None:
    before = bench._anonymous()
    block = torch.ones(1 << 30, dtype=torch.uint8)  # 1 GB: whatever else the process does is small beside it
    assert before + 0.9e9 < bench._anonymous() and len(block)
