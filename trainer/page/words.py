"""What a run's page says in words: how it stands, what the seed was, which settings are its own."""

import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from trainer.config import first_few, to_dict
from trainer.hub.sources import plain_id
from trainer.page.left import Left, at, entries, mean_error, number, numbers, table_at
from trainer.plan import RunConfig
from trainer.tracking import duration

TONES = {"still learning": "look", "converged": "keep", "overfitting": "leave-out"}


@dataclass(frozen=True)
class Headline:
    name: str
    status: str
    tone: str
    verdict: str
    best: str
    """The sentences on the best step."""
    ended_by: str
    facts: list[str]


def headline(left: Left) -> Headline:
    report, steps = left.report, number(at(left.report, "config", "train", "steps"))
    status = str(report.get("status") or "not known how it ended")
    all_steps = f" of {steps:.0f}" if steps is not None else ""
    verdict, best = str(left.choice.get("verdict") or ""), str(left.choice.get("text") or "").strip()
    if not best:
        best = "" if left.chosen is None else f"The best step so far is {left.chosen}."
        if at(report, "data", "held_out") == []:
            best = "No picture is held out, so that no step is known to be the best one."
    name = left.folder.resolve().name
    ended = str(report.get("ended_by") or "")
    where = f"{status}, step {left.step}{all_steps}"
    return Headline(name, where, TONES.get(verdict, ""), verdict, best[:1].upper() + best[1:], ended, _facts(left))


def _facts(left: Left) -> list[str]:
    report, found = left.report, []
    parts = {name: len(entries(at(report, "data", name))) for name in ("train", "held_out")}
    if parts["train"]:
        found.append(f"{parts['train']} training pictures, {parts['held_out']} held out")
    if base := at(report, "config", "model", "base"):
        found.append(f"base {plain_id(str(base))}")
    if method := at(report, "init", "method"):
        found.append(f"started from {method}")
    if trigger := at(report, "config", "data", "trigger"):
        found.append(f"trigger word {trigger}")
    if device := at(report, "hardware", "name") or at(report, "hardware", "device"):
        found.append(f"on {device}")
    if (total := number(at(report, "seconds", "total"))) is not None:
        found.append(f"{duration(total)} in all")
    if memory := number(at(report, "peak_memory_bytes")):
        found.append(f"{memory / 1e9:.1f} GB at most")
    return found


def losses(left: Left) -> str:
    """The held-out loss at the points of a run that matter, in one line; empty without held-out pictures."""
    curve = dict(left.curve("val_loss"))
    if not curve:
        return ""
    base = mean_error(left.errors, "held_out", "base", 0)
    shown = [] if base is None else [f"base without LoRA {base:.4f}"]
    for step in sorted({min(curve), max(curve), *([left.chosen] if left.chosen in curve else [])}):
        note = " (chosen)" if step == left.chosen else ""
        shown.append(f"step {step:.0f}{note} {curve[step]:.4f}")
    return "Held-out loss: " + ", ".join(shown) + "."


# --- the seed ----------------------------------------------------------------------------------------------


def seed(left: Left) -> list[str]:
    """The report of the start, in sentences."""
    init = table_at(left.report, "init")
    if not init:
        return []
    applied = table_at(init, "applied")
    seeded, random = (int(number(applied.get(name)) or 0) for name in ("seeded", "random"))
    found = [_what(init)]
    if (rank := at(init, "adapter", "rank")) is not None:
        pattern = ", some layers with a rank of their own" if at(init, "adapter", "rank_pattern") else ""
        kind = at(init, "applied", "adapter") or "LoRA"
        found.append(f"The adapter is a {kind}. It has rank {rank}{pattern}, on {seeded + random} layers.")
    if init.get("frozen"):
        found.append("The whole prediction stays frozen; a new LoRA is trained on top of it.")
    if seeded:
        found += _applied(applied, seeded, random)
    found += _tried(init)
    if (seconds := number(init.get("seconds"))) is not None:
        found.append(f"The start took {seconds:.1f} seconds.")
    return found


def _what(init: Mapping[str, Any]) -> str:
    method, strength = init.get("method", "unknown"), number(init.get("strength"))
    strong = "" if strength is None else f" at strength {strength:g}"
    if method == "file":
        return f"The adapter starts from the {init.get('kind', 'LoRA')} in {init.get('path', 'a file')}{strong}."
    if experts := [str(entry.get("expert")) for entry in entries(init.get("experts"))]:
        pictures = init.get("pictures")
        count = f" from {len(pictures)} training pictures" if isinstance(pictures, list) else ""
        return f"The adapter starts from what {method}'s {' and '.join(experts)} predicted{count}{strong}."
    return f"The adapter starts at random ({method}): before the first step it changes nothing."


