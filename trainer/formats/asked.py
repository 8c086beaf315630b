"""LoRA files as they are asked for on a command line or in a configuration: FILE or FILE:STRENGTH."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.formats.lora import FormatError, LoraFile, open_lora


@dataclass(frozen=True)
class Asked:
    """A LoRA, and the strength that its dW is multiplied by."""

    path: Path
    file: LoraFile
    strength: float


def read_asked(
    option: str, texts: Sequence[str], modules: Mapping[str, tuple[int, int]] | None, problems: list[str]
) -> list[Asked]:
    """Files whose headers are in order, and fit a model whose Linear layers have these in_features and out_features;
    what is wrong with the others is added to `problems`. modules: None if the model is not known.

    option: what the texts were given to, for messages: "--lora".
    """
    wanted = []
    for text in texts:
        try:
            wanted.append(parse_strength(text))
        except FormatError as error:
            problems.append(f"{option} {error}")
    files, wrong = check_files([path for path, _ in wanted], modules)
    problems += [f"{option} {problem}" for problem in wrong]
    return [Asked(path, files[path], strength) for path, strength in wanted if path in files]


def parse_strength(text: str) -> tuple[Path, float]:
    """A file and the strength that its dW is multiplied by, from `FILE` or `FILE:STRENGTH`; 1 if none is given.

    A colon inside the path is none before a strength: that of a drive, as in `C:\\x.safetensors`, one before a slash,
    and one in the name of a file that is there. FormatError if the strength is no finite number.
    """
    path, colon, given = text.rpartition(":")
    if not colon or "/" in given or "\\" in given or Path(text).expanduser().exists():
        return Path(text).expanduser(), 1.0
    try:
        strength = float(given)
    except ValueError:
        if re.fullmatch("[A-Za-z]", path):  # a drive
            return Path(text), 1.0
        strength = math.nan
    if not path or not math.isfinite(strength):
        raise FormatError(f'{text}: "{given}" after the colon is no finite number: write FILE, or FILE:0.8')
    return Path(path).expanduser(), strength


def check_files(
    paths: Iterable[Path], modules: Mapping[str, tuple[int, int]] | None
) -> tuple[dict[Path, LoraFile], list[str]]:
    """The headers of LoRA files, and what is wrong with the others. modules: as in `read_asked`."""
    found, problems = dict[Path, LoraFile](), list[str]()
    for path in dict.fromkeys(paths):
        try:
            file = open_lora(path)
        except FormatError as error:
            problems.append(str(error))
            continue
        if modules is not None and (problem := _misfit(file, modules)):
            problems.append(f"{path} {problem}")
        else:
            found[path] = file
    return found, problems


def _misfit(file: LoraFile, modules: Mapping[str, tuple[int, int]]) -> str | None:
    wrong = [(name, size[:2]) for name, size in file.sizes().items() if modules.get(name) != size[:2]]
    if not wrong:
        return None
    name, (columns, rows) = wrong[0]
    there = "is not in the model" if name not in modules else "is {} -> {} in the model".format(*modules[name])
    count = f"{len(wrong)} of its {len(file.modules)} modules do not fit"
    return f"was made for another model: {count}; {name} is {columns} -> {rows} in the file, and {there}"
