"""What a hypernetwork learns from: pictures of subjects, references and targets drawn from them, all encoded once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from initializers.i2l import encoders
from trainer import flow, qwen_image
from trainer.data.cache import Cache, key
from trainer.data.dataset import DataConfig, Example, scan
from trainer.data.encode import encode_pictures, encode_prompts
from trainer.data.pictures import DataError, open_picture
from trainer.files import DTYPES
from trainer.qwen_image import ModelConfig

COLUMNS = ("subject", "style")  # of metadata.jsonl: pictures that agree in it belong together


@dataclass(frozen=True, kw_only=True)
class SubjectsConfig:
    """`[data]`"""

    images: str
    """A folder of pictures with captions. In `metadata.jsonl` (`file_name`, `text`), `subject` (or `style`) tells which
    pictures belong together: then reference and target are different pictures of one subject. Without it, the target
    is its own reference, as in the published training."""
    resolution: int = 1024
    """Side of the square, in pixels, to which target pictures are brought."""
    held_out_subjects: int = 64
    """Subjects kept from training, chosen by seed: validation is on them alone."""
    max_references: int = 1
    """Each step draws a number of reference pictures from 1 to this, so that an expert learns to be averaged."""
    references_each: int = 0
    """Only so many pictures of each subject, the first by name, are ever references; the others are targets alone, and
    need not be looked at by image encoders and Qwen-VL, which take longest. 0: all."""
    cache: str | None = None
    """Folder for latents, prompt embeddings and image embeddings; default: `cache` in the output."""

    def problems(self) -> list[str]:
        found = []
        if self.held_out_subjects < 2:
            found.append("held_out_subjects must be at least 2: one is the other's wrong picture")
        if self.max_references < 1:
            found.append("max_references must be at least 1")
        if self.references_each and self.references_each < self.max_references:
            found.append("references_each must be 0 or at least max_references")
        return found


def read_subjects(config: SubjectsConfig, *, square: bool, problems: list[str]) -> list[list[Example]]:
    """The pictures of each subject, in order of the subjects' names. What is wrong is added to `problems`.

    `square`: all pictures must be squares of one size.
    """
    folder = Path(config.images)
    try:
        data = DataConfig(images=str(folder), resolution=config.resolution)
        examples = scan(data, multiple=qwen_image.PICTURE_MULTIPLE, seed=0).train
    except DataError as error:
        problems += [f"[data] {problem}" for problem in error.problems]
        return []
    names = _subject_names(folder / "metadata.jsonl")
    groups: dict[str, list[Example]] = {}
    for example in examples:
        file = example.path.relative_to(folder).as_posix()
        if names and file not in names:
            problems.append(f"[data] images: {example.path} has no subject in {folder / 'metadata.jsonl'}")
        groups.setdefault(names.get(file, file), []).append(example)
    least = config.max_references + 1 if names else 1
    problems += [
        f'[data] images: subject "{name}" has {len(group)} pictures; with max_references = {config.max_references} it '
        f"needs {least}"
        for name, group in groups.items()
        if len(group) < least
    ]
    if not names and config.max_references > 1:
        problems.append("[data] max_references: without subjects a picture has no reference but itself")
    if len(groups) < config.held_out_subjects + 2:
        problems.append(
            f"[data] held_out_subjects: {config.held_out_subjects} of {len(groups)} leave too few to train on"
        )
    sizes = {example.size for example in examples}
    if square and (len(sizes) > 1 or any(width != height for width, height in sizes)):
        problems.append(
            "[expert] train_encoders: pictures must be squares of one size; these are " + str(sorted(sizes)[:3])
        )
    return [groups[name] for name in sorted(groups)]


def _subject_names(path: Path) -> dict[str, str]:
    """file_name -> subject, of the rows that name one; the file was checked by `scan`."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["file_name"]: str(row[column]) for row in rows for column in COLUMNS if column in row}


@dataclass(frozen=True)
class Pairs:
    """A batch, as rows of the data."""

    references: Tensor  # B K
    targets: Tensor  # B


