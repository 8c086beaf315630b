"""From a configuration to a saved adapter: the program, top to bottom.

check everything -> encode pictures and captions -> ask the initializer -> inject and seed -> train -> save
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from trainer import adapter, checkpoint, config, export, flow, loop, qwen_image, validation
from trainer.adapter import AdapterConfig, AdapterWeights, InitContext, Seed
from trainer.data.cache import Cache
from trainer.data.dataset import Dataset, Example, batch, drops_caption
from trainer.data.encode import encode_pictures, encode_prompts
from trainer.files import DTYPES, remove_leftovers, write_json
from trainer.formats import read_lora, write_lora
from trainer.hardware import machine, parallel
from trainer.hub import sources
from trainer.loop import Loss
from trainer.plan import Plan
from trainer.qwen_image import TextEncoder
from trainer.tracking import Tracker, duration

log = logging.getLogger("trainer")

FROZEN_FILE = "frozen.safetensors"  # in the output: what is held on the base, to resume and to export


def execute(plan: Plan, *, resume: bool, quiet: bool) -> Path:
    """Run the plan; returns the adapter's folder. See `loop.train` for what it raises."""
    run, began = plan.config, time.monotonic()
    accelerator = parallel.make_accelerator(run.model.dtype)
    device, seconds = accelerator.device, {}
    text_encoder = TextEncoder(run.model.base, device)
    machine.check(plan, device)
    with accelerator.local_main_process_first():  # the others find it all on the disk
        sources.fetch(plan.needs, quiet=quiet)
    loading = parallel.loading_device(device)
    batches = loop.batches_per_step(run.train, accelerator)
    for note in plan.dataset.notes:
        log.info("note: %s", note)
    saved = checkpoint.latest(plan.output / "checkpoints", plan.fingerprint(), batches) if resume else None
    tick = time.monotonic()
    with accelerator.main_process_first():  # the others find it all in the cache
        if resume and accelerator.is_main_process:  # else the folder may hold what is not ours
            remove_leftovers(plan.output)
        encoded = encode(plan, device, text_encoder, quiet=quiet)
    seconds["encode"], tick = time.monotonic() - tick, time.monotonic()

    report: dict[str, Any] = {"config": config.to_dict(run), "init_options": config.to_dict(plan.start.options)}
    report |= {"versions": machine.versions(), "hardware": machine.hardware(device), "data": data_report(plan.dataset)}
    report["sources"] = sources.used(plan.needs)
    settings, frozen = run.adapter, None
    if saved:
        log.info("resuming after step %d", saved.step)
        report["init"] = json.loads((plan.output / "run.json").read_text(encoding="utf-8"))["init"]
        settings = replace(settings, **report["init"]["adapter"])
        text_encoder.unload()
        transformer = qwen_image.load_transformer(run.model, loading)
        adapter.inject(transformer, settings)
        if (plan.output / FROZEN_FILE).exists():
            frozen = read_lora(plan.output / FROZEN_FILE)[0]
    else:
        if resume:
            log.info("no checkpoint yet: starting from the beginning")
        trials = Trials(plan, encoded, text_encoder, lambda: qwen_image.load_transformer(run.model, loading))
        context = init_context(plan, device, None if parallel.uses_fsdp() else trials, text_encoder)
        with accelerator.main_process_first():  # the others find what it predicted in the cache
            seed = plan.start.initialize(context, plan.start.options)
        transformer = trials.transformer
        settings, applied = install(transformer, seed, settings, random_seed=run.seed)
        frozen = seed.frozen
        if frozen is not None and accelerator.is_main_process:
            write_lora(plan.output / FROZEN_FILE, frozen, {})
        seconds["init"] = time.monotonic() - tick
        report["init"] = {"method": plan.start.method, **seed.report, "applied": applied}
        report["init"]["adapter"] = {"rank": settings.rank, "rank_pattern": settings.rank_pattern}
        report["init"]["seconds"] = seconds["init"]
        log.info("start: %s", summary(plan.start.method, applied, seconds["init"], held=frozen))
    if frozen is not None:
        adapter.attach_frozen(transformer, frozen)
    if accelerator.is_main_process:
        write_json(plan.output / "run.json", {"status": "running", **report})
    qwen_image.set_up(transformer, run.model, gradient_checkpointing=run.train.gradient_checkpointing)

    objective = LoraObjective(plan, transformer, encoded, accelerator)
    result = loop.train(
        objective,
        run.train,
        run.checkpoint,
        output=plan.output,
        accelerator=accelerator,
        validate_every=run.validation.every,
        resume=resume,
        quiet=quiet,
        fingerprint=plan.fingerprint(),
    )
    folder = plan.output / "adapter"
    parallel.unshard(objective.transformer)
    if accelerator.is_main_process:
        report |= {"status": "finished", "steps": result.step, "validations": result.validations}
        export.export(objective.transformer, folder, run.export, settings, frozen, report)
        report["seconds"] = {**seconds, "train": result.seconds, "total": time.monotonic() - began}
        report["peak_memory_bytes"] = machine.peak_memory(device)
        write_json(plan.output / "run.json", report)
        log.info("done in %s: %s", duration(time.monotonic() - began), folder)
        if run.export.push_to_hub:
            log.info("uploaded to %s", export.push(folder, run.export.push_to_hub))
    accelerator.end_training()
    return folder


