"""Every layout of a LoRA file gives the dW that the file's own trainer means, or an error that says why not."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer import formats
from trainer.adapter import TARGETS, AdapterWeights
from trainer.formats import OUTER_MODULES, FormatError, check_lora, module_name, read_lora, write_lora
from trainer.formats.layouts import layouts_of
from trainer.formats.lora import open_lora
from trainer.lowrank import LowRank, zeros

NAMES = tuple(f"transformer_blocks.{block}.{kind}" for block in (0, 11) for kind in TARGETS["all"])
Tensors = dict[str, Tensor]


def weights(rank: int = 3) -> AdapterWeights:
    random = torch.Generator().manual_seed(0)
    return AdapterWeights(
        {
            name: LowRank(torch.randn(rank, 20, generator=random), torch.randn(30, rank, generator=random))
            for name in NAMES
        }
    )


def tensors(prefix: str, a: str, b: str, *, flat: bool = False, alpha: float | None = None) -> Tensors:
    """The weights in one layout. With alpha, b holds what alpha / rank will be multiplied with."""
    result = {}
    for name, factors in weights().factors.items():
        key = prefix + (name.replace(".", "_") if flat else name)
        result[f"{key}.{a}.weight"] = factors.a
        result[f"{key}.{b}.weight"] = factors.b / (1 if alpha is None else alpha / 3)
        if alpha is not None:
            result[f"{key}.alpha"] = torch.tensor(alpha)
    return result


def write(path: Path, content: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in content.items()}, path, metadata)
    return path


def assert_equal(found: AdapterWeights, expected: AdapterWeights, tolerance: float = 1e-6) -> None:
    assert set(found.factors) == set(expected.factors) and found.factors
    for name, (a, b) in expected.factors.items():
        x = found.factors[name]
        assert x.a.dtype == x.b.dtype == torch.float32
        assert torch.allclose(x.b @ x.a, b @ a, rtol=0, atol=tolerance * float((b @ a).abs().max())), name


LAYOUTS = {
    "bare": tensors("", "lora_A", "lora_B"),
    "i2l": tensors("", "lora_A.default", "lora_B.default"),
    "diffusers": tensors("transformer.", "lora_A", "lora_B"),
    "diffusers, old": tensors("transformer.", "lora.down", "lora.up"),
    "comfy": tensors("diffusion_model.", "lora_A", "lora_B"),
    "comfy with alpha": tensors("diffusion_model.", "lora_A", "lora_B", alpha=6.0),
    "down/up": tensors("diffusion_model.", "lora_down", "lora_up", alpha=1.0),
    "kohya": tensors("lora_unet_", "lora_down", "lora_up", flat=True, alpha=1.5),
    "kohya without alpha": tensors("lora_unet_", "lora_down", "lora_up", flat=True),
    "PEFT with alpha": tensors("base_model.model.", "lora_A", "lora_B", alpha=1.5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(layout: str, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", LAYOUTS[layout], {"note": "x"})
    found, metadata = read_lora(path)
    assert_equal(found, weights())
    assert metadata == {"note": "x"}
    assert check_lora(path) == dict.fromkeys(NAMES, (20, 30, 3))
    assert_equal(read_lora(tmp_path)[0], weights())  # the only file of its folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    content = {key: tensor.to(dtype) for key, tensor in LAYOUTS["kohya"].items()}
    assert_equal(read_lora(write(tmp_path / "lora.safetensors", content))[0], weights(), tolerance=0.02)


def test_writing_and_reading_give_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lora.safetensors"
    write_lora(path, weights(), {"made_by": "a test"})
    assert f"{NAMES[0]}.lora_A.default.weight" in load_file(path)
    found, metadata = read_lora(path)
    assert metadata["made_by"] == "a test"
    for name, (a, b) in weights().factors.items():
        assert torch.equal(found.factors[name].a, a) and torch.equal(found.factors[name].b, b)


def test_the_known_modules_are_all_linear_layers_of_the_model() -> None:
    with torch.device("meta"):
        model: Any = QwenImageTransformer2DModel(num_layers=12, num_attention_heads=2, attention_head_dim=128)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 12 * 14 + len(OUTER_MODULES)
    for name in linears:
        for prefix in ("", "transformer.", "diffusion_model.", "base_model.model.", "base_model.model.transformer."):
            assert module_name(prefix + name) == name
        assert module_name("lora_unet_" + name.replace(".", "_")) == name
    foreign = [name for name, module in model.named_modules() if not isinstance(module, nn.Linear)]
    assert foreign and not any(map(module_name, foreign))


class Blocks(nn.Module):
    """Some modules under their names in Qwen-Image, for PEFT to adapt."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.ModuleDict({"to_q": nn.Linear(20, 30), "to_k": nn.Linear(20, 30)})
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn": attention})])


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 7},
    "rslora": {"lora_alpha": 7, "use_rslora": True},
    "patterns": {"lora_alpha": 7, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn.to_k": 5}},
}


