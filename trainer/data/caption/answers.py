"""What the model answered becomes a caption: the template's form, whole sentences, not longer than what is read."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.data.caption.templates import Template
from trainer.data.captions import CaptionError, clean, with_trigger

CUT = "answers were cut at max_tokens: their last, unfinished sentence was left out"
WHOLE = "answers had none of the template's labels, and were taken whole"
LONG = "captions were longer than what is read of a prompt, and were shortened"
_ENDS = (r"[.!?](?=\s|$)|[\u3002\uff01\uff1f]", r"[,;:](?=\s|$)|[\uff0c\uff1b\u3001\uff1a]", r".(?=\s|$)", r".")
"""Where a text may end: after a sentence, else a clause, a word, a letter."""

Count = Callable[[Sequence[str]], Mapping[str, int]]
"""Texts to their numbers of tokens."""


@dataclass(frozen=True)
class Answer:
    text: str
    ended: bool
    """The model came to its end before max_tokens."""


@dataclass(frozen=True)
class Limit:
    """What is read of a caption."""

    tokens: int
    count: Count
    trigger: str
    """What training will put in front."""

    def fits(self, texts: Sequence[str]) -> list[bool]:
        whole = [with_trigger(self.trigger, text)[0] for text in texts]
        long = [text for text in whole if len(text.encode()) > self.tokens]  # a token is at least one byte
        counted = self.count(long) if long else {}
        return [counted.get(text, 0) <= self.tokens for text in whole]


def caption_of(answer: Answer, template: Template, limit: Limit) -> tuple[str, list[str]]:
    """The caption, and remarks on what was done. CaptionError if there is none."""
    done = [] if answer.ended else [CUT]
    text, formed = template.caption(answer.text if answer.ended else _whole_sentences(answer.text))
    if not formed:
        done.append(WHOLE)
    text, more = clean(text.strip('"\u201c\u201d '))
    if not text:
        raise CaptionError("the model gave no answer; write one yourself, or try another --detail")
    shorter = shortened(text, limit)
    return shorter, [*done, *more, *([LONG] if shorter != text else [])]


def shortened(text: str, limit: Limit) -> str:
    """The text as it is, or up to the last end of a sentence at which it fits."""
    if limit.fits([text])[0]:
        return text
    for end in _ENDS:
        shorter = [text[: match.end()] for match in re.finditer(end, text)][::-1]
        if fitting := [one for one, fits in zip(shorter, limit.fits(shorter), strict=True) if fits]:
            return fitting[0].rstrip(" ,;:\uff0c\uff1b\u3001\uff1a")
    return ""


def _whole_sentences(text: str) -> str:
    """Without what stands behind the last end of a sentence, or of a line; a text without any is left as it is."""
    places = [match.end() for match in re.finditer(rf"{_ENDS[0]}|\n", text.rstrip())]
    return text[: places[-1]] if places else text
