"""What a run trains: the adapter in the transformer, on encoded pictures, with the flow-matching loss.

`LoraObjective` is what the loop trains, validates and saves. `Trials` tells an initializer what a start would be worth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor

from trainer import adapter, flow, measure, qwen_image, validation
from trainer.adapter import AdapterWeights
from trainer.data import masks
from trainer.data.cache import Cache
from trainer.data.dataset import Example, load_picture
from trainer.data.encode import encode_pictures, encode_prompts
from trainer.data.epoch import batch, drawn_caption, drops_caption
from trainer.data.prior import drawing_keys
from trainer.files import DTYPES
from trainer.hardware import parallel
from trainer.loop import Loss, Measured
from trainer.plan import Plan
from trainer.qwen_image import TextEncoder
from trainer.stages import StagePlan
from trainer.tracking import Tracker


@dataclass(frozen=True)
class Encoded:
    """Latents and prompt_embeds of all examples, on the CPU."""

    latents: dict[str, Tensor]  # picture digest and bucket -> C 1 h w
    prompts: dict[str, Tensor]  # text -> L D
    weights: dict[str, Tensor] = field(default_factory=dict)  # mask digest, bucket, mask_outside -> 1 1 h w, of mean 1

    def latents_of(self, example: Example) -> Tensor:
        """C 1 h w"""
        return self.latents[_name(example)]

    def item(self, example: Example) -> validation.Item:
        return validation.Item(example.name, example.digest, self.latents_of(example), self.prompts[example.caption])

    def weighted(self, examples: Sequence[Example], outside: float) -> list[validation.Item]:
        """With weights as in training with this `mask_outside`, if one of the pictures has a mask."""
        weights = self.weights_of(examples, outside)
        items = [self.item(example) for example in examples]
        return [replace(item, weights=(one,)) for item, one in zip(items, weights, strict=True)] if weights else items

    def weights_of(self, examples: Sequence[Example], outside: float) -> list[Tensor]:
        """1 1 h w for each, which is 1 everywhere without a mask; none at all if no picture has one."""
        if not any(example.mask for example in examples):
            return []
        return [
            self.weights[_mask_name(e, outside)] if e.mask else torch.ones(1, *self.latents_of(e).shape[1:])
            for e in examples
        ]


def _name(example: Example) -> str:
    return f"{example.digest} {example.bucket}"


def _mask_name(example: Example, outside: float) -> str:
    assert example.mask is not None
    return f"{example.mask.digest} {example.bucket} {outside:g}"


def encode(plan: Plan, device: torch.device, text_encoder: TextEncoder, *, quiet: bool) -> Encoded:
    """Encode what is not in the cache yet: first the pictures, then the captions."""
    run, cache = plan.config, Cache(plan.cache)
    train, held_out = plan.dataset.train, plan.dataset.held_out
    pictures = (*train, *(plan.prior.pictures if plan.prior else ()))
    pictures = (*pictures, *(example for stage in plan.stages for example in stage.examples))
    shown = list({_name(e): e for picture in pictures for e in map(picture.at, picture.buckets)}.values())
    examples = list({_name(e): e for e in (*shown, *held_out)}.values())
    latents = encode_pictures(cache, run.model.base, examples, device, quiet=quiet)
    texts = {*(text for e in train for text in e.captions), *(e.caption for e in held_out)}
    texts |= {*run.validation.prompts, *run.validation.unrelated_prompts}
    texts.add(qwen_image.EMPTY_PROMPT)
    texts |= plan.prior.texts if plan.prior else set()
    prompts = encode_prompts(cache, text_encoder, DTYPES[run.model.dtype], texts, quiet=quiet)
    qwen_image.free_memory()
    encoded = Encoded({_name(e): value for e, value in zip(examples, latents, strict=True)}, prompts)
    for example in (*shown, *held_out):
        if example.mask:
            mask, cells = masks.load(example.mask, example.bucket), encoded.latents_of(example).shape[-2:]
            for outside in {run.data.mask_outside, *(stage.mask_outside for stage in plan.stages)}:
                weights = masks.weights(mask, (cells[0], cells[1]), outside)
                encoded.weights[_mask_name(example, outside)] = weights
    return encoded


def draw_prior(
    plan: Plan, transformer: QwenImageTransformer2DModel, encoded: Encoded, accelerator: Accelerator, *, quiet: bool
) -> None:
    """Add to `encoded` the prior's pictures that the base draws, in the cache or now, divided among the processes. The
    adapter must not be on the transformer yet."""
    if plan.prior is None or not plan.prior.drawn:
        return
    drawn, wanted, cache = plan.prior.drawn, plan.prior.config, Cache(plan.cache)
    keys, sampler = drawing_keys(plan.prior, plan.config.model), qwen_image.Sampler(plan.config.model.base)
    transformer.eval()

    def draw(numbers: Sequence[int]) -> list[Tensor]:
        return [
            sampler.latents(
                transformer,
                [encoded.prompts[drawn[number].caption]],
                size=drawn[number].bucket,
                seeds=[wanted.seed + number],
                num_inference_steps=wanted.num_inference_steps,
                true_cfg_scale=wanted.true_cfg_scale,
                negative_prompt=encoded.prompts[qwen_image.EMPTY_PROMPT],
                device=accelerator.device,
            )[0]
            .float()
            .cpu()
            for number in numbers
        ]

    own = range(accelerator.process_index, len(drawn), accelerator.num_processes)
    what, names = "draw the prior's pictures", [str(example.path) for example in drawn]
    cache.get([keys[i] for i in own], lambda rows: draw([own[row] for row in rows]), what=what, quiet=quiet)
    accelerator.wait_for_everyone()
    latents = cache.get(keys, draw, what=what, names=names, quiet=quiet)
    encoded.latents.update(zip(map(_name, drawn), latents, strict=True))
    qwen_image.free_memory()


@dataclass(frozen=True)
class Inputs:
    """The inputs of one forward pass."""

    latents: Tensor  # B C 1 h w
    noise: Tensor  # B C 1 h w
    sigmas: Tensor  # B
    prompt_embeds: Tensor  # B L D
    mask: Tensor | None  # B L
    random: torch.Generator
    """For the adapter's dropout."""
    names: list[str]
    """Paths of the pictures, for messages."""
    stage: StagePlan
    weights: Tensor | None = None  # B 1 1 h w
    loss_weights: Tensor | None = None  # B
    prior: "Inputs | None" = None
    """What is trained on beside them, if the run has a prior: as many."""


