"""Choose from a folder of LoRAs for each prompt: by the trigger word in it, else by what it describes.

What a prompt describes is the mean of its prompt_embeds over the tokens. A LoRA is near if the prompt resembles the
captions that it was trained with far more than `PLAIN`, prompts of all sorts, do.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from torch.nn.functional import normalize

from trainer.data.captions import has_trigger, read_text, with_trigger, without_trigger
from trainer.errors import UserError
from trainer.folder import FROZEN_FILE, NEGATIVE_FILE, RUN_FILE
from trainer.formats.asked import check_files
from trainer.formats.lora import LoraFile
from trainer.formats.origin import DIFFUSERS_FILE, PEFT_FILE, TRIGGER

PLAIN = (
    "a mountain lake under a clear sky, photograph",
    "an old fisherman with a grey beard, portrait",
    "a bowl of noodle soup with herbs",
    "a racing car on a wet track",
    "a cat asleep on a window sill",
    "a funny cartoon animal",
    "a castle on a hill, oil painting",
    "a bright kitchen with a large table",
    "tulips in a glass vase",
    "a crowded market street in the rain",
    "a robot at work in a factory",
    "two children flying a kite",
    "a sailing boat far out at sea",
    "a forest of fir trees in winter",
    "overlapping blue and orange circles, abstract",
    "a rider on a horse crossing a field",
    "a poster with the words GRAND OPENING",
    "the skyline of a city at dusk",
    "a hand holding a small screwdriver",
    "a dancer on a dark stage",
)
"""Prompts of all sorts."""
NEAR = 0.4
"""A prompt is near if its similarity is at least so much of the way from those of `PLAIN` to those that the LoRA's own
captions have with one another."""
MOST_CAPTIONS = 64  # of a LoRA that are compared

Encode = Callable[[Iterable[str]], Mapping[str, Tensor]]
"""Texts to prompt_embeds, L D."""


@dataclass(frozen=True)
class Book:
    """A LoRA of the library."""

    path: Path
    file: LoraFile
    trigger: str
    captions: tuple[str, ...]
    """Some that it was trained with, without the trigger."""

    @property
    def name(self) -> str:
        """That of the run, where the file is one of those that a run writes."""
        usual = self.path.name in (PEFT_FILE, DIFFUSERS_FILE)
        return _run_folder(self.path).name if usual else self.path.stem


@dataclass(frozen=True)
class Choice:
    """What was chosen for a prompt; no books if none is near."""

    prompt: str
    """As it is drawn: with the trigger of what was chosen."""
    books: tuple[Book, ...]
    why: str


def open_library(folder: Path, modules: Mapping[str, tuple[int, int]] | None) -> tuple[list[Book], list[str]]:
    """All LoRAs in a folder and the folders in it, and what is wrong with it. modules: as in `check_files`."""
    if not folder.is_dir():
        return [], [f"{folder}: there is no such folder"]
    paths = [path for path in sorted(folder.rglob("*.safetensors")) if not _is_other(path, folder)]
    files, problems = check_files(paths, modules)
    if not paths:
        problems.append(f"{folder}: no LoRA is in it (.safetensors)")
    return [_book(path, file) for path, file in files.items()], problems


def _is_other(path: Path, library: Path) -> bool:
    """What runs write beside their result, and the same LoRA a second time."""
    inner = {part for part in path.relative_to(library).parts[:-1]}
    again = path.name != PEFT_FILE and (path.parent / PEFT_FILE).is_file()
    beside = path.name in (FROZEN_FILE, NEGATIVE_FILE) and (path.parent / RUN_FILE).is_file()
    return bool(inner & {"checkpoints", "cache", "adapter_last"}) or beside or again


def _book(path: Path, file: LoraFile) -> Book:
    run = _json(_run_folder(path) / RUN_FILE)
    card = _card(path.parent / "README.md")
    trigger = card.get("instance_prompt") or file.metadata.get(TRIGGER) or _of_run(run) or ""
    captions = [*_captions_of_run(run), *_captions_beside(path), *_tags(file.metadata)]
    plain = dict.fromkeys(without_trigger(trigger, text) if trigger else text for text in captions)
    return Book(path, file, str(trigger), tuple(text for text in plain if text)[:MOST_CAPTIONS])


def _run_folder(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "adapter" else path.parent


def _json(path: Path) -> dict[str, Any]:
    """Empty if there is none, or it cannot be read: the library is what can be known."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _card(path: Path) -> dict[str, Any]:
    """The data of a model card."""
    with suppress(OSError, ValueError, TypeError):
        return dict(ModelCard.load(path).data.to_dict()) if path.is_file() else {}
    return {}


