"""`python -m trainer.page FOLDER`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.cli import guarded
from trainer.errors import UserError
from trainer.folder import RUN_FILE
from trainer.page.write import PAGE, write_page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.page",
        description=f"Make {PAGE} of a run again, from the files in its folder. A run makes it by itself at each "
        "validation and at its end.",
    )
    parser.add_argument("folder", type=Path, help="the run's output folder")
    options = parser.parse_args(arguments)

    def program() -> None:
        if not (options.folder / RUN_FILE).exists():
            raise UserError(f"{options.folder / RUN_FILE} is missing: this is not the folder of a run that has begun")
        write_page(options.folder)
        print(options.folder / PAGE)

    return guarded(program)


if __name__ == "__main__":
    sys.exit(main())
