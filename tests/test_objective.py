"""What a step is trained on, what a validation measures and draws: against the settings, and drawn again one by one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

import initializers
from trainer import adapter, flow, objective, qwen_image, validation
from trainer.adapter import AdapterWeights
from trainer.data.dataset import batch, drops_caption
from trainer.flow import generator
from trainer.lowrank import LowRank
from trainer.objective import Encoded, LoraObjective, stable_losses
from trainer.plan import Plan, load_config, prepare
from trainer.tracking import Tracker

CPU = torch.device("cpu")
PROMPTS = ("one", "another", "a third")


class Process(NamedTuple):
    """One of several processes, in the words of accelerate."""

    process_index: int
    num_processes: int
    device: torch.device = CPU


def make_plan(run_toml: Path, *overrides: str) -> Plan:
    settings, start = load_config(run_toml, [f"output={run_toml.parent / 'out'}", *overrides], initializers)
    return prepare(settings, start, resume=False)


def made_up(plan: Plan) -> Encoded:
    """Random latents and prompt_embeds instead of encoded ones. The captions have different lengths."""
    examples = (*plan.dataset.train, *plan.dataset.held_out)
    names = {objective._name(e.at(bucket)): bucket for e in examples for bucket in e.buckets}
    texts = {text for e in examples for text in e.captions} | {*PROMPTS, qwen_image.EMPTY_PROMPT}
    return Encoded(
        {
            name: torch.randn(16, 1, height // 8, width // 8, generator=generator("latents", name))
            for name, (width, height) in names.items()
        },
        {text: torch.randn(4 + len(text) % 5, 64, generator=generator("prompt", text)) for text in sorted(texts)},
    )


def make_objective(plan: Plan, process: Any = None) -> LoraObjective:
    """With the tiny transformer, whose adapter has an effect."""
    transformer = qwen_image.load_transformer(plan.config.model, CPU)
    adapter.inject(transformer, plan.config.adapter)
    for name, tensor in adapter.tensors(transformer).items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator("adapter", name)) * 0.2)
    return LoraObjective(plan, transformer, made_up(plan), process or Accelerator())


def same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x, y)


def pictures_of(batches: list[objective.Inputs]) -> list[str]:
    return [name for inputs in batches for name in inputs.names]


# --- what goes in -----------------------------------------------------------------------------------------


def test_a_dropped_caption_is_the_empty_one(run_toml: Path) -> None:
    plan = make_plan(run_toml, "data.caption_dropout=0.5", "train.batch_size=2")
    trained, nothing = make_objective(plan), 0
    prompts, captions = made_up(plan).prompts, {str(e.path): e.caption for e in plan.dataset.train}
    for step in range(12):
        inputs = trained.inputs(step, 0)
        texts = [
            qwen_image.EMPTY_PROMPT if drops_caption(0.5, seed=0, index=step, position=i) else captions[name]
            for i, name in enumerate(inputs.names)
        ]
        nothing += texts.count(qwen_image.EMPTY_PROMPT)
        for i, text in enumerate(texts):
            length = len(prompts[text])
            assert same(inputs.prompt_embeds[i, :length], prompts[text])
            assert inputs.mask is None or inputs.mask[i].tolist() == [n < length for n in range(inputs.mask.shape[1])]
    assert 4 < nothing < 20  # of 24


def test_pictures_captions_and_noise_are_those_of_the_seed(run_toml: Path) -> None:
    noises = []
    for seed in (0, 3):
        plan = make_plan(run_toml, f"seed={seed}", "data.held_out=0", "data.caption_dropout=0.5")
        trained, prompts = make_objective(plan), made_up(plan).prompts
        for step in range(4):
            inputs = trained.inputs(step, 0)
            examples = batch(plan.dataset.train, 2, seed=seed, index=step)
            assert inputs.names == [str(example.path) for example in examples]
            for i, example in enumerate(examples):
                dropped = drops_caption(0.5, seed=seed, index=step, position=i)
                text = qwen_image.EMPTY_PROMPT if dropped else example.caption
                assert same(inputs.prompt_embeds[i, : len(prompts[text])], prompts[text])
            noises.append(str(inputs.noise.flatten()[:4].tolist()))
    assert len({*noises}) == 8


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_divided_into_micro_steps_and_processes_shows_each_picture_once(
    processes: int, run_toml: Path
) -> None:
    plan = make_plan(run_toml, "train.batch_size=1", "train.gradient_accumulation_steps=2", "data.held_out=2")
    every = sorted(str(example.path) for example in plan.dataset.train)
    parts = [make_objective(plan, Process(index, processes)) for index in range(processes)]
    for epoch in range(3):
        steps = range(epoch * 2 // processes, (epoch + 1) * 2 // processes)
        shown = [part.inputs(step, micro) for step in steps for micro in range(2) for part in parts]
        assert sorted(pictures_of(shown)) == every


def test_latents_are_the_picture_s_own_and_no_two_batches_have_the_same_noise(run_toml: Path) -> None:
    plan = make_plan(run_toml, "train.gradient_accumulation_steps=2")
    parts = [make_objective(plan, Process(index, 2)) for index in range(2)]
    seen = [part.inputs(step, micro) for step in range(2) for micro in range(2) for part in parts]
    examples, encoded = {str(example.path): example for example in plan.dataset.train}, made_up(plan)
    for inputs in seen:
        for name, latents in zip(inputs.names, inputs.latents, strict=True):
            assert same(latents, encoded.latents_of(examples[name]))
    noises = [noise for inputs in seen for noise in inputs.noise]
    assert len({str(noise.flatten()[:4].tolist()) for noise in noises}) == len(noises) == 16
    assert len({float(sigma) for inputs in seen for sigma in inputs.sigmas}) == 16


def test_sigmas_are_moved_by_the_number_of_the_picture_s_tokens(run_toml: Path) -> None:
    """64 pixels are 8 latents, and 2 x 2 of them one token: 16."""
    plain = make_objective(make_plan(run_toml)).inputs(3, 0).sigmas
    moved = make_objective(make_plan(run_toml, "flow.sigma_sampling=resolution_shift")).inputs(3, 0).sigmas
    torch.testing.assert_close(moved, flow.shifted(plain, float(torch.tensor(flow.resolution_mu(16)).exp())))


@torch.no_grad()
def test_the_loss_of_a_batch_is_the_mean_of_each_picture_with_its_own_prompt(run_toml: Path) -> None:
    """Prompts of different lengths are padded: what is beyond a prompt's end has no effect."""
    trained = make_objective(make_plan(run_toml, "train.batch_size=4"))
    inputs = trained.inputs(0, 0)
    assert inputs.mask is not None and not inputs.mask.all()
    alone = []
    for i, length in enumerate(inputs.mask.sum(dim=1).tolist()):
        row = slice(i, i + 1)
        one = replace(inputs, latents=inputs.latents[row], noise=inputs.noise[row], sigmas=inputs.sigmas[row])
        one = replace(one, prompt_embeds=inputs.prompt_embeds[row, :length], mask=None)
        alone.append(float(trained.forward(one)))
    assert float(trained.forward(inputs)) == pytest.approx(sum(alone) / 4, rel=1e-5)


