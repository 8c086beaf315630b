"""A folder of captions that a command writes: captions.json says of which pictures, and how they were made.

It is written before the captions themselves, so that what a killed command leaves is whole and can be finished.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from trainer.config import first_few
from trainer.data.captions import CAPTION_SUFFIXES
from trainer.errors import UserError
from trainer.files import read_json, write_json, write_text

RECORD, ROWS = "captions.json", "metadata.jsonl"
VERSION = 1
Kind = Literal["txt", "jsonl"]


@dataclass(frozen=True)
class Entry:
    sha256: str  # of the picture's file
    caption: str


class Written:
    """The captions in a folder. UserError if there are others than those that `asked` makes."""

    def __init__(self, folder: Path, kind: Kind, asked: Mapping[str, Any]):
        self._folder, self._kind = folder, kind
        self._asked = json.loads(json.dumps({**asked, "format": kind}))  # as it will be read again
        self._entries: dict[str, Entry] = {}
        if (folder / RECORD).exists():
            self._entries = self._read()
        elif foreign := _captions_in(folder):
            raise UserError(
                f"--output: {folder} has captions of another origin ({first_few(foreign)}), which are not overwritten; "
                "name another folder"
            )

    def _read(self) -> dict[str, Entry]:
        found = read_json(self._folder / RECORD)
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise UserError(f"--output: {self._folder / RECORD} was written by another version; name another folder")
        if differing := [name for name, value in self._asked.items() if found["asked"].get(name) != value]:
            shown = ", ".join(_difference(name, found["asked"].get(name), self._asked[name]) for name in differing)
            raise UserError(
                f"--output: {self._folder} has captions that were made in another way ({shown}); give the same "
                "arguments to go on with them, or name another folder"
            )
        return {name: Entry(**entry) for name, entry in found["pictures"].items()}

    def has(self, picture: str, sha256: str) -> bool:
        """Whether there is a caption of this picture as it is now."""
        return picture in self._entries and self._entries[picture].sha256 == sha256

    def knows(self, picture: str) -> bool:
        """Whether there is a caption of it, or of what it was before it was changed."""
        return picture in self._entries

    def add(self, entries: Mapping[str, Entry], pictures: Sequence[str]) -> None:
        """Write captions. pictures: all of the folder, which decide on the names of text files."""
        self._entries |= entries
        made = {name: asdict(entry) for name, entry in sorted(self._entries.items())}
        write_json(self._folder / RECORD, {"version": VERSION, "asked": self._asked, "pictures": made})
        self._write([*entries], pictures)

    def restore(self, pictures: Sequence[str]) -> None:
        """Write what is on record and not there, because a command was stopped in between. Others, which a person may
        have changed, are left as they are."""
        known = [name for name in pictures if name in self._entries]
        if self._kind == "txt":
            known = [name for name in known if not self._text_file(name, pictures).exists()]
        self._write(known, pictures, keep=True)

    def _write(self, names: Sequence[str], pictures: Sequence[str], keep: bool = False) -> None:
        """keep: rows that are there already stay."""
        if self._kind == "txt":
            for name in names:
                write_text(self._text_file(name, pictures), f"{self._entries[name].caption}\n")
            return
        for parent in {PurePosixPath(name).parent for name in names}:
            file = self._folder / parent / ROWS
            rows = _rows(file)
            new = {PurePosixPath(n).name: self._entries[n].caption for n in names if PurePosixPath(n).parent == parent}
            rows = new | rows if keep else rows | new
            lines = [json.dumps({"file_name": n, "text": t}, ensure_ascii=False) for n, t in sorted(rows.items())]
            if rows != _rows(file):
                write_text(file, "".join(f"{line}\n" for line in lines))

    def _text_file(self, picture: str, pictures: Sequence[str]) -> Path:
        """a.txt for a.png; a.png.txt where there is an a.jpg, too."""
        path = PurePosixPath(picture)
        stems = Counter(str(PurePosixPath(other).with_suffix("")) for other in pictures)
        shared = stems[str(path.with_suffix(""))] > 1
        return self._folder / path.with_name(f"{path.name if shared else path.stem}.txt")


def _rows(file: Path) -> dict[str, str]:
    """What metadata.jsonl says, which a person may have edited."""
    if not file.exists():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row["file_name"]: row["text"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output: {file} is damaged ({error!r}); correct it, or name another folder") from error


def _captions_in(folder: Path) -> list[str]:
    """Files of captions in it, by name."""
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    return [p.name for p in files if p.name == ROWS or (p.suffix.lower() in CAPTION_SUFFIXES and p.is_file())]


def _difference(name: str, old: Any, new: Any) -> str:
    long = any(len(str(value)) > 40 or isinstance(value, list | dict) for value in (old, new))
    return name if long else f"{name} {json.dumps(old)} -> {json.dumps(new)}"
