"""Train an i2L expert end to end with the flow-matching loss of the frozen transformer; no LoRAs are needed as targets.

    reference pictures -> encoders -> experts -> a LoRA for each sample -> velocity loss on *another* picture of it

Because the target is another picture of the subject, copying the reference does not help: the expert must learn what
stays the same. The validation losses show whether it does, on subjects that are never trained on: with the right
reference, with another subject's, and without a LoRA.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from initializers.i2l import encoders, layout
from initializers.i2l.expert import Expert, Factors
from initializers.i2l.training import hypernetwork
from initializers.i2l.training.batch_lora import BatchLora
from initializers.i2l.training.hypernetwork import ExpertConfig, Hypernetwork, StaticLora
from initializers.i2l.training.subjects import Encoding, SubjectData, SubjectsConfig, read_subjects
from trainer import checkpoint, flow, folder, loop, qwen_image, validation
from trainer import config as configuration
from trainer.adapter import AdapterConfig
from trainer.checkpoint import CheckpointConfig
from trainer.cli import add_run_arguments, guarded
from trainer.data.cache import Cache
from trainer.data.dataset import Example, load_picture
from trainer.files import DTYPES, content_hash, remove_leftovers, size, write_json
from trainer.flow import FlowConfig
from trainer.hardware import machine, memory, offload, parallel
from trainer.hub import sources
from trainer.hub.sources import Need
from trainer.loop import Loss, Measured
from trainer.optimizer import TrainConfig
from trainer.qwen_image import ModelConfig
from trainer.tracking import Tracker
from trainer.validation import ValidationConfig

log = logging.getLogger("trainer")

NUM_SHOWN = 4  # held-out subjects in the sample pictures
BIAS_OTHER_SUBJECTS = 0.1  # share of targets that Bias is trained on with references of another subject


@dataclass(frozen=True, kw_only=True)
class HypernetworkConfig:
    """Configuration of the training of an expert."""

    output: str
    """Folder of the run: everything it makes is written there."""
    seed: int = 0
    """Seed of all random choices: held-out subjects, pairs, noise, sigmas."""
    model: ModelConfig
    data: SubjectsConfig
    expert: ExpertConfig = ExpertConfig()
    train: TrainConfig = TrainConfig(steps=10_000, batch_size=16, learning_rate=1e-3, lr_schedule="cosine")
    flow: FlowConfig = FlowConfig()
    validation: ValidationConfig = ValidationConfig(every=500)
    checkpoint: CheckpointConfig = CheckpointConfig(every=500)

    def problems(self) -> list[str]:
        return [] if self.output.strip() else ["output must name a folder"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m initializers.i2l train", description="Train an i2L expert on pictures of many subjects."
    )
    add_run_arguments(parser, "configs/i2l_creatures_style.toml")
    parser.add_argument("--plan", action="store_true", help="check everything, print what the run would do, and stop")
    parser.add_argument("--help-config", action="store_true", help="explain every key of the configuration, and stop")
    options = parser.parse_args(arguments)
    if options.help_config:
        print(configuration.explain(HypernetworkConfig))
        return 0
    if options.config is None:
        parser.error("--config is needed; configs/i2l_creatures_style.toml trains the demo's Style expert")
    # quoted, or --output 2026-01-01 would be a date
    overrides = options.set + ([f"output={json.dumps(options.output)}"] if options.output else [])

    def program() -> None:
        settings = configuration.load(HypernetworkConfig, options.config, overrides)
        if options.plan:
            print(plan_text(settings, prepare(settings, resume=options.resume)))
        else:
            execute(settings, resume=options.resume, quiet=options.quiet)

    return guarded(program)


def prepare(settings: HypernetworkConfig, *, resume: bool) -> list[list[Example]]:
    """The pictures of each subject. ConfigError lists every problem of models, output and data at once."""
    problems = [problem for need in _needs(settings) for problem in sources.check(need)]
    problems += folder.problems(Path(settings.output), resume=resume, steps=settings.train.steps)
    if settings.model.compile:
        problems.append(
            "[model] compile: each step puts other LoRAs into the blocks: they would be compiled every time"
        )
    problems += parallel.problems(settings.model.dtype, settings.model.quantization, settings.train.optimizer)
    checkpointing = settings.train.gradient_checkpointing
    problems += offload.problems(settings.model.offload_blocks, gradient_checkpointing=checkpointing)
    subjects = read_subjects(settings.data, square=settings.expert.train_encoders, problems=problems)
    if problems:
        raise configuration.ConfigError(problems)
    return subjects


def plan_text(settings: HypernetworkConfig, subjects: Sequence[Sequence[Example]]) -> str:
    """What the run would do and need: subjects, parameters, memory, downloads. No weights are loaded."""
    transformer = qwen_image.transformer_on_meta(settings.model.base)
    geometry = _geometry(settings, transformer)
    with torch.device("meta"):
        learning: nn.Module = (
            StaticLora(layout.module_shapes(geometry), settings.expert.rank)
            if settings.expert.kind == "bias"
            else Expert(geometry, device="meta")
        )
    parameters = sum(p.numel() for p in learning.parameters())
    base = sum(p.numel() for p in transformer.parameters())
    batch, pixels = settings.train.batch_size, settings.data.resolution**2
    weights = memory.weight_bytes(transformer, settings.model)
    lora = AdapterConfig(rank=settings.expert.rank * settings.data.max_references)
    activations = memory.step_bytes(transformer, settings.model, settings.train, lora, pixels)
    factors = batch * settings.data.max_references * settings.expert.rank * 4 * 2
    factors *= sum(inside + out for inside, out in layout.module_shapes(geometry).values())
    states = {"AdamW": 4 + 4 + 8, "8-bit AdamW": 4 + 4 + 2}
    pictures = sum(len(group) for group in subjects)
    lines = [
        f"subjects     {len(subjects)} with {pictures} pictures, {settings.data.held_out_subjects} subjects held out",
        f"expert       {settings.expert.kind}: {parameters / 1e9:.3f} B parameters, "
        f"{len(layout.module_names(geometry))} modules, rank {settings.expert.rank}",
        f"base         {settings.model.base}: {base / 1e6:,.1f} M parameters in {settings.model.dtype}, frozen",
        f"training     {settings.train.steps} steps of {batch * settings.train.gradient_accumulation_steps} samples",
        f"memory       base {size(weights)}, predicted factors {size(factors)}, activations about {size(activations)}",
    ]
    for name, per_parameter in states.items():
        lines.append(
            f"             expert with gradients and {name} {size(parameters * per_parameter)}; "
            f"with FSDP over 8 GPUs {size(parameters * per_parameter / 8)} on each"
        )
    lines += [f"download     {line}" for line in sources.download_lines(_needs(settings))]
    return "\n".join(lines)


def _needs(settings: HypernetworkConfig) -> list[Need]:
    expert = settings.expert
    frozen = [Need(expert.weights, expert.frozen_files)] if expert.frozen_files else []
    return [qwen_image.need(settings.model.base), encoders.need(expert.encoders), *frozen]


def _geometry(settings: HypernetworkConfig, transformer: Any) -> layout.Geometry:
    size = encoders.embedding_size(settings.expert.encoders) or layout.Geometry().embedding_size
    return hypernetwork.geometry(settings.expert, transformer.config, size)


def execute(settings: HypernetworkConfig, *, resume: bool, quiet: bool) -> Path:
    """Train, then write the expert in the published layout, and the encoders, if they were trained. Returns the output.

    ConfigError if anything is wrong with the settings; CheckpointError if `resume` meets checkpoints of another run.
    """
    subjects = prepare(settings, resume=resume)
    accelerator = parallel.make_accelerator(settings.model.dtype)
    with accelerator.local_main_process_first():  # the other processes find the files on the disk
        sources.fetch(_needs(settings), quiet=quiet)
    with folder.occupied(Path(settings.output), main=accelerator.is_main_process):
        return _execute(settings, subjects, accelerator, resume=resume, quiet=quiet)


def _execute(
    settings: HypernetworkConfig,
    subjects: Sequence[Sequence[Example]],
    accelerator: Accelerator,
    *,
    resume: bool,
    quiet: bool,
) -> Path:
    output = Path(settings.output)
    job = loop.Job(output, settings.train, settings.checkpoint, settings.validation.every, _course(settings, subjects))
    if resume:  # before run.json is written, which holds the settings that a resumed run must have
        loop.latest(job, accelerator)
    with accelerator.main_process_first():  # the other processes read from the cache what this one encoded
        if resume and accelerator.is_main_process:  # without --resume the folder may hold files of other programs
            remove_leftovers(output)
        encoding = _encoding(settings, accelerator.device, quiet)
        prompts = settings.validation.prompts
        data = SubjectData(settings.data, subjects, encoding, prompts=prompts, seed=settings.seed)
    objective = HypernetworkObjective(settings, data, accelerator)
    report = _report(settings, data, objective, accelerator.device)
    if accelerator.is_main_process:
        write_json(output / folder.RUN_FILE, {"status": "running", **report})
    trained, held_out, parameters = len(data.train), len(data.held_out), report["parameters"]
    log.info("%d subjects for training, %d held out; %s parameters are trained", trained, held_out, f"{parameters:,}")
    result = loop.train(objective, job, accelerator, resume=resume, quiet=quiet)
    parallel.unshard(objective.network)
    if accelerator.is_main_process:
        file = objective.network.save(output)
        report |= {"status": "finished", "steps": result.step, "validations": result.validations}
        report |= {"seconds": result.seconds, "peak_memory_bytes": machine.peak_memory(accelerator.device)}
        write_json(output / folder.RUN_FILE, report)
        log.info("done: %s", file)
    accelerator.end_training()
    return output


def _encoding(settings: HypernetworkConfig, device: torch.device, quiet: bool) -> Encoding:
    return Encoding(
        settings.model,
        encoders_from=None if settings.expert.train_encoders else settings.expert.encoders,
        resolutions=settings.expert.resolutions,
        cache=Cache(Path(settings.data.cache or Path(settings.output) / "cache")),
        device=device,
        quiet=quiet,
    )


def _report(
    settings: HypernetworkConfig, data: SubjectData, objective: "HypernetworkObjective", device: torch.device
) -> dict[str, Any]:
    """The part of run.json that is known before the training."""
    return {
        "config": configuration.to_dict(settings),
        "versions": machine.versions(),
        "hardware": machine.hardware(device),
        "subjects": {"train": len(data.train), "held_out": len(data.held_out)},
        "parameters": sum(p.numel() for p in objective.module.parameters()),
        "sources": sources.used(_needs(settings)),
    }


def _course(settings: HypernetworkConfig, subjects: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """What must be the same when the training is resumed: see `Plan.course`."""
    expert, values = settings.expert, configuration.to_dict(settings)
    frozen = [content_hash(sources.locate(expert.weights, file)) for file in expert.frozen_files]
    models = {
        "model.base": qwen_image.identity(settings.model.base, qwen_image.PARTS),
        "expert.encoders": encoders.identity(expert.encoders),
        "expert.weights": frozen or None,
    }
    free = {"output", "validation", "checkpoint", "model.base", "model.attention", "expert.weights", "expert.encoders"}
    free |= {"data.images", "data.cache", "train.gradient_checkpointing"}
    free |= {"train.offload_activations", "model.offload_blocks"}
    pictures = [(e.digest, e.caption) for group in subjects for e in group]
    return checkpoint.course(values, pictures, models, free)


class HypernetworkObjective:
    """The velocity loss of the frozen transformer, with the LoRA that is predicted for each sample.

    Pairs, sigmas and noise are drawn for all processes together and each process takes its part, so that two processes
    train as one with twice the batch does.
    """

    def __init__(self, settings: HypernetworkConfig, data: SubjectData, accelerator: Accelerator):
        self._settings, self._data, self._accelerator = settings, data, accelerator
        self._transformer = qwen_image.load_transformer(settings.model, accelerator.device)
        qwen_image.set_up(
            self._transformer,
            settings.model,
            gradient_checkpointing=settings.train.gradient_checkpointing,
            offload_activations=settings.train.offload_activations,
        )
        geometry = _geometry(settings, self._transformer)
        self.network = Hypernetwork(settings.expert, geometry)
        self.network.to_device(accelerator.device)
        self.module: nn.Module = self.network
        self._lora = BatchLora(self._transformer, layout.module_names(geometry))
        self._other_subjects = BIAS_OTHER_SUBJECTS if settings.expert.kind == "bias" else 0.0

    def loss(self, step: int, micro_step: int) -> Loss:
        settings, batch_size = self._settings, self._settings.train.batch_size
        total, first = batch_size * self._accelerator.num_processes, batch_size * self._accelerator.process_index
        random = flow.generator(settings.seed, "pairs", step, micro_step)
        pairs = self._data.pairs(total, random, other_subjects=self._other_subjects)
        num_tokens = self._data.latents.shape[-1] * self._data.latents.shape[-2] // 4
        sigmas = flow.sample_sigmas(settings.flow, total, num_tokens, random)
        noise = torch.randn(total, *self._data.latents.shape[1:], generator=random)
        own = slice(first, first + batch_size)
        factors = self._predict(self.module, pairs.references[own])
        losses = self._losses(pairs.targets[own], sigmas[own], noise[own], factors)
        names = [self._data.examples[row].path.name for row in pairs.targets[own].tolist()]
        return Loss(losses.mean(), ", ".join(names))

    def _predict(self, network: nn.Module, rows: Tensor, **options: bool) -> dict[str, Factors]:
        """rows: B K, the references of each sample"""
        device = self._accelerator.device
        references, residuals = self._data.references(rows)
        return network(references.to(device), {size: x.to(device) for size, x in residuals.items()}, **options)

    def _losses(self, rows: Tensor, sigmas: Tensor, noise: Tensor, factors: dict[str, Factors]) -> Tensor:
        device, dtype = self._accelerator.device, DTYPES[self._settings.model.dtype]
        latents, embeds, mask = self._data.targets(rows)
        latents, noise, sigmas = latents.to(device), noise.to(device), sigmas.to(device)
        noisy = flow.interpolate(latents, noise, sigmas).to(dtype)
        embeds, mask = embeds.to(device), None if mask is None else mask.to(device)
        with self._lora.applied(factors):
            predicted = qwen_image.predict_velocity(self._transformer, noisy, sigmas, embeds, mask)
        return flow.losses(predicted, latents, noise)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        own = self.network.state_dict()
        self.network.load_state_dict(
            {name: parallel.sharded_like(tensor, own[name]) for name, tensor in tensors.items()}
        )

    def validate(self, step: int, tracker: Tracker) -> Measured:
        """Losses on held-out subjects: with the right reference, with the next subject's, and without a LoRA; where
        there are frozen experts, also with these alone."""
        if not (self._accelerator.is_main_process or parallel.is_sharded(self.network)):
            return Measured()
        pairs = self._data.held_out_pairs()
        count = len(pairs.targets)
        sigmas = flow.stratified_sigmas(validation.NUM_SIGMAS).repeat(count // validation.NUM_SIGMAS + 1)[:count]
        noise = torch.randn(count, *self._data.latents.shape[1:], generator=flow.generator("stable loss"))
        arms: dict[str, tuple[Tensor | None, bool]] = {
            "val_loss": (pairs.references, True),
            "val_loss_wrong_picture": (pairs.references.roll(1, 0), True),
            "val_loss_no_lora": (None, False),
        }
        if self.network.frozen:
            arms["val_loss_frozen_only"] = (pairs.references, False)
            arms["val_loss_frozen_only_wrong_picture"] = (pairs.references.roll(1, 0), False)
        values = {}
        for name, (references, learning) in tracker.each([*arms.items()], "validation losses"):
            parts = []
            for rows in torch.arange(count).split(self._settings.train.batch_size):
                factors = {} if references is None else self._predict(self.network, references[rows], learning=learning)
                parts.append(self._losses(pairs.targets[rows], sigmas[rows], noise[rows], factors))
            values[name] = float(torch.cat(parts).mean())
        self._draw(step, tracker, pairs.references)
        return Measured(values)

    def _draw(self, step: int, tracker: Tracker, references: Tensor) -> None:
        """A sheet for each prompt: the reference, then samples with its LoRA, with another subject's, without one."""
        settings, data = self._settings.validation, self._data
        right, wrong = references[:NUM_SHOWN], references.roll(1, 0)[:NUM_SHOWN]
        sampler = qwen_image.Sampler(self._settings.model.base)
        for number, text in enumerate(tracker.each(settings.prompts, "samples")):
            latents = []
            for rows in (right, wrong, None):
                with self._lora.applied({} if rows is None else self._predict(self.network, rows)):
                    latents.append(
                        sampler.latents(
                            self._transformer,
                            [data.prompts[text]] * len(right),
                            size=data.examples[0].bucket,
                            seeds=[settings.seed + row for row in range(len(right))],
                            num_inference_steps=settings.num_inference_steps,
                            true_cfg_scale=settings.true_cfg_scale,
                            negative_prompt=data.prompts[qwen_image.EMPTY_PROMPT],
                            batch_size=len(right),
                        )
                    )
            if not self._accelerator.is_main_process:  # the first process writes; this one only computed its shards
                continue
            vae = qwen_image.load_vae(self._settings.model.base, self._accelerator.device)
            columns = [qwen_image.decode_latents(vae, part) for part in latents]
            pictures: list[list[Image.Image]] = [
                [load_picture(data.examples[int(row)]), *[column[i] for column in columns]]
                for i, row in enumerate(right[:, 0])
            ]
            sheet = validation.grid(pictures, ["reference", "its LoRA", "another's", "no LoRA"], [text] * len(right))
            validation.write_png(Path(self._settings.output) / "samples" / f"step-{step:06d}-{number}.png", sheet)
            tracker.image(step, f"samples/{text}", sheet)
