"""What a seed may ask of a run beyond weights: a constant term, another rank, trials; and what is then exported."""

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from peft import PeftModel

import initializers
import initializers.random
from tests.helpers import FINISHED, INTERRUPTED, adapter_bytes, metrics, run
from trainer import adapter, flow, qwen_image, validation
from trainer import objective as program
from trainer.adapter import AdapterConfig, AdapterError, AdapterWeights, InitContext, Seed
from trainer.formats import read_lora
from trainer.lowrank import LowRank, relative_difference, truncate
from trainer.plan import load_config, prepare
from trainer.qwen_image import TextEncoder

CPU = torch.device("cpu")
PLAIN = ("validation.prompts=[]", "train.learning_rate=0.02")


def some_weights(modules: dict[str, tuple[int, int]], rank: int = 6) -> AdapterWeights:
    random = flow.generator("seed")
    return AdapterWeights(
        {
            name: LowRank(
                torch.randn(rank, inside, generator=random) * 0.3, torch.randn(out, rank, generator=random) * 0.3
            )
            for name, (inside, out) in modules.items()
        }
    )


def start_from(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(initializers.random, "initialize", lambda context, config: make(context))


def holding(context: InitContext) -> Seed:
    """A module that is not trained is in it, too."""
    modules = {**context.modules, "transformer_blocks.0.img_mlp.net.0.proj": (64, 256)}
    return Seed(AdapterWeights({}), {}, frozen=some_weights(modules))


def losses_with(folder: Path, run_toml: Path, base: Path, *settings: str) -> dict[str, float]:
    """The held-out stable loss of the plain base with the exported files, as PEFT and as diffusers loads them."""
    overrides = [f"output={folder.parent / 'never made'}", *settings]
    settings_read, start = load_config(run_toml, overrides, initializers)
    plan = prepare(settings_read, start, resume=False)
    encoded = program.encode(plan, CPU, TextEncoder(plan.config.model.base, CPU), quiet=True)
    items = [encoded.item(example) for example in plan.dataset.held_out]
    pipeline = QwenImagePipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipeline.load_lora_weights(folder)
    peft = PeftModel.from_pretrained(QwenImageTransformer2DModel.from_pretrained(base, subfolder="transformer"), folder)
    return {
        name: float(validation.stable_errors(model.eval(), items, CPU, torch.float32).mean())
        for name, model in (("peft", peft), ("diffusers", pipeline.transformer))
    }


def test_a_constant_term_is_held_and_exported_with_what_was_trained(
    run_toml: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    assert run(run_toml, tmp_path / "plain", *PLAIN, cache) == FINISHED
    start_from(monkeypatch, holding)
    assert run(run_toml, tmp_path / "out", *PLAIN, cache) == FINISHED
    first, last = metrics(tmp_path / "out")[0]["val_loss"], metrics(tmp_path / "out")[-1]["val_loss"]
    assert first != pytest.approx(metrics(tmp_path / "plain")[0]["val_loss"], rel=1e-3)  # it is at work at step 0
    assert last != pytest.approx(first, rel=1e-4)  # and something was learned on top
    for measured in losses_with(tmp_path / "out" / "adapter", run_toml, tiny_base, *PLAIN, cache).values():
        assert measured == pytest.approx(last, rel=1e-5)
    exported = read_lora(tmp_path / "out" / "adapter")[0].factors
    assert {len(factors.a) for factors in exported.values()} == {4 + 6, 6}
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["init"]["applied"]["random"] == 24


def test_a_constant_term_survives_an_interruption(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    start_from(monkeypatch, holding)
    assert run(run_toml, tmp_path / "through", *PLAIN, cache) == FINISHED
    loss = program.LoraObjective.loss

    def stopped(self: Any, step: int, micro_step: int) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, step, micro_step)

    with monkeypatch.context() as patch:
        patch.setattr(program.LoraObjective, "loss", stopped)
        assert run(run_toml, tmp_path / "halves", *PLAIN, cache) == INTERRUPTED
    start_from(monkeypatch, lambda _: pytest.fail("asked again"))
    assert run(run_toml, tmp_path / "halves", *PLAIN, cache, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "halves") == adapter_bytes(tmp_path / "through")


@pytest.mark.parametrize("held", [True, False])
def test_the_export_is_truncated_on_request(
    held: bool, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cache = f"data.cache={tmp_path / 'cache'}"
    start_from(monkeypatch, holding if held else lambda context: Seed(some_weights(context.modules), {}))
    assert run(run_toml, tmp_path / "whole", *PLAIN, cache) == FINISHED
    assert run(run_toml, tmp_path / "small", *PLAIN, cache, "export.rank=3") == FINISHED
    whole, small = (read_lora(tmp_path / name / "adapter")[0].factors for name in ("whole", "small"))
    assert whole.keys() == small.keys() and len(small) >= 24
    for name, factors in small.items():
        assert len(factors.a) == 3
        assert relative_difference(truncate(whole[name], 3)[0], factors) < 1e-5
    kept = float(caplog.text.split("exported at rank 3: truncation kept ")[1].split("%")[0])
    assert 40 < kept < 99


def test_a_seed_chooses_the_rank(run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    start_from(monkeypatch, lambda context: Seed(some_weights(context.modules), {}, rank=2))
    assert run(run_toml, tmp_path / "two", *PLAIN, cache) == FINISHED
    assert {len(factors.a) for factors in read_lora(tmp_path / "two" / "adapter")[0].factors.values()} == {2}
    pattern = {"transformer_blocks.1.attn.to_k": 5, "transformer_blocks.0.img_mod.1": 1}
    start_from(monkeypatch, lambda context: Seed(some_weights(context.modules), {}, rank_pattern=pattern))
    assert run(run_toml, tmp_path / "own", *PLAIN, cache) == FINISHED
    ranks = {name: len(x.a) for name, x in read_lora(tmp_path / "own" / "adapter")[0].factors.items()}
    assert ranks == {**dict.fromkeys(ranks, 4), **pattern}


def test_a_rank_pattern_in_the_configuration(run_toml: Path, tiny_base: Path, tmp_path: Path) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    with run_toml.open("a") as file:
        file.write('\n[adapter.rank_pattern]\n"transformer_blocks.0.attn.to_q" = 7\n')
    assert run(run_toml, tmp_path / "out", *PLAIN, cache) == FINISHED
    last = metrics(tmp_path / "out")[-1]["val_loss"]
    for measured in losses_with(tmp_path / "out" / "adapter", run_toml, tiny_base, *PLAIN, cache).values():
        assert measured == pytest.approx(last, rel=1e-5)
    ranks = {name: len(x.a) for name, x in read_lora(tmp_path / "out" / "adapter")[0].factors.items()}
    assert ranks.pop("transformer_blocks.0.attn.to_q") == 7 and set(ranks.values()) == {4}
    transformer = qwen_image.transformer_on_meta(str(tiny_base))
    with pytest.raises(AdapterError, match=r'rank_pattern: there is no module "attn\.to_q"; near'):
        adapter.target_modules(transformer, AdapterConfig(rank_pattern={"attn.to_q": 3}))


def test_a_trial_is_the_stable_loss_with_the_seed(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an initializer is told of its seed is what the run then starts with; trying changes nothing."""
    cache = f"data.cache={tmp_path / 'cache'}"
    told: list[float] = []

    def trying(context: InitContext) -> Seed:
        weights = some_weights(context.modules, rank=4)
        assert context.try_seed is not None
        for _ in range(2):
            values = [[context.try_seed(w, i, range(8)) for i in range(4)] for w in (weights, AdapterWeights({}))]
            told[:] = [float(torch.stack(row).mean()) for row in values]
            some = context.try_seed(weights, 2, [6, 1])
            torch.testing.assert_close(some, values[0][2][[6, 1]], rtol=1e-5, atol=0)  # with the same noise
        return Seed(weights, {})

    assert run(run_toml, tmp_path / "plain", *PLAIN, cache) == FINISHED
    start_from(monkeypatch, trying)
    assert run(run_toml, tmp_path / "out", *PLAIN, cache) == FINISHED
    with_seed, without = told
    assert metrics(tmp_path / "out")[0]["train_stable_loss"] == pytest.approx(with_seed, rel=1e-5)
    assert metrics(tmp_path / "plain")[0]["train_stable_loss"] == pytest.approx(without, rel=1e-5)
    assert with_seed != pytest.approx(without, rel=1e-3)


def test_holding_is_adding(tiny_base: Path) -> None:
    transformer = qwen_image.load_transformer(qwen_image.ModelConfig(base=str(tiny_base), dtype="fp32"), CPU)
    modules = adapter.target_modules(transformer, AdapterConfig())
    weights = some_weights(modules)
    latents, prompt = torch.randn(1, 16, 1, 8, 8), torch.randn(1, 5, 64)

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            return qwen_image.predict_velocity(transformer, latents, torch.tensor([0.3]), prompt, None)

    plain = velocity()
    handles = adapter.attach_frozen(transformer, weights)
    held = velocity()
    for handle in handles:
        handle.remove()
    assert torch.equal(velocity(), plain)
    for name, x in weights.factors.items():
        transformer.get_submodule(name).weight.data += x.b @ x.a
    torch.testing.assert_close(velocity(), held, rtol=1e-4, atol=1e-4)
    assert (held - plain).abs().max() > 0.01
    wide = AdapterWeights({"transformer_blocks.0.attn.to_q": LowRank(torch.zeros(2, 9), torch.zeros(64, 2))})
    with pytest.raises(AdapterError, match="is 9 -> 64 in the seed and 64 -> 64 in the model"):
        adapter.attach_frozen(transformer, wide)
    with pytest.raises(AdapterError, match="the seed is empty"):
        adapter.attach_frozen(transformer, AdapterWeights({}))
