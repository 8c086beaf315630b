"""The data of hypernetwork training: pictures of many subjects, encoded once, and pairs of references and targets."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from initializers.i2l import encoders
from trainer import flow, qwen_image
from trainer.config import first_few
from trainer.data.cache import Cache, key
from trainer.data.dataset import DataConfig, Example, scan
from trainer.data.encode import encode_pictures, encode_prompts
from trainer.data.pictures import DataError, open_picture
from trainer.files import DTYPES
from trainer.qwen_image import ModelConfig

COLUMNS = ("subject", "style")  # columns of metadata.jsonl that name a picture's subject


@dataclass(frozen=True, kw_only=True)
class SubjectsConfig:
    """`[data]`"""

    images: str
    """Folder of pictures with captions. Name each picture's `subject` (or `style`) in `metadata.jsonl`, beside
    `file_name` and `text`: then the expert sees one picture of a subject (the reference) and learns to draw another
    (the target). Without subjects each picture is its own reference, as in the published training."""
    resolution: int = 1024
    """Side of the square, in pixels, to which target pictures are resized. Lower it to save memory and time."""
    held_out_subjects: int = 64
    """Number of subjects that are kept out of training, chosen by `seed`; the validation losses are of them alone."""
    max_references: int = 1
    """Largest number of reference pictures of a sample: each step draws a number from 1 to this. Raise it if the expert
    will be given several pictures at once, whose predictions are averaged."""
    references_each: int = 0
    """How many pictures of each subject may be references, the first by name; 0 means all. The others are only targets,
    which the image encoders and Qwen-VL need not encode: lower it where encoding takes too long."""
    cache: str | None = None
    """Folder for encoded pictures and captions. Default: `cache` in the output folder. Set it to share them."""

    def problems(self) -> list[str]:
        found = []
        if self.held_out_subjects < 2:
            found.append("held_out_subjects must be at least 2: each is compared with another one's pictures")
        if self.max_references < 1:
            found.append("max_references must be at least 1")
        if self.references_each and self.references_each < self.max_references:
            found.append("references_each must be 0 or at least max_references")
        return found


def read_subjects(config: SubjectsConfig, *, square: bool, problems: list[str]) -> list[list[Example]]:
    """The pictures of each subject, in the order of the subjects' names. What is wrong is added to `problems`.

    square: whether all pictures must be squares of one size.
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
        if example.more_captions:
            problems.append(f"[data] images: {example.path} has several captions, and here one is read; keep one")
        groups.setdefault(names.get(file, file), []).append(example)
    least = config.max_references + 1 if names else 1
    problems += [
        f'[data] images: subject "{name}" has {len(group)} pictures; with max_references = {config.max_references} it '
        f"needs {least}"
        for name, group in groups.items()
        if len(group) < least
    ]
    if not names and config.max_references > 1:
        problems.append(
            "[data] max_references: without subjects each picture is its only reference; name them in metadata.jsonl, "
            "or leave this at 1"
        )
    if len(groups) < config.held_out_subjects + 2:
        problems.append(
            f"[data] held_out_subjects: {config.held_out_subjects} of {len(groups)} subjects leave too few for training"
        )
    sizes = {example.size for example in examples}
    if square and (len(sizes) > 1 or any(width != height for width, height in sizes)):
        problems.append(
            "[expert] train_encoders: all pictures must be squares of one size; "
            f"their sizes are {first_few(sorted(sizes))}"
        )
    return [groups[name] for name in sorted(groups)]


