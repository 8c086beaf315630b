"""The adapter on a tiny real transformer, against PEFT's own merge and forward, and diffusers' own loader."""

import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainer import adapter
from trainer.adapter import TARGETS, AdapterConfig, AdapterError, AdapterWeights, Seed
from trainer.files import write_json, write_tensors
from trainer.flow import generator
from trainer.formats.lora import plain, read_lora, write_lora
from trainer.lowrank import LowRank, concatenate
from trainer.optimizer import lr_groups

SETTINGS = [
    AdapterConfig(rank=6),
    AdapterConfig(rank=6, alpha=1.5),
    AdapterConfig(rank=6, alpha=24.0, use_rslora=True),
    AdapterConfig(rank=6, use_rslora=True),
]


def tiny(dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = QwenImageTransformer2DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=32,
            joint_attention_dim=32,
            in_channels=64,
            axes_dims_rope=(8, 12, 12),
        )
        for parameter in model.parameters():  # diffusers starts some at 0 or 1, which would hide a change
            nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval()


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    random = generator(0, "inputs")
    dtype = next(p.dtype for name, p in model.named_parameters() if "lora" not in name)
    return model(
        hidden_states=torch.randn(1, 16, 64, generator=random).to(dtype),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=random).to(dtype),
        encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.long),
        timestep=torch.tensor([0.5]).to(dtype),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0].float()


def random_seed(model: nn.Module, rank: int, config: AdapterConfig, size: float = 0.3) -> Seed:
    factors = {}
    for name, (in_features, out_features) in adapter.target_modules(model, config).items():
        random = generator(1, name)
        a = torch.randn(rank, in_features, generator=random) * size
        factors[name] = LowRank(a, torch.randn(out_features, rank, generator=random) * size)
    return Seed(AdapterWeights(factors), {})


def dense(x: LowRank) -> Tensor:
    return x.b.double() @ x.a.double()


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def merged(seed: Seed) -> nn.Module:
    """The base with dW added to its weights, by plain matrix products."""
    model = tiny()
    for name, factors in seed.weights.factors.items():
        model.get_submodule(name).weight.data += dense(factors).float()
    return model


@pytest.mark.parametrize(("name", "per_block"), [("i2l", 12), ("all", 14), ("attention", 8), ("diffusers", 4)])
def test_named_sets_are_what_peft_adapts(name: str, per_block: int) -> None:
    config, model = AdapterConfig(target_modules=name), tiny()
    modules = adapter.target_modules(model, config)
    assert len(modules) == 2 * per_block
    adapter.inject(model, config)
    assert list(layers(model)) == list(modules)
    assert adapter.target_modules(model, config) == modules
    for module, (in_features, out_features) in modules.items():
        layer = model.get_submodule(module)
        assert (layer.in_features, layer.out_features) == (in_features, out_features)


def test_all_is_every_linear_layer_of_the_blocks() -> None:
    linears = {name for name, module in tiny().transformer_blocks.named_modules() if isinstance(module, nn.Linear)}
    assert {name.partition(".")[2] for name in linears} == set(TARGETS["all"])


def test_target_modules_works_without_weights_and_with_quantised_layers() -> None:
    class Linear4bit(nn.Linear):
        """As in bitsandbytes: a subclass, whose weight has another shape."""

    expected = adapter.target_modules(tiny(), AdapterConfig())
    with torch.device("meta"):
        model: Any = QwenImageTransformer2DModel(**{k: v for k, v in tiny().config.items() if not k.startswith("_")})
    assert adapter.target_modules(model, AdapterConfig()) == expected
    quantised = Linear4bit(64, 64)
    quantised.weight = nn.Parameter(torch.zeros(2048, 1), requires_grad=False)
    model.transformer_blocks[0].attn.to_q = quantised
    assert adapter.target_modules(model, AdapterConfig()) == expected


def test_single_names_and_types_can_be_chosen() -> None:
    config = AdapterConfig(target_modules=("to_q", "transformer_blocks.1.img_mod.1", "proj_out"))
    assert set(adapter.target_modules(tiny(), config)) == {
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.img_mod.1",
        "proj_out",
    }


