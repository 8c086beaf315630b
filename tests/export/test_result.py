"""The result of a run, as PEFT and diffusers load it, in further layouts, and its model card."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from tests.helpers import BAD_INPUT, FAILED, FINISHED, run
from tests.test_adapter import SETTINGS, layers, output, random_seed, tiny
from trainer import adapter
from trainer.adapter import AdapterConfig
from trainer.export import result
from trainer.formats import LAYOUTS, read_lora


def report(folder: Path) -> dict[str, Any]:
    """As much of a run's report as the export reads."""
    train = {"steps": 3, "batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    return {
        "config": {
            "output": str(folder),
            "model": {"base": "some/base"},
            "data": {"trigger": "zorp", "resolution": 64},
            "adapter": {"use_dora": False},
            "train": {**train, "lr_schedule": "constant", "optimizer": "adamw"},
            "validation": {"prompts": ["zorp at night"]},
        },
        "data": {"train": [{"sha256": "abc"}]},
        "steps": train["steps"],
        "init": {
            "method": "i2l",
            "experts": [{"expert": "style"}],
            "strength": 1.0,
            "adapter": {"rank": 4},
            "applied": {"energy_kept": {"total": 0.9}, "seeded": 20, "random": 4},
        },
    }


def save(model: Any, folder: Path, config: AdapterConfig) -> None:
    result.export(model, folder, result.ExportConfig(), config, None, report(folder.parent))


def pipeline() -> Any:
    return QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=tiny()
    )


@pytest.mark.parametrize("config", [*SETTINGS, AdapterConfig(rank=6, alpha=3.0, use_dora=True)], ids=str)
def test_the_saved_folder_loads_in_peft_and_in_diffusers(config: AdapterConfig, tmp_path: Path) -> None:
    model = tiny()
    adapter.inject(model, config)
    adapter.apply_seed(model, random_seed(model, 6, config), random_seed=0)
    for layer in layers(model).values():  # as after training, where the magnitudes are not the norms of W + dW any more
        for magnitude in layer.lora_magnitude_vector.values():
            magnitude.weight.data *= 1.1
    save(model, tmp_path / "adapter", config)
    expected, plain = output(model), output(tiny())
    assert (expected - plain).abs().max() > 0.01

    wrapped: Any = PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter")).eval()
    assert torch.allclose(output(wrapped), expected, atol=1e-6)
    model.requires_grad_(False)
    ours, theirs = layers(model), layers(wrapped.base_model.model)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        assert torch.equal(layer.get_delta_weight("default"), theirs[name].get_delta_weight("default"))

    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path / "adapter"))
    assert torch.allclose(output(pipe.transformer), expected, atol=1e-5)
    loaded = layers(pipe.transformer)
    assert loaded.keys() == ours.keys()
    for name, layer in ours.items():
        (their_name,) = loaded[name].lora_A
        delta = layer.get_delta_weight("default")
        assert torch.allclose(loaded[name].get_delta_weight(their_name), delta, atol=1e-6 * float(delta.abs().max()))


def test_the_saved_folder_is_complete_and_reproducible(tmp_path: Path) -> None:
    model, config = tiny(), AdapterConfig(rank=4, alpha=2.0, dropout=0.1)
    adapter.inject(model, config)
    adapter.apply_seed(model, random_seed(model, 4, config), random_seed=0)
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        save(model, folder, config)
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "pytorch_lora_weights.safetensors",
        "README.md",
    }
    description = json.loads(contents[0]["adapter_config.json"])
    assert (description["r"], description["lora_alpha"], description["peft_type"]) == (4, 2.0, "LORA")
    assert description["base_model_name_or_path"] == "some/base"
    keys = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight" in keys and len(keys) == 48


def test_a_failing_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny(), AdapterConfig(rank=4)
    adapter.inject(model, config)
    save(model, tmp_path / "adapter", config)
    before = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        save(model, tmp_path / "adapter", config)
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- whole runs -------------------------------------------------------------------------------------------


