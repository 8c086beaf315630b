"""Pictures and captions: find them, check that each can be used, sort them into buckets, split, deal batches.

Nothing is skipped silently: what cannot be used is a problem, all problems are raised together, and what was
changed on the way (orientation, transparency, size, ...) is said in the notes. The user's folder is only read.
"""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from trainer.config import first_few
from trainer.data.pictures import SUFFIXES, DataError, decode, read
from trainer.flow import generator

MAX_RATIO = 2.25  # of a bucket's sides: 2:1, with room for rounding
CROP_NOTE = 0.25  # more than this share of a picture outside its crop is worth a word
_Size = tuple[int, int]  # width, height


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`[data]`"""

    images: str
    """The folder of the training pictures. Captions are in text files of the same name, or in metadata.jsonl."""
    resolution: int = 1024
    """Pictures are scaled and cropped to about resolution x resolution pixels, in a shape near their own."""
    trigger: str = ""
    """A word for the subject. It is put in front of each caption that does not contain it."""
    default_caption: str = ""
    """The caption of pictures that have none of their own."""
    held_out: int | str = 0
    """Pictures that are kept for validation and never trained on: how many, chosen by the seed, or a folder of their
    own."""
    caption_dropout: float = 0.0
    """The probability, from 0 to 1, that a picture is trained on without its caption."""
    cache: str | None = None
    """The folder for latents and prompt embeddings, which may be shared by runs. By default `cache` in the output
    folder."""

    def problems(self) -> list[str]:
        found = []
        if not self.images:
            found.append("images must name a folder")
        elif not _folder(self.images).is_dir():
            found.append(f"images: there is no folder {_folder(self.images).absolute()}")
        if isinstance(self.held_out, int):
            if self.held_out < 0:
                found.append("held_out must not be negative")
        elif not self.held_out or not _folder(self.held_out).is_dir():
            found.append(f"held_out: there is no folder {_folder(self.held_out).absolute()}; or give a number")
        elif _folder(self.held_out).resolve() == _folder(self.images).resolve():
            found.append("held_out is the same folder as images: it must hold other pictures, or be a number")
        if self.resolution < 16:
            found.append("resolution must be at least 16")
        if not 0 <= self.caption_dropout <= 1:
            found.append("caption_dropout must be from 0 to 1")
        if self.trigger != self.trigger.strip():
            found.append("trigger must not begin or end with a space")
        if self.cache == "":
            found.append("cache must name a folder; leave it out for the one in the output folder")
        return found


@dataclass(frozen=True)
class Example:
    path: Path
    caption: str
    """With the trigger."""
    digest: str
    """sha256 of the file, in hex."""
    size: _Size
    """Width and height after EXIF orientation."""
    bucket: _Size
    """What it is trained at."""


@dataclass(frozen=True)
class Dataset:
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    notes: tuple[str, ...]
    """What was done to pictures or left unread, for the log."""


def scan(config: DataConfig, *, multiple: int, seed: int) -> Dataset:
    """Read every picture and caption; sides of buckets are multiples of `multiple`. DataError lists all problems."""
    problems = config.problems()
    if config.resolution % multiple:
        low = max(config.resolution // multiple, 1) * multiple
        advice = f"such as {low}" + (f" or {low + multiple}" if low < config.resolution else "")
        problems.append(f"resolution = {config.resolution} must be a multiple of {multiple}, {advice}")
    if problems:
        raise DataError(problems)
    notes = _Notes()
    options = buckets(config.resolution, multiple)
    found = _scan_folder(_folder(config.images), config, options, problems, notes)
    if isinstance(config.held_out, str):
        train, held_out = found, _scan_folder(_folder(config.held_out), config, options, problems, notes)
        problems += _in_both(train, held_out)
    elif problems:  # some pictures are missing from `found`: nothing to choose from
        train, held_out = found, []
    else:
        train, held_out = _split(found, config.held_out, seed, problems)
    if problems:
        raise DataError(problems)
    for same in _same_content(train):
        notes.add("the same picture more than once, so it counts more", " = ".join(e.path.name for e in same))
    return Dataset(tuple(train), tuple(held_out), notes.lines())


# --- pictures ---------------------------------------------------------------------------------------------


def load_picture(example: Example) -> Image.Image:
    """The picture at its bucket's size: scaled to cover it, the centre kept. DataError if the file has changed."""
    data = read(example.path)
    if hashlib.sha256(data).hexdigest() != example.digest:
        raise DataError([f"{example.path}: the file has changed since the run began; start the run again"])
    return ImageOps.fit(decode(example.path, data)[0], example.bucket, Image.Resampling.LANCZOS)


# --- folders and captions ---------------------------------------------------------------------------------


