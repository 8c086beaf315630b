"""Pictures held against the rules: what is wrong with each, in words with numbers."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.config import first_few
from trainer.data.audit.boxes import Box
from trainer.data.audit.duplicates import groups
from trainer.data.audit.measures import Measures
from trainer.data.audit.picture import Picture
from trainer.data.audit.rules import DAMAGED, Rules
from trainer.data.audit.verdicts import KEEP, LEAVE_OUT, LOOK
from trainer.data.audit.words import same_captions

Reason = tuple[str, str]
"""A rule, and what it found."""
Groups = Sequence[Sequence[str]]
"""Pictures that show the same, the best first."""
MOST = 0.6  # the share of a folder's captions that makes a habit
_LIMITS = {
    "max_faces": ("face", "faces"),
    "max_people": ("person", "people"),
    "max_hands": ("hand", "hands"),
    "max_texts": ("line of text", "lines of text"),
}


@dataclass(frozen=True)
class Judgement:
    verdict: str
    reasons: tuple[Reason, ...]


def judge(
    pictures: Sequence[Picture], rules: Rules, *, resolution: int, token_limit: int
) -> tuple[list[Judgement], list[list[str]]]:
    """That of each picture, and the groups of pictures that show the same, the one to keep first."""
    reasons = {p.file: [*_of_itself(p, rules, resolution, token_limit)] for p in pictures}
    alike = duplicates(pictures, rules, {name: len(found) for name, found in reasons.items()})
    for found in (_of_groups(pictures, alike, rules), _of_captions(pictures, alike, rules)):
        for name, reason in found:
            reasons[name].append(reason)
    return [_judgement(reasons[picture.file], rules) for picture in pictures], alike


def _judgement(reasons: Sequence[Reason], rules: Rules) -> Judgement:
    worst = KEEP if not reasons else LEAVE_OUT if any(rule in rules.leave_out for rule, _ in reasons) else LOOK
    return Judgement(worst, tuple(reasons))


def _of_itself(picture: Picture, rules: Rules, resolution: int, token_limit: int) -> Iterator[Reason]:
    measures = picture.seen.measures
    if measures is None:
        yield DAMAGED, picture.seen.problem
        return
    yield from _of_size(picture, measures, rules, resolution)
    yield from _of_light(measures, rules)
    yield from _of_boxes(picture, rules)
    if rules.captions and picture.caption.problem:
        yield "captions", picture.caption.problem
    limit = token_limit if rules.max_tokens is None else rules.max_tokens
    if picture.tokens is not None and picture.tokens > limit:
        yield "max_tokens", f"the caption has {picture.tokens} tokens, more than {limit}: the end is not read"


def _of_size(picture: Picture, measures: Measures, rules: Rules, resolution: int) -> Iterator[Reason]:
    assert picture.bucket is not None
    bucket = "{} x {}".format(*picture.bucket)
    least = resolution // 2 if rules.min_side is None else rules.min_side
    if min(measures.size) < least:
        yield "min_side", f"small: the shorter side has {min(measures.size)} pixels, fewer than {least}"
    elif picture.enlargement > rules.max_enlargement:
        factor, limit = picture.enlargement, rules.max_enlargement
        yield "max_enlargement", f"enlarged {factor:.2f} times to its bucket, {bucket}; more than {limit:g}"
    if picture.cropped > rules.max_crop:
        yield "max_crop", f"{picture.cropped:.0%} is cut off by the crop to {bucket}, more than {rules.max_crop:.0%}"


def _of_light(measures: Measures, rules: Rules) -> Iterator[Reason]:
    """One reason at most: where there is no detail, nothing can be sharp, and what is dark has no contrast."""
    if measures.flat > rules.max_flat:
        yield "max_flat", f"empty: {measures.flat:.0%} of it has no detail, more than {rules.max_flat:.0%}"
    elif measures.lights < rules.min_lights:
        yield "min_lights", f"dark: 98 % of it lies below {measures.lights:.2f} of white, under {rules.min_lights:g}"
    elif measures.shadows > rules.max_shadows:
        lowest, limit = measures.shadows, rules.max_shadows
        yield "max_shadows", f"bright: 98 % of it lies above {lowest:.2f} of white, over {limit:g}"
    elif measures.contrast < rules.min_contrast:
        yield "min_contrast", f"hazy: contrast {measures.contrast:.2f}, less than {rules.min_contrast:g}"
    elif measures.sharpness < rules.min_sharpness:
        yield "min_sharpness", f"not sharp: {measures.sharpness:.2f}, less than {rules.min_sharpness:g}"


def _of_boxes(picture: Picture, rules: Rules) -> Iterator[Reason]:
    for rule, (one, many) in _LIMITS.items():
        boxes, limit = picture.seen.boxes.get(rule.removeprefix("max_"), []), getattr(rules, rule)
        if len(boxes) > limit:
            what = f"{len(boxes)} {one if len(boxes) == 1 else many}"
            yield rule, f"{what}, more than {limit}{_written(boxes)}"
    if rules.watermarks and (marks := picture.seen.boxes.get("watermarks")):
        yield "watermarks", f"a watermark{_written(marks)}"


def _written(boxes: Sequence[Box]) -> str:
    texts = [f'"{box.text}"' for box in boxes if box.text]
    return f": {first_few(texts, count=2)}" if texts else ""


# --- several pictures -------------------------------------------------------------------------------------


def duplicates(pictures: Sequence[Picture], rules: Rules, faults: Mapping[str, int]) -> list[list[str]]:
    """Groups of pictures that show the same, the best first: that with the fewest faults of its own, then the largest,
    then the sharpest."""
    seen = [(picture, picture.seen.measures) for picture in pictures]
    usable = [(p, m) for p, m in seen if m is not None and m.flat <= rules.max_flat]  # empty ones all look alike
    found = groups([measures.perceptual_hash for _, measures in usable], rules.near_duplicates)
    best = [sorted((usable[i] for i in group), key=lambda x: (faults[x[0].file], *_rank(*x))) for group in found]
    return [[picture.file for picture, _ in group] for group in best]


def _rank(picture: Picture, measures: Measures) -> tuple[int, float, str]:
    return -measures.size[0] * measures.size[1], -measures.sharpness, picture.file


def _of_groups(pictures: Sequence[Picture], alike: Groups, rules: Rules) -> Iterator[tuple[str, Reason]]:
    """Copies to the pixel are found whatever they show; the others by their group."""
    first: dict[str, str] = {}
    order = {name: place for group in alike for place, name in enumerate(group)}
    copies = set()
    for picture in sorted(pictures, key=lambda picture: (order.get(picture.file, 0), picture.file)):
        if (measures := picture.seen.measures) is None:
            continue
        original = first.setdefault(measures.pixels, picture.file)
        if original != picture.file and rules.copies:
            copies.add(picture.file)
            yield picture.file, ("copies", f"the same picture as {original}")
    for best, *others in alike:
        for name in others:
            if name not in copies:
                yield name, ("near_duplicates", f"nearly the same as {best}, which is the better one")


def _of_captions(pictures: Sequence[Picture], alike: Groups, rules: Rules) -> Iterator[tuple[str, Reason]]:
    captions = {picture.file: picture.caption for picture in pictures if picture.caption.own}
    scripts = Counter(caption.script for caption in captions.values() if caption.script)
    usual, count = scripts.most_common(1)[0] if scripts else ("", 0)
    with_trigger = sum(caption.has_trigger for caption in captions.values())
    others = same_captions(captions, alike) if rules.same_captions else {}
    for name, caption in captions.items():
        if rules.trigger and not caption.has_trigger and with_trigger >= MOST * len(captions):
            yield name, ("trigger", f"the caption lacks the trigger, which {with_trigger} others have")
        if rules.one_script and caption.script not in ("", usual) and count >= MOST * scripts.total():
            yield name, ("one_script", f"the caption is in {caption.script}, {count} others are in {usual}")
        if name in others:
            yield name, ("same_captions", f"the same caption as {first_few(others[name])}")


def counts(judgements: Sequence[Judgement]) -> Mapping[str, int]:
    found = Counter(judgement.verdict for judgement in judgements)
    return {verdict: found[verdict] for verdict in (KEEP, LOOK, LEAVE_OUT)}