class SubjectData:
    """All pictures encoded, in memory: latents and prompt_embeds of targets, what the experts look at of references."""

    def __init__(
        self,
        config: SubjectsConfig,
        subjects: Sequence[Sequence[Example]],
        *,
        model: ModelConfig,
        cache: Cache,
        prompts: Sequence[str],
        encoders_from: str | None,
        resolutions: Sequence[int],
        seed: int,
        device: torch.device,
        quiet: bool,
    ):
        """`encoders_from`: folder or id of frozen encoders; None if they train. `resolutions`: of the residuals."""
        self.examples = [example for group in subjects for example in group]
        starts = np.cumsum([0, *[len(group) for group in subjects]])
        rows = [list(range(start, start + len(group))) for start, group in zip(starts, subjects, strict=False)]
        order = torch.randperm(len(rows), generator=flow.generator(seed, "held-out subjects")).tolist()
        count = config.held_out_subjects
        self.held_out, self.train = [rows[i] for i in order[:count]], [rows[i] for i in sorted(order[count:])]
        self._max_references = config.max_references
        limit = config.references_each or len(self.examples)
        looked_at = [row for group in rows for row in group[:limit]]
        self._place = {row: place for place, row in enumerate(looked_at)}  # of a reference among what is looked at
        shown = [self.examples[row] for row in looked_at]
        dtype = DTYPES[model.dtype]
        self.latents = torch.stack(encode_pictures(cache, model.base, self.examples, device, quiet=quiet))  # N C 1 h w
        texts = {e.caption for e in self.examples} | {*prompts, qwen_image.NEGATIVE_PROMPT}
        text_encoder = qwen_image.TextEncoder(model.base, device)
        self.prompts = encode_prompts(cache, text_encoder, dtype, texts, batch_size=16, quiet=quiet)
        text_encoder.unload()
        self._references = (
            encoders.stacked([open_picture(example.path) for example in shown])  # N 3 S S in uint8
            if encoders_from is None
            else _embeddings(shown, cache, encoders_from, device, dtype, quiet)
        )
        self._residuals = {
            resolution: _residuals(shown, cache, model.base, resolution, device, dtype, quiet)
            for resolution in resolutions
        }

    def look(self, rows: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """What experts see of references B K: pictures or embeddings B K ..., and residuals by resolution, B K T W."""
        places = torch.tensor([[self._place[row] for row in group] for group in rows.tolist()])
        return self._references[places], {size: values[places] for size, values in self._residuals.items()}

    def pairs(self, count: int, random: torch.Generator, *, other_subjects: float = 0.0) -> Pairs:
        """`count` training subjects: a target of each, and references that are other pictures of it (or the target, if
        it is all there is). A share of `other_subjects` gets another subject's pictures as references instead."""
        num_references = int(torch.randint(1, self._max_references + 1, (), generator=random))
        chosen = torch.randint(len(self.train), (count,), generator=random).tolist()
        references, targets = [], []
        for subject in chosen:
            rows = _shuffled(self.train[subject], random)
            allowed = {row for row in rows if row in self._place}
            # the first that leaves enough references; one that is alone is its own
            target = next((row for row in rows if len(allowed - {row}) >= num_references), rows[0])
            targets.append(target)
            if other_subjects and float(torch.rand((), generator=random)) < other_subjects:
                shift = int(torch.randint(1, len(self.train), (), generator=random))
                rows = _shuffled(self.train[(subject + shift) % len(self.train)], random)
            others = [row for row in rows if row != target and row in self._place]
            references.append((others or rows)[:num_references])
        return Pairs(torch.tensor(references), torch.tensor(targets))

    def held_out_pairs(self) -> Pairs:
        """One of each held-out subject."""
        return Pairs(
            torch.tensor([rows[:1] for rows in self.held_out]), torch.tensor([rows[-1] for rows in self.held_out])
        )

    def targets(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """latents B C 1 h w, prompt_embeds B L D, mask B L or None"""
        embeds, mask = qwen_image.stack_prompts([self.prompts[self.examples[row].caption] for row in rows.tolist()])
        return self.latents[rows], embeds, mask


def _embeddings(
    examples: Sequence[Example], cache: Cache, source: str, device: torch.device, dtype: torch.dtype, quiet: bool
) -> Tensor:
    """N D"""
    small = encoders.are_small_squares([example.size for example in examples])

    def embed(part: list[int]) -> list[Tensor]:
        pictures = [open_picture(examples[i].path) for i in part]
        if small:
            return [*encoders.encode_squares(encoders.stacked(pictures), source, device, dtype)]
        return [*encoders.encode_pictures(pictures, source, device, dtype)]

    name = ("image embedding", encoders.identity(source), str(dtype), small)
    return _cached(examples, cache, name, embed, "embed pictures", quiet)


def _residuals(
    examples: Sequence[Example],
    cache: Cache,
    base: str,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
    quiet: bool,
) -> Tensor:
    """N T W in half precision: the largest of all that is kept."""

    def look(part: list[int]) -> list[Tensor]:
        pictures = [open_picture(examples[i].path) for i in part]
        return [*encoders.qwen_vl_residual(pictures, base, resolution, device, dtype).half()]

    name = ("residual", qwen_image.identity(base), str(dtype), resolution)
    return _cached(examples, cache, name, look, f"look at pictures, {resolution} pixels", quiet)


def _cached(
    examples: Sequence[Example],
    cache: Cache,
    name: tuple[object, ...],
    compute: Callable[[list[int]], list[Tensor]],
    what: str,
    quiet: bool,
) -> Tensor:
    keys = [key(*name, example.digest) for example in examples]
    return torch.stack(cache.get(keys, compute, what=what, batch_size=512, quiet=quiet)).cpu()


def _shuffled(rows: Sequence[int], random: torch.Generator) -> list[int]:
    return [rows[i] for i in torch.randperm(len(rows), generator=random).tolist()]
