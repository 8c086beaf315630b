"""Train an i2L expert end to end: no teacher LoRAs, only the flow-matching loss through the frozen transformer.

    reference picture -> encoders -> expert -> a LoRA for each sample -> velocity loss on *another* picture of it

The subject's other picture is what keeps an expert from copying: it must learn what stays the same. The log tells
whether it does, on subjects never trained on: the loss with the right reference, with another subject's, with none.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from initializers.i2l import encoders, layout
from initializers.i2l.batch_lora import BatchLora
from initializers.i2l.expert import Expert, Factors, save_expert
from trainer import checkpoint, flow, loop, qwen_image, run, validation
from trainer import config as configuration
from trainer.cache import Cache, key
from trainer.checkpoint import CheckpointConfig
from trainer.cli import add_run_arguments, guarded
from trainer.dataset import DataConfig, Example, load_picture, scan
from trainer.encode import encode_pictures, encode_prompts
from trainer.files import remove_leftovers, write_json
from trainer.flow import FlowConfig
from trainer.loop import Loss, TrainConfig
from trainer.pictures import DataError, open_picture
from trainer.qwen_image import ModelConfig
from trainer.tracking import Tracker
from trainer.validation import ValidationConfig

log = logging.getLogger("trainer")

NUM_SHOWN = 4  # held-out subjects in the sample pictures


@dataclass(frozen=True, kw_only=True)
class SubjectsConfig:
    """`[data]`"""

    images: str
    """A folder of pictures with `metadata.jsonl`: `file_name`, `text`, `subject`. A subject needs two pictures."""
    resolution: int = 1024
    """Side of the square, in pixels, to which target pictures are brought."""
    held_out_subjects: int = 64
    """Subjects kept from training, chosen by seed: validation is on them alone."""
    cache: str | None = None
    """Folder for latents, prompt embeddings and image embeddings; default: `cache` in the output."""

    def problems(self) -> list[str]:
        return (
            []
            if self.held_out_subjects > 1
            else ["held_out_subjects must be at least 2: one is the other's wrong picture"]
        )


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """`[expert]`"""

    kind: Literal["style"] = "style"
    """Style is the expert without a residual."""
    encoders: str = "DiffSynth-Studio/General-Image-Encoders"
    """Folder or Hugging Face id of SigLIP2 and DINOv3."""
    train_encoders: bool = False
    """Train SigLIP2 and DINOv3 along with the expert. Only for small square pictures, all of one size."""
    compress: int = 64
    """Width between an expert's two layers; 64 in the published Style."""
    rank: int = 4
    """Rank of the LoRA predicted from one picture; 4 in the published experts."""

    def problems(self) -> list[str]:
        return [f"{name} must be at least 1" for name in ("compress", "rank") if getattr(self, name) < 1]


@dataclass(frozen=True, kw_only=True)
class HypernetworkConfig:
    """A hypernetwork's training run."""

    output: str
    """The run's folder; everything it makes is written there."""
    seed: int = 0
    """Of the expert's start, the pairs, the noise and the sigmas."""
    model: ModelConfig
    data: SubjectsConfig
    expert: ExpertConfig = ExpertConfig()
    train: TrainConfig = TrainConfig(steps=10_000, batch_size=16, learning_rate=1e-3, lr_schedule="cosine")
    flow: FlowConfig = FlowConfig()
    validation: ValidationConfig = ValidationConfig(every=500)
    checkpoint: CheckpointConfig = CheckpointConfig(every=500)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m initializers.i2l train", description="Train an i2L expert on pictures of many subjects."
    )
    add_run_arguments(parser, "configs/i2l_creatures_style.toml")
    parser.add_argument("--help-config", action="store_true", help="explain every key of the configuration, and stop")
    options = parser.parse_args(arguments)
    if options.help_config:
        print(configuration.describe(HypernetworkConfig))
        return 0
    if options.config is None:
        parser.error("--config is needed; configs/i2l_creatures_style.toml is the demo's")
    overrides = options.set + ([f"output={options.output}"] if options.output else [])
    return guarded(lambda: execute(load(options.config, overrides), resume=options.resume, quiet=options.quiet))


