"""What an audit has said of pictures, read from its file and found again by their content."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config import first_few
from trainer.data.notes import Notes
from trainer.data.pictures import no_file
from trainer.errors import UserError
from trainer.files import sha256

FORMAT = 1
"""The number of audit.json's format. A file of another one is refused."""
KEEP, LOOK, LEAVE_OUT = "keep", "look", "leave out"
"""What an audit says of a picture: train on it; see for yourself; do not train on it."""


@dataclass(frozen=True)
class Verdict:
    file: str
    """Its path under the folder that was audited, with `/`."""
    sha256: str
    """The file's, in hex; "" if it could not be read."""
    verdict: str
    reasons: tuple[tuple[str, str], ...]
    """Pairs of a rule and what it found."""

    def rules(self) -> str:
        return ", ".join(dict.fromkeys(rule for rule, _ in self.reasons))


@dataclass(frozen=True)
class Verdicts:
    path: Path
    folder: str
    """That was audited."""
    pictures: tuple[Verdict, ...]
    must_know: bool = True
    """Whether a picture that is not in it is a problem."""

    def of(self, path: Path) -> Verdict | None:
        """That of a picture: by content, so that a renamed one is known; of several copies, the one of the same name,
        else the first that is not left out. None if it was not audited as it is now."""
        digest = file_hash(path)
        same = self._by_hash.get(digest, [])
        named = [verdict for verdict in same if Path(verdict.file).name == path.name]
        kept = [verdict for verdict in same if verdict.verdict != LEAVE_OUT]
        return next(iter([*named, *kept, *same] if digest else named), None)

    @cached_property
    def _by_hash(self) -> dict[str, list[Verdict]]:
        found: dict[str, list[Verdict]] = {}
        for verdict in self.pictures:
            found.setdefault(verdict.sha256, []).append(verdict)
        return found

    def without_left_out(self, pictures: Sequence[Path], problems: list[str], notes: Notes) -> list[Path]:
        """The pictures to train on. The notes tell which others there are, and why."""
        found = {path: self.of(path) for path in pictures}
        unknown = [path for path, verdict in found.items() if verdict is None]
        if unknown and self.must_know:
            problems.append(self._not_audited(unknown, len(pictures)))
        for path, verdict in found.items():
            if verdict is not None and verdict.verdict == LEAVE_OUT:
                notes.add(f"left out by the audit: {verdict.rules()}", path.name)
        return [path for path, verdict in found.items() if verdict is None or verdict.verdict != LEAVE_OUT]

    def _not_audited(self, unknown: Sequence[Path], count: int) -> str:
        folder = unknown[0].parent
        again = f"audit again: python -m trainer.data audit {folder} --output {self.path.parent}"
        if len(unknown) == count:
            which = f"is of other pictures, those of {self.folder}: none of {folder} is in it"
        else:
            names = first_few((path.name for path in unknown), count=5)
            which = f"does not know {len(unknown)} of {count} pictures in {folder}, added or changed since: {names}"
        return f"audit: {self.path} {which}; {again}"


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex; "" if it cannot be read."""
    try:
        return "" if no_file(path) else sha256(path)
    except OSError:
        return ""


def read_verdicts(path: Path) -> Verdicts:
    """UserError if it is not there, or not whole."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise UserError(f"{path} was written by another version of this program; audit the pictures again")
        return Verdicts(path, str(data["folder"]), tuple(map(_verdict, data["pictures"])))
    except FileNotFoundError:
        advice = "it is what `python -m trainer.data audit` writes"
        raise UserError(f"there is no file {path.absolute()}; {advice}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged, or is no audit.json ({reason}); audit the pictures again") from error


def _verdict(entry: dict[str, Any]) -> Verdict:
    if entry["verdict"] not in (KEEP, LOOK, LEAVE_OUT):
        raise ValueError(f"{entry['verdict']!r} is no verdict")
    reasons = tuple((str(reason["rule"]), str(reason["says"])) for reason in entry["reasons"])
    return Verdict(str(entry["file"]), str(entry["sha256"]), entry["verdict"], reasons)