def _of_run(run: Mapping[str, Any]) -> str:
    with suppress(KeyError, TypeError):
        return str(run["config"]["data"]["trigger"])
    return ""


def _captions_of_run(run: Mapping[str, Any]) -> list[str]:
    with suppress(KeyError, TypeError):
        captions = [entry["caption"] for entry in run["data"]["train"]]
        return [text for one in captions for text in ([one] if isinstance(one, str) else one)]
    return []


def _captions_beside(path: Path) -> list[str]:
    """NAME.txt beside NAME.safetensors, one caption a line."""
    file = path.with_suffix(".txt")
    return [line.strip() for line in read_text(file).splitlines() if line.strip()] if file.is_file() else []


def _tags(metadata: Mapping[str, str]) -> list[str]:
    """What kohya's trainers keep of captions: `ss_tag_frequency`, folder -> tag -> how often."""
    with suppress(ValueError, AttributeError, KeyError):
        return [tag.strip() for folder in json.loads(metadata["ss_tag_frequency"]).values() for tag in folder]
    return []


def choose(prompts: Sequence[str], books: Sequence[Book], encode: Encode) -> list[Choice]:
    """For each prompt the LoRAs whose trigger is in it, all of them; else the nearest one, or none."""
    by_trigger = {text: tuple(book for book in books if has_trigger(book.trigger, text)) for text in prompts}
    others = [text for text in dict.fromkeys(prompts) if not by_trigger[text]]
    described = [book for book in books if book.captions]
    near = _nearest(others, described, encode) if others and described else {}
    found = []
    for text in prompts:
        if chosen := by_trigger[text]:
            words = " and ".join(f'"{book.trigger}"' for book in chosen)
            found.append(Choice(text, chosen, f"{words} {'is' if len(chosen) == 1 else 'are'} in the prompt"))
        elif text in near:
            found.append(near[text])
        else:
            found.append(Choice(text, (), "no trigger is in the prompt, and no LoRA tells its captions"))
    return found


def _nearest(prompts: Sequence[str], books: Sequence[Book], encode: Encode) -> dict[str, Choice]:
    embedded = encode({*prompts, *PLAIN, *(text for book in books for text in book.captions)})

    def rows(texts: Sequence[str]) -> Tensor:
        return torch.stack([embedded[text].double().mean(0) for text in texts])

    captions = [rows(book.captions) for book in books]
    plain = rows(PLAIN)
    # what all prompts have in common, the template's words above all, must not count
    middle = (plain.mean(0) + torch.stack([own.mean(0) for own in captions]).mean(0)) / 2

    def similarity(texts: Tensor) -> Tensor:
        """N books: the mean cosine with the captions of each."""
        unit = normalize(texts - middle, dim=1)
        return torch.stack([(unit @ normalize(own - middle, dim=1).T).mean(1) for own in captions], dim=1)

    low = similarity(plain).mean(0)
    high = torch.stack([similarity(own)[:, number].mean() for number, own in enumerate(captions)])
    least = low + NEAR * (high - low)
    found = {}
    for text, values in zip(prompts, similarity(rows(prompts)), strict=True):
        best = int(values.argmax())
        book, value, limit = books[best], float(values[best]), float(least[best])
        if value > limit:
            why = f"its captions are the nearest: {value:.2f}, where {limit:.2f} is needed"
            found[text] = Choice(with_trigger(book.trigger, text)[0], (book,), why)
        else:
            found[text] = Choice(text, (), f"none is near: {book.name} is the nearest by {value:.2f} of {limit:.2f}")
    return found


def library_lines(choices: Sequence[Choice]) -> list[str]:
    """What was chosen for each prompt, for people."""
    return [
        f'"{choice.prompt}": {" + ".join(book.name for book in choice.books) or "none"} ({choice.why})'
        for choice in choices
    ]


def check_library(books: Sequence[Book]) -> None:
    """UserError if nothing could ever be chosen."""
    if not any(book.trigger or book.captions for book in books):
        raise UserError(
            "no LoRA of the library tells a trigger word or captions: put NAME.txt with some of its captions, one a "
            "line, beside NAME.safetensors"
        )