class LoraObjective:
    """Train the adapter in the transformer with the flow-matching loss."""

    def __init__(
        self,
        plan: Plan,
        transformer: QwenImageTransformer2DModel,
        encoded: Encoded,
        accelerator: Accelerator,
        sample: Callable[[int, Tracker], Mapping[str, float]] | None = None,
        others: Mapping[int, Tensor] | None = None,
        negative: AdapterWeights | None = None,
    ):
        """`sample(step, tracker)` is called at validations instead of drawing the sample pictures of the configuration;
        what it returns is logged, and neither drift nor likeness is measured. others: see `Seed.others`. negative: the
        LoRA of `[validation] negative_lora`."""
        self._others, self._negative = others or {}, negative
        self.module: torch.nn.Module = transformer.train()
        self.transformer = transformer
        self._plan, self._run, self._encoded, self._accelerator = plan, plan.config, encoded, accelerator
        self._own_samples, self._sample = sample is None, sample or self._draw_samples
        self._device, self._dtype = accelerator.device, DTYPES[plan.config.model.dtype]
        self._passes = measure.Passes(transformer, accelerator, self._dtype, _without_gradients(plan))
        self._drift: measure.Drift | None = None

    def loss(self, step: int, micro_step: int) -> Loss:
        inputs = self.inputs(step, micro_step)
        total, parts = self._losses(inputs)
        return Loss(total, ", ".join(inputs.names), parts)

    def inputs(self, step: int, micro_step: int) -> Inputs:
        """Pictures, captions, sigmas and noise: functions of the seed and the step."""
        run, processes, stage = self._run, self._accelerator.num_processes, self._plan.stage_at(step)
        part = micro_step * processes + self._accelerator.process_index  # of the step, however it is divided
        index = step * run.train.gradient_accumulation_steps * processes + part
        examples = batch(stage.examples, run.train.batch_size, seed=run.seed, index=index)
        share = run.data.caption_dropout
        dropped = [drops_caption(share, seed=run.seed, index=index, position=i) for i in range(len(examples))]

        def captions(pictures: Sequence[Example]) -> list[str]:
            return [drawn_caption(e, seed=run.seed, index=index, position=i) for i, e in enumerate(pictures)]

        drawn = captions(examples)
        texts = [qwen_image.EMPTY_PROMPT if drop else text for text, drop in zip(drawn, dropped, strict=True)]
        inputs = self._noised(stage, examples, texts, flow.generator(run.seed, "noise", step, part, 0))
        if (prior := self._plan.prior) is None or not stage.prior_weight:
            return inputs
        random = flow.generator(run.seed, "prior", step, part)
        if prior.config.method == "pictures":
            others = batch(prior.examples, len(examples), seed=run.seed, index=index)
            return replace(inputs, prior=self._noised(stage, others, captions(others), random))
        texts = [prior.prompt(text, seed=run.seed, index=index, position=i) for i, text in enumerate(drawn)]
        embeds, mask = self._stacked(texts)
        return replace(inputs, prior=replace(inputs, prompt_embeds=embeds, mask=mask, random=random))

    def _noised(
        self, stage: StagePlan, examples: Sequence[Example], texts: Sequence[str], random: torch.Generator
    ) -> Inputs:
        """Pictures with prompts, and noise and sigmas from `random`."""
        latents = torch.stack([self._encoded.latents_of(e) for e in examples])  # B C 1 h w
        noise = torch.randn(latents.shape, generator=random)
        num_tokens = latents.shape[-1] * latents.shape[-2] // 4
        sigmas = flow.sample_sigmas(stage.flow, len(latents), num_tokens, random).to(self._device)
        embeds, mask = self._stacked(texts)
        latents, noise = latents.to(self._device), noise.to(self._device)
        found = self._encoded.weights_of(examples, stage.mask_outside)
        weights = torch.stack(found).to(self._device) if found else None
        each = flow.loss_weights(stage.flow, sigmas, num_tokens)
        names = [str(e.path) for e in examples]
        return Inputs(latents, noise, sigmas, embeds, mask, random, names, stage, weights, each)

    def _stacked(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        embeds, mask = qwen_image.stack_prompts([self._encoded.prompts[text] for text in texts])
        return embeds.to(self._device), None if mask is None else mask.to(self._device)

    def forward(self, inputs: Inputs) -> Tensor:
        """The loss: scalar, attached to the graph."""
        return self._losses(inputs)[0]

    def _losses(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts if there is a prior: see `trainer.data.prior`."""
        if inputs.prior is None:
            return self._subject_loss(inputs), {}
        assert self._plan.prior is not None
        kept, settings = inputs.prior, self._plan.prior.config
        of_base = settings.method == "prediction"
        target = self._base_velocity(kept) if of_base else flow.velocity(kept.latents, kept.noise)
        subject = self._subject_loss(inputs)
        differences = (self._velocity(kept).float() - target.float()).square().flatten(1).mean(1)
        prior = _weighted_mean(differences, kept.loss_weights)
        parts = {"subject_loss": subject.detach(), "prior_loss": prior.detach()}
        return subject + inputs.stage.prior_weight * prior, parts

    def _subject_loss(self, inputs: Inputs) -> Tensor:
        losses = flow.losses(self._velocity(inputs), inputs.latents, inputs.noise, inputs.weights)
        return _weighted_mean(losses, inputs.loss_weights)

    def _velocity(self, inputs: Inputs) -> Tensor:
        with flow.seeded(inputs.random, self._device):  # the adapter's dropout
            return self._predicted(self.module, inputs)

    @torch.no_grad()
    def _base_velocity(self, inputs: Inputs) -> Tensor:
        """The frozen base's, which draws no random numbers."""
        with adapter.switched_off(self.transformer):
            return self._predicted(self.transformer, inputs)

    def _predicted(self, module: torch.nn.Module, inputs: Inputs) -> Tensor:
        noisy = flow.interpolate(inputs.latents, inputs.noise, inputs.sigmas).to(self._dtype)
        return qwen_image.predict_velocity(module, noisy, inputs.sigmas, inputs.prompt_embeds, inputs.mask)

    def tensors(self) -> dict[str, Tensor]:
        return adapter.tensors(self.transformer)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        adapter.load_tensors(self.transformer, tensors)

    def validate(self, step: int, tracker: Tracker) -> Measured:
        """Stable losses, drift and sample pictures, divided among the processes; the first one writes."""
        self.transformer.eval()
        values, chosen_by, of = dict[str, float](), None, tuple[str, ...]()
        for part, name, items in _parts(self._plan, self._encoded):
            errors = self._passes.errors(items, name, tracker)
            values.update(_losses(name, errors))
            tracker.pictures(step, measure.records(items, errors[..., 0], part, "adapter"))
            if part == "held_out":
                chosen_by = errors[..., -1].cpu()  # where there are masks, as in training
                of = tuple(item.digest for item in items)
        if step == 0 and self._run.validation.diagnose and self._own_samples:
            self._record_for_diagnosis(tracker)
        values.update(self._measured_drift(tracker))
        values.update(self._sample(step, tracker))
        self.transformer.train()
        return Measured(values, chosen_by, of)

    def _record_for_diagnosis(self, tracker: Tracker) -> None:
        """The errors of all training pictures on the frozen base, with their captions, without any, and with the seed
        of the other pictures."""
        items = [self._encoded.item(example) for example in self._plan.dataset.train]
        empty = self._encoded.prompts[qwen_image.EMPTY_PROMPT]
        with adapter.switched_off(self.transformer):
            for what, shown in (("base", items), ("no caption", [replace(item, prompt=empty) for item in items])):
                errors = self._passes.errors(shown, what, tracker)
                tracker.pictures(0, measure.records(shown, errors[..., 0], "train", what))
        for number, values in self._others.items():
            tracker.pictures(0, measure.records([items[number]], values[None], "train", "others' seed"))

    def _measured_drift(self, tracker: Tracker) -> dict[str, float]:
        """None of it where the comparison measures drift by samples."""
        texts = self._run.validation.unrelated_prompts
        if not texts or not self._own_samples:
            return {}
        if self._drift is None:
            shape = self._encoded.latents_of(self._plan.dataset.train[0]).shape
            prompts = [self._encoded.prompts[text] for text in texts]
            self._drift = measure.Drift(self._passes, prompts, shape, lambda: adapter.switched_off(self.transformer))
        return {"drift": self._drift(tracker)}

    def _draw_samples(self, step: int, tracker: Tracker) -> Mapping[str, float]:
        """A picture for each prompt into samples/, TensorBoard and the contact sheet.

        Samples that fail are no reason to lose a training: then there is a warning. Several processes have to stop
        together.
        """
        if not self._run.validation.prompts:
            return {}
        try:
            latents = self._sample_latents(tracker)
            if self._accelerator.is_main_process:
                return self._likeness(self._write_samples(step, latents, tracker))
        except RuntimeError as error:  # of memory, too
            if self._accelerator.num_processes > 1:
                raise
            qwen_image.free_memory()
            tracker.warn("no sample pictures of step %d: %s; the training goes on without them", step, error)
        return {}

    def _sample_latents(self, tracker: Tracker) -> Tensor:
        """N C 1 h w: a sample for each prompt, divided among the processes."""
        settings, prompts = self._run.validation, self._encoded.prompts
        count, size = len(settings.prompts), self._run.train.batch_size
        rows = parallel.rows_of_process(self._accelerator, count)
        sampler, other = qwen_image.Sampler(self._run.model.base), self._negative
        with nullcontext(None) if other is None else adapter.with_other(self.transformer, other) as negative:
            parts = [
                sampler.latents(
                    self.transformer,
                    [prompts[settings.prompts[row]] for row in some],
                    size=self._plan.dataset.train[0].bucket,
                    seeds=[settings.seed + row for row in some],
                    num_inference_steps=settings.num_inference_steps,
                    true_cfg_scale=settings.true_cfg_scale,
                    negative_prompt=prompts[qwen_image.EMPTY_PROMPT],
                    negative=negative,
                    batch_size=size,
                    device=self._device,
                )
                for some in tracker.each([rows[i : i + size] for i in range(0, len(rows), size)], "samples")
            ]
        return parallel.collect_rows(self._accelerator, count, rows, torch.cat(parts))

    def _write_samples(self, step: int, latents: Tensor, tracker: Tracker) -> list[Image.Image]:
        settings = self._run.validation
        vae = qwen_image.load_vae(self._run.model.base, self._device)  # loaded to decode, and freed again
        samples = []
        for row, (text, one) in enumerate(zip(settings.prompts, latents, strict=True)):
            if not bool(one.isfinite().all()):
                tracker.warn('step %d: the sample of "%s" is NaN and left out; %s', step, text, qwen_image.NAN_ADVICE)
                continue
            picture = qwen_image.decode_latents(vae, one[None])[0]
            samples.append(validation.Sample(text, settings.seed + row, picture))
            tracker.image(step, f"samples/{text}", picture)
        validation.write_samples(self._plan.output, step, samples)
        return [sample.picture for sample in samples]

    def _likeness(self, samples: Sequence[Image.Image]) -> dict[str, float]:
        """With held-out pictures, or with training pictures where none are held out."""
        embed, dataset = self._plan.start.embed, self._plan.dataset
        if not self._run.validation.likeness or embed is None or not samples:
            return {}
        real = [load_picture(example) for example in (dataset.held_out or dataset.train)]
        return measure.likeness(embed([*samples, *real], self._device), len(samples))


def _weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Both B."""
    return losses.mean() if weights is None else (losses * weights).mean()


def _without_gradients(plan: Plan) -> int:
    """A batch size: without gradients there is room for more."""
    return 2 * plan.config.train.batch_size


def _parts(plan: Plan, encoded: Encoded) -> Iterator[tuple[str, str, list[validation.Item]]]:
    """The pictures that validations look at: which part of the data, the name of its loss, the pictures."""
    dataset, count = plan.dataset, plan.config.validation.num_pictures
    for part, name, examples in (
        ("held_out", "val_loss", dataset.held_out), ("train", "train_stable_loss", dataset.train)
    ):  # fmt: skip
        if items := encoded.weighted(examples[:count], plan.config.data.mask_outside):
            yield part, name, items


def _losses(name: str, errors: Tensor) -> dict[str, float]:
    """errors: N 8 W"""
    return {f"{name}_masked" if way else name: float(errors[..., way].mean()) for way in range(errors.shape[-1])}


def stable_losses(
    plan: Plan, transformer: torch.nn.Module, encoded: Encoded, accelerator: Accelerator
) -> dict[str, float]:
    """`val_loss` of held-out pictures, if there are any, and `train_stable_loss`; where pictures have masks also
    `val_loss_masked` and `train_stable_loss_masked`, weighted as in training. Divided among the processes."""
    passes = measure.Passes(transformer, accelerator, DTYPES[plan.config.model.dtype], _without_gradients(plan))
    values = dict[str, float]()
    for _, name, items in _parts(plan, encoded):
        values.update(_losses(name, passes.errors(items)))
    return values


class Trials:
    """What a start would be worth: the errors of training pictures with it on the base.

    The transformer is loaded at the first trial, when an initializer's own models are gone; the text encoder is
    unloaded before.
    """

    def __init__(
        self,
        plan: Plan,
        encoded: Encoded,
        text_encoder: TextEncoder,
        load: Callable[[], QwenImageTransformer2DModel],
    ):
        self._plan, self._encoded, self._text_encoder, self._load = plan, encoded, text_encoder, load

    @cached_property
    def transformer(self) -> QwenImageTransformer2DModel:
        self._text_encoder.unload()
        return self._load()

    def __call__(self, weights: AdapterWeights, index: int, sigmas: Sequence[int]) -> Tensor:
        """The errors of training picture `index` with `weights` on the base, or of the base if they are empty, at some
        of the sigmas of `validation.stable_errors`."""
        run, device = self._plan.config, self.transformer.device
        items, dtype = [self._encoded.item(self._plan.dataset.train[index])], DTYPES[run.model.dtype]
        handles = adapter.attach_frozen(self.transformer, weights) if weights.factors else []
        try:
            size = run.train.batch_size
            return validation.stable_errors(self.transformer, items, device, dtype, batch_size=size, chosen=sigmas)[
                0
            ].cpu()
        finally:
            for handle in handles:
                handle.remove()