def load(path: Path, overrides: list[str]) -> HypernetworkConfig:
    problems: list[str] = []
    table = configuration.read_toml(path, problems)
    if problems:  # nothing to look at: every key would be reported as missing
        raise configuration.ConfigError(problems)
    table = configuration.apply_overrides(table, overrides, problems)
    parsed = configuration.parse(HypernetworkConfig, table, "", problems)
    if parsed is None or problems:
        raise configuration.ConfigError(problems)
    return parsed


def execute(settings: HypernetworkConfig, *, resume: bool, quiet: bool) -> Path:
    """Train, then write the expert (and the encoders, if they were trained) in the published layout."""
    output = Path(settings.output)
    subjects = read_subjects(settings, resume=resume)
    fingerprint = key(_course(settings), [[e.digest, e.caption] for group in subjects for e in group])
    if resume:  # refused before run.json is written, which tells the settings to resume with
        checkpoint.latest(output / "checkpoints", fingerprint)
    accelerator = run.make_accelerator(settings.model.dtype)
    with accelerator.main_process_first():  # the others find it all in the cache
        if accelerator.is_main_process:
            remove_leftovers(output)
        data = PairData(settings, subjects, accelerator.device, quiet=quiet)
    objective = HypernetworkObjective(settings, data, accelerator)
    report: dict[str, Any] = {
        "config": configuration.to_dict(settings),
        "versions": run.versions(),
        "hardware": run.hardware(accelerator.device),
        "subjects": {"train": len(data.train), "held_out": len(data.held_out)},
        "parameters": sum(p.numel() for p in objective.module.parameters()),
    }
    if accelerator.is_main_process:
        write_json(output / "run.json", {"status": "running", **report})
    log.info(
        "%d subjects, %d held out; %s parameters", len(data.train), len(data.held_out), f"{report['parameters']:,}"
    )
    result = loop.train(
        objective,
        settings.train,
        settings.checkpoint,
        output=output,
        accelerator=accelerator,
        validate_every=settings.validation.every,
        resume=resume,
        quiet=quiet,
        fingerprint=fingerprint,
    )
    if accelerator.is_main_process:
        objective.save(output)
        report |= {"status": "finished", "steps": result.step, "validations": result.validations}
        report |= {"seconds": result.seconds, "peak_memory_bytes": run.peak_memory(accelerator.device)}
        write_json(output / "run.json", report)
        log.info("done: %s", output)
    return output


def _course(settings: HypernetworkConfig) -> dict[str, Any]:
    """All that decides the course of training: a checkpoint belongs to one."""
    values = configuration.to_dict(settings)
    for name in ("output", "validation", "checkpoint"):
        del values[name]
    del values["data"]["cache"]
    return values