def test_types_that_match_nothing_are_all_named_with_what_is_near() -> None:
    config = AdapterConfig(target_modules=("attn.to_qq", "img_mlp.net.2", "text_mlp.net.2", "attn"))
    with pytest.raises(AdapterError) as caught:
        adapter.target_modules(tiny(), config)
    first, second, third = str(caught.value).splitlines()
    assert '"attn.to_qq"' in first and "attn.to_q" in first.replace("attn.to_qq", "")
    assert '"text_mlp.net.2"' in second and "txt_mlp.net.2" in second
    assert '"attn"' in third and "not a Linear layer" in third


def test_ranks_of_modules_without_an_adapter_are_all_named() -> None:
    strangers = {f"transformer_blocks.{block}.attn.to_q": 3 for block in range(2, 9)}
    untrained = "transformer_blocks.1.img_mlp.net.0.proj"
    pattern = {untrained: 3, "transformer_blocks.1.attn.to_k": 3, "to_v": 5, **strangers}
    with pytest.raises(AdapterError) as caught:
        adapter.inject(tiny(), AdapterConfig(rank_pattern=pattern))
    lines = str(caught.value).splitlines()
    near = "; near are transformer_blocks.0.attn.to_v, transformer_blocks.1.attn.to_v"
    assert lines[0] == f'rank_pattern: there is no module "to_v"{near}'
    left_out = f'rank_pattern: "{untrained}" gets no adapter, as target_modules leave it out'
    assert lines[1].startswith(f"{left_out}; near are transformer_blocks.1.img_mlp.net.2")
    assert lines[2].startswith(
        'rank_pattern: there is no module "transformer_blocks.2.attn.to_q"; near are transformer'
    )
    assert lines[5].startswith("rank_pattern: 4 more get no adapter: transformer_blocks.5.attn.to_q, ")
    assert len(lines) == 6
    assert "attn.to_k" not in str(caught.value)  # which has an effect
    adapter.inject(tiny(), AdapterConfig(target_modules="all", rank_pattern={untrained: 3}))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"target_modules": "attn.to_q"}, "target_modules"),
        ({"target_modules": ()}, "target_modules"),
    ],
)
def test_impossible_settings_are_named(values: dict[str, Any], key: str) -> None:
    (problem,) = AdapterConfig(**values).problems()
    assert problem.startswith(key)
    assert not AdapterConfig().problems()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_injection_changes_nothing_yet(dtype: torch.dtype, use_dora: bool) -> None:
    model, config = tiny(dtype), AdapterConfig(rank=4, use_dora=use_dora)
    before, state = output(model), torch.random.get_rng_state()
    adapter.inject(model, config)
    adapter.apply_seed(model, Seed(AdapterWeights({}), {}), random_seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype] if use_dora else 0.0
    assert torch.allclose(output(model), before, rtol=0, atol=tolerance * float(before.abs().max()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter.tensors(model)) and len(trained) == 24 * (3 if use_dora else 2)
    assert all(p.dtype == torch.float32 for p in adapter.tensors(model).values())
    assert all(p.dtype == dtype for name, p in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("incoming", [2, 6, 15])
def test_peft_s_own_delta_is_what_was_asked(config: AdapterConfig, incoming: int) -> None:
    model = tiny()
    seed = random_seed(model, incoming, config)
    adapter.inject(model, config)
    report = adapter.apply_seed(model, seed, random_seed=0)
    for name, layer in layers(model).items():
        u, s, vh = torch.linalg.svd(dense(seed.weights.factors[name]), full_matrices=False)
        expected = (u[:, :6] * s[:6] @ vh[:6]).float()
        assert torch.allclose(layer.get_delta_weight("default"), expected, atol=1e-5 * float(s[0]))
    assert (report["seeded"], report["random"], report["dropped"]) == (24, 0, {})
    assert report["padded"] == (24 if incoming == 2 else 0)
    assert report["largest_error"] <= 1e-6
    assert (report["energy_kept"]["min"] < 0.99) == (incoming == 15)


@pytest.mark.parametrize("config", [*SETTINGS, AdapterConfig(rank=6, alpha=3.0, use_dora=True)], ids=str)
def test_the_seeded_model_computes_with_w_plus_dw(config: AdapterConfig) -> None:
    model = tiny()
    seed = random_seed(model, 4, config, size=0.1)
    base, expected = output(model), output(merged(seed))
    adapter.inject(model, config)
    adapter.apply_seed(model, seed, random_seed=0)
    difference = (output(model) - expected).abs().max() / (base - expected).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("config", [*SETTINGS, AdapterConfig(rank=6, use_dora=True)], ids=str)
def test_what_is_read_back_is_effective(config: AdapterConfig) -> None:
    model = tiny()
    seed = random_seed(model, 6, config)
    adapter.inject(model, config)
    adapter.apply_seed(model, seed, random_seed=0)
    read = adapter.read(model).factors
    assert read.keys() == seed.weights.factors.keys()
    for name, factors in seed.weights.factors.items():
        assert torch.equal(read[name].a, factors.a)  # at the same rank nothing is rotated
        assert torch.allclose(read[name].b, factors.b, rtol=1e-6)


def test_every_rank_of_a_padded_adapter_gets_a_gradient() -> None:
    model, config = tiny(), AdapterConfig(rank=6)
    seed = random_seed(model, 2, config)
    zero_padded = {  # some trainers pad with zeros in both factors
        name: concatenate([x, LowRank(torch.zeros(4, x.a.shape[1]), torch.zeros(x.b.shape[0], 4))])
        for name, x in seed.weights.factors.items()
    }
    adapter.inject(model, config)
    for weights in (seed.weights, AdapterWeights(zero_padded)):
        report = adapter.apply_seed(model, Seed(weights, {}), random_seed=0)
        assert report["padded"] == 24
        for layer in layers(model).values():
            assert (layer.lora_A["default"].weight.abs().amax(1) > 0).all()
            layer.zero_grad()
            layer(torch.randn(7, layer.in_features, generator=generator(2))).square().sum().backward()
            assert (layer.lora_B["default"].weight.grad.abs().amax(0) > 0).all()


def test_the_report_says_what_is_random_and_what_is_lost() -> None:
    model, config = tiny(), AdapterConfig(rank=4, target_modules="attention")
    whole = random_seed(model, 4, AdapterConfig()).weights.factors
    given = {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.img_mod.1"}
    seed = Seed(AdapterWeights({name: whole[name] for name in given}), {})
    adapter.inject(model, config)
    report = adapter.apply_seed(model, seed, random_seed=0)
    energy = {name: float(dense(whole[name]).square().sum()) for name in given}
    lost = energy["transformer_blocks.0.img_mod.1"] / sum(energy.values())
    assert (report["seeded"], report["random"]) == (2, 14)
    assert report["dropped"] == {"transformer_blocks.0.img_mod.1": pytest.approx(lost)}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_random_rows_depend_on_the_seed_and_the_module_alone() -> None:
    def rows(seed: int, target_modules: str) -> Tensor:
        model, config = tiny(), AdapterConfig(rank=4, target_modules=target_modules)
        adapter.inject(model, config)
        adapter.apply_seed(model, Seed(AdapterWeights({}), {}), random_seed=seed)
        return adapter.read(model).factors["transformer_blocks.1.attn.to_q"].a

    assert torch.equal(rows(0, "all"), rows(0, "diffusers"))
    assert not torch.equal(rows(0, "all"), rows(1, "all"))


def test_each_module_has_random_rows_of_its_own() -> None:
    model, config = tiny(), AdapterConfig(rank=4)
    adapter.inject(model, config)
    adapter.apply_seed(model, Seed(AdapterWeights({}), {}), random_seed=0)
    rows = [x.a for x in adapter.read(model).factors.values()]
    assert len(rows) == 24 and len({str(a.flatten()[:8].tolist()) for a in rows}) == 24


def test_a_smaller_seed_is_balanced() -> None:
    """Both factors of a direction are as long: neither learns faster only by how the seed was written down."""
    model, config = tiny(), AdapterConfig(rank=6)
    unbalanced = {
        name: LowRank(x.a * 50, x.b / 50) for name, x in random_seed(model, 2, config).weights.factors.items()
    }
    adapter.inject(model, config)
    adapter.apply_seed(model, Seed(AdapterWeights(unbalanced), {}), random_seed=0)
    for name, x in adapter.read(model).factors.items():
        values = torch.linalg.svdvals(dense(unbalanced[name]))[:2].float()
        torch.testing.assert_close(x.a[:2].norm(dim=1).square(), values, rtol=1e-4, atol=0)
        torch.testing.assert_close(x.b[:, :2].norm(dim=0).square(), values, rtol=1e-4, atol=0)


def test_rows_that_have_no_effect_yet_stay_as_they_are() -> None:
    """At the adapter's rank a seed is taken as it is: only rows that are zero in both factors are drawn anew."""
    model, config = tiny(), AdapterConfig(rank=6)
    seed = random_seed(model, 6, config).weights.factors
    for a, b in seed.values():
        b[:, 1] = 0
        a[4] = 0
        a[5] = b[:, 5] = 0
    adapter.inject(model, config)
    adapter.apply_seed(model, Seed(AdapterWeights(seed), {}), random_seed=0)
    for name, (a, b) in adapter.read(model).factors.items():
        assert torch.equal(a[:5], seed[name].a[:5]) and torch.equal(b[:, :5], seed[name].b[:, :5])
        assert a[5].abs().max() > 0 and not b[:, 5].any()


def test_a_seed_s_ranks_go_before_the_configuration_s() -> None:
    settings = AdapterConfig(rank=4, rank_pattern={"x": 2, "y": 3})
    found = adapter.settings_for(Seed(AdapterWeights({}), {}, rank=8, rank_pattern={"y": 5, "z": 6}), settings)
    assert (found.rank, found.rank_pattern) == (8, {"x": 2, "y": 5, "z": 6})
    assert adapter.settings_for(Seed(AdapterWeights({}), {}), settings) == settings


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_with_a_rank_of_its_own_has_that_alpha_unless_alpha_is_set(rslora: bool) -> None:
    name = "transformer_blocks.0.attn.to_q"
    default = {4: 2.0, 9: 3.0} if rslora else {4: 4.0, 9: 9.0}
    for alpha, expected in ((None, default), (2.0, {4: 2.0, 9: 2.0})):
        model, config = tiny(), AdapterConfig(rank=4, alpha=alpha, rank_pattern={name: 9}, use_rslora=rslora)
        adapter.inject(model, config)
        for module, scale in adapter.scales(model).items():
            rank = 9 if module == name else 4
            assert scale == pytest.approx(expected[rank] / (rank**0.5 if rslora else rank))


def _halve(factors: dict[str, LowRank]) -> None:
    name = "transformer_blocks.1.attn.to_k"
    factors[name] = LowRank(factors[name].a, factors[name].b / 2)


def _swap(factors: dict[str, LowRank]) -> None:
    q, k = "transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k"
    factors[q], factors[k] = factors[k], factors[q]


def _forget(factors: dict[str, LowRank]) -> None:
    factors.pop("transformer_blocks.1.attn.to_k")


@pytest.mark.parametrize("damage", [_halve, _swap, _forget])
def test_a_seed_that_does_not_arrive_is_an_error(
    damage: Callable[[dict[str, LowRank]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = tiny(), AdapterConfig(rank=6)
    seed = random_seed(model, 6, config)
    adapter.inject(model, config)
    write = adapter._write

    def damaged(found: dict[str, Any], requested: dict[str, LowRank], adapter_name: str) -> None:
        copy = dict(requested)
        damage(copy)
        write(found, copy, adapter_name)

    monkeypatch.setattr(adapter, "_write", damaged)
    with pytest.raises(
        AdapterError, match=r"not in the adapter: [12] of 24 modules .*transformer_blocks\.1\.attn\.to_"
    ):
        adapter.apply_seed(model, seed, random_seed=0)


def test_the_proof_of_a_zero_seed_is_exact() -> None:
    model, config = tiny(), AdapterConfig(rank=6)
    adapter.inject(model, config)
    assert adapter.apply_seed(model, Seed(AdapterWeights({}), {}), random_seed=0)["largest_error"] == 0.0
    requested = adapter.read(model)
    layers(model)["transformer_blocks.0.attn.to_q"].lora_B["default"].weight.data[0, 0] = 1e-20
    with pytest.raises(AdapterError, match="1 of 24"):
        adapter.verify(model, requested)


def test_a_seed_for_nothing_that_is_trained_is_an_error() -> None:
    model, config = tiny(), AdapterConfig(rank=4, target_modules="attention")
    other = random_seed(model, 4, AdapterConfig(target_modules=("img_mod.1",)))
    adapter.inject(model, config)
    with pytest.raises(
        AdapterError, match=r"transformer_blocks\.0\.img_mod\.1.*transformer_blocks\.0\.attn\.add_k_proj"
    ):
        adapter.apply_seed(model, other, random_seed=0)


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (LowRank(torch.ones(2, 32), torch.ones(64, 2)), "32 -> 64 in the seed and 64 -> 64"),
        (LowRank(torch.ones(2, 64), torch.ones(64, 3)), "rank 2 in a and 3 in b"),
        (LowRank(torch.full((2, 64), torch.nan), torch.ones(64, 2)), "NaN"),
    ],
)
def test_a_seed_that_does_not_fit_is_an_error(factors: LowRank, said: str) -> None:
    model, config = tiny(), AdapterConfig(rank=4)
    adapter.inject(model, config)
    seed = Seed(AdapterWeights({"transformer_blocks.0.attn.to_q": factors}), {})
    with pytest.raises(AdapterError, match=re.escape(said)):
        adapter.apply_seed(model, seed, random_seed=0)


def test_dora_on_a_row_of_zeros_is_refused() -> None:
    """Its gradient would be NaN: 0 / 0."""
    model = tiny()
    with torch.no_grad():
        model.transformer_blocks[1].attn.to_q.weight[3] = 0
    with pytest.raises(AdapterError, match=r"some are zero in transformer_blocks\.1\.attn\.to_q; choose"):
        adapter.inject(model, AdapterConfig(rank=4, use_dora=True))
    adapter.inject(model, AdapterConfig(rank=4))


@pytest.mark.parametrize("use_dora", [False, True])
def test_tensors_go_back_exactly(use_dora: bool) -> None:
    config = AdapterConfig(rank=4, alpha=2.0, use_dora=use_dora)
    first, second = tiny(), tiny()
    for model in (first, second):
        adapter.inject(model, config)
    adapter.apply_seed(first, random_seed(first, 4, config), random_seed=0)
    saved = {name: tensor.clone() for name, tensor in adapter.tensors(first).items()}
    adapter.load_tensors(second, saved)
    assert saved and all(torch.equal(tensor, saved[name]) for name, tensor in adapter.tensors(second).items())
    assert torch.equal(output(first), output(second))


def test_tensors_of_another_adapter_are_refused() -> None:
    model = tiny()
    adapter.inject(model, AdapterConfig(rank=4))
    saved = {name: tensor.clone() for name, tensor in adapter.tensors(model).items()}
    name = next(iter(saved))
    for wrong, said in (
        ({k: v for k, v in saved.items() if k != name}, "is missing"),
        ({**saved, "stray": torch.ones(1)}, "stray is not in this adapter"),
        ({**saved, name: torch.ones(5, 64)}, r"is \(5, 64\) instead of \(4, 64\)"),
    ):
        with pytest.raises(AdapterError, match=said):
            adapter.load_tensors(model, wrong)


def test_truncation_of_a_larger_seed_is_the_module_s_own() -> None:
    model, config = tiny(), AdapterConfig(rank=3, target_modules=("attn.to_q",))
    seed = random_seed(model, 9, config)
    adapter.inject(model, config)
    report = adapter.apply_seed(model, seed, random_seed=0)
    squares = [torch.linalg.svdvals(dense(x)).square() for x in seed.weights.factors.values()]
    kept = [float(values[:3].sum() / values.sum()) for values in squares]
    together = float(sum(values[:3].sum() for values in squares) / sum(values.sum() for values in squares))
    assert report["energy_kept"] == {"min": pytest.approx(min(kept)), "total": pytest.approx(together)}


def as_peft_has_it(config: AdapterConfig, dtype: torch.dtype) -> Any:
    """The adapter in fp32 on the base, without `inject`."""
    model = tiny(dtype)
    model.requires_grad_(False)
    model.add_adapter(adapter.peft_config(config))
    for parameter in adapter._parameters(model).values():
        parameter.data = parameter.data.float()
    return model


def with_effect(model: Any) -> Any:
    """Random numbers in a and b, the same in each model."""
    for name, parameter in adapter._parameters(model).items():
        if "magnitude" not in name:
            parameter.data.normal_(std=0.1, generator=generator(3, name))
    return model


def gradients(model: Any, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """The output, the gradients of a loss, and what autograd kept, in `dtype`."""
    model.train()
    random, kept = generator(0, "inputs"), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = model(
            hidden_states=torch.randn(2, 16, 64, generator=random).to(dtype),
            encoder_hidden_states=torch.randn(2, 5, 32, generator=random).to(dtype),
            encoder_hidden_states_mask=torch.ones(2, 5, dtype=torch.long),
            timestep=torch.tensor([0.5, 0.3]).to(dtype),
            img_shapes=[[(1, 4, 4)]] * 2,
            return_dict=False,
        )[0]
    (found.double() * torch.randn(found.shape, generator=random)).sum().backward()
    return found.detach(), {n: p.grad for n, p in adapter._parameters(model).items() if p.grad is not None}, kept


@pytest.mark.parametrize("config", [*SETTINGS, AdapterConfig(rank=6, use_dora=True)], ids=str)
def test_on_an_fp32_base_every_bit_is_peft_s(config: AdapterConfig) -> None:
    ours = tiny()
    adapter.inject(ours, config)
    first, second = (gradients(with_effect(m), torch.float32) for m in (ours, as_peft_has_it(config, torch.float32)))
    assert torch.equal(first[0], second[0]) and first[1].keys() == second[1].keys()
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())
    assert [*ours.state_dict()] == [*as_peft_has_it(config, torch.float32).state_dict()]


def test_at_bf16_gradients_are_as_good_as_peft_s_and_no_input_is_kept_in_fp32() -> None:
    """Against the same weights in float64."""
    config = AdapterConfig(rank=6, alpha=3.0)
    ours, peft = tiny(torch.bfloat16), as_peft_has_it(config, torch.bfloat16)
    adapter.inject(ours, config)
    exact = with_effect(as_peft_has_it(config, torch.bfloat16)).double()
    _, expected, _ = gradients(exact, torch.float64)
    errors, raised = [], []
    for model in (ours, peft):
        output, found, kept = gradients(with_effect(model), torch.bfloat16)
        assert output.dtype == torch.bfloat16 and {g.dtype for g in found.values()} == {torch.float32}
        assert found.keys() == expected.keys()
        total = sum(float((g - expected[name]).square().sum()) for name, g in found.items())
        errors.append((total / sum(float(g.square().sum()) for g in expected.values())) ** 0.5)
        raised.append(sum(x.dtype == torch.float32 and x.shape in ((2, 16, 64), (32, 64)) for x in kept))
    assert errors[0] < 1.1 * errors[1] < 0.2  # most of it is the base's own rounding
    assert raised[0] == 0 < raised[1]


def test_dora_at_bf16_stays_as_peft_has_it() -> None:
    config = AdapterConfig(rank=6, use_dora=True)
    ours = tiny(torch.bfloat16)
    adapter.inject(ours, config)
    first, second = (gradients(with_effect(m), torch.bfloat16) for m in (ours, as_peft_has_it(config, torch.bfloat16)))
    assert torch.equal(first[0], second[0])


def test_dropout_and_merging_at_bf16_are_peft_s() -> None:
    config = AdapterConfig(rank=6, dropout=0.5)
    ours, peft = tiny(torch.bfloat16), as_peft_has_it(config, torch.bfloat16)
    adapter.inject(ours, config)
    outputs = []
    for model in (ours, peft):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs.append(gradients(with_effect(model), torch.bfloat16)[0].float())
    plain = output(with_effect(ours).eval())
    assert (outputs[0] - outputs[1]).norm() < 0.02 * (outputs[0] - outputs[1].mean()).norm()
    merging = [*layers(ours).values()]
    for layer in merging:
        layer.merge()
    assert (output(ours) - plain).norm() < 0.02 * plain.norm()
    for layer in merging:
        layer.unmerge()
    assert (output(ours) - plain).norm() < 0.02 * plain.norm()


def test_the_adapter_comes_off_without_a_trace() -> None:
    transformer = tiny()
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    names = [name for name, _ in transformer.named_modules()]
    for _ in range(2):
        adapter.inject(transformer, AdapterConfig(rank=2))
        adapter.apply_seed(transformer, Seed(AdapterWeights({}), {}), random_seed=0)
        adapter.remove(transformer)
        assert [name for name, _ in transformer.named_modules()] == names
        after = transformer.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


RANKS = {  # of some modules, two of them equal
    "transformer_blocks.0.attn.to_q": 2,
    "transformer_blocks.1.attn.to_q": 9,
    "transformer_blocks.0.img_mod.1": 2,
    "transformer_blocks.1.txt_mlp.net.2": 1,
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_modules_with_ranks_of_their_own_have_the_scale_that_is_said(use_rslora: bool, alpha: float | None) -> None:
    """By default 1; with alpha, alpha / rank or alpha / sqrt(rank)."""
    config = AdapterConfig(rank=6, alpha=alpha, use_rslora=use_rslora, rank_pattern=RANKS)
    ours, peft = tiny(), tiny()
    adapter.inject(ours, config)
    alphas = {name: rank**0.5 if use_rslora else rank for name, rank in RANKS.items()}
    theirs = LoraConfig(  # a pattern for each module, as one would write it by hand
        r=6,
        lora_alpha=alpha or (6**0.5 if use_rslora else 6),
        target_modules=list(config.module_types),
        use_rslora=use_rslora,
        rank_pattern=RANKS,
        alpha_pattern=alphas if alpha is None else {},
    )
    peft.add_adapter(theirs)
    for name, layer in layers(ours).items():
        rank = RANKS.get(name, 6)
        assert layer.r["default"] == layers(peft)[name].r["default"] == rank
        assert layer.scaling["default"] == layers(peft)[name].scaling["default"]
        expected = 1.0 if alpha is None else alpha / (rank**0.5 if use_rslora else rank)
        assert layer.scaling["default"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_folder_with_ranks_by_module_loads_in_plain_peft(use_rslora: bool, tmp_path: Path) -> None:
    """What is written of ranks and alpha, `pattern_of_ranks` and all, against the effect of the adapter."""
    config = AdapterConfig(rank=6, use_rslora=use_rslora, rank_pattern=RANKS)
    model = tiny()
    adapter.inject(model, config)
    adapter.apply_seed(model, random_seed(model, 20, config, size=0.1), random_seed=0)
    expected = output(model)
    description = {**adapter.peft_config(config).to_dict(), "target_modules": sorted(config.module_types)}
    write_json(tmp_path / "adapter_config.json", plain(description))
    found = {
        f"base_model.model.{name.replace('.default', '')}": tensor for name, tensor in adapter.tensors(model).items()
    }
    write_tensors(tmp_path / "adapter_model.safetensors", found)
    loaded: Any = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(output(loaded), expected)
    for name, factors in read_lora(tmp_path)[0].factors.items():
        assert len(factors.a) == RANKS.get(name, 6)
        assert torch.equal(factors.b, adapter.read(model).factors[name].b)
    write_lora(tmp_path / "own" / "adapter_model.safetensors", adapter.read(model), {}, layout="peft")
    again: Any = PeftModel.from_pretrained(tiny(), tmp_path / "own")
    assert torch.allclose(output(again), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_rank_for_each_module_costs_no_more_than_one_for_all() -> None:
    """PEFT tries every pattern on every module."""
    with torch.device("meta"):
        model: Any = QwenImageTransformer2DModel(num_layers=60, num_attention_heads=2, attention_head_dim=8)
    modules = [*adapter.target_modules(model, AdapterConfig())]
    pattern = {name: 1 + number % 40 for number, name in enumerate(modules)}
    assert len(modules) == 720

    def seconds(config: AdapterConfig) -> float:
        fresh = copy.deepcopy(model)
        began = time.process_time()
        adapter.inject(fresh, config)
        assert {name: layer.r["default"] for name, layer in layers(fresh).items()} == {
            name: config.rank_of(name) for name in modules
        }
        return time.process_time() - began

    seconds(AdapterConfig(rank=20))  # imports
    one, own = seconds(AdapterConfig(rank=20)), seconds(AdapterConfig(rank=20, rank_pattern=pattern))
    assert own < 3 * one


def test_a_frozen_lora_is_held_in_the_precision_of_the_base() -> None:
    """Raised to fp32, it would take twice the memory, and each layer's input once more."""
    model = tiny(torch.bfloat16)
    factors = LowRank(torch.randn(3, 64), torch.randn(64, 3))
    adapter.attach_frozen(model, AdapterWeights({"transformer_blocks.0.attn.to_q": factors}))
    (hook,) = model.transformer_blocks[0].attn.to_q._forward_hooks.values()
    output(model)
    assert {hook._a.dtype, hook._b.dtype} == {torch.bfloat16}


def test_lora_plus_has_the_groups_of_peft() -> None:
    config = AdapterConfig(rank=4, lora_plus_ratio=16.0)
    model = tiny()
    adapter.inject(model, config)
    reference = create_loraplus_optimizer(
        model=model, optimizer_cls=torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01
    )
    rates = {id(p): group["lr"] for group in reference.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = lr_groups(named, lambda name: adapter.lr_factor(config, name))
    assert {group["lr_factor"] for group in groups} == {1.0, 16.0}
    for group in groups:
        for parameter in group["params"]:
            assert rates[id(parameter)] == pytest.approx(1e-3 * group["lr_factor"])
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(named)
