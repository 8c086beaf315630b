"""Strict TOML: a table becomes a frozen dataclass, or every mistake in it is reported at once.

Sections live beside the code that uses them. Each is a keyword-only dataclass whose fields are followed by a
docstring line, with an optional method `problems()` for what types cannot say. This file knows none of them.
"""

import ast
import copy
import difflib
import inspect
import itertools
import json
import math
import os
import re
import textwrap
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli

from trainer.errors import UserError

T = TypeVar("T")
_BAD: Any = object()  # what a value becomes when it cannot be used; the reason is then in `problems`
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class ConfigError(UserError):
    """All that is wrong with a configuration, one problem a line."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)  # so that it survives the way out of a worker process


def read_toml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The file's table; {} and a problem if it cannot be read, and then there is nothing to `parse`."""
    try:
        data = path.read_bytes()
        return tomli.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        problems.append(f"{path}: there is no such file (looked in {path.absolute().parent})")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = "is UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "is not UTF-8"
        problems.append(f"{path}, line {line}: this {kind}; save the file as UTF-8")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
    except tomli.TOMLDecodeError as error:
        source = error.doc.splitlines()[error.lineno - 1 : error.lineno]
        text = source[0].strip() if source else ""
        shown = f"; the line is: {text}" if text else ""
        problems.append(f"{path}, line {error.lineno}: not TOML ({error.msg}){shown}{_toml_advice(text)}")
    return {}


def _toml_advice(line: str) -> str:
    """What to type instead in a line that is not TOML, where that can be guessed."""
    if quotes := [letter for letter in line if letter in _TYPOGRAPHIC]:
        return f'. {quotes[0]} is a typographic quotation mark: type " instead'
    if "\0" in line:
        return ". It looks like UTF-16: save the file as UTF-8"
    if "\\" in line and '"' in line:
        return ". In double quotes \\ begins an escape: write a path in single quotes, such as 'C:\\pictures'"
    if re.search(r"=\s*[A-Za-z]:[\\/]|=\s*[/~.]", line):
        return ". Write a path in single quotes"
    return ""


