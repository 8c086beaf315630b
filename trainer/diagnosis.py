"""Which training pictures deserve a second look: each is diagnosed by its errors at fixed noise, which a run has
written into `pictures.jsonl`.

A line of that file is {"step": 40, "part": "train", "picture": "3.png", "what": "adapter", "errors": [...]}, with the
errors of one picture at the sigmas of `validation.stable_errors`, always with the same noise. `what` is

    adapter         with the adapter as it is at this step, of all validations
    base            of the frozen base, at step 0
    no caption      of the frozen base with the empty prompt, at step 0
    others' seed    of the base with the i2L seed of the other training pictures, whole and at strength 1, at step 0;
                    only where a run starts from i2L

Two errors of one picture differ by what was changed, and not by noise: their ratio says what a caption, a seed or a
training is worth to the picture. A picture is doubtful if its ratio is far from those of the other pictures.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.files import read_json, write_json

log = logging.getLogger("trainer")

RECORDS_FILE, DIAGNOSIS_FILE = "pictures.jsonl", "diagnosis.json"
THRESHOLD = 4.0
"""From this score on, a picture is doubtful. With normal numbers, a picture without a fault reaches it in 2 to 5 of
100 folders; `python -m demo.diagnosis` counts the false alarms with pictures."""
MIN_COMPARED = 4
"""With fewer pictures none is compared with the others: nobody can say which of two is the odd one."""
SMALLEST_RISE = 0.01
"""Differences between rises (as the log of a ratio) are told from four times this one on."""
LEARNED_LEAST = "it is learned least of all: is it the same subject?"
Errors = NDArray[np.float64]
"""The errors of one picture at each sigma; or, with an axis before it, at several steps or of several pictures."""
Series = Mapping[str, Mapping[int, Errors]]
"""Picture -> step -> its errors, all with the adapter."""


@dataclass(frozen=True, kw_only=True)
class PictureDiagnosis:
    """One training picture. What its records do not tell is None."""

    picture: str
    score: float
    """How doubtful it is: by about how many standard deviations it is worse than the other pictures. From `THRESHOLD`
    on it has a reason."""
    reasons: tuple[str, ...] = ()
    """In sentences. What is in doubt comes first; that a picture gets worse, or teaches little, is told without a high
    score, too."""
    base_error: float | None = None
    """The mean error of the base, with the caption."""
    caption_worth: float | None = None
    """1 - the base's error with the caption / that without it: 0 if the caption explains nothing."""
    start_error: float | None = None
    """The mean error at step 0."""
    last_error: float | None = None
    """The mean error at the last validation."""
    gain: float | None = None
    """1 - last error / start error."""
    learned_at: int | None = None
    """The first step with at least half of its largest gain; None if it has never gained."""
    best_step: int | None = None
    """The step with its lowest error."""
    rise: float | None = None
    """Last error / lowest error - 1."""
    others_seed_gain: float | None = None
    """1 - the error with the seed of the other pictures / that of the base."""


@dataclass(frozen=True)
class Diagnosis:
    pictures: tuple[PictureDiagnosis, ...]
    """The most doubtful first."""

    @property
    def doubtful(self) -> tuple[PictureDiagnosis, ...]:
        return tuple(picture for picture in self.pictures if picture.score >= THRESHOLD)


def diagnose(records: Iterable[Mapping[str, Any]]) -> Diagnosis:
    """The training pictures of the records, the most doubtful first.

    The score is the larger of two doubts. The caption's: how much less it is worth than those of the other pictures;
    below `THRESHOLD` it counts half, since captions of one folder are worth more and less. The subject's: how much less
    the seed of the other pictures helps; without such seeds how much less the picture is learned, which says less. A
    picture with a wrong caption is fitted badly by the others' seed, too: its caption alone is named then.

    Records of the same step, picture and kind replace earlier ones, as a resumed run writes them. Names of pictures
    must be unique. UserError if there is no training picture in the records.
    """
    found = _Found.of(records)
    if not found.pictures:
        raise UserError(f"{RECORDS_FILE} tells of no training picture: there is nothing to diagnose")
    numbers = {name: _numbers(found, name) for name in found.pictures}
    caption = _caption_doubts(found)
    subject = _seed_doubts(found) if found.others_seed else _learning_doubts(found)
    rises, easy, last = _rise_doubts(found), _easy(found, numbers), _learned_last(numbers)
    rows = []
    for name, one in numbers.items():
        doubt, other = caption.get(name, 0.0), subject.get(name, 0.0)
        score, reasons = max(doubt if doubt >= THRESHOLD else doubt / 2, other, 0.0), []
        if doubt >= THRESHOLD:
            reasons.append(_caption_reason(one))
        elif other >= THRESHOLD:
            reasons.append(_seed_reason(one) if found.others_seed else LEARNED_LEAST)
        if name == last and score >= THRESHOLD:
            reasons.append(f"it is learned last: half of its gain came by step {one.learned_at}")
        if rises.get(name, 0.0) >= THRESHOLD:
            reasons.append(f"it gets worse since step {one.best_step}")
        if easy.get(name, 0.0) >= THRESHOLD:
            reasons.append("the base already explains it: it teaches little")
        rows.append(replace(one, score=score, reasons=tuple(reasons)))
    return Diagnosis(tuple(sorted(rows, key=lambda row: -row.score)))


