"""docs/faults.md, made from the table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.table import Fault
from tests.faults.world import Outcome

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
LIMIT = 220
INTRODUCTION = """# What goes wrong, and what comes of it

Each row was brought about on the miniature world of the tests: what the program says is what it said there, cut after
{limit} characters. After each of them the user's own files were as before, nothing half written remained, and a run
that was interrupted ended with the same bytes as one that nothing happened to. The page is made by a command, which
takes about ten minutes and fails if anything is not as the table says:

```sh
python -m tests.faults
```

Exit codes: 0 done, 1 training failed, 2 something in the configuration or the data is wrong.
"""
SECTIONS = {
    "a configuration": "Found by the check of the configuration: no model was loaded, and nothing was written.",
    "a picture": "Put into the folder of training pictures, with a caption, and looked at with `--plan`.",
    "damage": "One byte with all its bits turned over, or the last third of the file missing; then the program is "
    "given the command that reads the file.",
    "a full disk": "The write stops halfway with the system's error; then there is room again, and `--resume` ends the "
    "run.",
    "a kill": "Nothing can be said by a process that is killed. The run is then given again, with `--resume` if it had "
    "begun to train. Before that, what is half written stays until the file is written again an hour later.",
    "NaN": "Put into what a stage computes.",
}


def row(fault: Fault, done: Outcome) -> str:
    """The fault's line of the page."""
    return f"| {fault.what} | {done.code} | {_said(fault, done.message)} | {fault.lost} |"


def _said(fault: Fault, message: str) -> str:
    """The line of the message that the fault is about."""
    lines = message.splitlines() or [""]
    line = next((line for line in lines if fault.says.splitlines()[:1] and fault.says in line), lines[0])
    if not line:
        return "(nothing)"
    short = line if len(line) <= LIMIT else line[: LIMIT - 1] + "…"
    return "`" + short.replace("`", "'").replace("|", "\\|") + "`"


def page(faults: Sequence[Fault], rows: Mapping[str, str]) -> str:
    """The whole page. rows: the line of each fault, by its name."""
    parts = [INTRODUCTION.format(limit=LIMIT)]
    for kind in dict.fromkeys(fault.kind for fault in faults):
        own = [rows[fault.name] for fault in faults if fault.kind == kind]
        title = kind[0].upper() + kind[1:]
        table = ["| what happens | exit code | what the program says | what is lost |", "|---|---|---|---|", *own]
        parts.append("\n".join([f"## {title}", "", SECTIONS[kind], "", *table, ""]))
    return "\n".join(parts)
