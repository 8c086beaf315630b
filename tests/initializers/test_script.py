"""`warm_start` in scripts as people have them, on every kind of adapter: dW is the seed's, as PEFT computes it."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, inject_adapter_in_model
from PIL import Image
from torch import Tensor, nn

from initializers import warm_start
from tests.formats.test_trainers import deltas, modules, weights
from tests.test_adapter import gradients, layers, output, tiny
from trainer import adapter
from trainer.adapter import TARGETS, AdapterConfig, AdapterError, Seed
from trainer.config import ConfigError
from trainer.formats import write_lora

DEMO = Path("demo")
I2L = {"weights": str(DEMO / "i2l"), "encoders": str(DEMO / "encoders"), "experts": ["style"]}
FOUR, TWELVE = list(TARGETS["diffusers"]), list(TARGETS["i2l"])


@pytest.fixture
def lora(tmp_path: Path) -> str:
    write_lora(tmp_path / "some.safetensors", weights(), {})
    return str(tmp_path / "some.safetensors")


def delta(model: Any, name: str = "default") -> dict[str, Tensor]:
    with torch.no_grad():
        return {module: layer.get_delta_weight(name) for module, layer in layers(model).items()}


def assert_seeded(model: Any, rank: int | None = None, name: str = "default") -> None:
    expected = deltas(weights(), rank)
    found = {module: x for module, x in delta(model, name).items() if module in expected}
    assert found
    for module, x in found.items():
        assert (x.double() - expected[module]).norm() <= 1e-5 * expected[module].norm(), module


CONFIGS: dict[str, LoraConfig] = {
    "four types": LoraConfig(r=6, lora_alpha=6, target_modules=FOUR, init_lora_weights="gaussian"),
    "twelve types": LoraConfig(r=6, lora_alpha=6, target_modules=TWELVE, init_lora_weights="gaussian"),
    "alpha": LoraConfig(r=6, lora_alpha=2, target_modules=TWELVE),
    "rslora": LoraConfig(r=6, lora_alpha=2, target_modules=TWELVE, use_rslora=True),
    "patterns": LoraConfig(
        r=6, lora_alpha=3, target_modules=TWELVE, rank_pattern={"to_q": 9}, alpha_pattern={"to_k": 5}
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_that_is_there_is_seeded(case: str, lora: str) -> None:
    """The structure of diffusers' DreamBooth LoRA script for Qwen-Image: freeze, add_adapter, (here), optimizer."""
    transformer = tiny()
    transformer.requires_grad_(False)
    transformer.add_adapter(CONFIGS[case])
    report = warm_start(transformer, init=lora)
    assert_seeded(transformer)
    expected = 8 if case == "four types" else 24
    assert (report["seeded"], report["random"], report["adapter"]) == (expected, 0, "LoRA")
    assert len(report["dropped"]) == 24 - expected
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    assert len(parameters) == 2 * expected
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    before = delta(transformer)
    transformer(
        hidden_states=torch.randn(1, 16, 64),
        encoder_hidden_states=torch.randn(1, 5, 32),
        encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.long),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0].square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(x, before[module]) for module, x in delta(transformer).items())


def test_an_adapter_is_added_where_there_is_none(lora: str) -> None:
    transformer = tiny()
    report = warm_start(transformer, init=lora, rank=4, alpha=8.0, target_modules="attention")
    assert_seeded(transformer, 4)
    assert (report["seeded"], len(report["dropped"])) == (16, 8) and report["energy_kept"]["total"] < 1
    assert {layer.scaling["default"] for layer in layers(transformer).values()} == {2.0}


def test_names_and_peft_models(lora: str) -> None:
    transformer = tiny()
    transformer.add_adapter(LoraConfig(r=6, target_modules=FOUR), "mine")
    warm_start(transformer, init=lora)
    assert_seeded(transformer, name="mine")
    transformer.add_adapter(LoraConfig(r=6, target_modules=FOUR), "other")
    with pytest.raises(ConfigError, match="several adapters"):
        warm_start(transformer, init=lora)
    warm_start(transformer, init=lora, adapter_name="other")
    assert_seeded(transformer, name="other")
    wrapped = get_peft_model(tiny(), LoraConfig(r=6, target_modules=FOUR))
    warm_start(wrapped, init=lora)
    assert_seeded(wrapped.base_model.model)