def _learned_last(numbers: Mapping[str, PictureDiagnosis]) -> str | None:
    """The picture that reaches half of its gain later than every other one."""
    steps = {name: one.learned_at for name, one in numbers.items() if one.learned_at is not None}
    latest = [name for name in steps if steps[name] == max(steps.values())]
    return latest[0] if len(latest) == 1 and len(steps) >= MIN_COMPARED else None


@dataclass(frozen=True)
class _Found:
    """The records, sorted. Those whose errors are NaN, infinite or 0 are left out."""

    pictures: list[str]
    base: dict[str, Errors]
    no_caption: dict[str, Errors]
    others_seed: dict[str, Errors]
    adapter: dict[str, dict[int, Errors]]
    """Picture -> step -> errors, the steps in order."""

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> "_Found":
        kinds: dict[str, dict[str, dict[int, Errors]]] = defaultdict(lambda: defaultdict(dict))
        pictures: dict[str, None] = {}
        for record in records:
            if record["part"] != "train":
                continue
            pictures[record["picture"]] = None
            errors = np.array(record["errors"], np.float64)
            if np.isfinite(errors).all() and (errors > 0).all():
                kinds[record["what"]][record["picture"]][record["step"]] = errors
        base, no_caption, others_seed = (
            {name: by_step[0] for name, by_step in kinds[what].items() if 0 in by_step}
            for what in ("base", "no caption", "others' seed")
        )
        adapter = {name: dict(sorted(by_step.items())) for name, by_step in kinds["adapter"].items()}
        return cls([*pictures], base, no_caption, others_seed, adapter)


# --- doubts: for each picture that is compared, by how many standard deviations it is worse than the others -


def _caption_doubts(found: _Found) -> dict[str, float]:
    """How much less its caption is worth. Whether it does harm is known without other pictures, too: by the errors at
    the sigmas, as the t statistic of the log ratio."""
    logs = _log_ratios(found.base, found.no_caption)
    doubts = _robust_z(logs)
    for name, values in logs.items():
        spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        harm = float(values.mean()) / max(spread, 1e-6)
        doubts[name] = max(doubts.get(name, 0.0), harm if harm >= THRESHOLD else 0.0)
    return doubts


def _seed_doubts(found: _Found) -> dict[str, float]:
    return _robust_z(_log_ratios(found.others_seed, found.base))


def _learning_doubts(found: _Found) -> dict[str, float]:
    """How much less it has been learned: at each sigma at its best step, since few pictures are soon overfitted."""
    return _robust_z(_over_steps(found.adapter, lambda logs: logs.min(axis=0)))


def _rise_doubts(found: _Found) -> dict[str, float]:
    def rise(logs: Errors) -> Errors:
        path = np.concatenate([np.zeros_like(logs[:1]), logs])
        return np.asarray(path[-1] - path[path.mean(axis=1).argmin()])

    return _robust_z(_over_steps(found.adapter, rise), least=SMALLEST_RISE)


def _easy(found: _Found, numbers: Mapping[str, PictureDiagnosis]) -> dict[str, float]:
    """How much lower the base's error is; of pictures that also gain less than half of what is usual."""
    gains = {name: one.gain for name, one in numbers.items() if one.gain is not None}
    doubts = _robust_z({name: -np.log(errors) for name, errors in found.base.items()})
    usual = float(np.median([*gains.values()])) if gains else 0.0
    return {name: doubt for name, doubt in doubts.items() if gains.get(name, math.inf) < usual / 2}


def _log_ratios(errors: Mapping[str, Errors], by: Mapping[str, Errors]) -> dict[str, Errors]:
    """For the pictures that have both: their sigmas count alike, whatever the size of the error there."""
    return {name: np.log(errors[name] / by[name]) for name in errors if name in by}


def _over_steps(series: Series, what: Callable[[Errors], Errors]) -> dict[str, Errors]:
    """`what` of the logs of error / error at step 0 (a row for each later step). Of pictures with records of all steps
    that any picture has."""
    steps = {step for by_step in series.values() for step in by_step}
    if 0 not in steps or len(steps) < 2:
        return {}
    whole = {name: np.stack([*by_step.values()]) for name, by_step in series.items() if by_step.keys() == steps}
    return {name: what(np.log(errors[1:] / errors[0])) for name, errors in whole.items()}


