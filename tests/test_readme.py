"""README, docs/ and CONTRIBUTING: their links, commands and file names are those of the project."""

import argparse
import json
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train as program
from demo import (
    build,
    captions,
    choice,
    creatures,
    diagnosis,
    experts,
    figure,
    guidance,
    kinds,
    masks,
    priors,
    strengths,
)
from initializers.i2l import __main__ as i2l
from initializers.i2l.layout import FILES
from tests import mutants
from tests.faults import __main__ as faults
from trainer import doctor
from trainer.bench import __main__ as bench
from trainer.compare import __main__ as compare
from trainer.data import __main__ as data
from trainer.draw import __main__ as draw
from trainer.evaluate import __main__ as evaluate
from trainer.export import __main__ as export
from trainer.formats import __main__ as formats
from trainer.page import __main__ as page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
MAINS: dict[str, Callable[[list[str]], object]] = {
    "train.py": program.main,
    "initializers.i2l": i2l.main,
    "demo.build": build.main,
    "demo.captions": captions.main,
    "demo.creatures": creatures.main,
    "demo.choice": choice.main,
    "demo.diagnosis": diagnosis.main,
    "demo.experts": experts.main,
    "demo.figure": figure.main,
    "demo.guidance": guidance.main,
    "demo.kinds": kinds.main,
    "demo.masks": masks.main,
    "demo.priors": priors.main,
    "demo.strengths": strengths.main,
    "tests.faults": faults.main,
    "tests.mutants": mutants.main,
    "trainer.bench": bench.main,
    "trainer.compare": compare.main,
    "trainer.data": data.main,
    "trainer.doctor": doctor.main,
    "trainer.draw": draw.main,
    "trainer.evaluate": evaluate.main,
    "trainer.export": export.main,
    "trainer.formats": formats.main,
    "trainer.page": page.main,
}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language, also those that are indented in a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


def shell(name: str) -> list[str]:
    """Every command line in the `sh` blocks of a page."""
    joined = [block.replace("\\\n", " ") for block in blocks(text_of(name), "sh")]
    return [line for block in joined for line in block.splitlines() if line.strip()]


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, hyphens for spaces, numbers for repeated ones."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = 1
        unique = slug
        while unique in found:
            unique, number = f"{slug}-{number}", number + 1
        found.add(unique)
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))


def test_ci_runs_the_two_commands_word_for_word() -> None:
    script = text_of(".ci/run")
    first, second = (line for line in shell("README.md") if line.startswith("python3 -m venv"))
    train_command, test_command = (line.split(" && ")[-1] for line in (first, second))
    install = second.removesuffix(f" && {test_command}")
    for command in (install, train_command, test_command):
        assert command in script, command
    assert first.split(" && ")[1] == install.split(" && ")[1].replace('".[dev]"', ".")


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 170


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    for link in links(text_of(name)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name}: {link} leads to no file"
        assert target.resolve().is_relative_to(ROOT), f"{name}: {link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: {link} leads to no heading"


def test_the_readme_links_every_page() -> None:
    linked = {link.partition("#")[0] for link in links(text_of("README.md"))}
    assert {name for name in NAMES if name != "README.md"} <= linked


def test_anchors_are_those_of_github() -> None:
    text = "# A `b.c` and D_e!\n## Two  words\n## Same\n## Same\n```sh\n# not a heading\n```\n### [Link](x.md), too\n"
    assert anchors(text) == {"a-bc-and-d_e", "two--words", "same", "same-1", "link-too"}


