"""`python -m trainer.formats trainers`: what is known of each program, in words."""

from collections.abc import Iterable

from trainer.formats.layouts import Layout
from trainer.formats.rules import TRAINERS, Rules, Trainer

_ALPHA = {"read": "read from .alpha", "ignored": ".alpha is ignored", "error": ".alpha must not be in the file"}
_SCALE = {
    "file": "dW = alpha / rank of the file * b a",
    "one": "dW = b a",
    "recipe": "dW = alpha / rank of the configuration * b a",
}
_RANK = {
    "any": "each module may have its own",
    "one": "one for all modules, taken from the file",
    "equal": "must be the configuration's, else it raises",
    "resized": "brought to the configuration's: leading rows, or zeros that never learn",
}


def overview() -> str:
    """A paragraph for each program: versions, layouts, the rules for alpha and rank, what is strict."""
    return "\n\n".join(_paragraph(name, trainer) for name, trainer in TRAINERS.items())


def _paragraph(name: str, trainer: Trainer) -> str:
    rules = trainer.rules_for(True)
    lines = [
        f"{trainer.title} (--for {name})",
        f"  known      {trainer.read}",
        f"  read in    {rules.source}",
        f"  takes      {_keys(rules.accepts)}",
        f"  methods    {', '.join(rules.methods)}",
        *_rules(rules),
    ]
    if trainer.older is not None:
        lines.append(f"  before {trainer.since}:")
        lines += [f"  {line}" for line in _rules(trainer.older) if line not in _rules(rules)]
        if fewer := [layout for layout in rules.accepts if layout not in trainer.older.accepts]:
            lines.append(f"    not taken  {_keys(fewer)}")
    lines += [f"  {'recipes' if i == 0 else '':9}  {change}" for i, change in enumerate(trainer.recipes)]
    return "\n".join(lines)


def _rules(rules: Rules) -> list[str]:
    strict = [
        *(["keys that it does not know"] if rules.foreign == "error" else []),
        *(["a module that is trained and not in the file"] if rules.missing == "error" else []),
        *(["a module in the file that is not trained"] if rules.extra == "error" else []),
    ]
    silent = [
        *(["keys that it does not know are ignored"] if rules.foreign == "ignored" else []),
        *(["modules that the file lacks start at random"] if rules.missing == "random" else []),
    ]
    return [
        f"  alpha      {_ALPHA[rules.alpha_keys]}; {_SCALE[rules.scale]}",
        f"  rank       {_RANK[rules.rank]}",
        f"  raises at  {', '.join(strict) or 'nothing of this'}",
        f"  silently   {', '.join(silent) or 'nothing'}",
    ]


def _keys(layouts: Iterable[Layout]) -> str:
    """The prefixes, with what the half of a is called under each."""
    halves: dict[str, list[str]] = {}
    for layout in layouts:
        found = halves.setdefault(layout.prefix, [])
        if (half := layout.halves[0].removesuffix(".weight")) not in found:
            found.append(half)
    return ", ".join(f"{prefix}*.{' | '.join(names)}" for prefix, names in halves.items())
