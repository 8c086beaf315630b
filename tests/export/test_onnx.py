"""The transformer as ONNX: real rotations equal diffusers' complex ones, and onnxruntime's velocity equals torch's."""

import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from tests.export.made import export, random_lora, tree
from tests.helpers import BAD_INPUT, FINISHED
from trainer.data.dataset import buckets
from trainer.export import onnx_folder
from trainer.export.onnx_folder import example, save, trtexec
from trainer.export.onnx_model import INPUTS, OnnxTransformer, Rope
from trainer.qwen_image import ModelError, pack, predict_velocity

SIZES = [(1, 4, 4, 9), (2, 4, 6, 12), (3, 5, 3, 2), (1, 8, 2, 40), (1, 1, 1, 1)]
"""batch, rows, columns, tokens"""


def reference(transformer: QwenImageTransformer2DModel, given: dict[str, Tensor]) -> Tensor:
    """diffusers' own forward pass, in the form of ONNX."""
    batch, height, width, _ = given["latents"].shape
    with torch.no_grad():
        found = transformer(
            hidden_states=given["latents"].flatten(1, 2),
            timestep=given["timestep"],
            encoder_hidden_states=given["prompt_embeds"],
            encoder_hidden_states_mask=given["prompt_mask"],
            img_shapes=[[(1, height, width)]] * batch,
            return_dict=False,
        )[0]
    return found.unflatten(1, (height, width))


def load(base: Path) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel.from_pretrained(base / "transformer").eval()