def test_dora_leaves_w_plus_dw(lora: str) -> None:
    seeded, plain = tiny(), tiny()
    for name, x in deltas(weights()).items():
        plain.get_submodule(name).weight.data += x.float()
    seeded.add_adapter(LoraConfig(r=6, lora_alpha=3, target_modules=TWELVE, use_dora=True))
    warm_start(seeded, init=lora)
    difference = (output(seeded) - output(plain)).abs().max()
    assert difference < 1e-4 * (output(tiny()) - output(plain)).abs().max()


def test_half_precision_is_raised(lora: str) -> None:
    transformer = tiny(torch.bfloat16)
    transformer.add_adapter(LoraConfig(r=6, target_modules=TWELVE))
    for parameter in transformer.parameters():
        parameter.data = parameter.data.bfloat16()
    assert warm_start(transformer, init=lora)["raised_to_fp32"] == 48
    assert_seeded(transformer)


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_lycoris_in_half_precision_is_raised_too(kind: Any, lora: str) -> None:
    model = tiny(torch.bfloat16)
    inject_adapter_in_model(kind(r=6, target_modules=TWELVE), model)
    for _, layer in adapter.layers(model, "default"):
        for name, parameter in layer.named_parameters():
            if name.endswith(".default"):
                parameter.data = parameter.data.bfloat16()
    assert warm_start(model, init=lora)["raised_to_fp32"] > 0
    kinds = {
        x.dtype for _, layer in adapter.layers(model, "default") for n, x in layer.named_parameters() if "default" in n
    }
    assert kinds == {torch.float32} and output(model).isfinite().all()


def test_a_loha_is_the_lora_exactly(lora: str) -> None:
    model = tiny()
    inject_adapter_in_model(LoHaConfig(r=6, alpha=3, target_modules=TWELVE), model)
    report = warm_start(model, init=lora)
    found = dict(adapter.layers(model, "default"))
    assert report["seeded"] == len(found) == 24 and report["energy_kept"]["min"] > 1 - 1e-12
    expected = deltas(weights())
    for name, layer in found.items():
        with torch.no_grad():
            x = layer.get_delta_weight("default").double()
        assert (x - expected[name]).norm() <= 1e-5 * expected[name].norm()
    layer = found["transformer_blocks.0.attn.to_q"]
    layer.get_delta_weight("default").pow(2).sum().backward()
    for part in ("w1_a", "w1_b", "w2_a", "w2_b"):
        columns = getattr(layer, f"hada_{part}")["default"].grad
        rows = columns.T if part.endswith("a") else columns
        assert part == "w2_b" or (rows.abs().amax(1) > 0).all()  # only w2_b waits for w2_a, as b waits for a
    small = tiny()
    inject_adapter_in_model(LoHaConfig(r=3, alpha=3, target_modules=TWELVE), small)
    assert 0.8 < warm_start(small, init=lora)["energy_kept"]["total"] < 1


@pytest.mark.parametrize("both", [False, True])
def test_a_lokr_is_the_nearest_kronecker_product(both: bool, tmp_path: Path) -> None:
    """A dW that is one is taken exactly; others at the error that it states, which an SVD in other order confirms."""
    model = tiny()
    inject_adapter_in_model(LoKrConfig(r=64, alpha=32, target_modules=["attn.to_q"], decompose_both=both), model)
    write_lora(tmp_path / "x.safetensors", weights(), {})
    report = warm_start(model, init=str(tmp_path / "x.safetensors"))
    assert report["seeded"] == 2 and len(report["dropped"]) == 22
    expected = deltas(weights())
    for name, layer in adapter.layers(model, "default"):
        with torch.no_grad():
            x = layer.get_delta_weight("default").double()
        lost = float((x - expected[name]).norm() ** 2 / expected[name].norm() ** 2)
        (i, j), (k, m) = layer.lokr_w1["default"].shape, layer.lokr_w2["default"].shape
        reordered = expected[name].reshape(i, k, j, m).permute(0, 2, 1, 3).reshape(i * j, k * m)
        values = torch.linalg.svdvals(reordered)
        assert lost == pytest.approx(1 - float(values[0] ** 2 / values.square().sum()), abs=1e-5)
        assert lost <= 1 - report["energy_kept"]["min"] + 1e-6
    assert 0 < report["energy_kept"]["total"] < 0.5  # a random dW is far from any product, and it says so