def test_a_run_leaves_the_layouts_it_is_asked_for_with_their_origin(run_toml: Path, tmp_path: Path) -> None:
    names = [name for name in LAYOUTS if name != "peft"]
    settings = (f"export.layouts={json.dumps(names)}", "export.dtype=bf16", "data.trigger=zorp")
    assert run(run_toml, tmp_path / "my_char", *settings) == FINISHED
    folder = tmp_path / "my_char" / "adapter"
    expected = read_lora(folder)[0].factors
    assert len(expected) == 24
    for name in names:
        file = folder / f"my_char-{name}.safetensors"
        found, metadata = read_lora(file)
        assert found.factors.keys() == expected.keys()
        for module, (a, b) in expected.items():
            delta, x = b @ a, found.factors[module]
            sizes = x.b.norm(dim=0)  # in the order of the singular values
            assert (sizes[1:] <= sizes[:-1] * 1.01).all() and (float(sizes[0]) > 0 or not delta.any())
            assert torch.allclose(x.b @ x.a, delta, rtol=0, atol=0.02 * float(delta.abs().max()))
        origin = json.loads(metadata["warm_start"])
        assert (origin["initializer"], len(origin["pictures"]), origin["steps"]) == ("random", 4, 4)
        assert metadata["modelspec.trigger_phrase"] == "zorp"
        with safe_open(file, framework="pt") as tensors:
            kinds = {tensors.get_tensor(key).dtype for key in tensors.keys() if not key.endswith("alpha")}  # noqa: SIM118
        assert kinds == {torch.bfloat16}
    with safe_open(folder / "my_char-kohya.safetensors", framework="pt") as tensors:
        assert tensors.metadata()["ss_network_dim"] == tensors.metadata()["ss_network_alpha"] == "4"


def test_the_model_card_says_how_to_load_it_and_shows_samples(run_toml: Path, tmp_path: Path) -> None:
    assert run(run_toml, tmp_path / "my_char", 'export.layouts=["kohya"]', "data.trigger=zorp") == FINISHED
    folder = tmp_path / "my_char" / "adapter"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.instance_prompt == "zorp" and "lora" in card.data.tags
    lines = card.content.splitlines()
    row = next(number for number, line in enumerate(lines) if line.startswith("| a big creature"))
    assert lines[row + 1] == "|---|" and lines[row + 2] == "| ![](samples/step-000004-0.png) |"  # a table in Markdown
    for part in (
        "load_lora_weights",
        "my_char-kohya.safetensors",
        "**zorp**",
        "held-out loss",
        "samples/step-000004-0",
    ):
        assert part in card.content
    assert (folder / "samples" / "step-000004-0.png").exists()


@pytest.mark.slow
def test_nothing_leaves_the_machine_unless_asked(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)) or "https://x"
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append((None, options)))
    assert run(run_toml, tmp_path / "kept") == FINISHED and calls == []
    assert run(run_toml, tmp_path / "pushed", "export.push_to_hub=me/zorp") == FINISHED
    assert [name for name, _ in calls] == ["me/zorp", None] and calls[0][1]["private"] is True
    assert calls[1][1]["folder_path"] == tmp_path / "pushed" / "adapter"

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    assert run(run_toml, tmp_path / "offline", "export.push_to_hub=me/zorp") == FAILED
    assert "hf upload me/zorp" in caplog.text and (tmp_path / "offline" / "adapter" / "README.md").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('export.layouts=["comfy"]', '"comfy" is not one of diffusion_model, transformer'),
        ("export.rank=0", "rank must be at least 1"),
        ("export.push_to_hub=zorp", "is not a repository"),
        ("export.dtype=int8", "dtype"),
    ],
)
def test_wrong_settings_are_told_before_the_run(
    setting: str, said: str, run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(run_toml, tmp_path / "out", setting) == BAD_INPUT
    assert "[export]" in caplog.text and said in caplog.text


def test_dora_is_exported_for_peft_and_diffusers_alone(
    run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("adapter.use_dora=true", 'export.layouts=["kohya"]', "export.rank=2")
    assert run(run_toml, tmp_path / "out", *settings) == BAD_INPUT
    assert "[export] layouts" in caplog.text and "[export] rank" in caplog.text
