"""Stages of a run: what each one trains, against plain references, and how a run goes on across their borders."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

import initializers
from tests.faults.world import no_model_loads
from tests.helpers import BAD_INPUT, FINISHED, INTERRUPTED, adapter_bytes, metrics, run
from trainer import adapter, flow, loop, objective, plan, plan_words, qwen_image
from trainer.config import ConfigError
from trainer.data import masks
from trainer.objective import LoraObjective
from trainer.plan import Plan, load_config

CPU = torch.device("cpu")
PLAIN = ("validation.prompts=[]", "validation.every=3")
STAGES = """stages=[
    {steps = 2, sigma_range = [0.5, 1.0]},
    {steps = 2, learning_rate = 1e-2, lr_schedule = "linear", blocks = [1],
     target_modules = ["attn.to_q", "img_mod.1"]},
    {steps = 2, resolution = 32},
]"""


@pytest.fixture
def run_toml(run_toml: Path) -> Path:
    """Without [train] steps, which stages have themselves."""
    run_toml.write_text(run_toml.read_text().replace("steps = 4\n", "", 1))
    return run_toml


@pytest.fixture
def cached(tmp_path: Path) -> str:
    return f"data.cache={tmp_path / 'cache'}"


def make_plan(run_toml: Path, *overrides: str) -> Plan:
    settings, start = load_config(run_toml, [f"output={run_toml.parent / 'out'}", *overrides], initializers)
    return plan.prepare(settings, start, resume=False)


def make_objective(prepared: Plan) -> LoraObjective:
    text_encoder = qwen_image.TextEncoder(prepared.config.model.base, CPU)
    encoded = objective.encode(prepared, CPU, text_encoder, quiet=True)
    transformer = qwen_image.load_transformer(prepared.config.model, CPU)
    adapter.inject(transformer, prepared.config.adapter)
    for name, tensor in adapter.tensors(transformer).items():
        tensor.copy_(torch.randn(tensor.shape, generator=flow.generator(name)) * 0.1)
    return LoraObjective(prepared, transformer, encoded, Accelerator())


@pytest.fixture
def staged(run_toml: Path, pictures: Path) -> LoraObjective:
    """Three stages, the last of which weighs masks and sigmas in another way."""
    for path in pictures.glob("*.png"):
        mask = Image.new("L", Image.open(path).size, 255)
        mask.paste(0, (0, 0, mask.width // 2, mask.height))
        mask.save(path.with_suffix(".mask.png"))
    stages = STAGES.replace("resolution = 32", "resolution = 32, mask_outside = 0.5")
    return make_objective(make_plan(run_toml, *PLAIN, stages, 'flow.loss_weighting="bell"'))


def test_each_stage_has_its_sigmas_pictures_and_masks(staged: LoraObjective) -> None:
    prepared = staged._plan
    assert prepared.config.train.steps == 6
    for step in range(6):
        inputs, low = staged.inputs(step, 0), 0.5 if step < 2 else 0.0
        random = flow.generator(prepared.config.seed, "noise", step, 0, 0)
        torch.randn(inputs.latents.shape, generator=random)
        drawn = torch.sigmoid(torch.randn(len(inputs.latents), generator=random))
        torch.testing.assert_close(inputs.sigmas, low + (1 - low) * drawn)
        side, outside = (4, 0.5) if step >= 4 else (8, 0.1)
        assert inputs.latents.shape[-2:] == (side, side) and inputs.weights is not None
        by_path = {str(example.path): example for example in prepared.dataset.train}
        for name, weights in zip(inputs.names, inputs.weights, strict=True):
            mask = by_path[name].mask
            assert mask is not None
            expected = masks.weights(masks.load(mask, (8 * side, 8 * side)), (side, side), outside)
            assert torch.equal(weights, expected)
    assert all(items[0].latents.shape[-1] == 8 for _, _, items in objective._parts(prepared, staged._encoded))


def test_the_loss_is_weighted_by_sigma_as_the_formula_says(staged: LoraObjective) -> None:
    """Its constant is found here by drawing."""
    for step in (0, 2, 5):
        inputs, low = staged.inputs(step, 0), 0.5 if step < 2 else 0.0
        sigmas = low + (1 - low) * torch.sigmoid(
            torch.randn(400_000, generator=flow.generator("x"), dtype=torch.float64)
        )
        many = (torch.exp(-2 * (sigmas - 0.5) ** 2) - math.exp(-0.5)).mean()
        velocity = staged._velocity(inputs)
        assert inputs.weights is not None
        errors = ((velocity - (inputs.noise - inputs.latents)) ** 2 * inputs.weights).flatten(1).mean(1)
        bell = (torch.exp(-2 * (inputs.sigmas - 0.5) ** 2) - math.exp(-0.5)) / many
        assert float(staged.loss(step, 0).value) == pytest.approx(float((errors * bell).mean()), rel=5e-3)


def test_what_learns_and_how_fast_is_a_plain_loop_s(staged: LoraObjective) -> None:
    """Each parameter has one AdamW of its own, which waits where its module does not learn."""
    prepared, seen = staged._plan, dict[int, dict[str, Tensor]]()
    reference = make_objective(prepared)
    parameters = {name: p for name, p in reference.transformer.named_parameters() if p.requires_grad}
    optimizers = {name: torch.optim.AdamW([p], lr=0.0, weight_decay=0.01) for name, p in parameters.items()}
    rates = [1e-3, 1e-3, 1e-2, 5e-3, 1e-3, 1e-3]
    for step in range(6):
        reference.loss(step, 0).value.backward()  # type: ignore[no-untyped-call]
        own = tuple(f"transformer_blocks.1.{name}." for name in ("attn.to_q", "img_mod.1"))
        learning = {
            name: p
            for name, p in parameters.items()
            if p.grad is not None and (step not in (2, 3) or name.startswith(own))
        }
        norm = torch.cat([p.grad.flatten() for p in learning.values()]).norm()  # type: ignore[union-attr]
        for name, p in learning.items():
            p.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))  # type: ignore[operator]
            optimizers[name].param_groups[0]["lr"] = rates[step]
            optimizers[name].step()
        reference.transformer.zero_grad()
    training = loop._Training(staged, prepared.job(), Accelerator())
    for step in range(6):
        seen[step] = {name: tensor.clone() for name, tensor in staged.tensors().items()}
        assert training.update(step)["lr"] == pytest.approx(rates[step])
    moved = {name for name, tensor in seen[4].items() if not torch.equal(tensor, seen[2][name])}
    assert len(moved) == 4 and all(".1." in name for name in moved)
    expected = reference.tensors()
    for name, tensor in staged.tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_the_prior_s_weight_is_the_stage_s(run_toml: Path) -> None:
    stages = "stages=[{steps = 1}, {steps = 1, prior_weight = 3.0}, {steps = 1, prior_weight = 0.0}]"
    settings = ("data.trigger=zorp", "prior.method=prediction", "prior.weight=0.5", *PLAIN, stages)
    trained = make_objective(make_plan(run_toml, *settings))
    for step, weight in ((0, 0.5), (1, 3.0)):
        found = trained.loss(step, 0)
        total = found.parts["subject_loss"] + weight * found.parts["prior_loss"]
        assert float(found.value) == pytest.approx(float(total), rel=1e-6) and found.parts["prior_loss"] > 0
    assert trained.loss(2, 0).parts == {}


@pytest.mark.parametrize("at", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 4, 5))])
def test_a_run_stopped_at_and_across_borders_goes_on_to_the_same_bytes(
    at: int, run_toml: Path, tmp_path: Path, cached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*PLAIN, cached, STAGES, "train.ema=0.9", "adapter.lora_plus_ratio=4", "data.caption_dropout=0.3")
    assert run(run_toml, tmp_path / "through", *settings) == FINISHED
    real = LoraObjective.loss

    def loss(self: LoraObjective, step: int, micro_step: int) -> Any:
        if step == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, micro_step)

    with monkeypatch.context() as patch:
        patch.setattr(LoraObjective, "loss", loss)
        assert run(run_toml, tmp_path / "cut", *settings) == INTERRUPTED
    assert run(run_toml, tmp_path / "cut", *settings, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "through")
    assert [line.get("lr") for line in metrics(tmp_path / "cut")] == [
        line.get("lr") for line in metrics(tmp_path / "through")
    ]


def test_other_stages_are_another_course(
    run_toml: Path, tmp_path: Path, cached: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*PLAIN, cached)
    assert run(run_toml, tmp_path / "out", *settings, "stages=[{steps = 1}]") == FINISHED
    changed = "stages=[{steps = 1, sigma_range = [0.5, 1.0]}]"
    assert run(run_toml, tmp_path / "out", *settings, changed, resume=True) == BAD_INPUT
    assert "stages is" in caplog.text


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (
            ("stages=[{steps = 0, blocks = []}, {steps = 2, mask_outside = 2, prior_weight = -1}]",),
            (
                "[stages.0] steps must be at least 1", "[stages.0] blocks must name at least one",
                "[stages.1] mask_outside must be from 0 to 1", "[stages.1] prior_weight must not be negative",
            ),
        ),
        (
            ("stages=[{stepz = 2}]", "train.steps=3"),
            ("did you mean steps?", "[train] steps has no effect with [[stages]]"),
        ),
        (
            (
                """stages=[
                    {steps = 2, blocks = [7]},
                    {steps = 2, target_modules = ["attn.to_x"]},
                    {steps = 2, decay_steps = 1},
                    {steps = 2, prior_weight = 1.0},
                    {steps = 2, resolution = 40},
                    {steps = 2, sigma_range = [0.7, 0.3]},
                ]""",
            ),
            (
                "[stages.0] blocks: no module that learns is in block 7",
                "[stages.1] target_modules: attn.to_x: no module of the adapter is called so",
                "[stages.2] decay_steps has no effect",
                "[stages.3] prior_weight has no effect without [prior]",
                "[stages.4] resolution = 40 must be a multiple of 16",
                "[stages.5] sigma_range must be two numbers that rise",
            ),
        ),
        (("adapter.lora_plus_ratio=0",), ("lora_plus_ratio must be above 0",)),
        (("validation.patience=2", "data.held_out=0"), ("[validation] patience waits for a better step",)),
        (("validation.likeness=true",), ("[validation] likeness needs image encoders: add the table [init.i2l]",)),
    ],
)  # fmt: skip
def test_bad_input_is_told_at_once_before_a_model_loads(
    settings: tuple[str, ...], messages: tuple[str, ...], run_toml: Path
) -> None:
    with no_model_loads(), pytest.raises(ConfigError) as error:
        make_plan(run_toml, *settings)
    for message in messages:
        assert message in str(error.value)
    assert len(error.value.problems) == len(messages)


def test_the_plan_lists_them(run_toml: Path) -> None:
    text = plan_words.plan_text(make_plan(run_toml, *PLAIN, STAGES))
    assert "stage        0, steps 1 to 2: sigma_range 0.5, 1.0" in text
    assert "stage        2, steps 5 to 6: resolution 32" in text
    assert "training     6 steps" in text
