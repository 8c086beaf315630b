"""Votes of a blind comparison, counted: which of two people prefer, how surely, and who voted how."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, first_few
from trainer.errors import UserError
from trainer.files import read_json

CHOICES = ("left", "right", "equal")
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Vote:
    """What a person said of a pair, by the names that the page did not show."""

    voter: str
    pair: str
    prompt: str
    names: tuple[str, str]
    """In alphabetical order."""
    preferred: str | None
    """None: equal."""


@dataclass(frozen=True)
class Preference:
    """How often the first of two was preferred to the second."""

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    share: float | None
    """wins / (wins + losses): ties do not count in it. None if nothing was decided."""
    low: float
    high: float
    """The 95 % interval of the share, by Wilson's score."""
    p: float
    """The probability of votes at least as uneven if neither were better: the two-sided sign test."""


def wilson(wins: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` (Wilson 1927); all there is if nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    share, spread = wins / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided and exact: the probability of a division at least as uneven, if both were as likely."""
    count, fewer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count)


def preference(names: tuple[str, str], preferred: Iterable[str | None]) -> Preference:
    """preferred: one of the names, or None, of each vote."""
    counts = Counter(preferred)
    wins, losses = counts[names[0]], counts[names[1]]
    share = wins / (wins + losses) if wins + losses else None
    return Preference(*names, wins, losses, counts[None], share, *wilson(wins, wins + losses), sign_test(wins, losses))


def read_votes(files: Sequence[Path], key_file: Path) -> tuple[list[Vote], list[str]]:
    """The votes in files that the page has saved, and remarks. ConfigError lists all that is wrong with the files.

    Of a page that was saved more than once in one browser, the last file counts.
    """
    key, problems, notes = _read_key(key_file), list[str](), list[str]()
    ballots = dict[str, tuple[Path, dict[str, Any]]]()
    for file in files:
        try:
            found = _checked(read_json(file), key)
        except OSError as error:
            problems.append(f"{file}: cannot be read ({error.strerror})")
        except UserError as error:
            problems.append(str(error) if str(file) in str(error) else f"{file}: {error}")
        else:
            ballot = str(found["ballot"])
            if ballot in ballots:
                older, newer = sorted([ballots[ballot], (file, found)], key=lambda one: str(one[1].get("saved", "")))
                notes.append(f"{older[0]} and {newer[0]} are of the same voter: only the later one, {newer[0]}, counts")
                ballots[ballot] = newer
            else:
                ballots[ballot] = file, found
    if problems:
        raise ConfigError(problems)
    votes = list[Vote]()
    for number, (_, found) in enumerate(ballots.values(), 1):
        votes += _named(found, key, f"{found.get('voter') or 'voter'} {number}")
    return votes, notes


def _read_key(file: Path) -> dict[str, Any]:
    try:
        key = read_json(file)
    except OSError as error:
        raise UserError(f"--key {file}: cannot be read ({error.strerror}); it was written beside the page") from error
    if not (isinstance(key, dict) and isinstance(key.get("pairs"), dict) and "page" in key):
        raise UserError(f"--key {file}: this is no key of a page of pairs; it is called key.json, and lies beside it")
    return key


def _checked(found: Any, key: Mapping[str, Any]) -> dict[str, Any]:
    """A file of votes. UserError if it is not one, or of another page than the key."""
    if not (isinstance(found, dict) and isinstance(found.get("votes"), dict) and found.get("ballot")):
        raise UserError("these are no votes: give the file that the page saves")
    if found.get("page") != key["page"]:
        raise UserError("these votes are of another page than the key: give that page's key.json")
    unknown = [pair for pair in found["votes"] if pair not in key["pairs"]]
    odd = [pair for pair, choice in found["votes"].items() if choice not in CHOICES]
    if unknown or odd:
        what = f"no such pair: {first_few(unknown)}" if unknown else f"neither left, right nor equal: {first_few(odd)}"
        raise UserError(f"it was changed after the page saved it ({what})")
    return found


def _named(found: Mapping[str, Any], key: Mapping[str, Any], voter: str) -> Iterable[Vote]:
    for pair, choice in found["votes"].items():
        told = key["pairs"][pair]
        first, second = sorted((told["left"], told["right"]))
        yield Vote(voter, pair, told["prompt"], (first, second), told.get(choice))


def count(votes: Sequence[Vote]) -> dict[str, Any]:
    """What the votes say, ready for JSON: `overall`, by `pairs` of pictures (each counts once, by its majority), by
    `prompts` and `by_voter`: for each two that were held against each other."""
    found: dict[str, Any] = {"votes": len(votes), "voters": len({vote.voter for vote in votes})}
    groups = {"overall": lambda vote: "", "prompts": lambda vote: vote.prompt, "by_voter": lambda vote: vote.voter}
    for name, group in groups.items():
        found[name] = []
        for told in sorted({(group(vote), vote.names) for vote in votes}):
            own = [vote.preferred for vote in votes if (group(vote), vote.names) == told]
            found[name].append({"of": told[0], **asdict(preference(told[1], own))})
    found["pairs"] = [
        {"of": "", **asdict(preference(names, _majorities([vote for vote in votes if vote.names == names])))}
        for names in sorted({vote.names for vote in votes})
    ]
    return found


def _majorities(votes: Sequence[Vote]) -> list[str | None]:
    """For each pair of pictures what most of those preferred who decided, None where as many preferred either."""
    found = list[str | None]()
    for pair in dict.fromkeys(vote.pair for vote in votes):
        counts = Counter(vote.preferred for vote in votes if vote.pair == pair and vote.preferred)
        ranked = counts.most_common(2)
        undecided = not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1])
        found.append(None if undecided else ranked[0][0])
    return found


def in_words(found: Mapping[str, Any]) -> str:
    """The count as text for a terminal."""
    lines = [f"{found['votes']} votes of {found['voters']} voter{'s' if found['voters'] != 1 else ''}"]
    for row in found["overall"]:
        lines.append(_line(row, ""))
    if found["voters"] > 1:
        lines += [
            "",
            "Each pair of pictures once, by its majority, since votes on the same pictures depend on each other:",
        ]
        lines += [_line(row, "  ") for row in found["pairs"]]
    for name, title in (("prompts", "By prompt:"), ("by_voter", "By voter:")):
        if len({row["of"] for row in found[name]}) > 1:
            lines += ["", title, *(_line(row, "  ") for row in found[name])]
    return "\n".join(lines)


def _line(row: Mapping[str, Any], indent: str) -> str:
    of = f"{json.dumps(row['of'], ensure_ascii=False)}: " if row["of"] else ""
    counts = f"{row['wins']} to {row['losses']}, {row['ties']} equal"
    if row["share"] is None:
        return f"{indent}{of}{row['first']} against {row['second']}: {counts}"
    bounds = f"95 % interval {row['low']:.0%} to {row['high']:.0%}, sign test p = {row['p']:.3g}"
    return f"{indent}{of}{row['first']} preferred to {row['second']} in {row['share']:.0%} ({counts}; {bounds})"