def install(
    transformer: QwenImageTransformer2DModel, seed: Seed, settings: AdapterConfig, *, random_seed: int
) -> tuple[AdapterConfig, dict[str, Any]]:
    """Inject an adapter and write the seed into it; its frozen LoRA is left to `adapter.attach_frozen`. Returns the
    settings that the adapter has, and the report of `apply_seed`."""
    settings = adapter.settings_for(seed, settings)
    adapter.inject(transformer, settings)
    return settings, adapter.apply_seed(transformer, seed, random_seed=random_seed)


def init_context(plan: Plan, device: torch.device, trials: "Trials | None", text_encoder: TextEncoder) -> InitContext:
    """What an initializer is told of a run: nothing of held-out pictures."""
    return InitContext(
        images=tuple(example.path for example in plan.dataset.train),
        modules=plan.modules,
        rank=plan.config.adapter.rank,
        seed=plan.config.seed,
        device=device,
        base=plan.config.model.base,
        log=log.info,
        cache=Path(plan.config.data.cache or plan.output / "cache"),
        text_encoder=text_encoder,
        try_seed=trials,
    )


class Trials:
    """What a seed is worth before it is chosen: stable losses of training pictures. The transformer is loaded when it
    is asked for, so that an initializer's own models are gone by then, and lets the text encoder go."""

    def __init__(
        self,
        plan: Plan,
        encoded: "Encoded",
        text_encoder: TextEncoder,
        load: Callable[[], QwenImageTransformer2DModel],
    ):
        self._plan, self._encoded, self._text_encoder, self._load = plan, encoded, text_encoder, load

    @cached_property
    def transformer(self) -> QwenImageTransformer2DModel:
        self._text_encoder.unload()
        return self._load()

    def __call__(self, weights: AdapterWeights, index: int) -> float:
        """Of training picture `index` with `weights` on the base; of the base itself if they are empty."""
        run, device = self._plan.config, self.transformer.device
        item = self._encoded.item(self._plan.dataset.train[index])
        handles = adapter.attach_frozen(self.transformer, weights) if weights.factors else []
        try:
            dtype = DTYPES[run.model.dtype]
            size = run.train.batch_size
            return float(validation.stable_errors(self.transformer, [item], device, dtype, batch_size=size).mean())
        finally:
            for handle in handles:
                handle.remove()


def summary(method: str, applied: Mapping[str, Any], seconds: float, *, held: AdapterWeights | None = None) -> str:
    """One line on what the adapter starts from."""
    if held is not None:
        line = f"{method}, {len(held.factors)} modules held on the base; on top of them "
        return f"{line}{applied['random']} modules to be trained, random; {seconds:.1f} s"
    line = f"{method}, {applied['seeded']} modules seeded, {applied['random']} random"
    if applied["padded"]:
        line += f", {applied['padded']} padded to the rank"
    if applied["dropped"]:
        lost = sum(applied["dropped"].values())
        line += f", {len(applied['dropped'])} not trained here, with {lost:.1%} of the energy: "
        line += ", ".join(list(applied["dropped"])[:3]) + (", ..." if len(applied["dropped"]) > 3 else "")
    if applied["energy_kept"]:
        line += f"; energy kept {applied['energy_kept']['mean']:.1%} (least {applied['energy_kept']['min']:.1%})"
    return f"{line}; proved to {applied['largest_error']:.0e}; {seconds:.1f} s"