def test_a_lokr_with_a_low_rank_second_factor_states_its_error(lora: str) -> None:
    model = tiny()
    inject_adapter_in_model(LoKrConfig(r=2, alpha=4, target_modules=TWELVE, decompose_both=True), model)
    report = warm_start(model, init=lora)
    expected, lost, total = deltas(weights()), 0.0, 0.0
    for name, layer in adapter.layers(model, "default"):
        with torch.no_grad():
            lost += float((layer.get_delta_weight("default").double() - expected[name]).norm() ** 2)
        total += float(expected[name].norm() ** 2)
    assert report["energy_kept"]["total"] == pytest.approx(1 - lost / total, abs=1e-4)


def test_i2l_of_the_demo_by_folder_paths_and_pictures(tmp_path: Path) -> None:
    def start(images: Any, rank: int = 8) -> tuple[Any, dict[str, Any]]:
        transformer: Any = QwenImageTransformer2DModel.from_pretrained(str(DEMO / "model"), subfolder="transformer")
        return transformer, warm_start(transformer, images, rank=rank, cache=tmp_path / "cache", **I2L)

    folder = DEMO / "images" / "zorp"
    paths = sorted(folder.glob("*.png"))
    model, report = start(folder)
    assert (report["seeded"], report["random"]) == (45, 3) and report["init"]["experts"][0]["expert"] == "style"
    assert report["init"]["pictures"] == [path.name for path in paths] and report["largest_error"] < 1e-5
    expected = delta(model)
    for images in (paths, [Image.open(path) for path in paths]):
        for module, x in delta(start(images)[0]).items():
            torch.testing.assert_close(x, expected[module])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"init": "i2l", **I2L}, "images: i2l needs pictures"),
        ({"images": "nowhere.png", **I2L}, "there is no file nowhere.png"),
        ({"images": "configs", **I2L}, "no picture in configs"),
        ({"images": "demo/images/zorp", **I2L, "strenght": 1.0}, "strength"),
        ({"images": "demo/images/zorp", **I2L, "strength": "auto"}, 'strength = "auto"'),
        ({"images": "demo/images/zorp", **I2L, "mode": "merge"}, "merge"),
        ({"images": "demo/images/zorp", "weights": "nowhere"}, "nowhere"),
        ({"init": "random", "rank": 0}, "rank must be at least 1"),
        ({"init": "random", "target_modules": "everything"}, "there is no set"),
        ({"init": "absent.safetensors"}, "there is no such file or folder"),
    ],
)
def test_bad_arguments_are_told(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        warm_start(tiny(), given.pop("images", None), **given)


def test_all_bad_arguments_are_told_at_once_and_near_names_are_given() -> None:
    given = {"rnak": 4, "strenght": 0.5, "alpha": "8", "seed": 0.5, "experts": "style", "rank": 0, "cashe": "x"}
    with pytest.raises(ConfigError) as caught:
        warm_start(tiny(), "nowhere.png", weights=I2L["weights"], encoders=I2L["encoders"], **given)
    told = str(caught.value)
    for part in (
        "rnak: unknown option of warm_start with init = i2l; did you mean rank?",
        "strenght: unknown option of warm_start with init = i2l; did you mean strength?",
        "cashe: unknown option of warm_start with init = i2l; did you mean cache?",
        'alpha: must be a number, not "8"; write 8',
        "seed: must be an integer, not 0.5",
        "[init.i2l] experts: must be a list",
        "there is no file nowhere.png",
    ):
        assert part in told, part
    with pytest.raises(ConfigError, match=r"rank must be at least 1.*\n.*there is no file"):
        warm_start(tiny(), "nowhere.png", rank=0, **I2L)


def test_values_may_be_what_scripts_have(lora: str) -> None:
    """Sets, as PEFT keeps target_modules; numpy's numbers; paths; None for what is not given."""
    transformer = tiny()
    options = {"rank": np.int64(4), "alpha": 8, "target_modules": {"attn.to_q"}, "seed": np.int64(3), "cache": None}
    report = warm_start(transformer, init=lora, base=Path("somewhere"), strength=1, **options)
    assert report["seeded"] == 2
    assert {layer.scaling["default"] for layer in layers(transformer).values()} == {2.0}


def test_what_cannot_take_a_start_is_refused(lora: str) -> None:
    transformer = tiny()
    transformer.add_adapter(LoraConfig(r=4, target_modules=FOUR))
    with pytest.raises(ConfigError, match="rank has no effect"):
        warm_start(transformer, init=lora, rank=4)
    with pytest.raises(ConfigError, match="no adapter mine"):
        warm_start(transformer, init=lora, adapter_name="mine")
    other = tiny()
    inject_adapter_in_model(OFTConfig(oft_block_size=4, target_modules=FOUR), other)
    with pytest.raises(ConfigError, match="only LoRA, LoHa and LoKr"):
        warm_start(other, init=lora)
    changed = tiny()
    changed.add_adapter(LoraConfig(r=4, target_modules=["attn.to_q"], init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match="has changed the base weights"):
        warm_start(changed, init=lora)
    elsewhere = tiny()
    elsewhere.add_adapter(LoraConfig(r=4, target_modules=["proj_out"]))
    with pytest.raises(AdapterError, match="none of the modules"):
        warm_start(elsewhere, init=lora)
    ada = tiny()
    inject_adapter_in_model(AdaLoraConfig(target_modules=FOUR, total_step=10), ada)
    with pytest.raises(ConfigError, match="low-rank start"):
        warm_start(ada, init=lora)
    assert modules()


def quantised(kind: str) -> Any:
    """The tiny model with bitsandbytes' own layers, on the CPU; diffusers would ask for a GPU to load them."""
    model = tiny()
    for name, layer in [*model.named_modules()]:
        if not isinstance(layer, nn.Linear) or not name.startswith("transformer_blocks"):
            continue
        size, weight = (layer.in_features, layer.out_features), layer.weight.data
        if kind == "nf4":
            new: Any = bnb.nn.Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    return model


@pytest.mark.parametrize(("kind", "dora"), [("nf4", False), ("int8", False), ("nf4", True)])
def test_quantised_bases(kind: str, dora: bool, lora: str) -> None:
    model = quantised(kind)
    base = output(model)
    assert 1e-5 < (base - output(tiny())).norm() / base.norm() < 0.1
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=6, lora_alpha=3, target_modules=TWELVE, use_dora=dora))
    expected_kind = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    assert {type(layer).__name__ for layer in layers(model).values()} == {expected_kind}
    assert warm_start(model, init=lora)["seeded"] == 24
    seeded = output(model)
    reference = quantised(kind)
    adapter.attach_frozen(reference, weights())
    expected = output(reference)
    assert (seeded - expected).norm() < 1e-4 * (expected - base).norm()
    assert_seeded(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_trainer_s_adapter_learns_on_a_quantised_base_in_bf16(kind: str) -> None:
    """PEFT's layers for such bases have a forward pass of their own."""
    model = quantised(kind)
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.bfloat16()
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.compute_dtype = torch.bfloat16
    model.requires_grad_(False)
    adapter.inject(model, AdapterConfig(rank=6))
    adapter.apply_seed(model, Seed(weights(), {}), random_seed=0)
    seen = list[torch.dtype]()
    for layer in layers(model).values():
        layer.lora_A["default"].register_forward_hook(lambda _, inputs, found: seen.append(found.dtype))
    light = gradients(model, torch.bfloat16)[1]
    assert set(seen) == {torch.bfloat16}
    model.zero_grad()
    for layer in layers(model).values():
        layer.cast_input_dtype_enabled = True  # as PEFT does it
    heavy = gradients(model, torch.bfloat16)[1]
    assert light.keys() == heavy.keys()
    for name, gradient in light.items():
        assert gradient.dtype == torch.float32 and (gradient - heavy[name]).norm() <= 0.05 * heavy[name].norm(), name


def test_another_adapter_in_fp32_works_beside_one_that_was_added_on_a_bf16_base(lora: str) -> None:
    transformer = tiny(torch.bfloat16)
    warm_start(transformer, init=lora)
    transformer.add_adapter(LoraConfig(r=6, target_modules=FOUR), "other")
    warm_start(transformer, init=lora, adapter_name="other")
    transformer.set_adapter(["default", "other"])
    assert output(transformer).isfinite().all()


def test_lycoris_on_a_quantised_base_is_refused(lora: str) -> None:
    model = quantised("nf4")
    inject_adapter_in_model(LoHaConfig(r=6, target_modules=TWELVE), model)
    with pytest.raises(ConfigError, match="quantised"):
        warm_start(model, init=lora)
