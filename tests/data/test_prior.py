"""Prior preservation: its items and gradients against a plain reference written here, drawing, resume, bad input."""

import hashlib
import itertools
import os
import shutil
import signal
from collections import defaultdict
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
from trainer import adapter, loop, objective, plan, plan_words, qwen_image
from trainer.adapter import AdapterConfig, AdapterWeights
from trainer.config import ConfigError
from trainer.data.captions import has_trigger, without_trigger
from trainer.data.prior import Prior
from trainer.hardware import memory, seconds
from trainer.lowrank import LowRank
from trainer.objective import Encoded, LoraObjective
from trainer.plan import Plan, load_config

CPU = torch.device("cpu")
PREDICTION = ("data.trigger=zorp", "prior.method=prediction")
TEXTS = ("a cat", "a big dog by the sea", "a bird")
DRAWN = ("prior.method=pictures", f"prior.prompts={[*TEXTS]}", "prior.num_pictures=4", "prior.num_inference_steps=2")
PLAIN = ("validation.prompts=[]",)


class Process:
    """One of several processes, in the words of accelerate."""

    def __init__(self, process_index: int, num_processes: int):
        self.process_index, self.num_processes, self.device = process_index, num_processes, CPU


def make_plan(run_toml: Path, *overrides: str) -> Plan:
    settings, start = load_config(run_toml, [f"output={run_toml.parent / 'out'}", *overrides], initializers)
    return plan.prepare(settings, start, resume=False)


