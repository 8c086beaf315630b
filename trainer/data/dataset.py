"""Pictures and captions: find them, check that each can be used, sort them into buckets and split.

Nothing is skipped silently: what cannot be used is a problem, all problems are raised together, and what was
changed on the way (orientation, transparency, size, ...) is said in the notes. The user's folder is only read.
"""

import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from trainer.config import first_few
from trainer.data import masks
from trainer.data.audit.verdicts import Verdicts, read_verdicts
from trainer.data.captions import CAPTION_SUFFIXES, CaptionError, Captions, clean, same_name
from trainer.data.folders import (
    FolderConfig,
    as_list,
    folder_path,
    folders_problems,
    masks_problems,
    resolution_problems,
)
from trainer.data.masks import Mask
from trainer.data.notes import Notes
from trainer.data.pictures import SUFFIXES, DataError, decode, fitted, pixel_hash, read
from trainer.errors import UserError
from trainer.files import file_in_the_way

MAX_RATIO = 2.25  # of a bucket's sides: 2:1, with room for rounding
CROP_NOTE = 0.25  # more than this share of a picture outside its crop is worth a word
_Size = tuple[int, int]  # width, height
_REPEATS = re.compile(r"\d+_")  # kohya: 10_name means each picture ten times


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`[data]`"""

    images: str = ""
    """The folder of the training pictures. Captions are in text files of the same name, or in metadata.jsonl. Several
    folders are named by `[[data.folders]]` instead."""
    recursive: bool = False
    """Use the pictures in folders below `images`, too."""
    resolution: int | tuple[int, ...] = 1024
    """Pictures are scaled and cropped to about resolution x resolution pixels, in a shape near their own. With a list,
    such as [768, 1024], each picture is trained on at each."""
    trigger: str = ""
    """A word for the subject. It is put in front of each caption that does not contain it."""
    default_caption: str = ""
    """The caption of pictures that have none of their own."""
    held_out: int | str = 0
    """Pictures that are kept for validation and never trained on: how many, chosen by the seed, or a folder of their
    own."""
    caption_dropout: float = 0.0
    """The probability, from 0 to 1, that a picture is trained on without its caption."""
    masks: str | None = None
    """A folder of masks, NAME.png or NAME.mask.png for a picture NAME, in the same folders as below `images`. Masks
    beside their pictures, NAME.mask.png, are used without it. In the loss, white counts wholly, black by
    `mask_outside`."""
    mask_outside: float = 0.1
    """How much the black of a mask counts, from 0, not at all, to 1, as much as white."""
    audit: str | None = None
    """The audit.json of `python -m trainer.data audit`: pictures that it says to leave out are neither trained on nor
    held out."""
    captions: str | None = None
    """The folder that `python -m trainer.data caption` wrote: its captions count instead of those beside the pictures.
    Those of a folder below `images` are in a folder of the same name."""
    cache: str | None = None
    """The folder for latents and prompt embeddings, which may be shared by runs. By default `cache` in the output
    folder."""
    folders: tuple[FolderConfig, ...] = ()
    """A table for each of several folders, in place of `images`. What a folder does not set is as in `[data]`."""

    def problems(self) -> list[str]:
        found = folders_problems(self.folders)
        if self.images and self.folders:
            found.append(f"images: there are [[data.folders]], too; make {self.images} one of them, or remove them")
        elif not self.images and not self.folders:
            found.append("images must name a folder, or [[data.folders]] several")
        elif self.images and not folder_path(self.images).is_dir():
            found.append(f"images: there is no folder {folder_path(self.images).absolute()}")
        if isinstance(self.held_out, int):
            if self.held_out < 0:
                found.append("held_out must not be negative")
        elif not self.held_out or not folder_path(self.held_out).is_dir():
            found.append(f"held_out: there is no folder {folder_path(self.held_out).absolute()}; or give a number")
        else:
            named = {"images": self.images, **{f"folders.{i}": one.images for i, one in enumerate(self.folders)}}
            found += [
                f"held_out is the same folder as {key}: it must hold other pictures, or be a number"
                for key, name in named.items()
                if name and folder_path(self.held_out).resolve() == folder_path(name).resolve()
            ]
        found += resolution_problems(self.resolution)
        if not 0 <= self.caption_dropout <= 1:
            found.append("caption_dropout must be from 0 to 1")
        found += self._problems_of_masks()
        if self.trigger != self.trigger.strip():
            found.append("trigger must not begin or end with a space")
        try:
            clean(self.trigger)
        except CaptionError as error:
            found.append(f"trigger: {error}")
        if self.captions is not None and self.folders:
            found.append("captions: with [[data.folders]], the captions of each folder are named in its own table")
        for name in dict.fromkeys(own.captions for own in self.each_folder() if own.captions is not None):
            if not folder_path(name).is_dir():
                found.append(f"captions: there is no folder {folder_path(name).absolute()}")
        if self.cache == "":
            found.append("cache must name a folder; leave it out for the one in the output folder")
        elif self.cache and (file := file_in_the_way(Path(self.cache))):
            found.append(f"cache: {file} is a file; name a folder, or leave it out for the one in the output folder")
        return found

    def _problems_of_masks(self) -> list[str]:
        found = [] if 0 <= self.mask_outside <= 1 else ["mask_outside must be from 0 to 1"]
        if self.masks is not None and self.folders:
            found.append("masks: with [[data.folders]], the masks of each folder are named in its own table")
        for own in self.each_folder():
            found += masks_problems(own.masks, [self.images, str(self.held_out), *(one.images for one in self.folders)])
        return found

    def each_folder(self) -> "list[DataConfig]":
        """The settings of each folder, as if it were the only one."""
        names = {field.name for field in fields(DataConfig)}
        own = [{k: v for k, v in vars(one).items() if k in names and v is not None} for one in self.folders]
        return [replace(self, **settings) for settings in own] or [self]


@dataclass(frozen=True)
class Example:
    path: Path
    caption: str
    """With the trigger. If there are several, the first one, which it is validated with."""
    digest: str
    """sha256 of the file, in hex."""
    size: _Size
    """Width and height after EXIF orientation."""
    bucket: _Size
    """What it is trained at. If there are several, that of the first resolution, which it is validated at."""
    pixels: str
    """sha256 of size and pixels, in hex: the same for copies that differ in their bytes only."""
    more_captions: tuple[str, ...] = ()
    more_buckets: tuple[_Size, ...] = ()
    """Those of further resolutions."""
    folder: int = 0
    """The number of its folder in `[[data.folders]]`."""
    repeats: int = 1

    mask: Mask | None = None
    """What of it counts; None: all."""
    name: str = ""
    """What it is called in a run's files: as its file, with the folder before it where several files are called so."""

    @property
    def captions(self) -> tuple[str, ...]:
        return self.caption, *self.more_captions

    @property
    def buckets(self) -> tuple[_Size, ...]:
        return self.bucket, *self.more_buckets

    def at(self, bucket: _Size) -> "Example":
        return self if bucket == self.bucket else replace(self, bucket=bucket)


