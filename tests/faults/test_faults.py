"""Whatever goes wrong: a message that says what, where and what to do; nothing lost, nothing half written."""

import os
from pathlib import Path

import pytest

from tests.faults import everything, page
from tests.faults.table import Fault
from tests.faults.world import TRACEBACK, half_written


def _case(fault: Fault) -> object:
    marks = [pytest.mark.slow] if fault.slow else []
    if fault.posix:
        marks.append(pytest.mark.skipif(os.name != "posix", reason="processes are forked, and pipes made"))
    return pytest.param(fault, id=fault.name, marks=marks)


@pytest.mark.parametrize("fault", [_case(fault) for fault in everything.FAULTS if not fault.by_command])
def test_a_fault_is_told_and_costs_no_more_than_it_must(fault: Fault, world: Path) -> None:
    done = fault.do()
    assert done.code != TRACEBACK, done.message
    assert fault.says in done.message, done.message
    assert done.code == fault.code, done.message
    assert half_written() == []
    if fault.stable:
        assert page.row(fault, done) in page.PAGE.read_text(encoding="utf-8"), "run python -m tests.faults"


def test_the_page_has_a_row_for_each_fault() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert [name for name in rows if name != "what happens"] == [fault.what for fault in everything.FAULTS]


def test_the_table_has_no_fault_twice() -> None:
    names = [fault.name for fault in everything.FAULTS]
    assert len(names) == len(set(names)) and len(names) > 150