def _robust_z(values: Mapping[str, Errors], *, least: float = 0.0) -> dict[str, float]:
    """(mean - median of the pictures' means) / their standard deviation, which is taken to be 1.4826 times their median
    absolute deviation, as that of normal numbers: a few doubtful pictures do not move it. It is not taken to be less
    than the error of such a mean over sigmas, nor than `least`; and times 1 + 4 / number of pictures, since few of them
    may lie near one another by chance: so `THRESHOLD` means about the same with 4 and with 40. Empty for fewer.

    values: at each sigma, by picture.
    """
    if len(values) < MIN_COMPARED:
        return {}
    rows = np.stack([*values.values()])
    means = rows.mean(axis=1)
    away = means - np.median(means)
    spreads = (rows - np.median(rows, axis=0)).std(axis=1, ddof=1) if rows.shape[1] > 1 else np.zeros(len(rows))
    noise = float(np.median(spreads)) / math.sqrt(rows.shape[1])
    scale = max(1.4826 * float(np.median(np.abs(away))), noise, least, 1e-6)
    scale *= 1 + 4 / len(rows)
    return dict(zip(values, (away / scale).tolist(), strict=True))


# --- numbers and words ------------------------------------------------------------------------------------


def _numbers(found: _Found, name: str) -> PictureDiagnosis:
    """What the records of one picture say; no score yet."""

    def ratio(errors: Mapping[str, Errors], by: Mapping[str, Errors]) -> float | None:
        return _gain(by[name], errors[name]) if name in errors and name in by else None

    one = PictureDiagnosis(
        picture=name,
        score=0.0,
        base_error=float(found.base[name].mean()) if name in found.base else None,
        caption_worth=ratio(found.base, found.no_caption),
        others_seed_gain=ratio(found.others_seed, found.base),
    )
    course = {step: float(errors.mean()) for step, errors in found.adapter.get(name, {}).items()}
    if 0 not in course:
        return one
    start, last, best = course[0], course[max(course)], min(course, key=lambda step: course[step])
    lowest = course[best]
    half = next(step for step, error in course.items() if error <= (start + lowest) / 2) if best else None
    return replace(
        one,
        start_error=start,
        last_error=last,
        gain=1 - last / start,
        learned_at=half,
        best_step=best,
        rise=last / lowest - 1,
    )


def _gain(before: Errors, after: Errors) -> float:
    return 1 - float(after.mean()) / float(before.mean())


def _caption_reason(one: PictureDiagnosis) -> str:
    if one.caption_worth is not None and one.caption_worth > 0:
        return "its caption explains it less than those of the other pictures explain them: is the caption right?"
    return "its caption explains it no better than no caption does: is the caption right?"


def _seed_reason(one: PictureDiagnosis) -> str:
    if one.others_seed_gain is not None and one.others_seed_gain > 0:
        return "the seed of the other pictures helps it less than it helps them: is it the same subject?"
    return "the seed of the other pictures makes it worse than the base is: is it the same subject?"


# --- files ------------------------------------------------------------------------------------------------


def write_diagnosis(folder: Path) -> Diagnosis:
    """Diagnose the pictures of the run in `folder`, and write diagnosis.json there. UserError as `read_records` and
    `diagnose`."""
    found = diagnose(read_records(folder))
    write_json(folder / DIAGNOSIS_FILE, {"pictures": [asdict(one) for one in found.pictures]})
    return found


def read_records(folder: Path) -> list[dict[str, Any]]:
    """What a run has written into `folder`; damaged lines are left out, with a warning unless it is the last, which a
    killed run may leave. UserError if there is no such file."""
    path, records, damaged = folder / RECORDS_FILE, list[dict[str, Any]](), list[int]()
    if not path.is_file():
        raise UserError(f"{path} is missing: a run writes it at its validations, and without it there is no diagnosis")
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8"))
            records.append({name: record[name] for name in ("step", "part", "picture", "what", "errors")})
        except (ValueError, KeyError, TypeError):
            damaged.append(number)
    if damaged and damaged != [len(lines)]:
        log.warning("%s: damaged, and left out: line %s", path, ", ".join(map(str, damaged)))
    return records


def read(folder: Path) -> Diagnosis:
    """The diagnosis.json in `folder`. UserError if it is missing or damaged."""
    path = folder / DIAGNOSIS_FILE
    try:
        rows: Sequence[dict[str, Any]] = read_json(path)["pictures"]
        return Diagnosis(tuple(PictureDiagnosis(**{**row, "reasons": tuple(row["reasons"])}) for row in rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a diagnosis ({error}): write it again from {RECORDS_FILE}"
        ) from error


def table(diagnosis: Diagnosis) -> str:
    """All pictures with their numbers, as Markdown; what is not known is left empty."""
    heads = {"base_error": "base", "caption_worth": "caption", "others_seed_gain": "others' seed", "gain": "gain"}
    heads |= {"learned_at": "learned at", "rise": "rise"}
    lines = [f"| picture | score | {' | '.join(heads.values())} | reasons |", "|---" * (len(heads) + 3) + "|"]
    for one in diagnosis.pictures:
        cells = [one.picture, f"{one.score:.1f}"]
        cells += [_cell(name, getattr(one, name)) for name in heads]
        lines.append(f"| {' | '.join([*cells, '; '.join(one.reasons)])} |")
    return "\n".join(lines) + "\n"


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "learned_at":
        return str(value)
    return f"{value:.3f}" if name == "base_error" else f"{100 * value:+.0f} %"
