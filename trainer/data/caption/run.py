"""Captions of a folder, top to bottom: look at everything, load the model, ask it of each picture, write."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from trainer import qwen_image
from trainer.config import to_dict
from trainer.data.caption import vision_model
from trainer.data.caption.answers import Limit, caption_of
from trainer.data.caption.templates import Template
from trainer.data.caption.written import Entry, Kind, Written
from trainer.data.captions import CaptionError
from trainer.data.dataset import DataConfig, contents
from trainer.data.notes import Notes
from trainer.data.pictures import SUFFIXES, DataError, decode, read
from trainer.files import DTYPES, file_in_the_way
from trainer.folder import held
from trainer.hardware import machine, parallel
from trainer.hardware.threads import parallel_map
from trainer.hub import sources
from trainer.hub.sources import Need
from trainer.qwen_image import ModelConfig, TextEncoder
from trainer.tracking import duration


@dataclass(frozen=True)
class Picture:
    path: Path
    sha256: str


@dataclass(frozen=True)
class Asked:
    """What is asked for."""

    pictures: Mapping[str, Picture]
    """By their paths in the folder."""
    trigger: str
    model: ModelConfig
    captioner: str | None
    """A Qwen2.5-VL of its own, instead of the base's."""
    template: Template
    detail: int
    pose: bool
    kind: Kind
    batch_size: int

    @property
    def question(self) -> str:
        return self.template.question(self.detail, pose=self.pose, trigger=self.trigger)

    def how(self, model: Sequence[str]) -> dict[str, Any]:
        """What decides on a caption, besides the picture. model: its identity."""
        form = {name: to_dict(self.template)[name] for name in ("fields", "form", "join", "nothing")}
        return {
            "model": [*model, self.model.dtype, self.model.text_encoder_quantization],
            "question": self.question,
            "trigger": self.trigger,
            "form": form,
            "max_tokens": self.template.max_tokens[self.detail - 1],
        }


@dataclass(frozen=True)
class Report:
    captions: int
    kept: int
    """How many of them were there already."""
    seconds: float
    peak: dict[str, int]
    notes: tuple[str, ...]


def look(
    data: DataConfig, model: ModelConfig, captioner: str | None, output: Path, problems: list[str]
) -> dict[str, Picture]:
    """The folder's pictures. Whatever would stop `caption` is added to `problems`; no model is loaded."""
    folder = Path(data.images).expanduser()
    if file := file_in_the_way(output):
        problems.append(f"--output: {file} is a file; name a folder")
    elif output.resolve().is_relative_to(folder.resolve()):
        problems.append(f"--output: {output} lies in the folder of the pictures, which is only read; name another one")
    for need in _needs(model, captioner):
        problems += sources.check(need)
    paths = dict(_paths(folder, folder, data, problems))
    if not paths:
        problems.append(f"{folder}: there is no picture in it ({', '.join(SUFFIXES)})")
    digests = tqdm(parallel_map(_digest, paths.values()), "look at pictures", len(paths), leave=False, disable=None)
    found = {}
    for (name, path), digest in zip(paths.items(), digests, strict=True):
        if isinstance(digest, DataError):
            problems += digest.problems
        else:
            found[name] = Picture(path, digest)
    return found


def caption(asked: Asked, output: Path) -> Report:
    """Write a caption of each picture into `output`; those that are there already are kept."""
    sources.fetch(_needs(asked.model, asked.captioner))
    device = parallel.one_device()
    encoder = vision_model.text_encoder(asked.model, asked.captioner, device)
    parts = ("text_encoder", "tokenizer", "processor") if encoder.part else ("",)
    with held(output, "captions"):
        written = Written(output, asked.kind, asked.how(qwen_image.identity(encoder.base, parts)))
        written.restore([*asked.pictures])
        todo = [name for name, picture in asked.pictures.items() if not written.has(name, picture.sha256)]
        notes, began = Notes(), time.monotonic()
        for name in filter(written.knows, todo):
            notes.add("captioned anew, since the picture has changed", name)
        for made in _captions(asked, encoder, todo, notes):
            written.add(made, [*asked.pictures])
    captions = sum(written.has(name, picture.sha256) for name, picture in asked.pictures.items())
    kept, seconds = len(asked.pictures) - len(todo), time.monotonic() - began
    return Report(captions, kept, seconds, machine.peak_memory(device), notes.lines())


def summary(report: Report, output: Path) -> str:
    """For the console."""
    new = report.captions - report.kept
    peak = ", ".join(f"{name} {num_bytes / 1e9:.1f} GB" for name, num_bytes in report.peak.items())
    each = f", {report.seconds / new:.1f} s for each" if new else ""
    lines = [f"{report.captions} captions in {output}, {report.kept} of them were there already"]
    lines.append(f"{new} written in {duration(report.seconds)}{each}; peak memory: {peak}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _needs(model: ModelConfig, captioner: str | None) -> list[Need]:
    """The model that captions, and the tokenizer of the base, which will read them."""
    tokenizer = qwen_image.need(model.base, ("tokenizer",))
    return [vision_model.need(model, captioner), Need(tokenizer.source, tokenizer.files, tokenizer.extra)]


def _paths(folder: Path, top: Path, config: DataConfig, problems: list[str]) -> Iterator[tuple[str, Path]]:
    """Each picture, by its path under `top`."""
    try:
        here = contents(folder, config)
    except OSError as error:
        problems.append(f"{folder}: cannot be read ({error.strerror})")
        return
    yield from ((path.relative_to(top).as_posix(), path) for path in here.pictures)
    for below in here.below if config.recursive else ():
        yield from _paths(below, top, config, problems)


def _digest(path: Path) -> str | DataError:
    """sha256 of a file that can be captioned."""
    try:
        data = read(path)
        size = decode(path, data)[0].size
    except DataError as error:
        return error
    if max(size) > vision_model.MAX_RATIO * min(size):
        return DataError([f"{path}: its sides are {size[0]} and {size[1]} pixels, too unequal; crop or remove it"])
    return hashlib.sha256(data).hexdigest()


def _captions(asked: Asked, encoder: TextEncoder, names: Sequence[str], notes: Notes) -> Iterator[dict[str, Entry]]:
    """The captions of each batch of these pictures."""
    if not names:
        return
    captioner = vision_model.Captioner(encoder, DTYPES[asked.model.dtype])
    count = partial(qwen_image.prompt_tokens, asked.model.base)
    limit = Limit(qwen_image.PROMPT_LIMIT, count, asked.trigger)
    max_tokens = asked.template.max_tokens[asked.detail - 1]
    with tqdm(total=len(names), desc="caption", unit="picture", disable=None) as bar:
        for start in range(0, len(names), asked.batch_size):
            batch, made = names[start : start + asked.batch_size], dict[str, Entry]()
            images = [_open(asked.pictures[name]) for name in batch]
            for name, answer in zip(batch, captioner(images, asked.question, max_tokens), strict=True):
                try:
                    text, done = caption_of(answer, asked.template, limit)
                    made[name] = Entry(asked.pictures[name].sha256, text)
                except CaptionError as error:
                    done = [f"without a caption: {error}"]
                for remark in done:
                    notes.add(remark, name)
            yield made
            bar.update(len(batch))


def _open(picture: Picture) -> Image.Image:
    data = read(picture.path)
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise DataError([f"{picture.path}: the file has changed meanwhile; give the command again"])
    return decode(picture.path, data)[0]