def read_subjects(settings: HypernetworkConfig, *, resume: bool) -> list[list[Example]]:
    """The pictures of each subject, in order of the subjects' names. ConfigError lists every problem at once."""
    problems: list[str] = []
    output = Path(settings.output)
    used = (output / "run.json").exists()
    if used and not resume:
        problems.append(f"output: {output} already holds a run; continue it with --resume, or choose another --output")
    if resume and not used:
        problems.append(f"output: {output} holds no run to resume; start it without --resume")
    folder = Path(settings.data.images)
    groups: dict[str, list[Example]] = {}
    try:
        examples = scan(DataConfig(images=str(folder), resolution=settings.data.resolution), multiple=16, seed=0).train
        names = _subject_names(folder / "metadata.jsonl")
        for example in examples:
            name = names.get(example.path.relative_to(folder).as_posix())
            if name is None:
                problems.append(f"[data] images: {example.path} has no subject in {folder / 'metadata.jsonl'}")
            else:
                groups.setdefault(name, []).append(example)
    except DataError as error:
        problems += [f"[data] {problem}" for problem in error.problems]
    problems += [
        f'[data] images: subject "{name}" has one picture; it needs two' for name, g in groups.items() if len(g) < 2
    ]
    if groups and len(groups) < settings.data.held_out_subjects + 2:
        problems.append(
            f"[data] held_out_subjects: {settings.data.held_out_subjects} of {len(groups)} leave too few to train on"
        )
    sizes = {example.size for group in groups.values() for example in group}
    if settings.expert.train_encoders and groups and (len(sizes) > 1 or any(w != h for w, h in sizes)):
        problems.append(
            "[expert] train_encoders: pictures must be squares of one size; these are " + str(sorted(sizes)[:3])
        )
    if problems:
        raise configuration.ConfigError(problems)
    return [groups[name] for name in sorted(groups)]


def _subject_names(path: Path) -> dict[str, str]:
    """file_name -> subject; the file was checked by `scan`."""
    if not path.is_file():
        raise DataError([f"images: {path} is missing; each line of it names a picture's file_name, text and subject"])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["file_name"]: str(row["subject"]) for row in rows if "subject" in row}


@dataclass(frozen=True)
class Pairs:
    """A batch: `references` and `targets` are rows of the data, one subject in each position."""

    references: Tensor
    targets: Tensor