@dataclass
class _Notes:
    """The same remark about many pictures is one line."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, remark: str, name: str) -> None:
        self.names.setdefault(remark, []).append(name)

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{remark} ({len(names)}): {first_few(names, count=5)}" for remark, names in self.names.items())


def _folder(name: str) -> Path:
    return Path(name).expanduser()


def _same_name(name: str) -> str:
    """Some systems store accented letters as two characters: for comparing names, one form."""
    return unicodedata.normalize("NFC", name)


def _scan_folder(
    folder: Path, config: DataConfig, options: Sequence[_Size], problems: list[str], notes: _Notes
) -> list[Example]:
    try:
        entries = sorted(_visible(folder), key=lambda p: p.name)
    except OSError as error:
        problems.append(f"{folder}: cannot be read ({error.strerror})")
        return []
    files = [p for p in entries if not p.is_dir()]
    pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
    below = [p for p in entries if p.is_dir() and _holds_pictures(p)]
    if isinstance(config.held_out, str):
        below = [p for p in below if p.resolve() != _folder(config.held_out).resolve()]
    if not pictures:
        more = f"; folders in it are not looked into: {first_few((p.name for p in below), count=5)}" if below else ""
        problems.append(f"{folder}: there is no picture in it ({', '.join(SUFFIXES)}){more}")
    for path in below:
        notes.add("folders with pictures that are not looked into", str(path))
    for path in files:
        if path.suffix.lower() not in (*SUFFIXES, ".txt") and path.name != "metadata.jsonl":
            notes.add("not read, being neither pictures nor captions", str(path))
    captions = _captions(folder, files, pictures, config, problems, notes)
    found = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        bar = tqdm(pool.map(_inspect, pictures), str(folder), len(pictures), leave=False, disable=None, delay=2)
        for path, result in zip(pictures, bar, strict=True):
            if isinstance(result, DataError):
                problems += result.problems
                continue
            digest, size, done = result
            bucket = _nearest(size, options)
            for remark in [*done, *_resizing(size, bucket)]:
                notes.add(remark, path.name)
            found.append(Example(path, captions.get(path, ""), digest, size, bucket))
    return found


def _inspect(path: Path) -> tuple[str, _Size, list[str]] | DataError:
    try:
        data = read(path)
        image, done = decode(path, data)
    except DataError as error:
        return error
    return hashlib.sha256(data).hexdigest(), image.size, done


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _holds_pictures(folder: Path) -> bool:
    try:
        return any(path.suffix.lower() in SUFFIXES for path in _visible(folder))
    except OSError:  # not for us to read: it would not be looked into anyway
        return False


def _captions(
    folder: Path,
    files: Sequence[Path],
    pictures: Sequence[Path],
    config: DataConfig,
    problems: list[str],
    notes: _Notes,
) -> dict[Path, str]:
    """The caption of each picture, with the trigger; those of which something is wrong are left out."""
    by_name = {_same_name(p.name): p for p in pictures}
    by_stem = defaultdict(list)
    for path in pictures:
        by_stem[_same_name(path.stem)].append(path)
    given: dict[Path, list[tuple[str, str | None]]] = defaultdict(list)  # picture -> (where, text or None if bad)
    for path in files:
        if path.suffix.lower() == ".txt":
            owners = by_stem.get(_same_name(path.stem), [])
            if not owners:
                notes.add("text files that belong to no picture", str(path))
                continue
            if len(owners) > 1:
                notes.add("one caption for several pictures", f"{path.name} for {', '.join(p.name for p in owners)}")
            text = _caption_file(path, problems)
            for owner in owners:
                given[owner].append((path.name, text))
    for owner, where, text in _metadata(folder / "metadata.jsonl", by_name, problems):
        given[owner].append((where, text))
    captions = {}
    for path in pictures:
        texts = given.get(path) or [("default_caption", config.default_caption.strip())]
        if any(text is None for _, text in texts):
            continue  # already a problem
        if len({text for _, text in texts}) > 1:
            places = " and ".join(where for where, _ in texts)
            problems.append(f"{path}: {places} give it different captions; keep one")
        elif not texts[0][1]:
            example = config.trigger or "a photo"
            problems.append(
                f"{path}: has no caption; write {path.stem}.txt beside it, name it in metadata.jsonl, or set a "
                f'default_caption, such as "{example}"'
            )
        else:
            captions[path] = _with_trigger(config.trigger, texts[0][1])
    if config.default_caption and pictures and all(path in given for path in pictures):
        notes.add("default_caption not needed: each picture has a caption of its own", str(folder))
    return captions


def _caption_file(path: Path, problems: list[str]) -> str | None:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        problems.append(f"{path}: is not UTF-8; save the caption in that encoding")
        return None
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return None
    if not text:
        problems.append(f"{path}: is empty; write a caption, or remove the file to use default_caption")
    return text or None


def _metadata(path: Path, pictures: dict[str, Path], problems: list[str]) -> Iterable[tuple[Path, str, str | None]]:
    """(picture, where the caption stands, caption or None if it is bad) for each good line of metadata.jsonl."""
    if not path.exists():
        return
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            problems.append(f"{where}: is not UTF-8")
            continue
        except json.JSONDecodeError as error:
            problems.append(f"{where}: is not JSON ({error.msg}, column {error.colno})")
            continue
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            problems.append(f'{where}: must be like {{"file_name": "a.png", "text": "a caption"}}')
            continue
        owner = pictures.get(_same_name(str(Path(name))))
        if owner is None:
            problems.append(f"{where}: {_why_not(path.parent, name)}")
            continue
        text = row.get("text")
        good = text.strip() if isinstance(text, str) else ""
        if not good:
            problems.append(f'{where}: {name} has no "text"; write a caption, or remove the line')
        yield owner, f"{path.name} line {number}", good or None


def _why_not(folder: Path, name: str) -> str:
    """Why metadata.jsonl may not name this file."""
    if not (folder / name).is_file():
        return f"there is no file {name} in {folder}"
    if Path(name).suffix.lower() not in SUFFIXES:
        return f"{name} is not one of {', '.join(SUFFIXES)}"
    return f"{name} must lie directly in {folder}, under a name without a leading dot"


def _with_trigger(trigger: str, caption: str) -> str:
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}"


# --- buckets and split ------------------------------------------------------------------------------------


def buckets(resolution: int, multiple: int) -> list[_Size]:
    """(width, height) from tall to wide, each of about resolution**2 pixels, sides multiples of `multiple`.

    Short sides go in steps of about resolution / 16: finer ones would leave too few pictures in each to fill a
    batch, coarser ones would crop more.
    """
    step = max(round(resolution / 16 / multiple), 1) * multiple
    square = max(round(resolution / multiple), 1) * multiple
    found = {(square, square)}
    for short in range(square - step, 0, -step):
        long = round(resolution**2 / short / multiple) * multiple
        if long > MAX_RATIO * short:
            break
        found |= {(short, long), (long, short)}
    return sorted(found, key=lambda size: size[0] / size[1])


def _nearest(size: _Size, options: Sequence[_Size]) -> _Size:
    """The bucket whose ratio of sides is nearest, measured as a factor."""
    return min(options, key=lambda option: abs(math.log(size[0] / size[1]) - math.log(option[0] / option[1])))


def _resizing(size: _Size, bucket: _Size) -> list[str]:
    """What is worth saying of the way from `size` to `bucket`."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    kept = bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)
    return [
        *(["smaller than their bucket, so upscaled and soft"] if scale > 1 else []),
        *([f"more than {CROP_NOTE:.0%} cut off by the crop to their bucket"] if kept < 1 - CROP_NOTE else []),
    ]