def peft_model(path: Path, **config: Any) -> PeftModel:
    model: Any = get_peft_model(Blocks(), LoraConfig(r=3, target_modules=["to_q", "to_k"], **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_a_folder_of_peft_gives_peft_s_own_delta(name: str, tmp_path: Path) -> None:
    model: Any = peft_model(tmp_path, **PEFT_CONFIGS[name])
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        factors = read_lora(path)[0].factors
        assert set(factors) == {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"}
        for module, (a, b) in factors.items():
            expected = model.base_model.model.get_submodule(module).get_delta_weight("default").detach()
            assert torch.allclose(b @ a, expected, rtol=0, atol=1e-5)


def test_diffusers_metadata_is_heeded(tmp_path: Path) -> None:
    entries = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.use_rslora": True}
    content = tensors("transformer.", "lora_A", "lora_B")
    path = write(tmp_path / "lora.safetensors", content, {"lora_adapter_metadata": json.dumps(entries)})
    scale = 6 / math.sqrt(3)
    expected = {name: LowRank(a, b * scale) for name, (a, b) in weights().factors.items()}
    assert_equal(read_lora(path)[0], AdapterWeights(expected))


def test_what_changes_more_than_dw_is_refused(tmp_path: Path) -> None:
    peft_model(tmp_path / "dora", use_dora=True)
    peft_model(tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(FormatError, match="DoRA"):
        read_lora(tmp_path / "dora")
    with pytest.raises(FormatError, match="started by pissa"):
        read_lora(tmp_path / "pissa")


def test_a_peft_file_without_its_configuration_has_no_scale(tmp_path: Path) -> None:
    peft_model(tmp_path, lora_alpha=7)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"adapter_config\.json is missing"):
        read_lora(tmp_path)


def _nan(content: Tensors) -> None:
    content["transformer_blocks.0.attn.to_q.lora_A.weight"][0, 0] = math.nan


def _half(content: Tensors) -> None:
    del content["transformer_blocks.0.attn.to_q.lora_A.weight"]


def _ranks(content: Tensors) -> None:
    content["transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(30, 4)


def _empty_factor(content: Tensors) -> None:
    content["transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.ones(0, 20)
    content["transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(30, 0)


def _convolution(content: Tensors) -> None:
    content["transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.ones(3, 20, 1, 1)


def _alpha(content: Tensors) -> None:
    content["transformer_blocks.0.attn.to_q.alpha"] = torch.ones(3)


def _alpha_zero(content: Tensors) -> None:
    content["transformer_blocks.0.attn.to_q.alpha"] = torch.zeros(())


def _foreign(content: Tensors) -> None:
    content["single_transformer_blocks.3.attn.to_q.lora_A.weight"] = torch.ones(3, 20)


def _twice(content: Tensors) -> None:
    content["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.ones(3, 20)


def _stray(content: Tensors) -> None:
    content["transformer_blocks.0.attn.to_q.something"] = torch.ones(30)


def _lokr(content: Tensors) -> None:
    content["transformer_blocks.0.attn.to_q.lokr_w1"] = torch.ones(3, 3)


def _no_lora(content: Tensors) -> None:
    content.clear()
    content["transformer_blocks.0.attn.to_q.weight"] = torch.ones(30, 20)


@pytest.mark.parametrize(
    ("damage", "said", "in_header"),
    [
        (_nan, r"transformer_blocks\.0\.attn\.to_q contains NaN", False),
        (_half, r"transformer_blocks\.0\.attn\.to_q lacks lora_A", True),
        (_ranks, r"rank 3 in .*lora_A\.weight and 4 in", True),
        (_empty_factor, "empty factors", True),
        (_convolution, "two dimensions", True),
        (_alpha, "not one number", True),
        (_alpha_zero, "alpha 0", True),
        (_foreign, r"no such modules: single_transformer_blocks\.3\.attn\.to_q", True),
        (_twice, r"transformer_blocks\.0\.attn\.to_q is in it twice", True),
        (_stray, r"not part of a plain LoRA: .*something", True),
        (_lokr, "to_q is both LoRA and LoKr", True),
        (_no_lora, "not a LoRA", True),
    ],
)
def test_damaged_and_foreign_files_are_named(
    damage: Callable[[Tensors], None], said: str, in_header: bool, tmp_path: Path
) -> None:
    content = {key: tensor.clone() for key, tensor in LAYOUTS["bare"].items()}
    damage(content)
    path = write(tmp_path / "lora.safetensors", content)
    with pytest.raises(FormatError, match=said) as caught:
        read_lora(path)
    assert str(caught.value).startswith(str(path))
    if in_header:
        with pytest.raises(FormatError, match=said):
            check_lora(path)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_files_are_named(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", LAYOUTS["bare"])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        read_lora(path)


def test_paths_without_a_lora_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file or folder"):
        read_lora(tmp_path / "absent.safetensors")
    with pytest.raises(FormatError, match=r"no other \.safetensors file"):
        read_lora(tmp_path)
    (tmp_path / "lora.pt").write_bytes(b"a pickle")
    with pytest.raises(FormatError, match=r"only \.safetensors"):
        read_lora(tmp_path / "lora.pt")
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", LAYOUTS["bare"])
    with pytest.raises(FormatError, match=r"2 other \.safetensors files are: name one"):
        read_lora(tmp_path)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    peft_model(tmp_path, lora_alpha=7)
    for text, said in (('{"r": 3', "cannot be read"), ("[]", "cannot be read"), ("{}", "no r and lora_alpha")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(FormatError, match=said):
            read_lora(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------

GOLDEN = {
    "diffusion_model": (
        "diffusion_model.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        "diffusion_model.transformer_blocks.0.attn.to_out.0.lora_B.weight",
        "diffusion_model.transformer_blocks.11.txt_mlp.net.0.proj.lora_A.weight",
        "diffusion_model.transformer_blocks.11.txt_mlp.net.0.proj.lora_B.weight",
        "diffusion_model.transformer_blocks.0.img_mod.1.lora_A.weight",
        "diffusion_model.transformer_blocks.0.img_mod.1.lora_B.weight",
    ),
    "transformer": (
        "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight",
        "transformer.transformer_blocks.11.txt_mlp.net.0.proj.lora_A.weight",
        "transformer.transformer_blocks.11.txt_mlp.net.0.proj.lora_B.weight",
        "transformer.transformer_blocks.0.img_mod.1.lora_A.weight",
        "transformer.transformer_blocks.0.img_mod.1.lora_B.weight",
    ),
    "kohya": (
        "lora_unet_transformer_blocks_0_attn_to_out_0.lora_down.weight",
        "lora_unet_transformer_blocks_0_attn_to_out_0.lora_up.weight",
        "lora_unet_transformer_blocks_0_attn_to_out_0.alpha",
        "lora_unet_transformer_blocks_11_txt_mlp_net_0_proj.lora_down.weight",
        "lora_unet_transformer_blocks_11_txt_mlp_net_0_proj.lora_up.weight",
        "lora_unet_transformer_blocks_11_txt_mlp_net_0_proj.alpha",
        "lora_unet_transformer_blocks_0_img_mod_1.lora_down.weight",
        "lora_unet_transformer_blocks_0_img_mod_1.lora_up.weight",
        "lora_unet_transformer_blocks_0_img_mod_1.alpha",
    ),
    "onetrainer": (
        "transformer.transformer_blocks.0.attn.to_out.0.lora_down.weight",
        "transformer.transformer_blocks.0.attn.to_out.0.lora_up.weight",
        "transformer.transformer_blocks.0.attn.to_out.0.alpha",
        "transformer.transformer_blocks.11.txt_mlp.net.0.proj.lora_down.weight",
        "transformer.transformer_blocks.11.txt_mlp.net.0.proj.lora_up.weight",
        "transformer.transformer_blocks.11.txt_mlp.net.0.proj.alpha",
        "transformer.transformer_blocks.0.img_mod.1.lora_down.weight",
        "transformer.transformer_blocks.0.img_mod.1.lora_up.weight",
        "transformer.transformer_blocks.0.img_mod.1.alpha",
    ),
    "bare": (
        "transformer_blocks.0.attn.to_out.0.lora_A.weight",
        "transformer_blocks.0.attn.to_out.0.lora_B.weight",
        "transformer_blocks.11.txt_mlp.net.0.proj.lora_A.weight",
        "transformer_blocks.11.txt_mlp.net.0.proj.lora_B.weight",
        "transformer_blocks.0.img_mod.1.lora_A.weight",
        "transformer_blocks.0.img_mod.1.lora_B.weight",
    ),
    "bare.default": (
        "transformer_blocks.0.attn.to_out.0.lora_A.default.weight",
        "transformer_blocks.0.attn.to_out.0.lora_B.default.weight",
        "transformer_blocks.11.txt_mlp.net.0.proj.lora_A.default.weight",
        "transformer_blocks.11.txt_mlp.net.0.proj.lora_B.default.weight",
        "transformer_blocks.0.img_mod.1.lora_A.default.weight",
        "transformer_blocks.0.img_mod.1.lora_B.default.weight",
    ),
    "peft": (
        "base_model.model.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        "base_model.model.transformer_blocks.0.attn.to_out.0.lora_B.weight",
        "base_model.model.transformer_blocks.11.txt_mlp.net.0.proj.lora_A.weight",
        "base_model.model.transformer_blocks.11.txt_mlp.net.0.proj.lora_B.weight",
        "base_model.model.transformer_blocks.0.img_mod.1.lora_A.weight",
        "base_model.model.transformer_blocks.0.img_mod.1.lora_B.weight",
    ),
}


def in_layout(folder: Path, layout: str, found: AdapterWeights, **options: Any) -> Path:
    path = folder / "adapter_model.safetensors"
    write_lora(path, found, {"note": "x"}, layout=layout, **options)
    return path


@pytest.mark.parametrize("layout", formats.LAYOUTS)
def test_the_keys_of_a_layout_are_these(layout: str, tmp_path: Path) -> None:
    names = ("attn.to_out.0", "txt_mlp.net.0.proj", "img_mod.1")
    blocks = (0, 11, 0)
    chosen = [f"transformer_blocks.{block}.{name}" for block, name in zip(blocks, names, strict=True)]
    found = AdapterWeights({name: weights().factors[name] for name in chosen})
    path = in_layout(tmp_path, layout, found)
    state = load_file(path)
    assert set(state) == set(GOLDEN[layout])
    assert {float(value) for key, value in state.items() if key.endswith("alpha")} <= {3.0}
    assert open_lora(path).metadata["note"] == "x"
    names_found = layouts_of(open_lora(path).modules)
    assert names_found == [layout]


def test_every_layout_has_a_golden_list() -> None:
    assert GOLDEN.keys() == formats.LAYOUTS.keys()


@pytest.mark.parametrize("second", formats.LAYOUTS)
@pytest.mark.parametrize("first", formats.LAYOUTS)
def test_from_any_layout_to_any_other_dw_stays(first: str, second: str, tmp_path: Path) -> None:
    once = read_lora(in_layout(tmp_path / "once", first, weights()))[0]
    twice = read_lora(in_layout(tmp_path / "twice", second, once))[0]
    assert_equal(twice, weights(), tolerance=1e-6)


@pytest.mark.parametrize("layout", ["kohya", "onetrainer", "transformer", "bare"])
def test_another_alpha_leaves_dw_as_it_is(layout: str, tmp_path: Path) -> None:
    path = in_layout(tmp_path, layout, weights(), alpha=1.0)
    assert_equal(read_lora(path)[0], weights())
    for (_, b), key in ((weights().factors[NAMES[0]], formats.LAYOUTS[layout].keys(NAMES[0])[1]),):
        assert torch.allclose(load_file(path)[key], 3 * b)  # for a reader whose scale is 1 / 3


def test_three_layouts_change_a_real_pipeline_s_picture_alike(tmp_path: Path) -> None:
    """The demo's pipeline, by diffusers' own loader."""
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained("demo/model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        random = torch.Generator().manual_seed(0)
        return pipe(
            "a big creature, at night", width=64, height=64, num_inference_steps=4, generator=random, output_type="pt"
        ).images[0]

    sizes = {
        name: (module.in_features, module.out_features)
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks")
    }
    factors = {}
    for number, (name, (in_features, out_features)) in enumerate(sizes.items()):
        random = torch.Generator().manual_seed(number)
        a, b = torch.randn(4, in_features, generator=random), torch.randn(out_features, 4, generator=random)
        factors[name] = LowRank(a * 0.05, b * 0.05)
    plain, pictures = draw(), []
    for layout in ("diffusion_model", "transformer", "kohya"):
        write_lora(tmp_path / f"{layout}.safetensors", AdapterWeights(factors), {}, layout=layout)
        pipe.load_lora_weights(str(tmp_path / f"{layout}.safetensors"))
        pictures.append(draw())
        pipe.unload_lora_weights()
    assert (pictures[0] - plain).abs().max() > 0.05
    assert torch.equal(draw(), plain)
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0], rtol=0, atol=1e-4)


def test_modules_of_rank_zero_are_left_out(tmp_path: Path) -> None:
    kept = LowRank(torch.ones(2, 3), torch.ones(4, 2))
    factors = {"transformer_blocks.0.attn.to_q": kept, "transformer_blocks.0.attn.to_k": zeros(3, 4)}
    write_lora(tmp_path / "lora.safetensors", AdapterWeights(factors), {})
    assert check_lora(tmp_path / "lora.safetensors") == {"transformer_blocks.0.attn.to_q": (3, 4, 2)}
