"""LoHa and LoKr as kinds of adapter, against PEFT's own layers and dense algebra in float64."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from tests.hardware.test_memory import BF16, FP32, SMALL, on_meta, on_the_cpu, request
from tests.hardware.test_parallel import DDP, FSDP, both
from tests.helpers import BAD_INPUT, FINISHED, adapter_bytes, metrics, run
from tests.test_adapter import dense, gradients, output, random_seed, tiny
from trainer import adapter, lycoris
from trainer.adapter import AdapterConfig, AdapterError, AdapterWeights, Seed
from trainer.flow import generator
from trainer.formats import read_lora
from trainer.hardware import memory
from trainer.lowrank import LowRank
from trainer.optimizer import TrainConfig

CONFIGS = [
    AdapterConfig(kind="loha", rank=3, alpha=1.5),  # by low-rank factors
    AdapterConfig(kind="loha", rank=8),  # by dW, where the layers are small
    AdapterConfig(kind="lokr", rank=2, alpha=3.0),
    AdapterConfig(kind="lokr", rank=2, lokr_factor=2),
    AdapterConfig(kind="lokr", rank=64, alpha=32.0),  # of whole matrices
]


def ids(config: AdapterConfig) -> str:
    return f"{config.kind}-{config.rank}-{config.lokr_factor}"


def deltas(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: layer.get_delta_weight("default") for name, layer in adapter.layers(model)}


def disturb(model: nn.Module) -> None:
    """As after training: no part is zero."""
    for name, tensor in adapter.tensors(model).items():
        tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator("disturb", name)))


def learns(model: nn.Module) -> bool:
    """Whether each part of the first block has a gradient, also one that is zero: else it could never learn."""
    found = gradients(model, torch.float32)[1]
    return all(bool(x.any()) for name, x in found.items() if name.startswith("transformer_blocks.0."))


def kronecker_limit(dw: Tensor, first: tuple[int, int], second: tuple[int, int]) -> float:
    """The most of its energy that a Kronecker product of matrices of these sizes can keep (Van Loan, Pitsianis)."""
    (i, j), (k, m) = first, second
    values = torch.linalg.svdvals(dw.reshape(i, k, j, m).permute(0, 2, 1, 3).reshape(i * j, k * m))
    return float(values[0] ** 2 / values.square().sum())


# --- on the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_the_model_computes_what_peft_computes(config: AdapterConfig) -> None:
    """In training, too: outputs and the gradients of all parts."""
    ours, theirs = tiny(), tiny()
    adapter.inject(ours, config)
    disturb(ours)
    inject_adapter_in_model(adapter.peft_config(config), theirs)
    adapter.load_tensors(theirs, adapter.tensors(ours))
    assert (output(theirs) - output(tiny())).abs().max() > 0.01
    torch.testing.assert_close(output(ours), output(theirs))
    found, expected = (gradients(model, torch.float32)[1] for model in (ours.train(), theirs.train()))
    assert found.keys() == expected.keys() and len(expected) > 0.9 * len(adapter.tensors(ours))
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_a_random_start_changes_nothing_and_is_the_seed_s_alone(config: AdapterConfig) -> None:
    found = []
    for number in (0, 0, 1):
        model = tiny()
        torch.rand(number + 3)  # the global state plays no part
        adapter.inject(model, config)
        report = adapter.apply_seed(model, Seed(AdapterWeights({}), {}), random_seed=number)
        assert (report["seeded"], report["random"], report["energy_kept"]) == (0, 24, None)
        assert not any(x.any() for x in deltas(model).values()) and torch.equal(output(model), output(tiny()))
        found.append({name: x.clone() for name, x in adapter.tensors(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    drawn = [name for name, x in found[0].items() if x.any()]
    assert drawn and not any(torch.equal(found[0][name], found[2][name]) for name in drawn)
    own = tiny()
    inject_adapter_in_model(adapter.peft_config(config), own)  # PEFT's own start has the same zeros and bounds
    for name, x in adapter.tensors(own).items():
        assert x.shape == found[0][name].shape and bool(x.any()) == bool(found[0][name].any()), name
        bound = 1 / math.sqrt(x.shape[1])
        assert float(found[0][name].abs().max()) <= bound and (not x.any() or float(x.abs().max()) <= bound)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_is_trained_is_in_fp32_also_on_a_base_in_bf16(kind: Any) -> None:
    model = tiny(torch.bfloat16)
    adapter.inject(model, AdapterConfig(kind=kind, rank=2))
    disturb(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "hada_" in name or "lokr_" in name}
    assert {x.dtype for x in adapter.tensors(model).values()} == {torch.float32}
    found = gradients(model, torch.bfloat16)[1]
    for _, layer in adapter.layers(model):
        vars(layer).pop("forward")  # as PEFT has it
    model.zero_grad()
    expected = gradients(model, torch.bfloat16)[1]
    assert len(expected) > 40
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm(), name


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_it_is_switched_off_counted_saved_and_taken_away(config: AdapterConfig) -> None:
    model, plain = tiny(), output(tiny())
    modules = adapter.target_modules(model, config)
    adapter.inject(model, config)
    assert adapter.target_modules(model, config) == modules
    disturb(model)
    changed = output(model)
    with adapter.switched_off(model):
        assert torch.equal(output(model), plain)
    assert torch.equal(output(model), changed) and not torch.equal(changed, plain)
    tensors = adapter.tensors(model)
    assert sum(x.numel() for x in tensors.values()) == adapter.num_parameters(config, modules)
    assert {adapter.module_of(name) for name in tensors} == set(modules)
    other = tiny()
    adapter.inject(other, config)
    adapter.load_tensors(other, tensors)
    assert torch.equal(output(other), changed)
    with pytest.raises(AdapterError, match="is missing"):
        adapter.load_tensors(other, dict(list(tensors.items())[1:]))
    for name, (a, b) in adapter.read(model).factors.items():
        torch.testing.assert_close(b.double() @ a.double(), deltas(model)[name].double(), rtol=1e-5, atol=1e-6)
    for name, factors in adapter.read(model, limit=2).factors.items():
        values = torch.linalg.svdvals(deltas(model)[name].double())
        lost = float((dense(factors) - deltas(model)[name]).norm() ** 2)
        assert lost == pytest.approx(float(values[2:].square().sum()), rel=1e-3)
        assert adapter.read(model, limit=2).lost[name] == pytest.approx(lost, rel=1e-3)
        break
    adapter.remove(model)
    assert torch.equal(output(model), plain) and not list(adapter.layers(model))


# --- seeds --------------------------------------------------------------------------------------------------


def seeded(config: AdapterConfig, rank: int) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    model = tiny()
    seed = random_seed(model, rank, config)
    adapter.inject(model, config)
    report = adapter.apply_seed(model, seed, random_seed=0)
    return model, {name: dense(x) for name, x in seed.weights.factors.items()}, report


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_a_loha_is_the_best_of_its_rank(rank: int) -> None:
    config = AdapterConfig(kind="loha", rank=4, alpha=10.0, rank_pattern={"transformer_blocks.0.attn.to_q": 3})
    model, expected, report = seeded(config, rank)
    assert (report["adapter"], report["seeded"], report["random"]) == ("LoHa", 24, 0)
    assert report["largest_error"] <= adapter.TOLERANCE
    kept = whole = 0.0
    for name, dw in deltas(model).items():
        values = torch.linalg.svdvals(expected[name])
        short = float(values[: config.rank_of(name)].square().sum())
        lost = float((dw.double() - expected[name]).norm() ** 2)
        total = float(values.square().sum())
        assert lost == pytest.approx(total - short, abs=1e-5 * total)
        kept, whole = kept + short, whole + total
    assert report["energy_kept"]["total"] == pytest.approx(kept / whole, abs=1e-6)
    assert learns(model)


@pytest.mark.parametrize("config", CONFIGS[2:], ids=ids)
def test_a_lokr_is_the_nearest_and_says_what_is_lost(config: AdapterConfig) -> None:
    model, expected, report = seeded(config, 3)
    assert (report["adapter"], report["seeded"]) == ("LoKr", 24) and report["largest_error"] <= adapter.TOLERANCE
    lost = whole = 0.0
    least = 1.0
    for name, layer in adapter.layers(model):
        dw = layer.get_delta_weight("default").detach().double()
        missing, total = float((dw - expected[name]).norm() ** 2), float(expected[name].norm() ** 2)
        lost, whole, least = lost + missing, whole + total, min(least, 1 - missing / total)
        if "default" in layer.lokr_w2:
            limit = kronecker_limit(
                expected[name], tuple(layer.lokr_w1["default"].shape), tuple(layer.lokr_w2["default"].shape)
            )
            assert 1 - missing / total == pytest.approx(limit, abs=1e-4), name
    assert report["energy_kept"]["total"] == pytest.approx(1 - lost / whole, abs=1e-5)
    assert report["energy_kept"]["min"] == pytest.approx(least, abs=1e-5)
    assert learns(model)


def test_a_kronecker_product_of_low_rank_is_taken_exactly() -> None:
    shapes = {"lokr_w1": (4, 6), "lokr_w2_a": (16, 3), "lokr_w2_b": (3, 8)}
    random = generator("exact")
    parts = {part: torch.randn(shape, generator=random, dtype=torch.float64) for part, shape in shapes.items()}
    dw = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    u, s, vh = torch.linalg.svd(dw, full_matrices=False)
    found, kept = lycoris.lokr_start(LowRank(s[:, None] * vh, u), shapes, 2.0, random)
    again = 2.0 * torch.kron(found["lokr_w1"], found["lokr_w2_a"] @ found["lokr_w2_b"])
    assert (again - dw).norm() <= 1e-6 * dw.norm() and kept > 1 - 1e-9
    narrow = {**shapes, "lokr_w2_a": (16, 12), "lokr_w2_b": (12, 8)}  # more ranks than the matrix can have
    found, kept = lycoris.lokr_start(LowRank(s[:, None] * vh, u), narrow, 2.0, random)
    assert {part: tuple(x.shape) for part, x in found.items()} == narrow and kept > 1 - 1e-9
    assert found["lokr_w2_b"].any(dim=1).all()


def test_modules_without_a_seed_start_at_random_and_others_are_told() -> None:
    config = AdapterConfig(kind="lokr", rank=2, target_modules=("to_q", "to_k"))
    model = tiny()
    seed = random_seed(model, 3, AdapterConfig(target_modules=("to_q", "to_v")))
    adapter.inject(model, config)
    report = adapter.apply_seed(model, seed, random_seed=0)
    assert (report["seeded"], report["random"], len(report["dropped"])) == (2, 2, 2)
    assert {name: bool(x.any()) for name, x in deltas(model).items()} == {
        f"transformer_blocks.{block}.attn.{kind}": kind == "to_q" for block in (0, 1) for kind in ("to_q", "to_k")
    }


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]], ids=ids)
def test_a_seed_that_does_not_arrive_is_an_error(config: AdapterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    adapter.inject(model, config)
    put = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other, *a: put(self, other * 0.5, *a))
    with pytest.raises(AdapterError, match="the seed is not in the adapter"):
        adapter.apply_seed(model, random_seed(model, 2, config), random_seed=0)


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainer.formats import write_lora

    path = tmp_path_factory.mktemp("lora") / "some.safetensors"
    write_lora(path, random_seed(tiny(), 3, AdapterConfig(), 0.05).weights, {})
    return path


SETTINGS = {
    "loha": ("adapter.kind=loha", "adapter.alpha=2"),
    "lokr": ("adapter.kind=lokr", "adapter.rank=2", "adapter.lokr_factor=4", "adapter.alpha=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind: str, run_toml: Path, tmp_path: Path, lora: Path) -> None:
    settings = (*SETTINGS[kind], f"init.method={lora}", 'export.layouts=["kohya"]', "export.rank=2")
    assert run(run_toml, tmp_path / "a" / "x", *settings) == FINISHED
    assert run(run_toml, tmp_path / "b" / "x", *settings, "train.steps=2") == FINISHED
    assert run(run_toml, tmp_path / "b" / "x", *settings, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "a" / "x") == adapter_bytes(tmp_path / "b" / "x")
    assert len(adapter_bytes(tmp_path / "a" / "x")) == 8


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_is_exported_is_what_was_trained(
    kind: str, run_toml: Path, tmp_path: Path, lora: Path, caplog: pytest.LogCaptureFixture, tiny_base: Path
) -> None:
    from diffusers import QwenImageTransformer2DModel

    layouts = 'export.layouts=["kohya", "diffusion_model"]'
    settings = (*SETTINGS[kind], f"init.method={lora}", layouts, "export.rank=3", "data.trigger=zorp")
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert run(run_toml, tmp_path / "mine", *settings) == FINISHED
    folder = tmp_path / "mine" / "adapter"
    name = adapter.KINDS[kind]
    said = caplog.text
    assert f"{name} initialised from file: 24 of 24 layers" in said
    assert f"the LoRA of rank 3 beside the {name} keeps" in said
    report = json.loads((tmp_path / "mine" / "run.json").read_text())
    assert report["init"]["applied"]["adapter"] == name and report["config"]["adapter"]["kind"] == kind
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["peft_type"] == name.upper() and description["inference_mode"] is True

    base: Any = QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer")
    wrapped: Any = PeftModel.from_pretrained(base, str(folder))
    expected = deltas(wrapped)
    assert len(expected) == 24 and all(x.any() for x in expected.values())
    expected = {module.removeprefix("base_model.model."): x.double() for module, x in expected.items()}
    for file in (folder, folder / "mine-kohya.safetensors", folder / "mine-diffusion_model.safetensors"):
        found = read_lora(file)[0].factors
        assert found.keys() == expected.keys()
        for module, x in found.items():
            assert (dense(x) - expected[module]).norm() <= 1e-6 * expected[module].norm(), (file, module)
    keys = set(load_file(folder / "mine-kohya.safetensors"))
    first = "lora_unet_transformer_blocks_0_attn_to_q"
    assert {f"{first}.{'hada_w1_a' if kind == 'loha' else 'lokr_w1'}", f"{first}.alpha"} <= keys
    for module, x in read_lora(folder / "pytorch_lora_weights.safetensors")[0].factors.items():
        values = torch.linalg.svdvals(expected[module])
        lost = float((dense(x) - expected[module]).norm() ** 2)
        expected_loss = float(values[3:].square().sum())
        assert len(x.a) <= 3 and lost == pytest.approx(expected_loss, abs=1e-6 * float(values[0]) ** 2)
    card = (folder / "README.md").read_text()
    for part in (f"A {name} for", "merge_and_unload()", f"cannot read a {name}", "truncated to rank 3"):
        assert part in card
    assert f"- {kind}\n" in card and "library_name: peft" in card


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_the_saved_folder_gives_the_trained_model_s_output(config: AdapterConfig, tmp_path: Path) -> None:
    from tests.export.test_result import report
    from trainer.export import result

    model = tiny()
    adapter.inject(model, config)
    disturb(model)
    result.export(model, tmp_path / "x", result.ExportConfig(), config, None, report(tmp_path))
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    wrapped: Any = PeftModel.from_pretrained(tiny(), str(tmp_path / "x")).eval()
    torch.testing.assert_close(output(wrapped), output(model))
    torch.testing.assert_close(output(wrapped.merge_and_unload()), output(model), rtol=1e-4, atol=1e-5)


def test_a_random_run_says_what_it_is(run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert run(run_toml, tmp_path / "out", "adapter.kind=loha") == FINISHED
    assert "LoHa initialised at random: 24 layers" in caplog.text
    assert not (tmp_path / "out" / "adapter" / "pytorch_lora_weights.safetensors").exists()
    assert "no file here is named as it reads a LoHa" in (tmp_path / "out" / "adapter" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_with_offloaded_blocks_it_is_the_run_without(kind: str, run_toml: Path, tmp_path: Path, lora: Path) -> None:
    few = ("train.gradient_checkpointing=true", "train.steps=2", "validation.prompts=[]")
    settings = (*SETTINGS[kind], f"init.method={lora}", *few)
    assert run(run_toml, tmp_path / "a" / "x", *settings) == FINISHED
    assert run(run_toml, tmp_path / "b" / "x", *settings, "model.offload_blocks=2") == FINISHED
    assert adapter_bytes(tmp_path / "a" / "x") == adapter_bytes(tmp_path / "b" / "x")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("env", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_give_the_adapter_of_one(
    env: dict[str, str], kind: str, run_toml: Path, tmp_path: Path, lora: Path
) -> None:
    settings = (*SETTINGS[kind], f"init.method={lora}", "train.gradient_checkpointing=true")
    assert run(run_toml, tmp_path / "one", *settings, "train.gradient_accumulation_steps=2") == FINISHED
    both(run_toml, tmp_path / "two", *settings, env=env)
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).norm() <= 1e-3 * first[name].norm() for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_compiled_it_is_nearly_the_same(kind: str, run_toml: Path, tmp_path: Path, lora: Path) -> None:
    settings = (*SETTINGS[kind], f"init.method={lora}")
    assert run(run_toml, tmp_path / "one", *settings) == FINISHED
    assert run(run_toml, tmp_path / "two", *settings, "model.compile=true") == FINISHED
    curves = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS[:3], ids=ids)
def test_a_plan_counts_what_a_step_makes(config: AdapterConfig) -> None:
    for checkpointing in (False, True):
        thrifty = TrainConfig(batch_size=2, gradient_checkpointing=checkpointing)
        estimated = memory.step_bytes(on_meta(**SMALL), FP32, thrifty, config, 64**2)
        assert estimated == pytest.approx(on_the_cpu(thrifty, 64**2, config, True), rel=0.06)


def test_a_plan_counts_what_is_trained_and_proposes_nothing_that_is_refused() -> None:
    config = CONFIGS[0]
    parts = memory.resident_bytes(on_meta(**SMALL), FP32, config, TrainConfig())
    assert parts["adapter"] == 4 * adapter.num_parameters(config, adapter.target_modules(on_meta(**SMALL), config))
    keys = {key for ways, _ in memory.ways_to_fit(request(FP32, TrainConfig(), adapter=config)) for key in ways}
    assert keys and not any("quantization" in key for key in keys)  # it would be refused


def test_a_large_loha_forms_dw_and_a_lokr_does_not() -> None:
    """At the real width, in half precision, beside a LoRA."""
    whole = on_meta()

    def count(**options: Any) -> float:
        thrifty, settings = TrainConfig(gradient_checkpointing=True), AdapterConfig(target_modules=("to_q",), **options)
        return memory.step_bytes(whole, BF16, thrifty, settings, 256**2)

    dw = 2 * 3072 * 3072  # bytes of one layer's
    assert count(kind="loha", rank=64) > count(rank=16) + 2 * dw
    assert count(kind="lokr", rank=64) < count(rank=16) + dw / 2


def test_the_plan_names_the_kind(run_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(run_toml), "--output", str(tmp_path / "out"), "--plan"]
    assert train.main([*arguments, "--set", "adapter.kind=loha", "--set", "adapter.rank=4"]) == FINISHED
    assert "adapter      loha rank 4 on 24 modules" in capsys.readouterr().out


@pytest.mark.slow
def test_kinds_can_be_compared(run_toml: Path, tmp_path: Path, lora: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["--config", str(run_toml), "--output", str(tmp_path / "out"), "--quiet"]
    arguments += [
        "--compare",
        "random",
        str(lora),
        "--seeds",
        "1",
        "--learning-rates",
        "1e-3",
        "--set",
        "adapter.kind=loha",
    ]
    assert train.main(arguments) == FINISHED
    results = [json.loads(file.read_text()) for file in (tmp_path / "out" / "runs").rglob("result.json")]
    assert {row["arm"]: row["applied"]["seeded"] for row in results} == {"random": 0, "some": 24}
    assert {row["applied"]["adapter"] for row in results} == {"LoHa"}
    refused = [*arguments[:6], "random", "i2l", "--controls", "norm-matched", "--set", "adapter.kind=lokr"]
    assert train.main(refused) == BAD_INPUT and "--controls norm-matched: [adapter] kind" in caplog.text


# --- problems -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("adapter.dropout=0.1",), 'dropout has no effect with kind = "loha"'),
        (("adapter.use_rslora=true",), "use_rslora has no effect"),
        (("adapter.use_dora=true",), "use_dora has no effect"),
        (("adapter.lora_plus_ratio=4",), "lora_plus_ratio has no effect"),
        (("adapter.lokr_factor=4",), 'lokr_factor has no effect with kind = "loha"'),
        (("adapter.kind=lora", "adapter.lokr_factor=4"), 'lokr_factor has no effect with kind = "lora"'),
        (("adapter.kind=lokr", "adapter.lokr_factor=0"), "lokr_factor must be at least 1, or -1"),
        (("adapter.kind=locon",), "kind"),
        (("model.quantization=nf4", "model.dtype=bf16"), "[adapter] kind: PEFT's LoHa needs the base unquantised"),
        (('export.layouts=["bare"]',), "[export] layouts: a LoHa has no form in bare"),
        (("init.method=gaussian",), '[init.gaussian] it has no effect with [adapter] kind = "loha"'),
    ],
)
def test_what_does_not_go_together_is_told(
    settings: tuple[str, ...], said: str, run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(run_toml, tmp_path / "out", "adapter.kind=loha", *settings) == BAD_INPUT
    assert said in caplog.text


def test_i2l_s_own_keys_that_do_not_go_with_a_kind(tmp_path: Path) -> None:
    from initializers.i2l import initializer
    from trainer.adapter import RunFacts

    def told(kind: Any, **options: Any) -> str:
        facts = RunFacts((tmp_path / "a.png",), AdapterConfig(kind=kind), can_try=True)
        return " ".join(initializer.check_run(initializer.Config(**options), facts))

    assert 'mode = "merge" with [adapter] kind = "loha"' in told("loha", mode="merge")
    assert "energy chooses the rank of a truncation" in told("lokr", energy=0.9)
    assert told("loha", energy=0.9) == told("lora", mode="merge") == told("lokr") == ""
