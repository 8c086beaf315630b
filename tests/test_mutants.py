"""The table of mutants fits the program and the tests; and its program tells the dead from the living."""

import ast
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, Mutant, main


def test_there_are_enough_mutants_and_no_two_of_one_name() -> None:
    assert len(MUTANTS) >= 48
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_its_file(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    mutated = mutant.applied(text)
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))


@pytest.mark.parametrize("test", sorted({test for mutant in MUTANTS for test in mutant.tests}))
def test_a_test_that_must_kill_exists(test: str) -> None:
    file, *names = test.split("[")[0].split("::")
    assert {*names} <= _functions(file)


@cache
def _functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# --- the program ------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of one line with two tests, tracked by git; and a file that is not. It needs none of our packages."""
    monkeypatch.setattr(mutants, "PRELOADED", ["pytest"])
    (tmp_path / "double.py").write_text("def double(x):\n    return x + x\n")
    (tmp_path / "test_double.py").write_text(
        "from double import double\n\n\n"
        "def test_of_two():\n    assert double(2) == 4\n\n\n"
        "def test_of_three():\n    assert double(3) == 6\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    (tmp_path / "test_untracked.py").write_text("def test_fails():\n    assert False\n")
    return tmp_path


def mutant(new: str, *tests: str, old: str = "x + x") -> Mutant:
    return Mutant(f"it returns {new}", "double.py", old, new, tests)


def test_the_dead_are_told_from_the_living(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead, living = mutant("x * x", "test_double.py"), mutant("x ** 2", "test_double.py::test_of_two")
    stale, broken = mutant("x", "test_double.py", old="y + y"), mutant("nothing)", "test_double.py::test_of_two")
    before = {path: path.read_bytes() for path in project.iterdir() if path.is_file()}
    assert main([], root=project, mutants=[dead, living, stale, broken]) == 1
    said = capsys.readouterr().out
    assert "it returns x * x: killed by test_double.py::test_of_three\n" in said
    assert "it returns x ** 2: LIVED\n" in said
    assert "it returns x: does not apply: 'y + y' is 0 times in double.py" in said
    assert "it returns nothing): its tests could not be run" in said and "1 of 4 mutants are dead" in said
    assert {path: path.read_bytes() for path in project.iterdir() if path.is_file()} == before
    assert main(["--only", r"X \* X"], root=project, mutants=[dead, living]) == 0


def test_red_tests_are_told_before_any_mutant(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "double.py").write_text("def double(x):\n    return x + x + 1\n")
    assert main([], root=project, mutants=[mutant("x * x", "test_double.py")]) == 1
    said = capsys.readouterr().out
    assert "red without a mutant" in said and "test_of_two" in said and "killed" not in said


def test_mutants_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "caption dropout"]) == 0
    assert capsys.readouterr().out.splitlines() == ["trainer/objective.py: caption dropout does nothing"]
    assert main(["--list", "--only", "no such mutant"]) == 1


@pytest.mark.slow
def test_a_sample_of_the_mutants_is_dead() -> None:
    assert main([], mutants=MUTANTS[:: len(MUTANTS) // 5][:5]) == 0
