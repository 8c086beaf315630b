"""python -m tests.faults: let everything of the table happen, and write docs/faults.md."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.faults import page
from tests.faults.everything import FAULTS
from tests.faults.table import Fault
from tests.faults.world import copy_of, half_written, make_world


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.parse_args(arguments)
    rows, wrong = {}, list[str]()
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder) / "world")
        for fault in FAULTS:
            print(fault.name, file=sys.stderr)
            with copy_of(Path(folder) / "world", Path(folder) / "copy"):
                rows[fault.name], problem = _row(fault)
            wrong += [f"{fault.name}: {problem}"] if problem else []
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    page.PAGE.write_text(page.page(FAULTS, rows), encoding="utf-8")
    return 0


def _row(fault: Fault) -> tuple[str, str]:
    """The fault's line, and what is not as it should be."""
    try:
        done = fault.do()
    except AssertionError as error:
        return "", str(error)
    if done.code != fault.code or fault.says not in done.message:
        return "", f"exit code {done.code}: {done.message}"
    return page.row(fault, done), "; ".join(half_written())


if __name__ == "__main__":
    sys.exit(main())