def _applied(applied: Mapping[str, Any], seeded: int, random: int) -> Iterator[str]:
    others = f"; the other {random} start at random and change nothing yet" if random else ""
    yield f"{seeded} of {seeded + random} layers hold the seed{others}."
    if padded := number(applied.get("padded")):
        yield f"{padded:.0f} of them were filled up to the rank with rows that change nothing yet."
    if dropped := table_at(applied, "dropped"):
        yield f"Left out of the seed, since they are not trained here: {len(dropped)} layers ({first_few(dropped)})."
    kept = {name: number(at(applied, "energy_kept", name)) for name in ("total", "min")}
    if kept["total"] is not None and kept["min"] is not None:
        least = f"{100 * kept['min']:.1f} %"
        cut = "The nearest Kronecker products" if applied.get("adapter") == "LoKr" else "Truncation to the rank"
        told = f"{cut} kept {100 * kept['total']:.1f} % of its energy, at least {least} in each layer."
        yield "Nothing of it was truncated." if least == "100.0 %" else told
    if (error := number(applied.get("largest_error"))) is not None:
        yield f"The adapter was read back and holds what was asked for: the largest relative error is {error:.0e}."


def _tried(init: Mapping[str, Any]) -> Iterator[str]:
    strengths, losses = (numbers(at(init, "tried", name)) for name in ("strengths", "losses"))
    tried = [(one, loss) for one, loss in zip(strengths, losses, strict=False) if one is not None and loss is not None]
    if tried:
        shown = ", ".join(f"{loss:.4f} at {one:g}" for one, loss in tried)
        yield f"The strength was chosen by the losses on training pictures that the seed had not seen: {shown}."


# --- settings ----------------------------------------------------------------------------------------------


def settings(left: Left) -> tuple[list[tuple[str, list[str], list[str]]], list[tuple[str, list[str]]]]:
    """Settings that differ from their defaults: key, value, default; and all of them: key, value; values in lines."""
    given, known = dict(_flat(table_at(left.report, "config"))), defaults(RunConfig)
    changed = [
        (key, _lines(value), _lines(known[key]) if key in known else [])
        for key, value in given.items()
        if key not in known or json.dumps(known[key]) != json.dumps(value)
    ]
    method = str(at(left.report, "init", "method") or "options")
    own = {f"init.{method}.{key}": value for key, value in table_at(left.report, "init_options").items()}
    changed += [(key, _lines(value), []) for key, value in own.items() if value]
    return changed, [(key, _lines(value)) for key, value in {**given, **own}.items()]


def _flat(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


@cache
def defaults(cls: type) -> dict[str, Any]:
    """The default of each key by its dotted name, as `config.to_dict` shows it; keys that must be set have none."""
    hints, found = get_type_hints(cls), dict[str, Any]()
    for field in fields(cls):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        section = _section(hints[field.name])
        if section is not None:
            found |= {f"{field.name}.{key}": value for key, value in defaults(section).items()}
        if default is not MISSING:
            shown = to_dict(default)
            found |= dict(_flat({field.name: shown}))
    return found


def _section(hint: Any) -> type | None:
    """The dataclass of a section, which may be one that can be left out."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _lines(value: Any) -> list[str]:
    """A value as it is shown; a list has a line for each entry."""
    if value is None:
        return ["not set"]
    if isinstance(value, list) and len(value) > 1:
        return [line for one in value for line in _lines(one)]
    return [value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)]


# --- the result --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """An exported adapter in the run's folder."""

    title: str
    path: str
    files: list[str]
    """Those for other programs, by the layouts of `[export]`."""


def results(left: Left) -> list[Result]:
    last = number(left.choice.get("last"))
    titles = {} if left.chosen is None else {"adapter": f"adapter: step {left.chosen}, the best one"}
    titles |= {} if last is None else {"adapter_last": f"adapter_last: step {last:.0f}, the last one"}
    found = []
    for file in sorted(left.folder.glob("*/adapter_model.safetensors")):
        names = sorted(path.name for path in file.parent.glob("*.safetensors"))
        own = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
        title = titles.get(file.parent.name, file.parent.name)
        found.append(Result(title, str(file.parent), [name for name in names if name not in own]))
    return found


def base_of(left: Left) -> str:
    base = at(left.report, "config", "model", "base")
    return plain_id(base) if isinstance(base, str) else "Qwen/Qwen-Image"