@dataclass(frozen=True)
class Encoded:
    """Latents and prompt_embeds of all examples, on the CPU."""

    latents: dict[str, Tensor]  # picture digest and bucket -> C 1 h w
    prompts: dict[str, Tensor]  # text -> L D

    def item(self, example: Example) -> validation.Item:
        return validation.Item(
            example.path.name, example.digest, self.latents[_name(example)], self.prompts[example.caption]
        )


def _name(example: Example) -> str:
    return f"{example.digest} {example.bucket}"


def encode(plan: Plan, device: torch.device, text_encoder: TextEncoder, *, quiet: bool) -> Encoded:
    """Encode what the cache does not hold: first the pictures, then the captions."""
    run, cache = plan.config, Cache(Path(plan.config.data.cache or plan.output / "cache"))
    examples = list({_name(e): e for e in (*plan.dataset.train, *plan.dataset.held_out)}.values())
    latents = encode_pictures(cache, run.model.base, examples, device, quiet=quiet)
    texts = {e.caption for e in examples} | {
        *run.validation.prompts,
        *run.validation.unrelated_prompts,
        qwen_image.NO_CAPTION,
        qwen_image.NEGATIVE_PROMPT,
    }
    prompts = encode_prompts(cache, text_encoder, DTYPES[run.model.dtype], texts, quiet=quiet)
    qwen_image.free_memory()
    return Encoded({_name(e): value for e, value in zip(examples, latents, strict=True)}, prompts)


def stable_losses(
    plan: Plan, transformer: torch.nn.Module, encoded: Encoded, accelerator: Accelerator
) -> dict[str, float]:
    """`val_loss` of held-out pictures, if there are any, and `train_stable_loss`. Shared out among the processes."""
    run, values = plan.config, dict[str, float]()
    device, dtype = accelerator.device, DTYPES[run.model.dtype]
    for name, examples in (("val_loss", plan.dataset.held_out), ("train_stable_loss", plan.dataset.train)):
        items = [encoded.item(example) for example in examples[: run.validation.num_pictures]]
        if items:
            size = 2 * run.train.batch_size  # without gradients there is room for it
            rows = parallel.rows_of_process(accelerator, len(items))
            own = [items[row] for row in rows]
            errors = validation.stable_errors(transformer, own, device, dtype, batch_size=size)
            values[name] = float(parallel.collect_rows(accelerator, len(items), rows, errors).mean())
    return values


@dataclass(frozen=True)
class Inputs:
    """Of one forward pass."""

    latents: Tensor  # B C 1 h w
    noise: Tensor
    sigmas: Tensor  # B
    prompt_embeds: Tensor  # B L D
    mask: Tensor | None  # B L
    random: torch.Generator
    names: list[str]