def _subject_names(path: Path) -> dict[str, str]:
    """file_name -> subject, for the rows that name one. `scan` has checked the file."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["file_name"]: str(row[column]) for row in rows for column in COLUMNS if column in row}


@dataclass(frozen=True)
class Pairs:
    """A batch, as numbers of examples in the data."""

    references: Tensor
    """B K"""
    targets: Tensor
    """B"""


@dataclass(frozen=True)
class Encoding:
    """How pictures and captions are encoded: by which models, on which device, into which cache."""

    model: ModelConfig
    encoders_from: str | None
    """Folder or id of the frozen image encoders; None if they are trained, and then read the pictures themselves."""
    resolutions: Sequence[int]
    """Side of the squares, in pixels, that Qwen-VL reads for each residual."""
    cache: Cache
    device: torch.device
    quiet: bool

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.model.dtype]

    def latents(self, examples: Sequence[Example]) -> Tensor:
        """N C 1 h w"""
        return torch.stack(encode_pictures(self.cache, self.model.base, examples, self.device, quiet=self.quiet))

    def prompts(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """prompt_embeds of each text, L D."""
        text_encoder = qwen_image.text_encoder(self.model, self.device)
        found = encode_prompts(self.cache, text_encoder, self.dtype, texts, batch_size=16, quiet=self.quiet)
        text_encoder.unload()
        return found

    def references(self, examples: Sequence[Example]) -> Tensor:
        """Image embeddings, N D; or the pictures, N 3 S S in uint8, if the encoders are trained."""
        source, small = self.encoders_from, encoders.are_small_squares([example.size for example in examples])
        if source is None:
            return encoders.stacked([open_picture(example.path) for example in examples])

        def embed(part: list[int]) -> list[Tensor]:
            pictures = [open_picture(examples[i].path) for i in part]
            if small:
                return [*encoders.encode_squares(encoders.stacked(pictures), source, self.device, self.dtype).cpu()]
            return [*encoders.encode_pictures(pictures, source, self.device, self.dtype)]

        name = ("image embedding", encoders.identity(source), str(self.dtype), small)
        return self._cached(examples, name, embed, "embed pictures")

    def residual(self, examples: Sequence[Example], resolution: int) -> Tensor:
        """Hidden states of Qwen-VL, N T W in half precision: they take more memory than anything else here."""

        def read(part: list[int]) -> list[Tensor]:
            pictures = [open_picture(examples[i].path) for i in part]
            base = self.model.base
            return [*encoders.qwen_vl_residual(pictures, base, resolution, self.device, self.dtype).half()]

        name = ("residual", qwen_image.identity(self.model.base), str(self.dtype), resolution)
        return self._cached(examples, name, read, f"read pictures with Qwen-VL, {resolution} pixels")

    def _cached(
        self,
        examples: Sequence[Example],
        name: tuple[object, ...],
        compute: Callable[[list[int]], list[Tensor]],
        what: str,
    ) -> Tensor:
        keys = [key(*name, example.digest) for example in examples]
        return torch.stack(self.cache.get(keys, compute, what=what, batch_size=512, quiet=self.quiet))


class SubjectData:
    """All pictures encoded, in memory: targets as latents with prompt_embeds, references as the experts read them."""

    def __init__(
        self,
        config: SubjectsConfig,
        subjects: Sequence[Sequence[Example]],
        encoding: Encoding,
        *,
        prompts: Sequence[str] = (),
        seed: int,
    ):
        """prompts: further texts to encode, for validation. seed: chooses the held-out subjects."""
        self.examples = [example for group in subjects for example in group]
        starts = np.cumsum([0, *[len(group) for group in subjects]])
        rows = [list(range(start, start + len(group))) for start, group in zip(starts, subjects, strict=False)]
        order = torch.randperm(len(rows), generator=flow.generator(seed, "held-out subjects")).tolist()
        count = config.held_out_subjects
        self.held_out, self.train = [rows[i] for i in order[:count]], [rows[i] for i in sorted(order[count:])]
        self._max_references = config.max_references
        limit = config.references_each or len(self.examples)
        allowed = [row for group in rows for row in group[:limit]]
        self._reference_number = {row: number for number, row in enumerate(allowed)}
        shown = [self.examples[row] for row in allowed]
        self.latents = encoding.latents(self.examples)  # N C 1 h w
        self.prompts = encoding.prompts(
            {*prompts, qwen_image.EMPTY_PROMPT, *(example.caption for example in self.examples)}
        )
        self._references = encoding.references(shown)
        self._residuals = {size: encoding.residual(shown, size) for size in encoding.resolutions}

    def references(self, rows: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """What the experts read for references B K: pictures or embeddings, B K ...; resolution -> residuals, B K T W.

        KeyError if a picture may not be a reference.
        """
        numbers = torch.tensor([[self._reference_number[row] for row in group] for group in rows.tolist()])
        return self._references[numbers], {size: values[numbers] for size, values in self._residuals.items()}

    def pairs(self, count: int, random: torch.Generator, *, other_subjects: float = 0.0) -> Pairs:
        """A target of each of `count` training subjects, and other pictures of the subject as its references; or the
        target itself, if the subject has only one picture.

        other_subjects: the share of targets whose references are pictures of another subject instead.
        """
        num_references = int(torch.randint(1, self._max_references + 1, (), generator=random))
        chosen = torch.randint(len(self.train), (count,), generator=random).tolist()
        references, targets = [], []
        for subject in chosen:
            rows = _shuffled(self.train[subject], random)
            allowed = {row for row in rows if row in self._reference_number}
            # the first that leaves enough references; the only picture of a subject is its own reference
            target = next((row for row in rows if len(allowed - {row}) >= num_references), rows[0])
            targets.append(target)
            if other_subjects and float(torch.rand((), generator=random)) < other_subjects:
                shift = int(torch.randint(1, len(self.train), (), generator=random))
                rows = _shuffled(self.train[(subject + shift) % len(self.train)], random)
            others = [row for row in rows if row != target and row in self._reference_number]
            references.append((others or rows)[:num_references])
        return Pairs(torch.tensor(references), torch.tensor(targets))

    def held_out_pairs(self) -> Pairs:
        """One pair of each held-out subject: its first picture as reference, its last as target."""
        return Pairs(
            torch.tensor([rows[:1] for rows in self.held_out]), torch.tensor([rows[-1] for rows in self.held_out])
        )

    def targets(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """latents B C 1 h w, prompt_embeds B L D, mask B L or None"""
        embeds, mask = qwen_image.stack_prompts([self.prompts[self.examples[row].caption] for row in rows.tolist()])
        return self.latents[rows], embeds, mask


def _shuffled(rows: Sequence[int], random: torch.Generator) -> list[int]:
    return [rows[i] for i in torch.randperm(len(rows), generator=random).tolist()]
