"""How the program speaks: every key is explained, and docstrings are sentences."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import initializers
from initializers.i2l.training.train import HypernetworkConfig
from trainer import config
from trainer.data.audit.rules import Rules
from trainer.plan import RunConfig

ROOT = Path(__file__).parents[1]
FILES = [
    ROOT / "train.py",
    *(path for name in ("trainer", "initializers", "demo") for path in (ROOT / name).rglob("*.py")),
]


def keys(cls: type[Any], where: str) -> Iterator[tuple[str, str]]:
    """The dotted name of every key, and what --help-config says of it."""
    hints, docs = get_type_hints(cls), config._field_docs(cls)
    for field in dataclasses.fields(cls):
        name = f"{where}.{field.name}" if where else field.name
        if (section := config._section(hints[field.name])) is not None:
            yield from keys(section, name)
        else:
            yield name, docs.get(field.name, "")


KEYS = [*keys(RunConfig, ""), *keys(HypernetworkConfig, "hypernetwork")]
KEYS += keys(Rules, "rules")
KEYS += [key for name in initializers.names() for key in keys(initializers.config_class(name), f"init.{name}")]


@pytest.mark.parametrize(("key", "text"), KEYS, ids=[key for key, _ in KEYS])
def test_every_key_has_a_sentence(key: str, text: str) -> None:
    first = text.split()[0] if text else ""
    assert len(text.split()) >= 4 and text.endswith("."), f"{key}: {text!r}"
    assert first != "Of" and (first[0].isupper() or not first[0].isalpha()), f"{key}: {text!r}"


def test_help_config_prints_them() -> None:
    text = " ".join(config.explain(RunConfig).split())
    for key, sentence in keys(RunConfig, ""):
        assert " ".join(sentence.split()) in text, key


def test_no_docstring_begins_with_of() -> None:
    found = 0
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                found += 1
                assert not node.value.value.startswith("Of "), f"{path}, line {node.lineno}"
    assert found > 300


def test_help_config_knows_a_section_s_own_defaults() -> None:
    text = config.explain(HypernetworkConfig)
    train = text[text.index("[train]") : text.index("[flow]")]
    assert f"steps = {HypernetworkConfig.train.steps}  #" in train and HypernetworkConfig.train.steps == 10_000
    assert "steps = 1000  #" in config.explain(RunConfig)
