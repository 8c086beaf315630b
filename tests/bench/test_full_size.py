"""The benchmark of the real size, at a small one."""

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from tests.helpers import BAD_INPUT, FINISHED
from trainer.adapter import AdapterConfig
from trainer.bench import full_size
from trainer.bench.__main__ import main

SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "joint_attention_dim": 48}


@pytest.mark.slow
def test_variants_are_timed_and_those_that_fail_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(full_size, "SHAPE", SMALL)
    words = ["--blocks", "3", "--resolution", "64", "--steps", "2", "--rank", "4", "--variants", "none", "fp8", "nf4"]
    report_file = tmp_path / "report.json"
    assert main(["full-size", *words, "--folder", str(tmp_path), "--output", str(report_file)]) == FINISHED
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]  # the weights are gone
    report = json.loads(report_file.read_text())
    plain, fp8, nf4 = report["variants"]
    assert "GPU" in nf4["error"] and "nf4" in capsys.readouterr().out  # diffusers asks for one
    for entry in (plain, fp8):
        assert entry["seconds_a_step"] > 0 and entry["estimated_bytes"] > 0
    assert fp8["estimated_bytes"] < plain["estimated_bytes"]
    assert plain["flop"] == fp8["flop"] and report["matmul_flop_a_second"] > 1e9
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**SMALL, num_layers=3)
    tokens = {"img": 16, "txt": full_size.memory.PROMPT_TOKENS}
    expected = 0
    for name, layer in model.transformer_blocks.named_modules():
        if isinstance(layer, torch.nn.Linear) and "_mod" not in name:  # those see one token
            stream = "txt" if "txt" in name or "add" in name else "img"
            expected += 2 * layer.weight.numel() * tokens[stream]
    assert plain["flop"] == pytest.approx(3 * expected, rel=0.3)  # forward, once more, backward; and LoRA and attention


@pytest.mark.slow
def test_the_seconds_are_those_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "SHAPE", SMALL)
    full_size.write_base(tmp_path, 1, quiet=True)
    real, calls = full_size.qwen_image.predict_velocity, [0]

    def slower(*given: object) -> torch.Tensor:
        calls[0] += 1
        time.sleep(0.1 if calls[0] > 1 + full_size.WARMUP else 0.3)  # the first one counts FLOP
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(full_size.qwen_image, "predict_velocity", slower)
    found = full_size.measure(tmp_path, "none", AdapterConfig(rank=2), 64**2, 3)
    assert 0.1 <= found["seconds_a_step"] < 0.3 <= found["seconds_first_step"]


def test_weights_have_the_layout_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "SHAPE", SMALL)
    full_size.write_base(tmp_path, 3, quiet=True)
    model = QwenImageTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer", torch_dtype=torch.bfloat16)
    assert len(model.transformer_blocks) == 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_bad_arguments(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["full-size", "--resolution", "100"]) == BAD_INPUT
    assert "multiple of 16" in caplog.text
