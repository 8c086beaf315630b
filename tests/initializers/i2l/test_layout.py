"""The published layouts, what is said of damaged files, and `inspect`."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import DINOv3ViTModel, SiglipVisionModel

from initializers.i2l import encoders
from initializers.i2l.__main__ import main
from initializers.i2l.expert import Expert, save_expert
from initializers.i2l.layout import (
    PUBLISHED,
    Geometry,
    LayoutError,
    Residual,
    expert_layout,
    infer_geometry,
    layout_md5,
    module_names,
    module_shapes,
    published_name,
)
from trainer.files import read_header

# As published: name -> layout md5, tensors, parameters in billions.
FACTS = {
    "style": ("0aad514690602ecaff932c701cb4b0bb", 2880, 2.406),
    "coarse": ("a166c33455cdbd89c0888a3645ca5c0f", 3360, 7.927),
    "fine": ("a5476e691767a4da6d3a6634a10f7408", 3360, 7.573),
}
SMALL = Geometry(num_blocks=2, hidden_size=8, embedding_size=10, compress=3, rank=2)
SMALL_RESIDUAL = Geometry(
    num_blocks=3,
    hidden_size=8,
    embedding_size=10,
    compress=3,
    rank=4,
    residual=Residual(num_tokens=71, compress=2, width=6),
)


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file whose weights are a hole in the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


@pytest.mark.parametrize("name", FACTS)
def test_layouts_are_the_published_ones(name: str) -> None:
    md5, num_tensors, billions = FACTS[name]
    shapes = expert_layout(PUBLISHED[name].geometry)
    assert layout_md5(shapes) == PUBLISHED[name].md5 == md5
    assert len(shapes) == num_tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert published_name(shapes) == name
    assert infer_geometry(shapes) == PUBLISHED[name].geometry


def test_modules_in_the_order_of_the_file() -> None:
    names = module_names(PUBLISHED["style"].geometry)
    assert len(names) == len(set(names)) == 720
    assert names[:4] == [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert names[4] == "transformer_blocks.1.attn.to_q"
    assert names[240:242] == ["transformer_blocks.0.img_mlp.net.2", "transformer_blocks.0.img_mod.1"]
    assert names[-1] == "transformer_blocks.59.txt_mod.1"
    shapes = module_shapes(PUBLISHED["style"].geometry)
    assert shapes["transformer_blocks.7.txt_mlp.net.2"] == (12288, 3072)
    assert shapes["transformer_blocks.7.img_mod.1"] == (3072, 18432)


def test_encoder_layouts_are_the_published_ones() -> None:
    with init_empty_weights():
        siglip = SiglipVisionModel(encoders.published_siglip_config())
        dinov3 = DINOv3ViTModel(encoders.published_dinov3_config())
    for model, rename, md5, billions in (
        (siglip, encoders.siglip_key, "469c78b61e3e31bc9eec0d0af3d3f2f8", 1.16),
        (dinov3, encoders.dinov3_key, "5722b5c873720009de96422993b15682", 6.72),
    ):
        shapes = {rename(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert layout_md5(shapes) == md5
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("geometry", [SMALL, SMALL_RESIDUAL])
def test_geometry_of_miniatures(geometry: Geometry) -> None:
    assert infer_geometry(expert_layout(geometry), geometry.rank) == geometry


@pytest.mark.parametrize("geometry", [SMALL, SMALL_RESIDUAL, PUBLISHED["style"].geometry])
@pytest.mark.parametrize("position", [0, 1, 2, 3, -1])
def test_a_missing_tensor_is_named(geometry: Geometry, position: int) -> None:
    shapes = expert_layout(geometry)
    gone = list(shapes)[position]
    del shapes[gone]
    with pytest.raises(LayoutError, match=rf"1 of {len(shapes) + 1} tensors are missing: {gone.replace('.', '[.]')}$"):
        infer_geometry(shapes, geometry.rank)


def test_a_missing_part_is_named() -> None:
    shapes = expert_layout(SMALL_RESIDUAL)
    third_group = {name: shape for name, shape in shapes.items() if not name.startswith(("blocks.6.", "blocks.7."))}
    with pytest.raises(LayoutError, match=r"36 of .* missing: blocks\.6\.layers\.0"):
        infer_geometry(third_group)
    residual_gone = {name: shape for name, shape in shapes.items() if "blocks.4.proj_residual" not in name}
    with pytest.raises(LayoutError, match=r"2 of .* missing: blocks\.4\.proj_residual"):
        infer_geometry(residual_gone)


def test_foreign_tensors_and_shapes_are_named() -> None:
    shapes = expert_layout(SMALL)
    with pytest.raises(LayoutError, match="1 do not belong to it: stranger"):
        infer_geometry({**shapes, "stranger": (1,)}, 2)
    with pytest.raises(LayoutError, match=r"1 have another shape, such as blocks\.3\.layers\.1\.proj_b\.proj_in"):
        infer_geometry({**shapes, "blocks.3.layers.1.proj_b.proj_in.weight": (3, 11)}, 2)
    with pytest.raises(LayoutError, match="no tensor is named as in an i2L expert"):
        infer_geometry({"model.weight": (2, 2)})


def test_damaged_files(tmp_path: Path) -> None:
    whole = sparse_file(tmp_path / "whole.safetensors", expert_layout(SMALL))
    cut = tmp_path / "cut.safetensors"
    for length, message in ((0, "cut short"), (5, "cut short"), (100, "longer than the file")):
        cut.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(LayoutError, match=message):
            read_header(cut)
    cut.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(LayoutError, match="not downloaded to its end"):
        read_header(cut)
    cut.write_bytes(b"\x89PNG" * 100)
    with pytest.raises(LayoutError, match="not a safetensors file"):
        read_header(cut)
    with pytest.raises(LayoutError, match="cannot be read"):
        read_header(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("name", FACTS)
def test_inspect_names_the_published_experts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sparse_file(tmp_path / "anything.safetensors", expert_layout(PUBLISHED[name].geometry))
    assert path.stat().st_blocks * 512 < 2**22, "the test would fill the disk"
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    md5, num_tensors, _ = FACTS[name]
    assert f"Qwen-Image-i2L {name.capitalize()}, as published" in text
    assert md5 in text and f"in {num_tensors:,} tensors" in text and "complete" in text
    assert "modules      720" in text and "rank         4" in text


def test_inspect_says_that_a_published_expert_is_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = expert_layout(PUBLISHED["coarse"].geometry)
    del shapes["blocks.17.proj_residual.proj_out.weight"]
    assert main(["inspect", str(sparse_file(tmp_path / "file.safetensors", shapes))]) == 1
    text = capsys.readouterr().out
    assert "Coarse layout (60 blocks" in text
    assert "1 of 3360 tensors are missing: blocks.17.proj_residual.proj_out.weight" in text


def test_inspect_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.safetensors"
    save_expert(Expert(SMALL), path, torch.float16)
    assert main(["inspect", str(path)]) == 0
    assert (
        "miniature Style layout (2 blocks, hidden size 8, embedding 10, compress 3, rank 2)" in capsys.readouterr().out
    )

    lora = {
        f"transformer_blocks.0.attn.to_{x}.lora_{h}.default.weight": torch.ones(s)
        for x in "qk"
        for h, s in (("A", (5, 8)), ("B", (8, 5)))
    }
    save_file(lora, path)
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "LoRA" in text and "modules      2" in text and "rank         5" in text

    del lora["transformer_blocks.0.attn.to_q.lora_B.default.weight"]
    save_file(lora, path)
    assert main(["inspect", str(path)]) == 1
    assert "lacks lora_B" in capsys.readouterr().out

    save_file({"something": torch.ones(2)}, path)
    assert main(["inspect", str(path)]) == 1
    assert "neither an i2L expert" in capsys.readouterr().out
