"""A page of pairs without names, for people to choose from: it needs no server, and no other file.

The page knows the pairs by numbers. Which side is whose is in a file beside it, key.json, and is joined with the votes
by `trainer.evaluate.votes`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image

from trainer import flow, template
from trainer.config import ConfigError
from trainer.data.cache import key as hash_of
from trainer.data.pictures import DataError, open_picture, pictures_in
from trainer.evaluate.names import distinct
from trainer.files import content_hash, write_json, write_text
from trainer.page.pictures import Shown, shrunk

TEMPLATE = Path(__file__).with_name("blind.html.jinja")
KEY_FILE = "key.json"
QUESTION = "Which picture is better?"
SIDE = 768  # pixels: a picture is shown at most so wide and high
MAX_REAL = 6


@dataclass(frozen=True)
class Pair:
    prompt: str
    seed: str
    left: str
    right: str
    """Names, which the page does not get."""
    left_file: Path
    right_file: Path


def read_folders(folders: Sequence[Path]) -> dict[str, dict[tuple[str, str], Path]]:
    """The pictures of each folder, under a short name of it, by the prompt and seed that their files tell, else by the
    files' names. ConfigError lists all that is wrong."""
    found, problems = dict[str, dict[tuple[str, str], Path]](), list[str]()
    if len(folders) < 2:
        problems.append("two folders of pictures are needed, or more")
    for name, folder in zip(distinct(folders), folders, strict=True):
        if not folder.is_dir():
            problems.append(f"{folder}: there is no such folder")
            continue
        own = found.setdefault(name, {})
        for path in pictures_in(folder):
            try:
                open_picture(path)
            except DataError as error:
                problems += error.problems
            else:
                own[_told(path)] = path
        if not own and not problems:
            problems.append(f"{folder}: there is no picture in it")
    if not problems and not any({*a} & {*b} for a, b in combinations(found.values(), 2)):
        problems.append(
            "no picture of one folder has its like in another: they must be of the same prompts and seeds, as "
            "`python -m trainer.evaluate` draws them, or have the same file names"
        )
    if problems:
        raise ConfigError(problems)
    return found


def _told(path: Path) -> tuple[str, str]:
    """The prompt and seed that are written in a file, else its name."""
    with Image.open(path) as picture:
        prompt, seed = picture.info.get("prompt"), picture.info.get("seed")
    return (str(prompt), str(seed)) if prompt is not None and seed is not None else (path.stem, "")


def pair_up(samples: Mapping[str, Mapping[tuple[str, str], Path]], seed: int) -> list[Pair]:
    """Each two of the names on each prompt and seed that both have; sides and order are drawn by the seed."""
    random, pairs = flow.generator(seed, "blind"), list[Pair]()
    for first, second in combinations(samples, 2):
        for told in samples[first]:
            if told not in samples[second]:
                continue
            left, right = (first, second) if torch.rand((), generator=random) < 0.5 else (second, first)
            pairs.append(Pair(*told, left, right, samples[left][told], samples[right][told]))
    return [pairs[i] for i in torch.randperm(len(pairs), generator=random)]


def write_page(
    page: Path, pairs: Sequence[Pair], *, question: str = QUESTION, real: Sequence[Path] = (), key: Path | None = None
) -> Path:
    """Write the page and its key, by default key.json beside it; returns the key's path. real: pictures of the subject,
    to be shown above each pair."""
    key = key or page.with_name(KEY_FILE)
    told = {
        f"{number:04d}": {"prompt": pair.prompt, "seed": pair.seed, "left": pair.left, "right": pair.right}
        for number, pair in enumerate(pairs, 1)
    }
    files = list(dict.fromkeys(file for pair in pairs for file in (pair.left_file, pair.right_file)))
    shown = [_shown(file) for file in files]
    identity = hash_of("blind", told, question, [content_hash(file) for file in files])[:16]
    place = {file: number for number, file in enumerate(files)}
    data = {
        "page": identity,
        "pictures": [one.uri for one in shown],
        "pairs": [
            [number, pair.prompt, place[pair.left_file], place[pair.right_file]]
            for number, pair in zip(told, pairs, strict=True)
        ],
    }
    text = template.load(TEMPLATE).render(
        data=data, question=question, real=[_shown(file, 256) for file in real[:MAX_REAL]]
    )
    write_json(key, {"page": identity, "question": question, "pairs": told})
    write_text(page, text)
    return key


def _shown(file: Path, side: int = SIDE) -> Shown:
    found = shrunk(file, side)
    if found is None:
        raise ConfigError([f"{file}: this picture cannot be read"])
    return found