def test_blocks_that_are_computed_again_have_the_dropout_and_the_frozen_lora_of_their_forward_pass(
    run_toml: Path,
) -> None:
    """Two losses, each with its own dropout, a validation between, and one backward pass: as without gradient
    checkpointing."""
    plan, gradients = make_plan(run_toml, "adapter.dropout=0.5", "validation.prompts=[]"), []
    for checkpointing in (False, True):
        trained = make_objective(plan)
        names = list(adapter.target_modules(trained.transformer, plan.config.adapter).items())[:8]
        frozen = {
            name: LowRank(*(0.2 * torch.randn(shape, generator=generator(name, *shape)) for shape in ((2, i), (o, 2))))
            for name, (i, o) in names
        }
        adapter.attach_frozen(trained.transformer, AdapterWeights(frozen))
        qwen_image.set_up(trained.transformer, plan.config.model, gradient_checkpointing=checkpointing)
        losses = [trained.loss(step, 0).value for step in range(2)]
        assert torch.equal(losses[0], trained.loss(0, 0).value) and not torch.equal(losses[0], losses[1])
        with torch.no_grad():
            trained.validate(0, Pictures())
        torch.stack(losses).sum().backward()
        gradients.append({n: p.grad for n, p in trained.transformer.named_parameters() if p.requires_grad})
    assert sum(gradient is not None for gradient in gradients[0].values()) > 40
    for name, expected in gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-8, msg=name)


