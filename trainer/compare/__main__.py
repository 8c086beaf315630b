"""`python -m trainer.compare report FOLDER`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.cli import guarded
from trainer.compare.report import write_report
from trainer.errors import UserError
from trainer.files import read_json


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.compare",
        description="Make report.html and its pictures again from report.json. Comparisons are run by "
        "`python train.py --config C --compare random i2l --output DIR`.",
    )
    parser.add_argument("command", choices=["report"])
    parser.add_argument("folder", type=Path, help="the comparison's output folder")
    options = parser.parse_args(arguments)

    def program() -> None:
        file = options.folder / "report.json"
        if not file.exists():
            raise UserError(f"{file} is missing: run the comparison to its end first")
        write_report(options.folder, read_json(file))
        print(options.folder / "report.html")

    return guarded(program)


if __name__ == "__main__":
    sys.exit(main())
