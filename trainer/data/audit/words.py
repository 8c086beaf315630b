"""The captions of an audited folder: what each says, in which script, and what is wrong with it."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.captions import CAPTION_SUFFIXES, CaptionError, Captions, clean, with_trigger
from trainer.data.dataset import Contents, DataConfig, captions_folder
from trainer.data.notes import Notes

SHARE = 0.15  # of a caption's letters: less of a script is a name or a loan word
LETTERS_OF_A_SIGN = 3  # a Chinese sign says as much as some letters
_NONE = "(there is no caption)"
_SCRIPTS = {"CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


@dataclass(frozen=True)
class Caption:
    text: str = ""
    """As training reads it, with the trigger."""
    own: bool = False
    """It is not `[data] default_caption`."""
    has_trigger: bool = True
    """Without the trigger's being put in front; True if there is no trigger."""
    script: str = ""
    """That of its letters, the trigger aside: "Latin", "Chinese", "Chinese and Latin"; "" if it has none."""
    problem: str = ""
    """That there is none, or why it cannot be used."""
    others: tuple[str, ...] = ()
    """Further ones of the picture. What is said of its caption is said of all of them."""

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text, *self.others) if self.text else ()


def captions_of(folder: Path, here: Contents, config: DataConfig, problems: list[str]) -> dict[Path, Caption]:
    """The caption of each picture of a folder. What is wrong with its files of captions, and is not said with a
    picture, is added to `problems`."""
    wrong, said = list[str](), set[str]()
    captions = Captions(folder, wrong, Notes())
    captions.read(here.files, here.pictures, captions_folder(config, folder))
    made = {}
    for path in here.pictures:
        texts = captions.of([path], trigger="", default=_NONE).get(path)
        if texts is None:
            problem = _problem_of(path, wrong)
            said.add(problem)
            short = problem.replace(f"{folder}{os.sep}", "") or "its row in metadata.jsonl is damaged"
            made[path] = Caption(problem=f"no usable caption: {short}")
        else:
            made[path] = _caption(texts, config)
    problems += [problem for problem in wrong if problem not in said]
    return made


def _caption(texts: tuple[str, ...], config: DataConfig) -> Caption:
    own = texts != (_NONE,)
    try:
        texts = texts if own else (clean(config.default_caption)[0],)
    except CaptionError as error:
        return Caption(problem=f"no usable caption: default_caption {error}")
    if not texts[0]:
        return Caption(problem="no caption")
    first, *others = [with_trigger(config.trigger, text)[0] for text in texts]
    put_in_front = [f"{config.trigger}, {text}" for text in texts]
    has_trigger = not config.trigger or not {first, *others} & {*put_in_front}
    return Caption(first, own, has_trigger, script(" ".join(texts), config.trigger), others=tuple(others))


def _problem_of(path: Path, problems: Sequence[str]) -> str:
    """That of a picture's caption, among those of its folder; "" if none names it."""
    files = [str(path.with_name(name + suffix)) for name in (path.stem, path.name) for suffix in CAPTION_SUFFIXES]
    named = re.compile(rf"(?<![\w.-]){re.escape(path.name)}(?![\w-])")
    for problem in problems:
        where, _, what = problem.partition(": ")
        if where in (*files, str(path)) or ("metadata.jsonl" in where and named.search(what)):
            return problem
    return ""


def script(text: str, trigger: str = "") -> str:
    """The scripts of a text's letters, the most frequent one first."""
    counts: Counter[str] = Counter()
    for letter in re.sub(re.escape(trigger), "", text, flags=re.IGNORECASE) if trigger else text:
        if unicodedata.category(letter).startswith("L"):
            name = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
            counts[_SCRIPTS.get(name, name.capitalize())] += LETTERS_OF_A_SIGN if name == "CJK" else 1
    if counts["Japanese"]:
        counts["Japanese"] += counts.pop("Chinese", 0)
    enough = SHARE * counts.total()
    return " and ".join(name for name, count in counts.most_common() if count and count >= enough)


def same_captions(captions: Mapping[str, Caption], groups: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """For each picture the others that have its caption, and are not copies of it."""
    group = {name: number for number, names in enumerate(groups) for name in names}
    by_text: dict[str, list[str]] = {}
    for name, caption in captions.items():
        if caption.own and caption.text:
            by_text.setdefault(" ".join(" ".join(caption.texts).casefold().split()), []).append(name)
    others = {
        name: [other for other in names if other != name and group.get(other, other) != group.get(name, name)]
        for names in by_text.values()
        for name in names
    }
    return {name: found for name, found in others.items() if found}
