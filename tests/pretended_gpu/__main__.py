"""python -m tests.pretended_gpu"""

from tests.pretended_gpu import guard

guard.load()

import argparse  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from tests.pretended_gpu import hollow  # noqa: E402

hollow.install()
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # which reads in other threads

from tests.pretended_gpu import table  # noqa: E402
from tests.pretended_gpu.cases import CARDS, CASES, OTHERS, RUNS, Case, Size, measure  # noqa: E402


def main() -> None:
    shown = [case.name for case in (*RUNS, *OTHERS)]
    parser = argparse.ArgumentParser(
        prog="python -m tests.pretended_gpu", description="Run the program at full size on a pretended GPU."
    )
    parser.add_argument(
        "cases", nargs="*", default=shown, help=f"some of {', '.join(CASES)}; by default those of the page"
    )
    parser.add_argument("--first", nargs="*", default=[], metavar="CASE", help="these only with fewest blocks")
    parser.add_argument("--share", action="store_true", help="find in the cache what cases before have encoded")
    parser.add_argument("--blocks", type=int, help="so many, instead of what is carried on to 60")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--write", action="store_true", help="put the table into docs/real_size.md")
    options = parser.parse_args()
    gc.freeze()  # what the imports have made need not be looked through each time
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    with tempfile.TemporaryDirectory() as root:
        os.environ["XDG_CACHE_HOME"] = root
        found = {}
        for name in options.cases:
            case = CASES[name]
            if not options.share:
                shutil.rmtree(Path(root) / "cache", ignore_errors=True)
            sizes = case.sizes[: 1 if name in options.first else None]
            found[name] = outcomes(case, Path(root), [Size(options.blocks)] if options.blocks else [*sizes])
    if options.json:
        options.json.write_text(json.dumps(found))
    else:
        print(text := table.markdown(found))
        if options.write:
            table.write(text)


def outcomes(case: Case, root: Path, sizes: list[Size]) -> dict[str, Any]:
    began, found = time.process_time(), []
    for size in sizes:
        found.append({**asdict(size), **asdict(outcome := measure(case, root, size))})
        if outcome.error:
            print(outcome.error, file=sys.stderr)
    print(f"{case.name}: {time.process_time() - began:.0f} s of CPU", file=sys.stderr)
    return {"card": case.card, "bytes": CARDS[case.card], "sizes": found}


if __name__ == "__main__":
    main()
