"""The runs of a comparison: one base in memory, on which adapters are put, trained and taken off again."""

import errno
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from trainer import adapter, checkpoint, loop, objective, qwen_image, run
from trainer.adapter import AdapterConfig, AdapterWeights, InitContext, Seed
from trainer.compare.measures import NUM_SAMPLES
from trainer.compare.plan import Arm, Cell, Comparison, Subject
from trainer.errors import Interrupted
from trainer.files import read_json, write_json, write_text
from trainer.flow import generator
from trainer.hardware import machine, parallel
from trainer.lowrank import truncate, with_random_directions
from trainer.plan import Plan
from trainer.tracking import Tracker
from trainer.validation import Sample, write_sample

TRACEBACK_FILE = "error.txt"  # in the folder of a run that failed


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


def start_seconds(spent: float, report: Mapping[str, Any]) -> float | None:
    """What a start would cost alone, in seconds: stages of which the result was found in the cache count as what they
    took when it was computed. None if that is not known.

    report: the initializer's, with `seconds` of stages now, and `first_seconds` of those that a cache keeps.
    """
    now, first = report.get("seconds", {}), report.get("first_seconds", {})
    if None in first.values():
        return None
    return round(max(spent - sum(now.get(stage, 0.0) for stage in first), 0.0) + sum(first.values()), 3)


def stops_all(error: Exception) -> bool:
    """Whether no other run would fare better, or none is wanted: the disk is full, or the user has stopped it."""
    seen: BaseException | None = error
    while seen is not None:
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or isinstance(seen, Interrupted) or "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class Workbench:
    """One base in memory, on which adapters are put, trained and taken off again."""

    def __init__(self, comparison: Comparison, quiet: bool):
        self._comparison, self._quiet = comparison, quiet
        self._accelerator = parallel.make_accelerator(comparison.config.model.dtype)
        self.device = self._accelerator.device
        machine.check(comparison.subjects[0].plan, self.device)
        self._text_encoder = qwen_image.text_encoder(comparison.config.model, self.device)
        self._encoded: dict[str, objective.Encoded] = {}
        self._base_losses: dict[str, float] = {}
        self._base_samples: dict[tuple[int, int], Tensor | None] = {}
        self._seeds: tuple[tuple[str, str, int], Seed] | None = None
        self._loading_seconds = 0.0

    @cached_property
    def _transformer(self) -> Any:
        began = time.monotonic()
        model, train = self._comparison.config.model, self._comparison.config.train
        transformer = qwen_image.load_transformer(model, self.device)
        qwen_image.set_up(
            transformer,
            model,
            gradient_checkpointing=train.gradient_checkpointing,
            offload_activations=train.offload_activations,
        )
        self._loading_seconds += time.monotonic() - began
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

        The runs find it all in the cache. What fails here fails again in the runs, which tell of it.
        """
        steps: list[Callable[[], object]] = [partial(self._encode, subject)]
        steps += [partial(self._start, subject, arm) for arm in arms]
        for step in steps:
            try:
                step()
            except Exception as error:
                if stops_all(error):
                    raise

    def _encode(self, subject: Subject) -> objective.Encoded:
        if subject.name not in self._encoded:
            encoded = objective.encode(subject.plan, self.device, self._text_encoder, quiet=self._quiet)
            self._text_encoder.unload()  # an initializer that needs it has to load it: that is part of what it costs
            self._encoded[subject.name] = encoded
        return self._encoded[subject.name]

    def _start(self, subject: Subject, arm: Arm) -> dict[str, Any]:
        """What the arm's initializer did for the subject, and what it cost: measured when it is first asked, and kept,
        since it finds everything in the cache from then on."""
        file = self._comparison.output / "runs" / subject.name / arm.name / "init.json"
        if not file.exists():
            context = self._context(subject, arm, self._comparison.config.seed)
            began, loading = time.monotonic(), self._loading_seconds
            seed = self._initialize(arm, context)
            spent = time.monotonic() - began - (self._loading_seconds - loading)  # every run needs the base
            found = {"seconds": start_seconds(spent, seed.report), "report": seed.report}
            if not file.exists():  # else another part has been quicker
                write_json(file, found)
        return dict(read_json(file))

    def _context(self, subject: Subject, arm: Arm, seed: int) -> InitContext:
        """What the initializer is told. That of `wrong-pictures` is told of the next subject alone: it finds the start
        that i2l has there, with the strength that "auto" takes by those pictures. Judged by this subject's pictures,
        "auto" would reject the seed, and the control would be `random` under another name."""
        shown = subject
        if arm.control == "wrong-pictures":
            other = self._comparison.other(subject)
            assert other is not None
            shown = other
        trials = objective.Trials(shown.plan, self._encode(shown), self._text_encoder, lambda: self._transformer)
        context = run.init_context(shown.plan, self.device, trials, self._text_encoder)
        # a cache of the comparison's own, for each subject: what is computed in it is measured, and all at once
        cache = self._comparison.output / "cache" / "starts" / shown.name
        return replace(context, seed=seed, log=lambda message: None, cache=cache, diagnose=False)

    def _initialize(self, arm: Arm, context: InitContext) -> Seed:
        result = arm.start.initialize(context, arm.start.options)
        if arm.control == "norm-matched":
            return norm_matched(result, self._comparison.config.adapter, context.seed)
        return result

    def _seed(self, cell: Cell) -> Seed:
        """Computed once for all learning rates."""
        name = (cell.subject.name, cell.arm.name, cell.seed)
        if self._seeds is None or self._seeds[0] != name:
            self._seeds = None  # two of them need not be in memory
            self._seeds = name, self._initialize(cell.arm, self._context(cell.subject, cell.arm, cell.seed))
        return self._seeds[1]

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train, and say what came of it. What is wrong with one run is no reason to stop the others, unless
        `stops_all`."""
        result = {
            "group": cell.subject.group,
            "subject": cell.subject.name,
            "arm": cell.arm.name,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "fingerprint": self._comparison.fingerprint(cell),
            "hardware": machine.hardware(self.device),
        }
        try:
            self._encode(cell.subject)
            start = self._start(cell.subject, cell.arm)
            result |= {"init_seconds": start["seconds"], "init": start["report"]}
            result["base_loss"] = self._base_loss(cell.subject)
            return {**result, "status": "finished", **self._train(cell)}
        except Exception as error:
            if stops_all(error):
                raise
            file = cell.folder / TRACEBACK_FILE
            write_text(file, traceback.format_exc())
            where = file.relative_to(self._comparison.output).as_posix()
            told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return {**result, "status": "failed", "error": told, "traceback": where, "curve": []}

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
        objective.draw_prior(prepared, transformer, encoded, self._accelerator, quiet=self._quiet)
        try:
            _, applied = run.install(transformer, seed, settings.adapter, random_seed=cell.seed)
            if seed.frozen is not None:
                handles = adapter.attach_frozen(transformer, seed.frozen)
            training = objective.LoraObjective(prepared, transformer, encoded, self._accelerator, sample)
            resume = (cell.folder / checkpoint.FOLDER).exists()
            result = loop.train(
                training, prepared.job(), self._accelerator, resume=resume, quiet=self._quiet, nested=True
            )
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
                sample = Sample(text, prepared.config.validation.seed + number, picture)
                write_sample(cell.folder / "samples" / f"step-{step:06d}-{row}-{number}.png", sample)

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