def load_table(path: Path, overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """The file's table with the overrides in it, for `parse`; what is wrong with an override is added to `problems`.

    ConfigError if the file cannot be read: without a table every key would be reported as missing.
    """
    unreadable: list[str] = []
    table = read_toml(path, unreadable)
    if unreadable:
        raise ConfigError(unreadable)
    return apply_overrides(table, overrides, problems)


def load(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The file as a `cls`. ConfigError lists every problem."""
    problems: list[str] = []
    made = parse(cls, load_table(path, overrides, problems), "", problems)
    if made is None or problems:
        raise ConfigError(problems)
    return made


def apply_overrides(table: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """A copy of `table` with each "section.key=value" set; the value is TOML or else plain text. In a list of tables
    the section is a number from 0: data.folders.0.repeats=3."""
    table = copy.deepcopy(table)
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not _KEY.fullmatch(key):
            problems.append(f"--set {override}: expected key=value, such as train.steps=50")
            continue
        *sections, name = key.split(".")
        target: Any = table
        for section in sections:
            target, outer = _inside(target, section), target
            if not isinstance(target, dict | list):
                what = f"not a table, it is {_show(target)}" if target is not None else f"not one of {_numbers(outer)}"
                problems.append(f"--set {override}: {section} is {what}")
                break
        else:
            if isinstance(target, list):
                problems.append(
                    f"--set {override}: {sections[-1]} is a list; set a key of one of its tables, "
                    f"{'.'.join(sections)}.0.NAME=value, or the whole list"
                )
            elif isinstance(target.get(name), dict):
                problems.append(f"--set {override}: {key} is a table; set one of its keys, {key}.NAME=value")
            else:
                target[name] = _toml_value(text.strip())
    return table


def _inside(table: dict[str, Any] | list[Any], section: str) -> Any:
    """What a table or a list of tables has there; None if the list is too short."""
    if isinstance(table, dict):
        return table.setdefault(section, {})
    return table[int(section)] if section.isdigit() and int(section) < len(table) else None


def _numbers(tables: Sequence[Any]) -> str:
    return f"0 to {len(tables) - 1}, the numbers of its tables" if tables else "its tables: there are none"


def _toml_value(text: str) -> Any:
    try:
        parsed = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text  # a line break could smuggle in a second key


def parse(cls: type[T], table: dict[str, Any], where: str, problems: list[str]) -> T | None:
    """`table` as a `cls`; None, and at least one more entry in `problems`, if anything in it is wrong.

    `where` is the dotted name of the table, "" for the whole file; problems begin with it in brackets.
    """
    return _parse(cls, table, where, problems, root=cls, root_name=where)


def to_dict(config: Any) -> Any:
    """The configuration as tables, lists and plain values, ready for JSON; options not set are None."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, dict):
        return {name: to_dict(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def explain(cls: type, where: str = "", defaults: Any = None) -> str:
    """Every key with type, default and meaning, section by section, for `--help-config`.

    defaults: an instance of `cls` whose values are the defaults, where they are not the fields' own.
    """
    hints, docs = get_type_hints(cls), _field_docs(cls)
    lines = [f"[{where}]"] if where else []
    sections = []
    for field in fields(cls):
        nested, listed = _section(hints[field.name]), _listed(hints[field.name])
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if listed is not None:
            header, *keys = explain(listed, f"[{_join(where, field.name)}]").split("\n")
            sections.append("\n".join([header, *_wrapped(docs.get(field.name, "")), *keys]))
            continue
        if nested is not None:
            own_defaults = default if isinstance(default, nested) else None
            sections.append(explain(nested, _join(where, field.name), own_defaults))
            continue
        value = "(required)" if default is MISSING else "(not set)" if default is None else _show(default, limit=None)
        lines.append(f"{field.name} = {value}  # {_type_name(hints[field.name])}")
        lines += _wrapped(docs.get(field.name, ""))
    own = "\n".join(lines)
    return "\n\n".join([*([own] if own else []), *sections])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


# --- one table --------------------------------------------------------------------------------------------


def _parse(cls: type[T], table: Any, where: str, problems: list[str], *, root: type, root_name: str) -> T | None:
    if not isinstance(table, dict):
        problems.append(f"{where}: must be a table, [{where}], not {_show(table)}")
        return None
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    begin = len(problems)
    doubtful = set()  # keys whose true value is not known, because it is wrong or misspelt
    for key in table:
        if key not in known:
            at_home_elsewhere = any(key == name for name, _ in _all_keys(root, root_name))
            near = [] if at_home_elsewhere else difflib.get_close_matches(key, known, n=1)
            doubtful.update(near)
            advice = f"did you mean {near[0]}?" if near else _elsewhere(key, known, root, root_name)
            problems.append(_at(where, f"{key}: unknown key; {advice}"))
    values, complete = {}, True
    for name, field in known.items():
        value, default = table.get(name, MISSING), _default(field)
        if value is MISSING and default is MISSING and _section(hints[name]) is not None:
            value = {}  # so that the keys missing in it are named, not the table
        if value is MISSING:
            converted = _BAD if default is MISSING else default
            if default is MISSING and name not in doubtful:
                problems.append(_at(where, f"{name}: is missing; it must be {_type_name(hints[name])}"))
        else:
            converted = _convert(hints[name], value, _Place(where, name, root, root_name), problems)
        if converted is _BAD:
            doubtful.add(name)
            converted = default
        complete = complete and converted is not MISSING
        values[name] = converted
    if not complete:
        return None
    made = cls(**values)
    check = getattr(made, "problems", None)
    if callable(check):  # with a default in place of a doubtful value, trust only what does not speak of it
        words = [(message, set(re.findall(r"\w+", message))) for message in check()]
        problems += [_at(where, message) for message, spoken in words if not spoken & doubtful]
    return made if len(problems) == begin else None


@dataclass(frozen=True)
class _Place:
    """Where a value stands, for messages."""

    where: str
    key: str
    root: type
    root_name: str

    def message(self, text: str) -> str:
        return _at(self.where, f"{self.key}: {text}")

    def inside(self, index: object) -> "_Place":
        return replace(self, key=f"{self.key}[{index}]")

    def table(self, index: int) -> "_Place":
        """That of a list of tables, named as `--set` names it."""
        return replace(self, key=f"{self.key}.{index}")


def _convert(hint: Any, value: Any, place: _Place, problems: list[str]) -> Any:
    """`value` as the type `hint` wants it, or _BAD."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, place, problems)
    if is_dataclass(hint) and isinstance(hint, type):
        made = _parse(hint, value, _join(place.where, place.key), problems, root=place.root, root_name=place.root_name)
        return _BAD if made is None else made
    if origin is Literal:
        choices = get_args(hint)
        if any(type(value) is type(choice) and value == choice for choice in choices):
            return value
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        advice = f"; did you mean {_show(near[0])}?" if near else ""
        problems.append(place.message(f"{_show(value)} is not {_type_name(hint)}{advice}"))
        return _BAD
    if origin in (tuple, list) and isinstance(value, list):
        return _convert_array(hint, value, place, problems)
    if (origin is dict or hint is dict) and isinstance(value, dict):
        inner = (get_args(hint) or (str, Any))[1]
        items = {name: _convert(inner, item, place.inside(name), problems) for name, item in value.items()}
        return _BAD if any(item is _BAD for item in items.values()) else items
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value)
        problems.append(place.message(f"must be a finite number, not {value}"))
        return _BAD
    if hint is str and type(value) is str and (escape := _escape_in_path(value)):
        problems.append(place.message(f"{escape}; write the path in single quotes, in which \\ is a plain character"))
        return _BAD
    if hint is str and type(value) is str:
        return os.path.expanduser(value) if value.startswith("~/") else value  # a path of the user's home
    if hint in (int, bool) and type(value) is hint:
        return value
    if hint is Path and type(value) is str:
        return Path(value)
    problems.append(place.message(f"must be {_type_name(hint)}, not {_show(value)}{_advice(hint, value)}"))
    return _BAD


def _convert_union(hint: Any, value: Any, place: _Place, problems: list[str]) -> Any:
    members = [member for member in get_args(hint) if member is not type(None)]
    if isinstance(value, dict):  # then only a section can be meant, and its own problems say more
        members = [member for member in members if _section(member) is not None] or members
    if len(members) == 1:
        return _convert(members[0], value, place, problems)
    for member in members:
        made = _convert(member, value, place, [])
        if made is not _BAD:
            return made
    advice = next((found for member in members if member is not str and (found := _advice(member, value))), "")
    problems.append(place.message(f"must be {_type_name(hint)}, not {_show(value)}{advice}"))
    return _BAD


def _convert_array(hint: Any, value: list[Any], place: _Place, problems: list[str]) -> Any:
    inner = get_args(hint)
    if get_origin(hint) is list or inner[1:] == (...,):
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        problems.append(place.message(f"must be {_type_name(hint)}, not {len(value)} values"))
        return _BAD
    places = [place.inside(i) if _section(h) is None else place.table(i) for i, h in enumerate(inner)]
    made = [_convert(h, v, p, problems) for h, v, p in zip(inner, value, places, strict=True)]
    if any(item is _BAD for item in made):
        return _BAD
    return made if get_origin(hint) is list else tuple(made)


_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_TYPOGRAPHIC = "\u201c\u201d\u201e\u201f\u2018\u2019\u201a\u201b\u00ab\u00bb"
_ESCAPES = {
    "\t": r"\t is a tab",
    "\n": r"\n is a line break",
    "\r": r"\r is a line break",
    "\b": r"\b is a control character",
    "\f": r"\f is a control character",
    "\x1b": r"\e is a control character",
}


def _escape_in_path(value: str) -> str | None:
    """What a Windows path in double quotes has lost to an escape, as in "C:\\temp"."""
    if re.match(r"[A-Za-z]:", value):
        return next((f"in double quotes {said}" for letter, said in _ESCAPES.items() if letter in value), None)
    return None


# --- words for messages -----------------------------------------------------------------------------------


def first_few(names: Iterable[object], separator: str = ", ", count: int = 3) -> str:
    """The first of them, and how many more there are: "a, b, c and 4 more"."""
    listed = [str(name) for name in names]
    rest = len(listed) - count
    return separator.join(listed[:count]) + (f" and {rest} more" if rest > 0 else "")


def _at(where: str, message: str) -> str:
    return f"[{where}] {message}" if where else message


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _elsewhere(key: str, known: dict[str, Any], root: type, root_name: str) -> str:
    """Advice for a key that resembles none of its own table: the table it belongs to, or all that are known."""
    homes: dict[str, str] = {}
    for name, home in _all_keys(root, root_name):
        homes.setdefault(name, _at(home, name))
    near = difflib.get_close_matches(key, homes, n=1, cutoff=0.75)
    if near:
        return f"did you mean {homes[near[0]]}?"
    return f"known keys: {', '.join(sorted(known))}"


def _all_keys(cls: type, where: str) -> list[tuple[str, str]]:
    hints, found = get_type_hints(cls), []
    for field in fields(cls):
        nested, listed = _section(hints[field.name]), _listed(hints[field.name])
        found += [(field.name, where)] if nested is None else _all_keys(nested, _join(where, field.name))
        found += [] if listed is None else _all_keys(listed, f"[{_join(where, field.name)}]")
    return found


def _section(hint: Any) -> type | None:
    """The dataclass that `hint` is, or is together with None."""
    members = [member for member in get_args(hint) if member is not type(None)]
    if get_origin(hint) in (Union, types.UnionType) and len(members) == 1:
        hint = members[0]
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def _listed(hint: Any) -> type | None:
    """The dataclass of which `hint` is a list: a list of tables."""
    inner = get_args(hint) if get_origin(hint) in (list, tuple) else ()
    return _section(inner[0]) if inner else None


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _type_name(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(member) for member in inner if member is not type(None))
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(_show(choice) for choice in inner)
    if origin is list or (origin is tuple and inner[1:] == (...,)):
        return f"a list of [{_type_name(inner[0])}, ...]"
    if origin is tuple:
        return f"a list of {len(inner)}: [{', '.join(_type_name(member) for member in inner)}]"
    if origin is dict or hint is dict or _section(hint) is not None:
        return "a table"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", Any: "anything"}
    return names.get(hint) or str(hint)


def _show(value: Any, limit: int | None = 60) -> str:
    """A value as TOML would write it, cut if long."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        text = f"[{', '.join(_show(item, limit) for item in value)}]"
    elif isinstance(value, bool | str | Path):
        text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
    else:
        text = str(value)
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."


def _advice(hint: Any, value: Any) -> str:
    """What to write instead, where that can be guessed."""
    if hint is int and type(value) is float and value.is_integer():
        return f"; write {int(value)}"
    if hint is bool and str(value).lower() in _YES | _NO:
        return f"; write {'true' if str(value).lower() in _YES else 'false'}"
    if hint is str and not isinstance(value, dict | list):
        return f'; write "{value}", in quotes'
    if hint in (int, float) and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", value):
        return f"; write {value}, without quotes"
    if _listed(hint) is not None and isinstance(value, dict):
        return "; write its name in double brackets, [[...]], above each"
    if get_origin(hint) in (tuple, list) and isinstance(value, str):
        return f"; write [{_show(value)}]"
    return ""


def _field_docs(cls: type) -> dict[str, str]:
    """The string that follows each field in the source of `cls` and of the classes it extends."""
    docs: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if is_dataclass(c)]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except OSError:  # made without a source file
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = inspect.cleandoc(text.value.value)
    return docs