@dataclass(frozen=True)
class Dataset:
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    notes: tuple[str, ...]
    """What was done to pictures or left unread, for the log."""


def scan(config: DataConfig, *, multiple: int, seed: int) -> Dataset:
    """Read every picture and caption; sides of buckets are multiples of `multiple`. DataError lists all problems."""
    problems, folders = config.problems(), config.each_folder()
    sides = [("", side, "") for side in as_list(config.resolution)]
    for number, folder in enumerate(config.folders):
        sides += [(f"folders.{number}.", side, f" ({folder.images})") for side in as_list(folder.resolution or ())]
    for where, side, images in sides:
        if side % multiple:
            low = max(side // multiple, 1) * multiple
            advice = f"such as {low}" + (f" or {low + multiple}" if low < side else "")
            problems.append(f"{where}resolution = {side} must be a multiple of {multiple}, {advice}{images}")
    if problems:
        raise DataError(problems)
    notes, found = Notes(), list[Example]()
    for number, own in enumerate(folders):
        examples = _scan_folder(folder_path(own.images), own, multiple, _verdicts(own, problems), problems, notes)
        examples = _with_masks(examples, own, problems)
        if own.audit and not examples and not problems:
            left = f" of {own.images}" if config.folders else ""
            problems.append(f"audit: {own.audit} leaves out all pictures{left}; change its rules, and audit again")
        repeats = config.folders[number].repeats if config.folders else 1
        found += [replace(example, folder=number, repeats=repeats) for example in examples]
    if isinstance(config.held_out, str):
        train, verdicts = found, _verdicts(config, problems)
        known = replace(verdicts, must_know=False) if verdicts else None  # it is another folder than was audited
        held_out = _scan_folder(folder_path(config.held_out), config, multiple, known, problems, notes)
        held_out = _with_masks(held_out, config, problems)
        problems += _in_both(train, held_out)
    elif problems:  # some pictures are missing from `found`: nothing to choose from
        train, held_out = found, []
    else:
        train, held_out = _split(found, config.held_out, seed, problems)
    if problems:
        raise DataError([*dict.fromkeys(problems)])  # what folders share is told once
    for same in _same_content(train):
        names = " = ".join(e.path.name if len({e.folder for e in same}) == 1 else str(e.path) for e in same)
        if len({e.captions for e in same}) > 1:
            notes.add("the same picture with different captions: each counts as a picture", names)
        elif len({e.digest for e in same}) > 1:
            notes.add("copies of a picture in other files, so it counts more", names)
        else:
            notes.add("the same picture more than once, so it counts more", names)
    called = _names([example.path for example in (*train, *held_out)])
    train, held_out = ([replace(e, name=called[e.path]) for e in part] for part in (train, held_out))
    return Dataset(tuple(train), tuple(held_out), notes.lines())


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """That of each file, with its folder before it where others are called so."""
    ways = {path: (path.name, f"{path.parent.name}/{path.name}", str(path)) for path in paths}
    counts = Counter(name for names in ways.values() for name in {*names})
    return {path: next((name for name in names if counts[name] == 1), names[-1]) for path, names in ways.items()}


# --- pictures ---------------------------------------------------------------------------------------------


def load_picture(example: Example) -> Image.Image:
    """The picture at its bucket's size: scaled to cover it, the centre kept. DataError if the file has changed."""
    data = read(example.path)
    if hashlib.sha256(data).hexdigest() != example.digest:
        raise DataError([f"{example.path}: the file has changed since the run began; start the run again"])
    return fitted(decode(example.path, data)[0], example.bucket)


# --- folders ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What lies in a folder, hidden files aside, by name."""

    files: list[Path]
    pictures: list[Path]
    masks: set[Path]
    """By their names, whether or not they are used."""
    below: list[Path]
    """Folders with pictures."""


def contents(folder: Path, config: DataConfig) -> Contents:
    """What may be trained on in a folder, and what lies beside it. OSError if it cannot be read."""
    entries = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    files = [p for p in entries if not p.is_dir()]
    named = [p for p in files if p.suffix.lower() in SUFFIXES]
    aside = masks.beside(named)
    below = [p for p in entries if p.is_dir() and _has_pictures(p, config.recursive)]
    others = [str(config.held_out), config.masks or "", *(one.images for one in config.folders)]
    apart = {folder_path(name).resolve() for name in others if name}
    below = [p for p in below if p.resolve() not in apart]
    return Contents(files, [p for p in named if p not in aside], aside, below)


def captions_folder(config: DataConfig, folder: Path) -> Path | None:
    """Where `[data] captions` has those of a folder's pictures: it is built like `images`."""
    top = folder_path(config.images).resolve()
    if config.captions is None or not folder.resolve().is_relative_to(top):
        return None
    return folder_path(config.captions) / folder.resolve().relative_to(top)


def _verdicts(config: DataConfig, problems: list[str]) -> Verdicts | None:
    """What the audit says, if there is one."""
    if config.audit is None:
        return None
    try:
        return read_verdicts(folder_path(config.audit))
    except UserError as error:
        problems.append(f"audit: {error}")
        return None


def _scan_folder(
    folder: Path,
    config: DataConfig,
    multiple: int,
    verdicts: Verdicts | None,
    problems: list[str],
    notes: Notes,
) -> list[Example]:
    """The examples of a folder, and of those below it with `recursive`."""
    try:
        here = contents(folder, config)
    except OSError as error:
        problems.append(f"{folder}: cannot be read ({error.strerror})")
        return []
    files, pictures, below = here.files, here.pictures, here.below
    named = [folder_path(name) for name in (config.images, config.held_out) if isinstance(name, str)]
    if folder in named and not pictures and not (below and config.recursive):
        names = first_few((p.name for p in below), count=5)
        more = f"; there are pictures in folders below it ({names}): set recursive = true to use them" if below else ""
        problems.append(f"{folder}: there is no picture in it ({', '.join(SUFFIXES)}){more}")
    masks.look_at_names(here.masks, pictures, problems, notes)
    for path in below:
        if not config.recursive:
            notes.add("folders with pictures that are not used without recursive = true", str(path))
        elif _REPEATS.match(path.name):
            notes.add("a number before a folder's name means repeats in other trainers; here it does not", str(path))
    for path in files:
        if path.suffix.lower() not in (*SUFFIXES, *CAPTION_SUFFIXES) and path.name != "metadata.jsonl":
            notes.add("not read, being neither pictures nor captions", str(path))
    if verdicts is not None:
        pictures = verdicts.without_left_out(pictures, problems, notes)
        files = _without_captions(files, {*here.pictures} - {*pictures}, pictures)
    captions = Captions(folder, problems, notes)
    captions.read(files, here.pictures, captions_folder(config, folder))
    texts = captions.of(pictures, trigger=config.trigger, default=config.default_caption)
    options = [buckets(side, multiple) for side in as_list(config.resolution)]
    found = _examples(folder, pictures, texts, options, problems, notes)
    for path in below if config.recursive else ():
        found += _scan_folder(path, config, multiple, verdicts, problems, notes)
    return found


def _without_captions(files: Sequence[Path], left_out: Iterable[Path], kept: Iterable[Path]) -> list[Path]:
    """The files without captions of pictures that are left out: what is wrong with them does not matter."""
    names = {same_name(name) for path in left_out for name in (path.stem, path.name)}
    names -= {same_name(name) for path in kept for name in (path.stem, path.name)}
    return [p for p in files if p.suffix.lower() not in CAPTION_SUFFIXES or same_name(p.stem) not in names]


def _has_pictures(folder: Path, recursive: bool) -> bool:
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:  # we may not read it: it would not be used anyway
        return False
    if any(path.suffix.lower() in SUFFIXES and not path.is_dir() for path in entries):
        return True
    return recursive and any(_has_pictures(path, recursive) for path in entries if path.is_dir())


def _examples(
    folder: Path,
    pictures: Sequence[Path],
    captions: Mapping[Path, Sequence[str]],
    options: Sequence[Sequence[_Size]],
    problems: list[str],
    notes: Notes,
) -> list[Example]:
    """Read each picture; what is wrong with one is a problem. options: the buckets of each resolution."""
    found = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        bar = tqdm(pool.map(_inspect, pictures), str(folder), len(pictures), leave=False, disable=None, delay=2)
        for path, result in zip(pictures, bar, strict=True):
            if isinstance(result, DataError):
                problems += result.problems
                continue
            digest, pixels, size, done = result
            bucket, *more = [nearest(size, some) for some in options]
            for remark in dict.fromkeys([*done, *(word for one in (bucket, *more) for word in _resizing(size, one))]):
                notes.add(remark, path.name)
            text, *others = captions.get(path, ("",))
            found.append(Example(path, text, digest, size, bucket, pixels, tuple(others), tuple(more)))
    return found


def _with_masks(examples: Sequence[Example], config: DataConfig, problems: list[str]) -> list[Example]:
    """The examples with the masks that there are for them."""
    folder = folder_path(config.masks) if config.masks else None
    files = masks.find([e.path for e in examples], folder_path(config.images), folder, problems)

    def inspect(example: Example) -> Mask | DataError | None:
        file = files.get(example.path)
        return masks.inspect(file, example.path, example.size, example.buckets) if file else None

    made = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        bar = tqdm(pool.map(inspect, examples), "masks", len(examples), leave=False, disable=None, delay=2)
        for example, mask in zip(examples, bar, strict=True):
            if isinstance(mask, DataError):
                problems += mask.problems
            else:
                made.append(replace(example, mask=mask) if mask else example)
    return made if len(made) == len(examples) else [*examples]


def _inspect(path: Path) -> tuple[str, str, _Size, list[str]] | DataError:
    """Hashes of the file and of its pixels, the size, and what had to be done to it."""
    try:
        data = read(path)
        image, done = decode(path, data)
    except DataError as error:
        return error
    return hashlib.sha256(data).hexdigest(), pixel_hash(image), image.size, done


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


def nearest(size: _Size, options: Sequence[_Size]) -> _Size:
    """The bucket whose ratio of sides is nearest, measured as a factor."""
    return min(options, key=lambda option: abs(math.log(size[0] / size[1]) - math.log(option[0] / option[1])))


def fitting(size: _Size, bucket: _Size) -> tuple[float, float]:
    """The factor by which a picture is scaled to cover its bucket, and the share of it that the crop cuts off."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return scale, 1 - bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)


def _resizing(size: _Size, bucket: _Size) -> list[str]:
    """What is worth saying of the way from `size` to `bucket`."""
    scale, cropped = fitting(size, bucket)
    return [
        *(["smaller than their bucket, so upscaled and soft"] if scale > 1 else []),
        *([f"more than {CROP_NOTE:.0%} cut off by the crop to their bucket"] if cropped > CROP_NOTE else []),
    ]


def _split(
    examples: Sequence[Example], count: int, seed: int, problems: list[str]
) -> tuple[list[Example], list[Example]]:
    """`count` pictures held out, chosen by seed and content, so that a renamed file stays on its side."""
    if count == 0:
        return [*examples], []
    copies = Counter(example.pixels for example in examples)
    single = [example for example in examples if copies[example.pixels] == 1]  # a copy would leak into training
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
        groups[example.pixels].append(example)
    return [group for group in groups.values() if len(group) > 1]


def _in_both(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    trained = {example.pixels: example.path for example in train}
    return [
        f"{e.path}: is held out, but {trained[e.pixels]} is the same picture; remove one of them"
        for e in held_out
        if e.pixels in trained
    ]
