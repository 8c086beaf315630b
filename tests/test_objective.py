"""What a step is trained on, what a validation measures and draws: against the settings, and drawn again one by one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from trainer.data import masks
from trainer.data.epoch import batch, drops_caption
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


# --- masks ------------------------------------------------------------------------------------------------


def with_masks(pictures: Path, *names: str, white: bool = False) -> None:
    """The left half is white, or all of it."""
    for name in names:
        mask = Image.new("L", (64, 64), "white" if white else "black")
        mask.paste(255, (0, 0, 32, 64))
        mask.save(pictures / f"{name}.mask.png")


def masked_objective(plan: Plan) -> LoraObjective:
    """With random latents, and the masks as a run reads them."""
    trained, cells = make_objective(plan), (8, 8)
    for e in (*plan.dataset.train, *plan.dataset.held_out):
        if e.mask:
            weights = masks.weights(masks.load(e.mask, e.bucket), cells, plan.config.data.mask_outside)
            trained._encoded.weights[objective._mask_name(e, trained._run.data.mask_outside)] = weights
    return trained


@torch.no_grad()
def test_the_loss_of_a_masked_picture_is_the_mean_of_its_weighted_errors(run_toml: Path, pictures: Path) -> None:
    with_masks(pictures, "0", "1", "2", "3")  # of six
    plan = make_plan(run_toml, "train.batch_size=6", "data.held_out=0", "data.mask_outside=0.25")
    trained = masked_objective(plan)
    inputs = trained.inputs(0, 0)
    noisy = flow.interpolate(inputs.latents, inputs.noise, inputs.sigmas)
    predicted = qwen_image.predict_velocity(
        trained.transformer, noisy, inputs.sigmas, inputs.prompt_embeds, inputs.mask
    )
    errors = (predicted - (inputs.noise - inputs.latents)).double().square()  # B C 1 h w
    expected = []
    for error, name in zip(errors, inputs.names, strict=True):
        left, right = error[..., :4].mean(), error[..., 4:].mean()
        masked = Path(name).stem in "0123"
        expected.append((left + 0.25 * right) / 1.25 if masked else (left + right) / 2)
    assert float(trained.forward(inputs)) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@pytest.mark.parametrize("settings", [("white", "data.mask_outside=0.1"), ("half", "data.mask_outside=1")])
def test_masks_that_leave_nothing_out_change_nothing(settings: tuple[str, str], run_toml: Path, pictures: Path) -> None:
    kind, outside = settings
    plain = make_objective(make_plan(run_toml))
    with_masks(pictures, *"012345", white=kind == "white")
    trained = masked_objective(make_plan(run_toml, outside))
    found = []
    for one in (plain, trained):
        one.loss(0, 0).value.backward()
        found.append({name: p.grad for name, p in one.transformer.named_parameters() if p.grad is not None})
    assert trained.inputs(0, 0).weights is not None and plain.inputs(0, 0).weights is None
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-9)


def test_a_batch_without_masks_is_not_weighted(run_toml: Path, pictures: Path) -> None:
    with_masks(pictures, "0")
    trained = masked_objective(make_plan(run_toml, "train.batch_size=1", "data.held_out=0"))
    for step in range(6):
        inputs = trained.inputs(step, 0)
        assert (inputs.weights is not None) == inputs.names[0].endswith("0.png")


def test_latents_in_the_cache_serve_with_and_without_masks(
    run_toml: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(run_toml)
    encoder = qwen_image.text_encoder(plan.config.model, CPU)
    plain = objective.encode(plan, CPU, encoder, quiet=True)
    with_masks(pictures, "0", "1")
    monkeypatch.setattr(qwen_image, "load_vae", lambda *_: pytest.fail("the VAE is loaded again"))
    masked = objective.encode(make_plan(run_toml), CPU, encoder, quiet=True)
    assert masked.latents.keys() == plain.latents.keys() and plain.weights == {}
    (weights,) = masked.weights.values()  # both masks are the same
    torch.testing.assert_close(weights[0, 0, 3], torch.tensor([1 / 0.55] * 4 + [0.1 / 0.55] * 4))


# --- validation -------------------------------------------------------------------------------------------


class Pictures(Tracker):
    """What would go to TensorBoard."""

    def __init__(self) -> None:
        self.shown: dict[str, bytes] = {}
        self.records: list[dict[str, Any]] = []

    def pictures(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        self.records += [{"step": step, **record} for record in records]

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


def test_beside_the_stable_losses_there_are_masked_ones(run_toml: Path, pictures: Path) -> None:
    with_masks(pictures, *"012345")
    plan = make_plan(run_toml, "validation.num_pictures=2")
    encoded, transformer = masked_objective(plan)._encoded, qwen_image.load_transformer(plan.config.model, CPU)
    found = stable_losses(plan, transformer, encoded, Accelerator())
    assert [*found] == ["val_loss", "val_loss_masked", "train_stable_loss", "train_stable_loss_masked"]
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 2
    for name, examples in (("val_loss", plan.dataset.held_out), ("train_stable_loss", plan.dataset.train)):
        items = [replace(encoded.item(e), weights=(left, 2 - left)) for e in examples[:2]]
        whole, inside, around = validation.weighted_errors(transformer, items, CPU, torch.float32).mean(dim=(0, 1))
        assert found[name] == pytest.approx(float(whole), rel=1e-5)
        assert found[name] == pytest.approx(float((inside + around) / 2), rel=1e-5)
        assert found[f"{name}_masked"] == pytest.approx(float((inside + 0.1 * around) / 1.1), rel=1e-5)
        assert abs(found[f"{name}_masked"] / found[name] - 1) > 1e-3
    for mask in pictures.glob("*.mask.png"):
        mask.unlink()
    unmasked = make_plan(run_toml, "validation.num_pictures=2")
    assert stable_losses(unmasked, transformer, made_up(unmasked), Accelerator()) == pytest.approx(
        {name: found[name] for name in ("val_loss", "train_stable_loss")}
    )


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
    assert measured.values == stable_losses(plan, trained.transformer, made_up(plan), Accelerator())


def test_each_picture_s_errors_are_recorded_and_the_held_out_ones_choose(run_toml: Path) -> None:
    """With a base that has never had an adapter as the reference."""
    plan = make_plan(run_toml, "validation.prompts=[]", "validation.diagnose=true", "validation.num_pictures=1")
    trained, tracker = make_objective(plan), Pictures()
    others = {number: torch.full((8,), number + 0.5) for number in range(len(plan.dataset.train))}
    trained._others, encoded = others, trained._encoded
    measured = trained.validate(0, tracker)
    base, empty = qwen_image.load_transformer(plan.config.model, CPU), encoded.prompts[qwen_image.EMPTY_PROMPT]
    train, held_out = ([encoded.item(e) for e in part] for part in (plan.dataset.train, plan.dataset.held_out))
    expected = {
        ("train", "adapter"): (trained.transformer, train[:1]),
        ("held_out", "adapter"): (trained.transformer, held_out[:1]),
        ("train", "base"): (base, train),
        ("train", "no caption"): (base, [replace(item, prompt=empty) for item in train]),
    }
    for (part, what), (transformer, items) in expected.items():
        found = [one for one in tracker.records if (one["part"], one["what"]) == (part, what)]
        assert [one["picture"] for one in found] == [item.name for item in items]
        errors = validation.stable_errors(transformer.eval(), items, CPU, torch.float32)
        torch.testing.assert_close(torch.tensor([one["errors"] for one in found]), errors, rtol=1e-4, atol=1e-5)
        if part == "held_out":
            assert measured.errors is not None and measured.of == (held_out[0].digest,)
            torch.testing.assert_close(measured.errors, errors, rtol=1e-4, atol=1e-5)
    told = [one["errors"][0] for one in tracker.records if one["what"] == "others' seed"]
    assert told == [number + 0.5 for number in others]
    assert {one["step"] for one in tracker.records} == {0}
    tracker.records.clear()
    trained.validate(2, tracker)
    assert {one["what"] for one in tracker.records} == {"adapter"}