# --- validation -------------------------------------------------------------------------------------------


class Pictures(Tracker):
    """What would go to TensorBoard."""

    def __init__(self) -> None:
        self.shown: dict[str, bytes] = {}

    def each(self, items: Sequence[Any], what: str) -> Iterator[Any]:
        yield from items

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.shown[f"{step} {name}"] = picture.tobytes()


def test_samples_are_drawn_as_configured_each_prompt_from_its_own_noise(
    run_toml: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same drawn one by one, with every argument written out."""
    decoded: list[Tensor] = []
    decode = qwen_image.decode_latents
    monkeypatch.setattr(
        qwen_image, "decode_latents", lambda vae, latents: decoded.append(latents) or decode(vae, latents)
    )
    settings = ("validation.true_cfg_scale=3.0", "validation.seed=5", "validation.num_inference_steps=3")
    texts = (*PROMPTS, "one")
    plan = make_plan(run_toml, *settings, f"validation.prompts={[*texts]}", "train.batch_size=2")
    trained, tracker, prompts = make_objective(plan), Pictures(), made_up(plan).prompts
    trained.validate(7, tracker)
    expected = [
        qwen_image.Sampler(str(tiny_base)).latents(
            trained.transformer.eval(),
            [prompts[text]],
            size=(64, 64),
            seeds=[5 + row],
            num_inference_steps=3,
            true_cfg_scale=3.0,
            negative_prompt=prompts[" "],
        )
        for row, text in enumerate(texts)
    ]
    torch.testing.assert_close(torch.cat(decoded), torch.cat(expected), rtol=1e-3, atol=1e-4)
    found = [Image.open(plan.output / "samples" / f"step-000007-{row}.png").tobytes() for row in range(4)]
    assert len({*found}) == 4  # the first and the last have the same prompt
    assert tracker.shown == {f"7 samples/{text}": picture for text, picture in zip(texts, found, strict=True)}


def test_samples_have_the_shape_of_the_training_pictures(run_toml: Path, pictures: Path) -> None:
    for path in pictures.glob("*.png"):
        Image.open(path).resize((80, 48)).save(path)
    plan = make_plan(run_toml, "validation.prompts=['one']")
    make_objective(plan).validate(0, Pictures())
    assert Image.open(plan.output / "samples" / "step-000000-0.png").size == (80, 48)


def test_the_stable_losses_are_of_so_many_pictures(run_toml: Path) -> None:
    plan = make_plan(run_toml, "validation.num_pictures=1")
    encoded, transformer = made_up(plan), qwen_image.load_transformer(plan.config.model, CPU)

    def expected(example: Any) -> float:
        return float(validation.stable_errors(transformer, [encoded.item(example)], CPU, torch.float32).mean())

    found = stable_losses(plan, transformer, encoded, Accelerator())
    assert found == {
        "val_loss": pytest.approx(expected(plan.dataset.held_out[0]), rel=1e-5),
        "train_stable_loss": pytest.approx(expected(plan.dataset.train[0]), rel=1e-5),
    }


def test_dropout_is_off_while_validating_and_on_again_after(run_toml: Path) -> None:
    plan = make_plan(run_toml, "adapter.dropout=0.5", "validation.prompts=[]")
    trained = make_objective(plan)
    assert trained.transformer.training
    with torch.no_grad():
        before = float(trained.loss(0, 0).value)
        measured = trained.validate(0, Pictures())
        assert float(trained.loss(0, 0).value) == before
        trained.transformer.eval()
        assert float(trained.loss(0, 0).value) != before
    assert measured == stable_losses(plan, trained.transformer, made_up(plan), Accelerator())
