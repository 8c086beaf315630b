"""How the model is asked for a caption, and how its answer becomes one: templates, in TOML."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

from trainer import config

SHIPPED = Path(__file__).with_name("templates.toml")
LANGUAGES = ("en", "zh", "both")
SLOTS = ("detail", "pose", "trigger")
"""What an instruction may have in braces."""
WHOLE = "answer"
"""What a form may have in braces where there are no fields."""
_LETTER = "a-zA-Z0-9_\u4e00-\u9fff"


@dataclass(frozen=True, kw_only=True)
class Template:
    """One language's table; `templates.toml` says what each key means."""

    instruction: str
    detail: tuple[str, str, str] = ("", "", "")
    pose: str = ""
    trigger: str = ""
    max_tokens: tuple[int, int, int] = (64, 160, 360)
    fields: dict[str, str] = field(default_factory=dict)
    form: tuple[str, ...] = (f"{{{WHOLE}}}",)
    join: str = " "
    nothing: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        found = _unknown("instruction", self.instruction, SLOTS)
        found += _unknown("trigger", self.trigger, ("trigger",))
        for part in self.form:
            found += _unknown("form", part, tuple(self.fields) or (WHOLE,))
        for name, label in self.fields.items():
            if not label.strip():
                found.append(f"fields: {name} has no label; give the word that begins it in the answer")
            elif label not in self.instruction:
                found.append(f'fields: the label "{label}" of {name} is not in the instruction: the model must know it')
        if not self.form or not any(_names(part) for part in self.form):
            found.append("form must have at least one field in braces")
        if min(self.max_tokens) < 1:
            found.append("max_tokens must be at least 1")
        return found

    def question(self, detail: int, *, pose: bool, trigger: str) -> str:
        """What the model is asked. detail: 1 to 3."""
        called = self.trigger.replace("{trigger}", trigger) if trigger else ""
        sentences = {"detail": self.detail[detail - 1], "pose": self.pose if pose else "", "trigger": called}
        return re.sub(r" {2,}", " ", self.instruction.format(**sentences)).strip()

    def caption(self, answer: str) -> tuple[str, bool]:
        """The caption in one line, and whether the answer had the fields; without them it is taken whole."""
        parts = self._parts(answer) if self.fields else {WHOLE: _one_line(answer)}
        if not parts:
            return _one_line(answer), False
        known = dict.fromkeys(self.fields, "") | parts
        filled = [part.format(**known) for part in self.form if all(known[name] for name in _names(part))]
        return self.join.join(text.strip(f" {self.join}") for text in filled), True

    def _parts(self, answer: str) -> dict[str, str]:
        """The text behind each label that the answer has; "" if it says that there is nothing."""
        labels = {label.casefold(): name for name, label in self.fields.items()}
        either = "|".join(map(re.escape, labels))
        _, *pieces = re.split(rf"(?<![{_LETTER}])({either})[\s*]*[:\uff1a]", answer, flags=re.IGNORECASE)
        found = {
            labels[label.casefold()]: _one_line(text) for label, text in zip(pieces[::2], pieces[1::2], strict=True)
        }
        empty = [word.casefold() for word in self.nothing]
        return {name: "" if text.rstrip("\u3002.").casefold() in empty else text for name, text in found.items()}


@dataclass(frozen=True, kw_only=True)
class Templates:
    en: Template | None = None
    zh: Template | None = None
    both: Template | None = None


def load(path: Path | None, language: str, problems: list[str]) -> Template | None:
    """A language's template, of the shipped file if no other is given; None, and a problem, if it cannot be used."""
    file, unreadable, wrong = path or SHIPPED, list[str](), list[str]()
    table = config.read_toml(file, unreadable)
    found = None if unreadable else config.parse(Templates, table, "", wrong)
    template = getattr(found, language) if found else None
    if found and template is None:
        has = ", ".join(f"[{name}]" for name in LANGUAGES if getattr(found, name)) or "no template"
        wrong.append(f"has no [{language}], which --language asks for; it has {has}")
    problems += [*unreadable, *(f"{file}: {problem}" for problem in wrong)]
    return template


def _names(text: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(text) if name is not None]


def _unknown(key: str, text: str, known: Collection[str]) -> list[str]:
    """A problem for each field in braces that is not known."""
    try:
        names = _names(text)
    except ValueError as error:
        return [f"{key}: braces are for fields, such as {{{next(iter(known))}}} ({error})"]
    options = ", ".join(f"{{{name}}}" for name in known)
    return [f"{key}: unknown field {{{name}}}; it may have {options}" for name in names if name not in known]


def _one_line(text: str) -> str:
    return " ".join(text.replace("**", "").split()).strip(" \uff1b;\uff0c,")
