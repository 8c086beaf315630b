"""The README's commands and files are those of the project."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

import train as program
from demo import build, creatures, experts, figure
from initializers.i2l import __main__ as i2l
from initializers.i2l.layout import FILES
from trainer.compare import __main__ as compare
from trainer.formats import __main__ as formats

README = Path("README.md").read_text(encoding="utf-8")
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]
SHELL = [line for block in BLOCKS for line in block.splitlines() if line]


def test_ci_runs_the_two_commands_word_for_word() -> None:
    script = Path(".ci/run").read_text(encoding="utf-8")
    first, second = (line for line in SHELL if line.startswith("python3 -m venv"))
    train_command, test_command = (line.split(" && ")[-1] for line in (first, second))
    install = second.removesuffix(f" && {test_command}")
    for command in (install, train_command, test_command):
        assert command in script, command
    assert first.split(" && ")[1] == install.split(" && ")[1].replace('".[dev]"', ".")


def test_every_other_command_is_accepted_by_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are parsed for real; what would then run is not run."""

    class ParsedError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *rest: object) -> None:
        parse(self, *rest)  # type: ignore[arg-type]
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    mains = {"train.py": program.main, "initializers.i2l": i2l.main, "demo.build": build.main}
    mains |= {"demo.creatures": creatures.main, "demo.experts": experts.main, "demo.figure": figure.main}
    mains |= {"trainer.compare": compare.main, "trainer.formats": formats.main}
    seen = set()
    for line in SHELL:
        words = shlex.split(line, comments=True)
        if words[0] != "python":
            continue
        name, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        with pytest.raises(ParsedError):
            mains[name](arguments)
        seen.add(name)
    assert seen == set(mains)


def test_every_file_it_names_is_there() -> None:
    table = README.split("## File map")[1]
    named = [
        name for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(named) > 10
    folders = ["", "trainer/", "initializers/"]
    for name in named:
        assert any(Path(folder + name).exists() for folder in folders), name
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or Path(link).exists(), link
    assert "@" not in re.sub(r"\S+@\S+\.\S+|/[\w-]+@\w+", "", README), "a number is missing"


def test_it_tells_the_figures_of_the_manifest() -> None:
    figures = json.loads(Path("demo/manifest.json").read_text(encoding="utf-8"))["figures"]
    for kind in FILES:
        row = next(line for line in README.splitlines() if line.startswith(f"| {kind.capitalize()}") and "96" in line)
        for name, value in figures[kind].items():
            if name != "val_loss_frozen_only_wrong_picture":
                assert (f"{value:.4f}" if isinstance(value, float) else f"{value}") in row, (kind, name)
    assert f"{figures['vae']['psnr_db']} dB" in README
