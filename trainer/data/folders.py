"""Several folders of pictures, each with settings of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def folder_path(name: str) -> Path:
    return Path(name).expanduser()


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """`[[data.folders]]`. What is None is as in `[data]`."""

    images: str
    """The folder of the pictures, with their captions."""
    repeats: int = 1
    """How often each of its pictures is drawn in an epoch. Held-out pictures are not repeated."""
    resolution: int | tuple[int, ...] | None = None
    """Instead of that in `[data]`."""
    default_caption: str | None = None
    """Instead of that in `[data]`."""
    audit: str | None = None
    """Instead of that in `[data]`: the audit.json of this folder."""
    masks: str | None = None
    """As `[data] masks`: the masks of this folder."""

    def problems(self) -> list[str]:
        found = []
        if not self.images:
            found.append("images must name a folder")
        elif not (folder := folder_path(self.images)).is_dir():
            found.append(f"images: there is no folder {folder.absolute()}")
        if self.repeats < 1:
            advice = "to leave the folder out, remove its table"
            found.append(f"repeats = {self.repeats} of {self.images}: must be at least 1; {advice}")
        if self.resolution is not None:
            found += [f"{problem} ({self.images})" for problem in resolution_problems(self.resolution)]
        return found


def folders_problems(folders: Sequence[FolderConfig]) -> list[str]:
    """What is wrong with them together, in the words of `[data]`."""
    found, first = [], dict[Path, int]()
    for number, folder in enumerate(folders):
        same = first.setdefault(folder_path(folder.images).resolve(), number)
        if same != number:
            advice = "name it once, with the repeats that it is to have"
            found.append(f"folders.{number}: {folder.images} is the folder of folders.{same}, too; {advice}")
    return found


def masks_problems(masks: str | None, pictures: Sequence[str]) -> list[str]:
    """What is wrong with a folder of masks. pictures: the folders of pictures."""
    if masks is None:
        return []
    if not masks or not (folder := folder_path(masks)).is_dir():
        return [f"masks: there is no folder {folder_path(masks).absolute()}"]
    if folder.resolve() in {folder_path(name).resolve() for name in pictures if name}:
        return [f"masks: {masks} is a folder of pictures; masks beside pictures, NAME.mask.png, are found without it"]
    return []


def as_list(resolution: int | tuple[int, ...]) -> tuple[int, ...]:
    return (resolution,) if isinstance(resolution, int) else resolution


def resolution_problems(resolution: int | tuple[int, ...]) -> list[str]:
    sides = as_list(resolution)
    twice = sorted({side for side in sides if sides.count(side) > 1})
    return [
        *([] if sides else ["resolution must name at least one"]),
        *(["resolution must be at least 16"] if any(side < 16 for side in sides) else []),
        *(f"resolution: {side} is there twice; for more of a picture use repeats" for side in twice),
    ]
