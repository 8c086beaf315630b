"""A LoRA for ComfyUI with its settings, and a folder for the Hub."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from tests.export.made import export, random_lora, tree
from tests.helpers import BAD_INPUT, FINISHED, run
from trainer.files import read_header, write_json
from trainer.formats import read_lora

CONFIG = {
    "output": "runs/my_char",
    "model": {"base": "Qwen/Qwen-Image-2512"},
    "data": {"trigger": "zorp", "resolution": [768, 1024]},
    "validation": {"num_inference_steps": 30, "true_cfg_scale": 4.0},
}


@pytest.fixture
def finished(tiny_base: Path, tmp_path: Path) -> Path:
    """As much of a finished run as is read."""
    folder = tmp_path / "run"
    random_lora(tiny_base, folder / "adapter" / "adapter_model.safetensors", layout="peft")
    write_json(folder / "run.json", {"config": CONFIG})
    (folder / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n# my_char\n")
    return folder


def row(text: str, name: str) -> str:
    """A line of the settings, with single spaces."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.strip().startswith(name))


@pytest.mark.parametrize("part", [".", "adapter"])
def test_the_settings_are_those_of_the_run(part: str, finished: Path, tmp_path: Path) -> None:
    assert export("comfyui", finished / part, "--output", tmp_path / "c") == FINISHED
    assert {*tree(tmp_path / "c")} == {"comfyui.txt", "my_char-diffusion_model.safetensors"}
    text = (tmp_path / "c" / "comfyui.txt").read_text()
    assert row(text, "steps").startswith("steps 30 [validation] num_inference_steps of the run")
    assert row(text, "cfg") == "cfg 4 published example of Qwen-Image"
    assert row(text, "trigger word") == "trigger word zorp [data] trigger"
    assert row(text, "width, height").startswith("width, height 1024 [data] resolution")
    assert row(text, "shift") == "shift 3.1 ComfyUI's workflow for Qwen-Image"
    assert "qwen_image_2512_bf16.safetensors" in text and "first 512 tokens" in text


def test_the_lora_is_the_same_in_comfyui_s_layout(finished: Path, tmp_path: Path) -> None:
    assert export("comfyui", finished, "--output", tmp_path / "c") == FINISHED
    file = tmp_path / "c" / "my_char-diffusion_model.safetensors"
    assert all(key.startswith("diffusion_model.transformer_blocks.") for key in load_file(file))
    expected, found = read_lora(finished / "adapter")[0].factors, read_lora(file)[0].factors
    assert found.keys() == expected.keys() and len(found) == 28
    for name, (a, b) in expected.items():
        assert torch.allclose(found[name].b @ found[name].a, b @ a, atol=1e-6)
    assert read_header(file).metadata["modelspec.trigger_phrase"] == "zorp"


def test_a_file_without_a_run_gets_what_is_published(tiny_base: Path, tmp_path: Path) -> None:
    random_lora(tiny_base, tmp_path / "style.safetensors", layout="kohya")
    asked = ("comfyui", tmp_path / "style.safetensors", "--output", tmp_path / "c", "--dtype", "bf16")
    assert export(*asked) == FINISHED
    text = (tmp_path / "c" / "comfyui.txt").read_text()
    assert row(text, "steps") == "steps 50 published example of Qwen-Image"
    assert row(text, "trigger word") == "trigger word none none is known"
    assert "On which model it was trained is not known" in text and "qwen_image_bf16.safetensors" in text
    assert {*read_header(tmp_path / "c" / "style-diffusion_model.safetensors").dtypes.values()} == {"BF16"}


def test_the_hub_s_folder_has_the_result(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: "https://x")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: pushed.append(options))
    assert export("hub", finished, "--output", tmp_path / "h") == FINISHED and not pushed
    own = {"comfyui.txt", "my_char-diffusion_model.safetensors"}
    assert {*tree(tmp_path / "h")} == {*tree(finished / "adapter"), *own}
    card = (tmp_path / "h" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and card.count("## ComfyUI") == 1
    assert export("hub", finished, "--output", tmp_path / "again", "--push", "me/zorp") == FINISHED
    assert [(one["repo_id"], one["folder_path"]) for one in pushed] == [("me/zorp", tmp_path / "again")]


def test_what_cannot_be_delivered_is_told_before(finished: Path, tiny_base: Path, tmp_path: Path, caplog: Any) -> None:
    random_lora(tiny_base, tmp_path / "a.safetensors")
    broken = load_file(tmp_path / "a.safetensors")
    broken[next(iter(broken))][0, 0] = torch.inf
    save_file(broken, tmp_path / "inf.safetensors")
    shutil.copytree(finished, tmp_path / "early")
    shutil.rmtree(tmp_path / "early" / "adapter")
    lokr = {f"lycoris_transformer_blocks_0_attn_to_q.lokr_w{x}": torch.ones(8, 8) for x in (1, 2)}
    save_file(lokr, tmp_path / "lokr.safetensors")
    (tmp_path / "there").mkdir()
    before = tree(tmp_path)
    for command, path, said in (
        ("comfyui", "inf.safetensors", ["exists already", "NaN or infinity in 1 modules"]),
        ("comfyui", "lokr.safetensors", ["is a LoKr: the run itself writes it"]),
        ("comfyui", "early", ["this run has no result yet"]),
        ("comfyui", "gone", ["gone: there is no such file"]),
        ("hub", "a.safetensors", ["no model card README.md is there"]),
    ):
        caplog.clear()
        assert export(command, tmp_path / path, "--output", tmp_path / "there") == BAD_INPUT
        assert all(part in caplog.text for part in said), caplog.text
    assert export("hub", finished, "--output", tmp_path / "h", "--push", "zorp") == BAD_INPUT
    assert '"zorp" is not a repository' in caplog.text
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_real_run_is_delivered(run_toml: Path, tmp_path: Path) -> None:
    assert run(run_toml, tmp_path / "zorp", "data.trigger=zorp") == FINISHED
    assert export("hub", tmp_path / "zorp", "--output", tmp_path / "h") == FINISHED
    assert any(name.startswith("samples/") for name in tree(tmp_path / "h"))
    assert row((tmp_path / "h" / "comfyui.txt").read_text(), "steps").startswith("steps 2 [validation]")
    lokr = ("adapter.kind=lokr", 'export.layouts=["diffusion_model"]')
    assert run(run_toml, tmp_path / "lokr", *lokr) == FINISHED
    assert export("comfyui", tmp_path / "lokr", "--output", tmp_path / "c") == FINISHED
    name = "lokr-diffusion_model.safetensors"
    assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "lokr" / "adapter" / name).read_bytes()