@pytest.fixture
def one_block(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with only its first block: what is exported is as long as there are blocks."""
    shutil.copytree(tiny_base, tmp_path / "base")
    transformer = load(tiny_base)
    transformer.transformer_blocks = transformer.transformer_blocks[:1]
    transformer.register_to_config(num_layers=1)
    transformer.save_pretrained(tmp_path / "base" / "transformer")
    return tmp_path / "base"


def in_onnxruntime(path: Path, given: dict[str, Tensor]) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return torch.from_numpy(session.run(None, {name: given[name].numpy() for name in INPUTS})[0])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_real_rotations_give_the_velocity_of_diffusers(size: tuple[int, int, int, int], tiny_base: Path) -> None:
    plain, ours = load(tiny_base), OnnxTransformer(load(tiny_base))
    given = example(plain, *size)
    expected = reference(plain, given)
    with torch.no_grad():
        assert torch.allclose(ours(**given), expected, atol=1e-5)
    longer = {**given, "prompt_mask": ~given["prompt_mask"]}
    assert size[-1] == 1 or not torch.allclose(reference(plain, longer), expected, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 3), (93, 44)])
def test_rope_is_that_of_diffusers(height: int, width: int) -> None:
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=1)
    published = type(transformer.pos_embed)(theta=10_000, axes_dim=[16, 56, 56], scale_rope=True)
    shapes = [[(1, height, width)]]
    picture, text = published(shapes, max_txt_seq_len=7, device=torch.device("cpu"))
    cos, sin = Rope((16, 56, 56))(shapes, 7, torch.device("cpu"))
    expected = torch.cat([text, picture])
    assert cos.shape == (7 + height * width, 64)
    assert torch.allclose(cos, expected.real, atol=1e-5) and torch.allclose(sin, expected.imag, atol=1e-5)


def test_the_inputs_are_those_of_training(tiny_base: Path) -> None:
    transformer = load(tiny_base)
    latents, sigmas, prompts = torch.randn(2, 16, 1, 8, 12), torch.tensor([0.3, 0.9]), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = predict_velocity(transformer, latents, sigmas, prompts, None)
        rows = pack(latents).unflatten(1, (4, 6))
        found = OnnxTransformer(transformer)(rows, sigmas, prompts, torch.ones(2, 5, dtype=torch.bool))
    assert torch.allclose(found.flatten(1, 2), pack(expected), atol=1e-5)


def test_onnxruntime_computes_what_torch_computes(one_block: Path, tmp_path: Path) -> None:
    """With a LoRA folded in, against PEFT's."""
    pytest.importorskip("onnxruntime")
    random_lora(one_block, tmp_path / "a.safetensors")
    lora = ("--lora", f"{tmp_path / 'a.safetensors'}:0.5")
    assert export("onnx", "--base", one_block, *lora, "--output", tmp_path / "onnx", "--resolution", 128) == FINISHED
    assert {*tree(tmp_path / "onnx")} == {"model.onnx", "model.onnx.data", "trtexec.txt", "merged.json"}
    transformer = load(one_block)
    plain = reference(transformer, example(transformer, *SIZES[0]))
    transformer.load_lora_adapter(str(tmp_path / "a.safetensors"), prefix="diffusion_model", adapter_name="x")
    transformer.set_adapters(["x"], [0.5])
    for size in SIZES:
        given = example(transformer, *size)
        expected = reference(transformer, given)
        assert torch.allclose(in_onnxruntime(tmp_path / "onnx" / "model.onnx", given), expected, atol=1e-4)
    assert not torch.allclose(plain, reference(transformer, example(transformer, *SIZES[0])), atol=1e-2)


@pytest.mark.slow
def test_onnxruntime_computes_what_torch_computes_on_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    base = Path("demo/model")
    assert export("onnx", "--base", base, "--dtype", "fp32", "--output", tmp_path / "onnx") == FINISHED
    transformer = load(base)
    for size in SIZES:
        given = example(transformer, *size)
        found = in_onnxruntime(tmp_path / "onnx" / "model.onnx", given)
        assert torch.allclose(found, reference(transformer, given), atol=1e-4), size


@pytest.mark.slow
def test_a_block_of_the_real_width_is_exported(tmp_path: Path) -> None:
    """Width 3072, 24 heads of 128, prompts of 3584: 0.4 B parameters, at two sizes."""
    pytest.importorskip("onnxruntime")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(num_layers=1).eval()
        expected = {}
        for size in ((1, 6, 4, 9), (2, 3, 8, 20)):
            expected[size] = reference(transformer, example(transformer, *size))
        save(transformer, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 5e6
    for size, velocity in expected.items():
        found = in_onnxruntime(tmp_path / "model.onnx", example(transformer, *size))
        assert torch.allclose(found, velocity, atol=1e-4 * velocity.abs().max())


def test_the_command_for_tensorrt_covers_all_buckets() -> None:
    config = {"in_channels": 64, "joint_attention_dim": 3584}
    command = trtexec(1024, 16, config)
    found = {}
    for name in ("min", "opt", "max"):
        given = re.search(rf"--{name}Shapes=(\S+)", command)
        assert given
        found[name] = {key: [*map(int, shape.split("x"))] for key, shape in (x.split(":") for x in given[1].split(","))}
        assert list(found[name]) == list(INPUTS)
    assert found["opt"]["latents"] == [1, 64, 64, 64]
    assert found["max"]["prompt_embeds"] == [2, 512, 3584] and found["max"]["prompt_mask"] == [2, 512]
    for width, height in buckets(1024, 16):
        for axis, side in ((1, height), (2, width)):
            assert found["min"]["latents"][axis] <= side // 16 <= found["max"]["latents"][axis]


def test_other_models_of_the_family_are_refused() -> None:
    with pytest.raises(ModelError, match="text-to-image"):
        OnnxTransformer(QwenImageTransformer2DModel(num_layers=1, num_attention_heads=1, zero_cond_t=True))


def test_what_is_wrong_is_told_before(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    before = tree(tmp_path)
    monkeypatch.setattr(onnx_folder.importlib.util, "find_spec", lambda name: None)
    asked = ("onnx", "--base", tiny_base, "--output", tmp_path / "x")
    assert export(*asked, "--resolution", 8) == BAD_INPUT
    assert 'pip install -e ".[onnx]"' in caplog.text and "--resolution must be from" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert export(*asked) == BAD_INPUT
    assert "MB of memory, and 0.0 MB are free" in caplog.text
    assert tree(tmp_path) == before