class PairData:
    """All pictures encoded, in memory: latents and prompt_embeds of targets, pixels or embeddings of references."""

    def __init__(
        self, settings: HypernetworkConfig, subjects: list[list[Example]], device: torch.device, *, quiet: bool
    ):
        self.examples = [example for group in subjects for example in group]
        starts = np.cumsum([0, *[len(group) for group in subjects]])
        rows = [list(range(start, start + len(group))) for start, group in zip(starts, subjects, strict=False)]
        order = torch.randperm(len(rows), generator=flow.generator(settings.seed, "held-out subjects")).tolist()
        count = settings.data.held_out_subjects
        self.held_out, self.train = [rows[i] for i in order[:count]], [rows[i] for i in sorted(order[count:])]
        cache = Cache(Path(settings.data.cache or Path(settings.output) / "cache"))
        base, dtype = settings.model.base, qwen_image.DTYPES[settings.model.dtype]
        self.latents = torch.stack(encode_pictures(cache, base, self.examples, device, quiet=quiet))  # N C 1 h w
        texts = {e.caption for e in self.examples} | {*settings.validation.prompts, validation.EMPTY_PROMPT}
        self.prompts = encode_prompts(cache, base, dtype, texts, device, batch_size=16, quiet=quiet)
        self.references = self._references(settings, cache, device, quiet=quiet)

    def _references(self, settings: HypernetworkConfig, cache: Cache, device: torch.device, *, quiet: bool) -> Tensor:
        """Pictures N 3 S S in uint8 if the encoders train, else embeddings N D."""
        source, dtype = settings.expert.encoders, qwen_image.DTYPES[settings.model.dtype]
        if settings.expert.train_encoders:
            pixels = np.stack([np.asarray(open_picture(e.path)) for e in self.examples])
            return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

        def embed(part: list[int]) -> list[Tensor]:
            pictures = [open_picture(self.examples[i].path) for i in part]
            return [*encoders.encode_pictures(pictures, source, device, dtype)]

        keys = [key("image embedding", encoders.identity(source), str(dtype), e.digest) for e in self.examples]
        found = cache.get(keys, embed, what="embed pictures", batch_size=512, quiet=quiet)
        return torch.stack(found).cpu()

    def pairs(self, batch_size: int, random: torch.Generator) -> Pairs:
        """`batch_size` training subjects, and of each two different pictures."""
        chosen = torch.randint(len(self.train), (batch_size,), generator=random).tolist()
        drawn = []
        for subject in chosen:
            rows = self.train[subject]
            drawn.append([rows[i] for i in torch.randperm(len(rows), generator=random)[:2].tolist()])
        both = torch.tensor(drawn)
        return Pairs(both[:, 0], both[:, 1])

    def targets(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """latents B C 1 h w, prompt_embeds B L D, mask B L or None"""
        embeds, mask = qwen_image.stack_prompts([self.prompts[self.examples[row].caption] for row in rows.tolist()])
        return self.latents[rows], embeds, mask


class Hypernetwork(nn.Module):
    """Reference pictures (or their embeddings) to LoRA factors."""

    def __init__(self, settings: ExpertConfig, transformer: nn.Module):
        super().__init__()
        self.siglip = self.dinov3 = None
        if settings.train_encoders:
            folder = Path(settings.encoders)
            self.siglip = encoders.load_siglip(folder / encoders.SIGLIP_FOLDER)
            self.dinov3 = encoders.load_dinov3(folder / encoders.DINOV3_FOLDER)
            width = self.siglip.config.hidden_size + self.dinov3.config.hidden_size
        else:
            width = encoders.embedding_size(settings.encoders) or layout.Geometry().embedding_size
        parts: Any = transformer.config
        geometry = layout.Geometry(
            num_blocks=parts.num_layers,
            hidden_size=parts.num_attention_heads * parts.attention_head_dim,
            embedding_size=width,
            compress=settings.compress,
            rank=settings.rank,
        )
        self.expert = Expert(geometry)

    def forward(self, references: Tensor) -> dict[str, Factors]:
        """references: B 3 S S in uint8 if the encoders train, else embeddings B D."""
        if self.siglip is None or self.dinov3 is None:
            return self.expert(references)
        sizes = self.siglip.config.image_size, self.dinov3.config.image_size
        siglip, dinov3 = encoders.square_pixels(references.float() / 255, *sizes)
        embeddings = [encoders.embed_siglip(self.siglip, siglip), encoders.embed_dinov3(self.dinov3, dinov3)]
        return self.expert(torch.cat(embeddings, dim=1))


class HypernetworkObjective:
    """The velocity loss of the frozen transformer with each sample's own predicted LoRA."""

    def __init__(self, settings: HypernetworkConfig, data: PairData, accelerator: Accelerator):
        self._settings, self._data, self._accelerator = settings, data, accelerator
        self._transformer = qwen_image.load_transformer(settings.model, accelerator.device)
        if settings.train.gradient_checkpointing:
            self._transformer.enable_gradient_checkpointing()
        self._network = Hypernetwork(settings.expert, self._transformer)
        self.module: nn.Module = self._network
        self._lora = BatchLora(self._transformer, layout.module_names(self._network.expert.geometry))

    def loss(self, step: int, micro_step: int) -> Loss:
        settings, process = self._settings, self._accelerator.process_index
        random = flow.generator(settings.seed, "pairs", step, micro_step, process)
        pairs = self._data.pairs(settings.train.batch_size, random)
        num_tokens = self._data.latents.shape[-1] * self._data.latents.shape[-2] // 4
        sigmas = flow.sample_sigmas(settings.flow, len(pairs.targets), num_tokens, random)
        noise = torch.randn(len(pairs.targets), *self._data.latents.shape[1:], generator=random)
        losses = self._losses(pairs.targets, sigmas, noise, self._predict(pairs.references))
        return Loss(losses.mean(), ", ".join(self._data.examples[row].path.name for row in pairs.targets.tolist()))

    def _predict(self, rows: Tensor) -> dict[str, Factors]:
        return self.module(self._data.references[rows].to(self._accelerator.device))

    def _losses(self, rows: Tensor, sigmas: Tensor, noise: Tensor, factors: dict[str, Factors]) -> Tensor:
        device, dtype = self._accelerator.device, qwen_image.DTYPES[self._settings.model.dtype]
        latents, embeds, mask = self._data.targets(rows)
        latents, noise, sigmas = latents.to(device), noise.to(device), sigmas.to(device)
        noisy = flow.interpolate(latents, noise, sigmas).to(dtype)
        embeds, mask = embeds.to(device), None if mask is None else mask.to(device)
        with self._lora.applied(factors):
            predicted = qwen_image.predict_velocity(self._transformer, noisy, sigmas, embeds, mask)
        return flow.losses(predicted, latents, noise)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._network.state_dict())

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._network.load_state_dict(tensors)

    def validate(self, step: int, tracker: Tracker) -> dict[str, float]:
        """On held-out subjects: the loss with the right reference, with the next subject's, and with none."""
        if not self._accelerator.is_main_process:
            return {}
        first = torch.tensor([rows[0] for rows in self._data.held_out])
        second = torch.tensor([rows[1] for rows in self._data.held_out])
        sigmas = flow.stratified_sigmas(validation.NUM_SIGMAS).repeat(len(first) // validation.NUM_SIGMAS + 1)[
            : len(first)
        ]
        noise = torch.randn(len(first), *self._data.latents.shape[1:], generator=flow.generator("stable loss"))
        values = {}
        for name, references in (
            ("val_loss", first),
            ("val_loss_wrong_picture", first.roll(1)),
            ("val_loss_no_lora", None),
        ):
            parts = []
            for part in torch.arange(len(first)).split(self._settings.train.batch_size):
                factors = {} if references is None else self._predict(references[part])
                parts.append(self._losses(second[part], sigmas[part], noise[part], factors))
            values[name] = float(torch.cat(parts).mean())
        self._draw(step, tracker, first)
        return values

    def _draw(self, step: int, tracker: Tracker, references: Tensor) -> None:
        """A sheet for each prompt: the reference, then samples with its LoRA, with the wrong one, with none."""
        settings, data = self._settings.validation, self._data
        right, wrong = references[:NUM_SHOWN], references.roll(1)[:NUM_SHOWN]
        sampler = qwen_image.Sampler(self._settings.model.base)
        for number, text in enumerate(settings.prompts):
            latents = []
            for rows in (right, wrong, None):
                with self._lora.applied({} if rows is None else self._predict(rows)):
                    latents.append(
                        sampler.latents(
                            self._transformer,
                            data.prompts[text],
                            size=data.examples[0].bucket,
                            seed=settings.seed,
                            num_inference_steps=settings.num_inference_steps,
                            true_cfg_scale=settings.true_cfg_scale,
                            negative_prompt=data.prompts[validation.EMPTY_PROMPT],
                            count=len(right),
                        )
                    )
            vae = qwen_image.load_vae(self._settings.model.base, self._accelerator.device)
            columns = [qwen_image.decode_latents(vae, part) for part in latents]
            pictures: list[list[Image.Image]] = [
                [load_picture(data.examples[int(row)]), *[column[i] for column in columns]]
                for i, row in enumerate(right)
            ]
            sheet = validation.grid(pictures, ["reference", "its LoRA", "another's", "no LoRA"], [text] * len(right))
            validation.write_png(Path(self._settings.output) / "samples" / f"step-{step:06d}-{number}.png", sheet)
            tracker.image(step, f"samples/{text}", sheet)

    def save(self, output: Path) -> None:
        """`Qwen-Image-i2L-Style.safetensors`, and trained encoders beside it, all in the published layout."""
        save_expert(self._network.expert, output / "Qwen-Image-i2L-Style.safetensors")
        if self._network.siglip is not None and self._network.dinov3 is not None:
            encoders.save_siglip(self._network.siglip, output / "encoders" / encoders.SIGLIP_FOLDER)
            encoders.save_dinov3(self._network.dinov3, output / "encoders" / encoders.DINOV3_FOLDER)
