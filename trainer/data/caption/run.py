"""Captions of a folder, top to bottom: look at everything, load the model, ask it of each picture, write."""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from trainer import qwen_image
from trainer.config import ConfigError, to_dict
from trainer.data.caption import vision_model
from trainer.data.caption.answers import Limit, caption_of
from trainer.data.caption.templates import Template
from trainer.data.caption.written import Entry, Kind, Written
from trainer.data.captions import CaptionError
from trainer.data.dataset import DataConfig, contents
from trainer.data.notes import Notes
from trainer.data.pictures import SUFFIXES, DataError, decode, read
from trainer.errors import UserError
from trainer.files import DTYPES, file_in_the_way
from trainer.folder import held
from trainer.hardware import machine
from trainer.hardware.threads import parallel_map
from trainer.hub import sources
from trainer.qwen_image import ModelConfig
from trainer.tracking import duration

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Asked:
    """What is asked for."""

    data: DataConfig
    model: ModelConfig
    template: Template
    detail: int
    pose: bool
    captioner: str | None
    """A Qwen2.5-VL of its own, instead of the base's."""
    kind: Kind
    batch_size: int

    @property
    def question(self) -> str:
        return self.template.question(self.detail, pose=self.pose, trigger=self.data.trigger)

    def how(self, model: Sequence[str]) -> dict[str, Any]:
        """What decides on a caption, besides the picture. model: its identity."""
        form = {name: to_dict(self.template)[name] for name in ("fields", "form", "join", "nothing")}
        return {
            "model": [*model, self.model.dtype, self.model.text_encoder_quantization],
            "question": self.question,
            "trigger": self.data.trigger,
            "form": form,
            "max_tokens": self.template.max_tokens[self.detail - 1],
        }


@dataclass(frozen=True)
class Report:
    captions: int
    kept: int
    """Of them, those that were there already."""
    seconds: float
    peak: dict[str, int]
    notes: tuple[str, ...]


def caption(asked: Asked, output: Path) -> Report:
    """Write a caption of each picture into `output`. The errors list everything that is wrong before a model loads."""
    folder = Path(asked.data.images).expanduser()
    problems = _problems(asked, folder, output)
    pictures = dict(_pictures(folder, folder, asked.data, problems))
    if not pictures and not problems:
        problems.append(f"{folder}: there is no picture in it ({', '.join(SUFFIXES)})")
    digests = _digests(pictures, problems)
    if problems:
        raise ConfigError(problems)
    sources.fetch(_needs(asked))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = vision_model.text_encoder(asked.model, asked.captioner, device)
    parts = ("text_encoder", "tokenizer", "processor") if encoder.part else ("",)
    with held(output, "captions"):
        written = Written(output, asked.kind, asked.how(qwen_image.identity(encoder.base, parts)))
        written.restore([*pictures])
        todo = [name for name in pictures if not written.has(name, digests[name])]
        notes, began = Notes(), time.monotonic()
        for name in filter(written.knows, todo):
            notes.add("captioned anew, since the picture has changed", name)
        if todo:
            captioner = vision_model.Captioner(encoder, DTYPES[asked.model.dtype])
            rest = {name: pictures[name] for name in todo}
            for made in _captions(asked, captioner, rest, digests, notes):
                written.add(made, [*pictures])
    captions = sum(written.has(name, digests[name]) for name in pictures)
    seconds = time.monotonic() - began
    return Report(captions, len(pictures) - len(todo), seconds, machine.peak_memory(device), notes.lines())


def summary(report: Report, output: Path) -> str:
    """For the console."""
    new = report.captions - report.kept
    peak = ", ".join(f"{name} {num_bytes / 1e9:.1f} GB" for name, num_bytes in report.peak.items())
    each = f", {report.seconds / new:.1f} s for each" if new else ""
    lines = [f"{report.captions} captions in {output}, {report.kept} of them were there already"]
    lines.append(f"{new} written in {duration(report.seconds)}{each}; peak memory: {peak}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _needs(asked: Asked) -> list[sources.Need]:
    """The model that captions, and the tokenizer that will read them."""
    tokenizer = qwen_image.need(asked.model.base, ("tokenizer",))
    return [
        vision_model.need(asked.model, asked.captioner),
        sources.Need(tokenizer.source, tokenizer.files, tokenizer.extra),
    ]


def _problems(asked: Asked, folder: Path, output: Path) -> list[str]:
    found = []
    if file := file_in_the_way(output):
        found.append(f"--output: {file} is a file; name a folder")
    elif output.resolve().is_relative_to(folder.resolve()):
        found.append(f"--output: {output} lies in the folder of the pictures, which is only read; name another one")
    for need in _needs(asked):
        try:
            found += sources.check(need)
        except UserError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def _pictures(folder: Path, top: Path, config: DataConfig, problems: list[str]) -> Iterator[tuple[str, Path]]:
    """Each picture, by its path under `top`."""
    try:
        here = contents(folder, config)
    except OSError as error:
        problems.append(f"{folder}: cannot be read ({error.strerror})")
        return
    yield from ((path.relative_to(top).as_posix(), path) for path in here.pictures)
    for below in here.below if config.recursive else ():
        yield from _pictures(below, top, config, problems)


def _digests(pictures: Mapping[str, Path], problems: list[str]) -> dict[str, str]:
    """sha256 of each picture's file; what cannot be captioned is a problem."""
    found = {}
    bar = tqdm(parallel_map(_inspect, pictures.values()), "look at pictures", len(pictures), leave=False, disable=None)
    for name, digest in zip(pictures, bar, strict=True):
        if isinstance(digest, DataError):
            problems += digest.problems
        else:
            found[name] = digest
    return found


def _inspect(path: Path) -> str | DataError:
    try:
        data = read(path)
        size = decode(path, data)[0].size
    except DataError as error:
        return error
    if max(size) > vision_model.MAX_RATIO * min(size):
        return DataError([f"{path}: its sides are {size[0]} and {size[1]} pixels, too unequal; crop or remove it"])
    return hashlib.sha256(data).hexdigest()


def _captions(
    asked: Asked,
    captioner: vision_model.Captioner,
    pictures: Mapping[str, Path],
    digests: Mapping[str, str],
    notes: Notes,
) -> Iterator[dict[str, Entry]]:
    """The captions of each batch."""
    limit = Limit(
        qwen_image.PROMPT_LIMIT, lambda texts: qwen_image.prompt_tokens(asked.model.base, texts), asked.data.trigger
    )
    names, max_tokens = [*pictures], asked.template.max_tokens[asked.detail - 1]
    with tqdm(total=len(names), desc="caption", unit="picture", disable=None) as bar:
        for start in range(0, len(names), asked.batch_size):
            batch, made = names[start : start + asked.batch_size], {}
            images = [_open(pictures[name], digests[name]) for name in batch]
            for name, answer in zip(batch, captioner(images, asked.question, max_tokens), strict=True):
                try:
                    text, done = caption_of(answer, asked.template, limit)
                    made[name] = Entry(digests[name], text)
                except CaptionError as error:
                    done = [f"without a caption, since {error}; write it yourself, or try another --detail"]
                for remark in done:
                    notes.add(remark, name)
            yield made
            bar.update(len(batch))


def _open(path: Path, digest: str) -> Image.Image:
    data = read(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError([f"{path}: the file has changed meanwhile; give the command again"])
    return decode(path, data)[0]