def plain_generator(*keys: Any) -> torch.Generator:
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def dealt(names: list[str], size: int, seed: int, index: int) -> list[str]:
    """Batch `index` of pictures of one shape: they are shuffled in each epoch, and its batches, too."""
    count = -(-len(names) // size)
    epoch, place = divmod(index, count)
    start = torch.randperm(count, generator=plain_generator(seed, "order", epoch)).tolist()[place] * size
    shuffle = torch.randperm(len(names), generator=plain_generator(seed, "shuffle", epoch, 64, 64)).tolist()
    return [names[shuffle[i % len(names)]] for i in range(start, start + size)]


def made_up(prepared: Plan) -> Encoded:
    """Random latents and prompt_embeds; the captions have different lengths."""
    assert prepared.prior is not None
    examples = (*prepared.dataset.train, *prepared.dataset.held_out, *prepared.prior.examples)
    texts = {e.caption for e in examples} | {qwen_image.EMPTY_PROMPT}
    texts |= prepared.prior.texts
    latents = {objective._name(e): torch.randn(16, 1, 8, 8, generator=plain_generator(e.digest)) for e in examples}
    return Encoded(latents, {t: torch.randn(4 + len(t) % 5, 64, generator=plain_generator(t)) for t in sorted(texts)})


def make_objective(prepared: Plan, process: Any = None) -> LoraObjective:
    """With an adapter that has an effect, and a frozen LoRA beside it."""
    transformer = qwen_image.load_transformer(prepared.config.model, CPU)
    adapter.inject(transformer, prepared.config.adapter)
    for name, tensor in adapter.tensors(transformer).items():
        tensor.copy_(torch.randn(tensor.shape, generator=plain_generator(name)) * 0.2)
    frozen = {
        name: LowRank(
            *(0.3 * torch.randn(shape, generator=plain_generator(name, *shape)) for shape in ((2, i), (o, 2)))
        )
        for name, (i, o) in list(prepared.modules.items())[:6]
    }
    adapter.attach_frozen(transformer, AdapterWeights(frozen))
    return LoraObjective(prepared, transformer, made_up(prepared), process or Accelerator())


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Five pictures of other things, with captions."""
    folder = tmp_path / "others"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (50 * number, 99, 20)).save(folder / f"o{number}.png")
        (folder / f"o{number}.txt").write_text(f"{'very ' * number}plain")
    return folder


# --- items ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_pictures_are_dealt_as_the_training_pictures_are(processes: int, run_toml: Path, others: Path) -> None:
    settings = ("prior.method=pictures", f"prior.images={others}", "train.gradient_accumulation_steps=2", "seed=3")
    prepared = make_plan(run_toml, *settings)
    encoded, names = made_up(prepared), [str(others / f"o{number}.png") for number in range(5)]
    examples = {str(e.path): e for e in prepared.prior.examples}  # type: ignore[union-attr]
    parts = [make_objective(prepared, Process(rank, processes)) for rank in range(processes)]
    seen, index = list[str](), 0
    for step, micro, rank in itertools.product(range(4), range(2), range(processes)):
        found = parts[rank].inputs(step, micro).prior
        assert found is not None
        expected = dealt(names, 2, 3, index)
        random = plain_generator(3, "prior", step, micro * processes + rank)
        noise = torch.randn(2, 16, 1, 8, 8, generator=random)
        assert found.names == expected and torch.equal(found.noise, noise)
        assert torch.equal(found.sigmas, torch.sigmoid(torch.randn(2, generator=random)))
        for i, name in enumerate(expected):
            prompt = encoded.prompts[examples[name].caption]
            assert torch.equal(found.prompt_embeds[i, : len(prompt)], prompt)
            assert torch.equal(found.latents[i], encoded.latents_of(examples[name]))
        seen, index = seen + expected, index + 1
    assert {*seen} == {*names}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("given", [True, False])
def test_a_prediction_is_made_where_the_training_picture_is(processes: int, given: bool, run_toml: Path) -> None:
    prompts = [f"prior.prompts={[*TEXTS]}"] if given else []
    settings = (*PREDICTION, *prompts, "train.gradient_accumulation_steps=2", "data.caption_dropout=0.5")
    prepared = make_plan(run_toml, *settings)
    encoded, captions = made_up(prepared), {str(e.path): e.caption for e in prepared.dataset.train}
    parts, seen = [make_objective(prepared, Process(rank, processes)) for rank in range(processes)], set[str]()
    for index, (step, micro, rank) in enumerate(itertools.product(range(4), range(2), range(processes))):
        inputs = parts[rank].inputs(step, micro)
        found = inputs.prior
        assert found is not None and found.names == inputs.names
        assert torch.equal(found.latents, inputs.latents) and torch.equal(found.noise, inputs.noise)
        assert torch.equal(found.sigmas, inputs.sigmas)
        for i, name in enumerate(inputs.names):
            number = int(torch.randint(3, (), generator=plain_generator(0, "prior_prompt", index, i)))
            text = TEXTS[number] if given else captions[name].removeprefix("zorp, ")
            assert "zorp" not in text
            assert torch.equal(found.prompt_embeds[i, : len(encoded.prompts[text])], encoded.prompts[text])
            seen.add(text)
    assert len(seen) >= 3


# --- gradients --------------------------------------------------------------------------------------------


def plain_loss(prepared: Plan, trained: LoraObjective, step: int, micro: int, weight: float) -> dict[str, Tensor]:
    """Picture by picture, with a base that has never had an adapter."""
    inputs = trained.inputs(step, micro)
    base = qwen_image.load_transformer(prepared.config.model, CPU)
    sums = defaultdict[str, Tensor](lambda: torch.zeros(()))
    for part, items in (("subject_loss", inputs), ("prior_loss", inputs.prior)):
        assert items is not None
        for i in range(2):
            length = None if items.mask is None else int(items.mask[i].sum())
            x0, noise, sigma = items.latents[i : i + 1], items.noise[i : i + 1], items.sigmas[i : i + 1]
            given = ((1 - sigma) * x0 + sigma * noise, sigma, items.prompt_embeds[i : i + 1, :length], None)
            target = noise - x0
            if part == "prior_loss" and prepared.config.prior.method == "prediction":  # type: ignore[union-attr]
                with torch.no_grad():
                    target = qwen_image.predict_velocity(base, *given)
            velocity = qwen_image.predict_velocity(trained.transformer, *given)
            sums[part] = sums[part] + (velocity - target).square().mean() / 2
    return {**sums, "loss": sums["subject_loss"] + weight * sums["prior_loss"]}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["pictures", "prediction"])
def test_the_gradient_of_all_parts_is_that_of_a_plain_reference(
    method: str, checkpointing: bool, run_toml: Path, others: Path
) -> None:
    """Two processes with two micro steps each: DDP's is the mean of the processes' gradients."""
    settings = {"pictures": ("prior.method=pictures", f"prior.images={others}"), "prediction": PREDICTION}[method]
    prepared = make_plan(run_toml, *settings, "prior.weight=0.7", "train.gradient_accumulation_steps=2")
    expected, found, losses = defaultdict[str, Any](float), defaultdict[str, Any](float), list[dict[str, Any]]()
    for rank in range(2):
        trained = make_objective(prepared, Process(rank, 2))
        if checkpointing:
            trained.transformer.enable_gradient_checkpointing()
        for micro in range(2):
            losses.append(plain_loss(prepared, trained, 1, micro, 0.7))
            for total, sums in ((losses[-1]["loss"], expected), (trained.loss(1, micro).value, found)):
                trained.transformer.zero_grad()
                total.backward()
                for name, parameter in trained.transformer.named_parameters():
                    if parameter.grad is not None:
                        sums[name] = sums[name] + parameter.grad / 4
            told = trained.loss(1, micro)
            for name, value in {"loss": told.value, **told.parts}.items():
                torch.testing.assert_close(value, losses[-1][name], rtol=1e-4, atol=1e-6)
    assert found.keys() == expected.keys() and len(found) > 40
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_log_tells_the_parts_of_all_micro_steps(run_toml: Path) -> None:
    prepared = make_plan(run_toml, *PREDICTION, "prior.weight=0.5", "train.gradient_accumulation_steps=2")
    trained = make_objective(prepared)
    single = [plain_loss(prepared, trained, 0, micro, 0.5) for micro in range(2)]
    found = loop._Training(trained, prepared.job(), Accelerator()).update(0)
    for name in ("loss", "subject_loss", "prior_loss"):
        assert found[name] == pytest.approx(sum(float(one[name]) for one in single) / 2, rel=1e-4)


def test_switched_off_is_the_base_and_leaves_the_rest_as_it_was(run_toml: Path) -> None:
    prepared = make_plan(run_toml, *PREDICTION)
    trained = make_objective(prepared)
    inputs = trained.inputs(0, 0)
    base = qwen_image.load_transformer(prepared.config.model, CPU)

    def velocity(transformer: Any) -> Tensor:
        return qwen_image.predict_velocity(transformer, inputs.latents, inputs.sigmas, inputs.prompt_embeds, None)

    before = velocity(trained.transformer)
    with adapter.switched_off(trained.transformer):
        assert torch.equal(velocity(trained.transformer), velocity(base))
    assert torch.equal(velocity(trained.transformer), before) and not torch.equal(before, velocity(base))
    assert all(p.requires_grad == ("lora_" in name) for name, p in trained.transformer.named_parameters())


# --- whole runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [(*PREDICTION, "prior.class_word=a creature"), pytest.param(DRAWN, marks=pytest.mark.slow)]
)
def test_a_resumed_run_gives_the_same_adapter(
    settings: tuple[str, ...], run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    assert run(run_toml, tmp_path / "whole", *PLAIN, *settings, cache) == FINISHED
    real = LoraObjective.loss

    def loss(self: LoraObjective, step: int, micro: int) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, micro)

    with monkeypatch.context() as patch:
        patch.setattr(LoraObjective, "loss", loss)
        assert run(run_toml, tmp_path / "out", *PLAIN, *settings, cache) == INTERRUPTED
    assert run(run_toml, tmp_path / "out", *PLAIN, *settings, cache, "prior.weight=2", resume=True) == BAD_INPUT
    assert "prior.weight is 2.0, the checkpoint has 1.0" in caplog.text
    assert run(run_toml, tmp_path / "out", *PLAIN, *settings, cache, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")
    for line in metrics(tmp_path / "out"):
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["subject_loss"] + line["prior_loss"], rel=1e-5)


def test_drawing_goes_on_where_it_was_stopped_and_the_plan_says_what_is_left(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the pipeline draws them with these prompts, sizes, seeds, steps and guidance."""
    prepared, drawn = make_plan(run_toml, *DRAWN, "prior.seed=7"), list[int]()
    encoded, real = made_up(prepared), qwen_image.Sampler.latents
    encoded.latents.clear()
    transformer = qwen_image.load_transformer(prepared.config.model, CPU)

    def latents(self: Any, *arguments: Any, **options: Any) -> Tensor:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(options["seeds"][0])
        return real(self, *arguments, **options)

    assert plan_words._prior_lines(prepared) == ["weight 1: 4 pictures, of which 4 must be drawn before the training"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(qwen_image.Sampler, "latents", latents)
        objective.draw_prior(prepared, transformer, encoded, Accelerator(), quiet=True)
    assert drawn == [7, 8]
    assert "4 pictures, of which 2 must be drawn" in plan_words._prior_lines(prepared)[0]
    assert "of which 4 must be drawn" in plan_words._prior_lines(make_plan(run_toml, *DRAWN, "prior.seed=11"))[0]
    drawn.insert(0, -1)  # no more interruptions
    monkeypatch.setattr(qwen_image.Sampler, "latents", latents)
    objective.draw_prior(prepared, transformer, encoded, Accelerator(), quiet=True)
    assert drawn == [-1, 7, 8, 9, 10] and len(encoded.latents) == 4
    for number, example in enumerate(prepared.prior.examples):  # type: ignore[union-attr]
        assert example.caption == TEXTS[number % 3]
        expected = real(
            qwen_image.Sampler(prepared.config.model.base),
            transformer,
            [encoded.prompts[example.caption]],
            size=(64, 64),
            seeds=[7 + number],
            num_inference_steps=2,
            true_cfg_scale=4.0,
            negative_prompt=encoded.prompts[" "],
        )
        assert torch.equal(encoded.latents_of(example), expected[0])


def test_other_pictures_in_the_folder_are_another_course(run_toml: Path, others: Path, tmp_path: Path) -> None:
    def course(folder: Path, *settings: str) -> dict[str, Any]:
        return make_plan(run_toml, "prior.method=pictures", f"prior.images={folder}", *settings).course()

    moved = tmp_path / "moved"
    shutil.copytree(others, moved)
    assert course(moved) == course(others)
    Image.new("RGB", (64, 64), "red").save(moved / "o2.png")
    assert course(moved) != course(others) != course(others, "prior.weight=3")
    without = make_plan(run_toml).course()
    assert without["prior"] is None and not any(name.startswith("prior.") for name in without)


# --- the plan ---------------------------------------------------------------------------------------------


def test_memory_and_seconds_count_the_prior(run_toml: Path) -> None:
    plans = [make_plan(run_toml, *settings) for settings in ((), PREDICTION, DRAWN)]
    plain, prediction, drawn = (memory.estimate(plan.memory_request(one)) for one in plans)
    activations = [needs.parts["activations and gradients"] for needs in (plain, prediction, drawn)]
    assert activations[1] == activations[2] > 1.4 * activations[0]
    assert next(stage.name for stage in drawn.stages if stage not in plain.stages) == "drawing the prior"
    assert not any(stage.name == "drawing the prior" for stage in prediction.stages)
    work = [seconds.count(one) for one in plans]
    assert work[1].step == pytest.approx(2 * work[0].step + 2 * work[0].forward, rel=0.01)  # a batch of two
    assert work[2].step == pytest.approx(2 * work[0].step)
    assert [one.drawing_passes for one in work] == [0, 0, 4 * 2 * 2]
    assert [one.captions.flop / work[0].captions.flop for one in work] == pytest.approx([1, 11 / 7, 10 / 7])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_a_prior_keeps_what_is_kept_on_the_cpu(checkpointing: bool) -> None:
    from tests.hardware.test_memory import FP32, SMALL, LiveBytes, fused_attention, on_meta
    from trainer.loop import TrainConfig

    settings, config = AdapterConfig(rank=4), TrainConfig(gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    transformer: Any = memory.few_blocks(memory.shape_of(on_meta(**SMALL)), torch.float32, settings, 3, CPU)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    with fused_attention(), LiveBytes("cpu") as counted:
        passes = [memory.forward(transformer, 1, pixels, of_input=False) for pixels in (128**2, 64**2)]
        torch.stack([velocity.square().mean() for velocity in passes]).sum().backward()
    estimated = memory.step_bytes(on_meta(**SMALL), FP32, config, settings, 128**2, 64**2)
    assert estimated == pytest.approx(counted.peak, rel=0.06)
    assert estimated > memory.step_bytes(on_meta(**SMALL), FP32, config, settings, 128**2)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (("prior.method=pictures",), ["needs images, a folder, or prompts"]),
        (("prior.method=pictures", "prior.prompts=[]"), ["needs images, a folder, or prompts"]),
        (("prior.method=pictures", "prior.images=EMPTY"), ["[prior] ", "there is no picture in it"]),
        (("prior.method=pictures", "prior.images=nowhere"), ["[prior] images: there is no folder"]),
        (("prior.method=prediction",), ["[prior] prompts are needed, or [data] trigger"]),
        (("prior.weight=1",), ["[prior] method: is missing"]),
        ((*PREDICTION, "prior.weight=0"), ["[prior] weight must be above 0, not 0; to train without"]),
        ((*PREDICTION, "prior.weight=-1", "prior.seed=4", "prior.images=x"),
         ["weight must be above 0", "seed has no effect", "images has no effect"]),
        ((*PREDICTION, "prior.prompts=['a ZORP!', 'a cat']", "data.resolution=60"),
         ['[prior] the trigger "zorp" is in "a ZORP!"', "[data] resolution = 60"]),
        ((*PREDICTION, "prior.prompts=['a cat']", "prior.class_word=a cat"), ["class_word has no effect with prompts"]),
        ((*DRAWN, "prior.num_pictures=2"), ["num_pictures = 2 leaves out some of the 3 prompts"]),
        ((*DRAWN, "prior.prompts=['a', 'a', ' ']"), ['"a" is there more than once', "one is empty"]),
        ((*DRAWN, "prior.images=EMPTY"), ["prompts has no effect with images"]),
        ((*DRAWN, "data.trigger=cat"), ['the trigger "cat" is in "a cat"']),
        (("prior.method=pictures", "prior.images=pictures"), ["the same pictures are the subject's"]),
        (("prior.method=pictures", "prior.images=OTHERS", "data.trigger=plain"), ["is in the captions of o0.png"]),
    ],
)  # fmt: skip
def test_bad_input_is_told_at_once_before_a_model_loads(
    settings: tuple[str, ...], messages: list[str], run_toml: Path, others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_toml.parent)
    Path("EMPTY").mkdir()
    others.rename("OTHERS")
    with no_model_loads(), pytest.raises(ConfigError) as caught:
        make_plan(run_toml, *settings)
    for message in messages:
        assert message in str(caught.value)


def test_a_caption_that_is_nothing_but_the_trigger_needs_a_class_word(run_toml: Path, pictures: Path) -> None:
    for path in pictures.glob("*.txt"):
        path.write_text("zorp")
    with pytest.raises(ConfigError, match="nothing but the trigger: set class_word"):
        make_plan(run_toml, *PREDICTION)
    prior: Prior | None = make_plan(run_toml, *PREDICTION, "prior.class_word=a creature").prior
    assert prior is not None and prior.texts == {"a creature"}


@pytest.mark.parametrize(
    ("trigger", "text", "instead", "expected"),
    [
        ("zorp", "zorp, a big one", "", "a big one"),
        ("zorp", "in a meadow, Zorp, at night", "", "in a meadow, at night"),
        ("zorp", "a zorp near zorpia", "creature", "a creature near zorpia"),
        ("小怪", "可爱的小怪在草地上", "", "可爱的在草地上"),
    ],
)
def test_captions_without_the_trigger(trigger: str, text: str, instead: str, expected: str) -> None:
    assert without_trigger(trigger, text, instead) == expected
    assert has_trigger(trigger, text) and not has_trigger(trigger, expected) and not has_trigger("", text)
