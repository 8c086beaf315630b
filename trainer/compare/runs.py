"""The runs of a comparison: one base in memory, on which adapters are put, trained and taken off again."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import adapter, loop, objective, qwen_image, run, validation
from trainer.adapter import AdapterConfig, AdapterWeights, Seed
from trainer.compare.measures import NUM_SAMPLES
from trainer.compare.plan import Arm, Cell, Comparison, Subject
from trainer.errors import TrainingError
from trainer.files import write_json
from trainer.flow import generator
from trainer.hardware import machine, parallel
from trainer.lowrank import truncate, with_random_directions
from trainer.plan import Plan
from trainer.tracking import Tracker


def norm_matched(seed: Seed, settings: AdapterConfig, number: int) -> Seed:
    """The control that has the seed's singular values, truncated to the adapter's ranks, and random directions."""
    settings = adapter.settings_for(seed, settings)

    def shuffled(weights: AdapterWeights, limit: Callable[[str], int | None]) -> AdapterWeights:
        found = {}
        for name, factors in weights.factors.items():
            rank = limit(name)
            kept = truncate(factors, rank)[0] if rank else factors
            found[name] = with_random_directions(kept, generator(number, "norm-matched", name))
        return AdapterWeights(found)

    frozen = shuffled(seed.frozen, lambda name: None) if seed.frozen else None
    return replace(seed, weights=shuffled(seed.weights, settings.rank_of), frozen=frozen)


class Workbench:
    """One base in memory, on which adapters are put, trained and taken off again."""

    def __init__(self, comparison: Comparison, quiet: bool):
        self._comparison, self._quiet = comparison, quiet
        self._accelerator = parallel.make_accelerator(comparison.config.model.dtype)
        self.device = self._accelerator.device
        machine.check(comparison.subjects[0].plan, self.device)
        self._text_encoder = qwen_image.TextEncoder(comparison.config.model.base, self.device)
        self._encoded: dict[str, objective.Encoded] = {}
        self._base_losses: dict[str, float] = {}
        self._base_samples: dict[tuple[int, int], Tensor | None] = {}
        self._seeds: tuple[tuple[str, str, int], Seed] | None = None

    @cached_property
    def _transformer(self) -> Any:
        model, train = self._comparison.config.model, self._comparison.config.train
        transformer = qwen_image.load_transformer(model, self.device)
        qwen_image.set_up(transformer, model, gradient_checkpointing=train.gradient_checkpointing)
        return transformer

    @cached_property
    def _sampler(self) -> qwen_image.Sampler:
        return qwen_image.Sampler(self._comparison.config.model.base)

    def close(self) -> None:
        """Free the base: measuring the samples needs the memory for other models."""
        self.__dict__.pop("_transformer", None)
        self._accelerator.free_memory()

    def prepare_subject(self, subject: Subject, arms: Sequence[Arm]) -> None:
        """Encode the subject's pictures and captions, and let each initializer predict, before the base is loaded.

        The time of this first prediction is what an initializer costs: the runs find it in the cache.
        """
        encoded = objective.encode(subject.plan, self.device, self._text_encoder, quiet=self._quiet)
        self._text_encoder.unload()  # an initializer that needs it has to load it: that is part of what it costs
        self._encoded[subject.name] = encoded
        for arm in arms:
            file = self._init_file(subject, arm)
            if not file.exists():
                began = time.monotonic()
                try:
                    seed = self._initialize(subject, arm, self._comparison.config.seed)
                except ValueError:  # its runs will fail by it, and tell
                    continue
                write_json(file, {"seconds": round(time.monotonic() - began, 3), "report": seed.report})

    def _init_file(self, subject: Subject, arm: Arm) -> Path:
        return self._comparison.output / "runs" / subject.name / arm.name / "init.json"

    def _initialize(self, subject: Subject, arm: Arm, seed: int) -> Seed:
        prepared = subject.plan
        trials = objective.Trials(prepared, self._encoded[subject.name], self._text_encoder, lambda: self._transformer)
        cache = self._comparison.output / "cache"  # of its own: what it costs must not be known from elsewhere
        context = run.init_context(prepared, self.device, trials, self._text_encoder)
        context = replace(context, seed=seed, log=lambda message: None, cache=cache)
        if arm.control == "wrong-pictures":
            other = self._comparison.other(subject)
            assert other is not None
            # apart, so that the other subject's own start is not found predicted already, at no cost
            images = tuple(example.path for example in other.plan.dataset.train)
            context = replace(context, images=images, cache=cache / "wrong-pictures")
        result = arm.start.initialize(context, arm.start.options)
        if arm.control == "norm-matched":
            return norm_matched(result, self._comparison.config.adapter, seed)
        return result

    def _seed(self, cell: Cell) -> Seed:
        """Computed once for all learning rates."""
        name = (cell.subject.name, cell.arm.name, cell.seed)
        if self._seeds is None or self._seeds[0] != name:
            self._seeds = name, self._initialize(cell.subject, cell.arm, cell.seed)
        return self._seeds[1]

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train, and say what came of it; what is wrong with one run is no reason to stop the others."""
        file = self._init_file(cell.subject, cell.arm)
        init = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"seconds": 0.0, "report": {}}
        result = {
            "group": cell.subject.group,
            "subject": cell.subject.name,
            "arm": cell.arm.name,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "fingerprint": self._comparison.fingerprint(cell),
            "init_seconds": init["seconds"],
            "init": init["report"],
            "base_loss": self._base_loss(cell.subject),
            "hardware": machine.hardware(self.device),
        }
        try:
            return {**result, "status": "finished", **self._train(cell)}
        except (TrainingError, ValueError, torch.OutOfMemoryError) as error:
            return {**result, "status": "failed", "error": str(error), "curve": []}

    def _base_loss(self, subject: Subject) -> float:
        """The stable loss of the subject's held-out pictures without any adapter."""
        if subject.name not in self._base_losses:
            encoded = self._encoded[subject.name]
            losses = objective.stable_losses(subject.plan, self._transformer.eval(), encoded, self._accelerator)
            self._base_losses[subject.name] = losses["val_loss"]
        return self._base_losses[subject.name]

    def _train(self, cell: Cell) -> dict[str, Any]:
        prepared, settings = self._comparison.plan_of(cell), self._comparison.config
        seed, transformer = self._seed(cell), self._transformer
        first = cell.seed == self._comparison.seeds[0]
        plain = self._plain(prepared) if first else None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        def sample(step: int, tracker: Tracker) -> Mapping[str, float]:
            if not first or step not in self._comparison.sample_steps:
                return {}
            self._draw(cell, prepared, step, tracker)
            drawn = self._unrelated(prepared)
            return {} if drawn is None or plain is None else {"drift": float((drawn - plain).square().mean())}

        encoded, handles = self._encoded[cell.subject.name], []
        try:
            _, applied = run.install(transformer, seed, settings.adapter, random_seed=cell.seed)
            if seed.frozen is not None:
                handles = adapter.attach_frozen(transformer, seed.frozen)
            training = objective.LoraObjective(prepared, transformer, encoded, self._accelerator, sample)
            every = settings.validation.every
            job = loop.Job(cell.folder, prepared.config.train, settings.checkpoint, every, prepared.course())
            resume = (cell.folder / "checkpoints").exists()
            result = loop.train(training, job, self._accelerator, resume=resume, quiet=self._quiet, nested=True)
        finally:
            for handle in handles:
                handle.remove()
            adapter.remove(transformer)
            self._accelerator.free_memory()
        return {"applied": applied, "curve": result.validations, "peak_memory_bytes": machine.peak_memory(self.device)}

    def _draw(self, cell: Cell, prepared: Plan, step: int, tracker: Tracker) -> None:
        """`samples/step-<step>-<prompt>-<noise>.png`"""
        base = prepared.config.model.base
        prompts = prepared.config.validation.prompts
        if not prompts:
            return
        latents = self._latents(prepared, prompts, NUM_SAMPLES).unflatten(0, (len(prompts), NUM_SAMPLES))
        vae = qwen_image.load_vae(base, self.device)
        for row, (text, part) in enumerate(zip(prompts, latents, strict=True)):
            pictures = qwen_image.decode_latents(vae, part)
            tracker.image(step, f"samples/{text}", pictures[0])
            for number, picture in enumerate(pictures):
                validation.write_png(cell.folder / "samples" / f"step-{step:06d}-{row}-{number}.png", picture)

    def _unrelated(self, prepared: Plan) -> Tensor | None:
        """Latents of the samples that drift is measured by."""
        prompts = prepared.config.validation.unrelated_prompts
        return self._latents(prepared, prompts, 1) if prompts else None

    def _plain(self, prepared: Plan) -> Tensor | None:
        """The same of the base without an adapter."""
        size = prepared.dataset.train[0].bucket
        if size not in self._base_samples:
            self._base_samples[size] = self._unrelated(prepared)
        return self._base_samples[size]

    def _latents(self, prepared: Plan, texts: Sequence[str], count: int) -> Tensor:
        """`count` samples for each of the texts, those of a text together; the noises are the same for all texts."""
        settings, prompts = prepared.config.validation, next(iter(self._encoded.values())).prompts
        return self._sampler.latents(
            self._transformer,
            [prompts[text] for text in texts for _ in range(count)],
            size=prepared.dataset.train[0].bucket,
            seeds=[settings.seed + number for _ in texts for number in range(count)],
            num_inference_steps=settings.num_inference_steps,
            true_cfg_scale=settings.true_cfg_scale,
            negative_prompt=prompts[qwen_image.EMPTY_PROMPT],
            batch_size=prepared.config.train.batch_size,
        )