class LoraObjective:
    """Train the adapter in the transformer with the flow-matching loss."""

    def __init__(
        self,
        plan: Plan,
        transformer: QwenImageTransformer2DModel,
        encoded: Encoded,
        accelerator: Accelerator,
        sample: Callable[[int, Tracker], Mapping[str, float]] | None = None,
    ):
        """`sample(step, tracker)` is called at validations instead of drawing the sample pictures of the configuration;
        what it returns is logged."""
        self.module: torch.nn.Module = transformer.train()
        self.transformer = transformer
        self._plan, self._run, self._encoded, self._accelerator = plan, plan.config, encoded, accelerator
        self._sample = sample or self._draw
        self._device, self._dtype = accelerator.device, DTYPES[plan.config.model.dtype]

    def loss(self, step: int, micro_step: int) -> Loss:
        inputs = self.inputs(step, micro_step)
        return Loss(self.forward(inputs), ", ".join(inputs.names))

    def inputs(self, step: int, micro_step: int) -> "Inputs":
        """Pictures, captions, sigmas and noise: functions of the seed and the step."""
        run, processes = self._run, self._accelerator.num_processes
        part = micro_step * processes + self._accelerator.process_index  # of the step, however it is divided
        index = step * run.train.gradient_accumulation_steps * processes + part
        examples = batch(self._plan.dataset.train, run.train.batch_size, seed=run.seed, index=index)
        share = run.data.caption_dropout
        dropped = [drops_caption(share, seed=run.seed, index=index, position=i) for i in range(len(examples))]
        texts = [qwen_image.NO_CAPTION if drop else e.caption for e, drop in zip(examples, dropped, strict=True)]
        random = flow.generator(run.seed, "noise", step, part, 0)
        latents = torch.stack([self._encoded.latents[_name(e)] for e in examples])  # B C 1 h w
        noise = torch.randn(latents.shape, generator=random)
        num_tokens = latents.shape[-1] * latents.shape[-2] // 4
        sigmas = flow.sample_sigmas(run.flow, len(latents), num_tokens, random).to(self._device)
        embeds, mask = qwen_image.stack_prompts([self._encoded.prompts[text] for text in texts])
        mask = None if mask is None else mask.to(self._device)
        latents, noise, embeds = latents.to(self._device), noise.to(self._device), embeds.to(self._device)
        return Inputs(latents, noise, sigmas, embeds, mask, random, [str(e.path) for e in examples])

    def forward(self, inputs: "Inputs") -> Tensor:
        """The loss: scalar, attached to the graph."""
        noisy = flow.interpolate(inputs.latents, inputs.noise, inputs.sigmas).to(self._dtype)
        with flow.seeded(inputs.random, self._device):  # the adapter's dropout
            predicted = qwen_image.predict_velocity(
                self.module, noisy, inputs.sigmas, inputs.prompt_embeds, inputs.mask
            )
        return flow.losses(predicted, inputs.latents, inputs.noise).mean()

    def tensors(self) -> dict[str, Tensor]:
        return adapter.tensors(self.transformer)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        adapter.load_tensors(self.transformer, tensors)

    def validate(self, step: int, tracker: Tracker) -> dict[str, float]:
        """Stable losses and sample pictures, shared out among the processes; the first one writes."""
        self.transformer.eval()
        values = stable_losses(self._plan, self.transformer, self._encoded, self._accelerator)
        values.update(self._sample(step, tracker))
        self.transformer.train()
        return values

    def _draw(self, step: int, tracker: Tracker) -> Mapping[str, float]:
        settings, prompts = self._run.validation, self._encoded.prompts
        if not settings.prompts:
            return {}
        count, base = len(settings.prompts), self._run.model.base
        rows = parallel.rows_of_process(self._accelerator, count)
        latents = qwen_image.Sampler(base).latents(
            self.transformer,
            [prompts[settings.prompts[row]] for row in rows],
            size=self._plan.dataset.train[0].bucket,
            seeds=[settings.seed + row for row in rows],
            num_inference_steps=settings.num_inference_steps,
            true_cfg_scale=settings.true_cfg_scale,
            negative_prompt=prompts[qwen_image.NEGATIVE_PROMPT],
            batch_size=self._run.train.batch_size,
            device=self._device,
        )
        latents = parallel.collect_rows(self._accelerator, count, rows, latents)
        if not self._accelerator.is_main_process:
            return {}
        vae = qwen_image.load_vae(base, self._device)  # brought in to decode, and let go
        pictures = [picture for one in latents for picture in qwen_image.decode_latents(vae, one[None])]
        folder = self._plan.output / "samples"
        validation.save_samples(folder, step, pictures)
        for text, picture in zip(settings.prompts, pictures, strict=True):
            tracker.image(step, f"samples/{text}", picture)
        sheet = validation.contact_sheet(folder, settings.prompts)
        if sheet is not None:
            validation.write_png(self._plan.output / "contact_sheet.png", sheet)
        return {}


def data_report(dataset: Dataset) -> dict[str, Any]:
    return {
        name: [{"picture": e.path.name, "sha256": e.digest, "caption": e.caption} for e in examples]
        for name, examples in (("train", dataset.train), ("held_out", dataset.held_out))
    }
