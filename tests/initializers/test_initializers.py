"""Initializers by name, and those that need no model."""

import subprocess
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import initializers
from trainer import adapter
from trainer.adapter import AdapterConfig, AdapterWeights, InitContext
from trainer.formats import FormatError, write_lora
from trainer.lowrank import LowRank

MODULES = {"transformer_blocks.0.attn.to_q": (400, 300), "transformer_blocks.0.img_mod.1": (400, 900)}


def context(seed: int = 0, rank: int = 8, modules: dict[str, tuple[int, int]] = MODULES) -> InitContext:
    return InitContext(
        images=(), modules=modules, rank=rank, seed=seed, device=torch.device("cpu"), base="base", log=lambda _: None
    )


def peft_start(init_lora_weights: bool | str) -> torch.Tensor:
    """What PEFT itself puts into a."""
    model: Any = nn.ModuleDict({"to_q": nn.Linear(400, 300)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=8, target_modules=["to_q"], init_lora_weights=init_lora_weights)
        inject_adapter_in_model(config, model)
    return model["to_q"].lora_A["default"].weight.detach()


@pytest.mark.parametrize(("name", "peft_name"), [("random", True), ("gaussian", "gaussian")])
def test_random_starts_have_peft_s_distribution_and_no_effect(name: str, peft_name: bool | str) -> None:
    seed = initializers.get(name)(context(), initializers.config_class(name)())
    assert {module: (x.a.shape, x.b.shape) for module, x in seed.weights.factors.items()} == {
        module: ((8, in_features), (out_features, 8)) for module, (in_features, out_features) in MODULES.items()
    }
    peft = peft_start(peft_name)
    for a, b in seed.weights.factors.values():
        assert a.dtype == b.dtype == torch.float32
        assert torch.count_nonzero(b) == 0
        assert a.std() == pytest.approx(float(peft.std()), rel=0.05)
        assert float(a.mean()) == pytest.approx(0, abs=0.1 * float(peft.std()))
        assert (a.abs().max() <= 400**-0.5) == (name == "random") == (peft.abs().max() <= 400**-0.5)


@pytest.mark.parametrize("name", ["random", "gaussian"])
def test_random_starts_are_functions_of_seed_and_module(name: str) -> None:
    def factors(seed: int, modules: dict[str, tuple[int, int]]) -> dict[str, LowRank]:
        state = torch.random.get_rng_state()
        result = initializers.get(name)(context(seed, modules=modules), initializers.config_class(name)())
        assert torch.equal(torch.random.get_rng_state(), state)
        return result.weights.factors

    module = "transformer_blocks.0.img_mod.1"
    alone, among = factors(3, {module: MODULES[module]}), factors(3, MODULES)
    assert torch.equal(alone[module].a, among[module].a)
    assert not torch.equal(alone[module].a, factors(4, MODULES)[module].a)
    assert not torch.equal(among[module].a, among["transformer_blocks.0.attn.to_q"].a)


@pytest.mark.parametrize("name", ["random", "gaussian"])
def test_random_starts_heed_a_module_s_own_rank(name: str) -> None:
    """And what they give is in the adapter afterwards, with the standard deviation of that rank."""
    model: Any = QwenImageTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=128)
    own = {"transformer_blocks.0.attn.to_q": 4, "transformer_blocks.0.img_mod.1": 32}
    config = AdapterConfig(rank=8, rank_pattern=own)
    some = replace(context(), modules=adapter.target_modules(model, config), rank_pattern=own)
    seed = initializers.get(name)(some, initializers.config_class(name)())
    adapter.inject(model, config)
    adapter.apply_seed(model, seed, random_seed=0)
    for module, factors in adapter.read(model).factors.items():
        rank = own.get(module, 8)
        given = seed.weights.factors[module]
        assert given.a.shape[0] == given.b.shape[1] == rank
        assert torch.equal(factors.a, given.a)
        expected = 1 / rank if name == "gaussian" else (3 * factors.a.shape[1]) ** -0.5
        assert float(factors.a.std()) == pytest.approx(expected, rel=0.15)


@pytest.fixture
def lora(tmp_path: Path) -> tuple[Path, AdapterWeights]:
    random = torch.Generator().manual_seed(0)
    weights = AdapterWeights(
        {
            module: LowRank(
                torch.randn(5, in_features, generator=random), torch.randn(out_features, 5, generator=random)
            )
            for module, (in_features, out_features) in MODULES.items()
        }
    )
    write_lora(tmp_path / "some.safetensors", weights, {"made_by": "a test"})
    return tmp_path / "some.safetensors", weights


def test_a_file_is_given_as_it_is_times_strength(lora: tuple[Path, AdapterWeights]) -> None:
    path, weights = lora
    name, table = initializers.resolve(str(path))
    assert (name, table) == ("file", {"path": str(path)})
    config = initializers.config_class(name)(**table, strength=0.5)
    assert initializers.check(name, config) == []
    seed = initializers.get(name)(context(), config)
    assert seed.weights.factors.keys() == weights.factors.keys()
    for module, (a, b) in weights.factors.items():
        assert torch.equal(seed.weights.factors[module].a, a)
        assert torch.equal(seed.weights.factors[module].b, b * 0.5)
    assert seed.report["ranks"] == [5] and seed.report["metadata"]["made_by"] == "a test"


def test_a_file_that_cannot_be_read_is_told_before_anything_loads(lora: tuple[Path, AdapterWeights]) -> None:
    path, _ = lora
    path.write_bytes(path.read_bytes()[:-10])
    config = initializers.config_class("file")(path=str(path), strength=0.0)
    strength, damaged = initializers.check("file", config)
    assert strength.startswith("strength") and damaged.startswith(f"path: {path}")
    with pytest.raises(FormatError):
        initializers.get("file")(context(), config)
    assert initializers.check("file", initializers.config_class("file")()) == ["path must name a LoRA file or folder"]


def test_names_are_known_and_near_ones_are_suggested() -> None:
    assert initializers.names() == ("random", "gaussian", "file", "i2l")
    for name in ("random", "gaussian", "file"):
        assert is_dataclass(initializers.config_class(name))
    with pytest.raises(initializers.UnknownInitializer, match='did you mean "gaussian"'):
        initializers.get("gausian")
    with pytest.raises(initializers.UnknownInitializer, match="nor an existing LoRA file"):
        initializers.resolve("nowhere/lora")
    resolved = initializers.resolve("nowhere/lora.safetensors")
    assert resolved == ("file", {"path": "nowhere/lora.safetensors"})
    (problem,) = initializers.check("file", initializers.config_class("file")(path="nowhere/lora.safetensors"))
    assert problem == "path: nowhere/lora.safetensors: there is no such file or folder"


def test_importing_the_package_imports_no_initializer_and_no_torch() -> None:
    code = "import initializers, sys; print([m for m in sys.modules if m == 'torch' or m.startswith('initializers.')])"
    root = Path(initializers.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