def _split(
    examples: Sequence[Example], count: int, seed: int, problems: list[str]
) -> tuple[list[Example], list[Example]]:
    """`count` pictures held out, chosen by seed and content, so that a renamed file stays on its side."""
    if count == 0:
        return [*examples], []
    copies = Counter(example.digest for example in examples)
    single = [example for example in examples if copies[example.digest] == 1]  # a copy would leak into training
    if count >= len(examples):
        problems.append(f"held_out = {count} leaves nothing to train on: there are {len(examples)} pictures")
    elif count > len(single):
        problems.append(
            f"held_out = {count}: only {len(single)} of {len(examples)} pictures have no copy among the others"
        )
    rank = {e.digest: hashlib.sha256(f"{seed} {e.digest}".encode()).digest() for e in single}
    chosen = {e.digest for e in sorted(single, key=lambda e: rank[e.digest])[:count]}
    return [e for e in examples if e.digest not in chosen], [e for e in examples if e.digest in chosen]


def _same_content(examples: Iterable[Example]) -> list[list[Example]]:
    groups = defaultdict(list)
    for example in examples:
        groups[example.digest].append(example)
    return [group for group in groups.values() if len(group) > 1]


def _in_both(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    trained = {example.digest: example.path for example in train}
    return [
        f"{e.path}: is held out, but {trained[e.digest]} is the same picture; remove one of them"
        for e in held_out
        if e.digest in trained
    ]


# --- batches ----------------------------------------------------------------------------------------------


def batch(examples: tuple[Example, ...], batch_size: int, *, seed: int, index: int) -> list[Example]:
    """Batch number `index` of an endless sequence, a function of its arguments alone. All of one bucket.

    Each epoch deals every example; the last batch of a bucket is filled up from the start of its shuffle. With
    several processes and accumulation, index = (step * accumulation + micro_step) * num_processes + process.
    """
    if not examples or batch_size < 1 or index < 0:
        raise ValueError(f"no batch {index} of {batch_size} from {len(examples)} examples")
    members: dict[_Size, list[Example]] = defaultdict(list)
    for example in examples:
        members[example.bucket].append(example)
    starts = [(size, i) for size in sorted(members) for i in range(0, len(members[size]), batch_size)]
    epoch, position = divmod(index, len(starts))
    order = torch.randperm(len(starts), generator=generator(seed, "order", epoch))
    size, start = starts[int(order[position])]
    group = members[size]
    shuffle = torch.randperm(len(group), generator=generator(seed, "shuffle", epoch, *size))
    return [group[int(shuffle[i % len(group)])] for i in range(start, start + batch_size)]


def drops_caption(probability: float, *, seed: int, index: int, position: int) -> bool:
    """Whether the picture at `position` of batch `index` is shown without its caption."""
    if probability == 0:
        return False
    return bool(torch.rand((), generator=generator(seed, "caption_dropout", index, position)) < probability)
