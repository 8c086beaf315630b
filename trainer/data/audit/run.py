"""An audit: look at every picture of a folder, judge them together, write what was found. The folder is only read."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config import first_few, to_dict
from trainer.data.audit import masks
from trainer.data.audit.find import EXTRA, FACES_HANDS_PEOPLE, Finder, not_looked_for
from trainer.data.audit.judge import Judgement, counts, judge
from trainer.data.audit.page import write_page
from trainer.data.audit.picture import Find, Picture, Seen, see
from trainer.data.audit.rules import Rules
from trainer.data.audit.verdicts import FORMAT
from trainer.data.audit.words import Caption, captions_of
from trainer.data.dataset import DataConfig, buckets, contents, fitting, nearest
from trainer.data.folders import as_list
from trainer.data.pictures import DataError
from trainer.errors import UserError
from trainer.files import file_in_the_way, write_json
from trainer.hardware.threads import parallel_map

DATA_FILE, PAGE_FILE = "audit.json", "audit.html"


@dataclass(frozen=True)
class Audit:
    """What is asked for."""

    data: DataConfig
    """The folder, and how training would read it."""
    rules: Rules
    multiple: int
    """Sides of buckets are multiples of it."""
    token_limit: int
    base: str | None = None
    """Whose tokenizer counts tokens."""
    quick: bool = False
    """Nothing is looked for in the pictures, whether or not the extra is installed."""
    masks: tuple[str, ...] = ()
    """What there shall be masks of: some of `masks.BOXES`."""

    @property
    def resolution(self) -> int:
        """The largest, if there are several: it asks most of a picture."""
        return max(as_list(self.data.resolution))


def audit(asked: Audit, output: Path) -> dict[str, Any]:
    """Write audit.json and audit.html into `output`; returns what the former holds."""
    folder = Path(asked.data.images).expanduser()
    _check(asked, folder, output)
    problems: list[str] = []
    captions = dict(_captions(folder, asked.data, problems))
    if not captions:
        raise DataError([f"{folder}: there is no picture in it that could be audited", *problems])
    pictures = [*_pictures(asked, folder, captions)]
    judgements, alike = judge(pictures, asked.rules, resolution=asked.resolution, token_limit=asked.token_limit)
    report = _report(asked, folder, pictures, judgements)
    notes = [*problems, *_notes(asked, pictures)]
    if asked.masks:
        notes += masks.write_masks(output / masks.FOLDER, pictures, asked.masks)
    report |= {"groups": alike, "notes": notes}
    write_page(output / PAGE_FILE, report, {picture.file: picture.seen.thumbnail for picture in pictures})
    write_json(output / DATA_FILE, report)
    return report


def _check(asked: Audit, folder: Path, output: Path) -> None:
    """Before minutes are spent."""
    found = []
    if wrong := [side for side in as_list(asked.data.resolution) if side % asked.multiple]:
        found.append(f"[data] resolution = {wrong[0]} must be a multiple of {asked.multiple}")
    if file := file_in_the_way(output):
        found.append(f"--output: {file} is a file; name a folder")
    elif output.resolve().is_relative_to(folder.resolve()):
        found.append(f"--output: {output} lies in the folder of the pictures, which is only read; name another one")
    if asked.masks:
        found += _problems_of_masks(asked, output / masks.FOLDER)
    if found:
        raise UserError("\n".join(found))


def _problems_of_masks(asked: Audit, folder: Path) -> Iterator[str]:
    if asked.quick:
        yield "--masks: --quick looks for nothing that a mask could be made of; leave one of the two out"
    elif FACES_HANDS_PEOPLE in not_looked_for():
        yield f"--masks: {FACES_HANDS_PEOPLE} cannot be looked for here; to look for them: {EXTRA}"
    if folder.exists() and any(folder.iterdir()):
        yield f"--masks: there are files in {folder} already, which may be yours; remove them, or name another --output"


def _captions(folder: Path, config: DataConfig, problems: list[str]) -> Iterator[tuple[Path, Caption]]:
    """Every picture with its caption, as training would find them."""
    try:
        here = contents(folder, config)
    except OSError as error:
        problems.append(f"{folder}: cannot be read ({error.strerror})")
        return
    yield from captions_of(folder, here, config, problems).items()
    for below in here.below:
        if config.recursive:
            yield from _captions(below, config, problems)
        else:
            problems.append(f"{below}: has pictures, which are not used without recursive = true")


def _pictures(asked: Audit, folder: Path, captions: dict[Path, Caption]) -> Iterator[Picture]:
    tokens: dict[str, int] = {}
    if asked.base:
        from trainer.qwen_image import prompt_tokens  # takes seconds to import

        tokens = prompt_tokens(asked.base, {text for caption in captions.values() for text in caption.texts})
    options = buckets(asked.resolution, asked.multiple)
    find: Find = (lambda image: {}) if asked.quick else Finder()
    seen = parallel_map(lambda path: see(path, find), captions)
    bar = tqdm(seen, f"audit {folder}", len(captions), leave=False, disable=None)
    for (path, caption), found in zip(captions.items(), bar, strict=True):
        bucket, enlargement, cropped = None, 0.0, 0.0
        if found.measures is not None:
            bucket = nearest(found.measures.size, options)
            enlargement, cropped = fitting(found.measures.size, bucket)
        name = path.relative_to(folder).as_posix().encode(errors="backslashreplace").decode()  # what is not UTF-8
        most = max((tokens[text] for text in caption.texts if text in tokens), default=None)
        yield Picture(name, found, bucket, enlargement, cropped, caption, most)


# --- what is written --------------------------------------------------------------------------------------


def _report(asked: Audit, folder: Path, pictures: Sequence[Picture], judgements: Sequence[Judgement]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "folder": str(folder.absolute()),
        "data": to_dict(asked.data),
        "base": asked.base,
        "rules": to_dict(asked.rules),
        "counts": counts(judgements),
        "pictures": [_entry(*pair) for pair in zip(pictures, judgements, strict=True)],
    }


def _entry(picture: Picture, judgement: Judgement) -> dict[str, Any]:
    seen: Seen = picture.seen
    return {
        "file": picture.file,
        "sha256": seen.sha256,
        "verdict": judgement.verdict,
        "reasons": [{"rule": rule, "says": says} for rule, says in judgement.reasons],
        "measures": asdict(seen.measures) if seen.measures is not None else None,
        "bucket": picture.bucket,
        "enlargement": round(picture.enlargement, 4),
        "cropped": round(picture.cropped, 4),
        "done": seen.done,
        "caption": {**asdict(picture.caption), "tokens": picture.tokens},
        "boxes": {kind: [asdict(box) for box in boxes] for kind, boxes in seen.boxes.items()},
    }


def _notes(asked: Audit, pictures: Sequence[Picture]) -> Iterator[str]:
    """What is worth a word of the whole folder."""
    if asked.quick:
        yield "nothing was looked for in the pictures: --quick"
    elif missing := not_looked_for():
        yield f"not looked for: {'; '.join(missing)}. To look for them: {EXTRA}"
    if asked.base is None:
        yield "tokens of captions were not counted: name a base that is on this machine, by --config or --base"
    own = [picture.caption for picture in pictures if picture.caption.own]
    if own and not any(caption.has_trigger for caption in own):
        yield f'no caption has the trigger, "{asked.data.trigger}": training puts it in front of each'
    if number := sum(bool(p.caption.text) and not p.caption.own for p in pictures):
        yield f"pictures with default_caption: {number}"


def summary(report: dict[str, Any]) -> str:
    """For the console: how many of each verdict, and why."""
    counted = ", ".join(f"{count} {verdict}" for verdict, count in report["counts"].items())
    lines = [f"{len(report['pictures'])} pictures: {counted}"]
    by_rule: dict[tuple[str, str], list[str]] = {}
    for entry in report["pictures"]:
        for reason in entry["reasons"]:
            by_rule.setdefault((entry["verdict"], reason["rule"]), []).append(entry["file"])
    for (verdict, rule), files in sorted(by_rule.items()):
        lines.append(f"  {verdict}: {rule} ({len(files)}): {first_few(files)}")
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])