class ParsedError(Exception):
    pass


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """Give arguments to a program's own parser; what would then run is not run."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *rest: object) -> None:
        parse_args(self, *rest)  # type: ignore[arg-type]
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)

    def call(name: str, arguments: list[str]) -> None:
        with pytest.raises(ParsedError):
            MAINS[name](arguments)

    return call


def commands(name: str) -> Iterator[tuple[str, list[str]]]:
    """Our programs that a page runs, with their arguments, also those under `accelerate launch`."""
    for line in shell(name):
        words = shlex.split(line, comments=True)
        if words[:2] == ["accelerate", "launch"]:
            start = next(index for index, word in enumerate(words) if word in ("-m", "train.py"))
            options = dict(zip(words[2:start:2], words[3:start:2], strict=True))
            assert set(options) <= {"--config_file", "--num_processes"}, line
            assert (ROOT / options["--config_file"]).exists(), line
            words = ["python", *words[start:]]
        if words[:2] == ["python3", "-m"] or words[0] == "ruff":
            continue
        assert words[0] == "python", f"{name}: {line}"
        program_name, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        if program_name in ("pytest", "tests.test_losses", "tests.pretended_gpu"):
            for word in arguments:
                assert not word.startswith("tests/") or (ROOT / word).exists(), f"{name}: {word}"
        else:
            yield program_name, arguments


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_accepted_by_its_program(name: str, parse: Callable[[str, list[str]], None]) -> None:
    for program_name, arguments in commands(name):
        parse(program_name, arguments)
        for word in arguments:
            if word.startswith(("configs/", "demo/")):
                assert (ROOT / word).exists(), f"{name}: {word}"


def test_every_program_is_shown_somewhere() -> None:
    assert {program_name for name in NAMES for program_name, _ in commands(name)} == set(MAINS)


@pytest.mark.parametrize("arguments", [["--no-such"], ["train", "--no-such"], ["bench", "--no-such"]])
def test_a_wrong_command_would_be_found(arguments: list[str], parse: Callable[[str, list[str]], None]) -> None:
    with pytest.raises(SystemExit):
        parse("initializers.i2l", arguments)


def mapped() -> set[str]:
    """Every path that CONTRIBUTING names, in its map and elsewhere."""
    roots = ("trainer/", "initializers/", "demo/", "configs/", "docs/", "tests/", ".ci/")
    names = re.findall(r"`([^`\n]+)`", prose(text_of("CONTRIBUTING.md")))
    return {name.rstrip(":,") for name in names if name.startswith(roots) and re.fullmatch(r"[\w./*-]+", name)}


def test_every_file_that_contributing_names_is_there() -> None:
    named = mapped()
    assert len(named) > 60
    for name in named - {"initializers/my_start.py"}:  # the one that its reader writes
        assert [*ROOT.glob(name.rstrip("/"))], name


def test_where_to_change_names_what_is_in_the_file() -> None:
    section = text_of("CONTRIBUTING.md").split("## Where do I change ...")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for task, answer in rows:
        words = re.findall(r"`([^`]+)`", answer)
        files = [ROOT / word for word in words if "/" in word]
        assert files, task
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        for word in words:
            assert "/" in word or all(part in text for part in word.split(".")), (task, word)


def test_the_map_covers_every_module() -> None:
    """By its own name; the `__init__.py` of a package by the package's."""
    named = mapped()  # which becomes a part of initializers/__init__.py
    for package in ("trainer", "initializers", "demo"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            folder = path.parent.relative_to(ROOT).as_posix() + "/"
            assert name in named or (path.name == "__init__.py" and folder in named), (
                f"{name} is not in CONTRIBUTING.md"
            )


def test_the_miniature_page_tells_the_figures_of_the_manifest() -> None:
    text = text_of("docs/miniature.md")
    figures = json.loads(text_of("demo/manifest.json"))["figures"]
    for kind in FILES:
        row = next(line for line in text.splitlines() if line.startswith(f"| {kind.capitalize()}") and "96" in line)
        for name, value in figures[kind].items():
            if name != "val_loss_frozen_only_wrong_picture":
                assert (f"{value:.4f}" if isinstance(value, float) else f"{value}") in row, (kind, name)
    assert f"{figures['vae']['psnr_db']} dB" in text
