"""Put the samples of several runs into one picture: python -m demo.figure OUTPUT.png RUN_FOLDER ... [--row N]

It has a row for each run, a column for each step, and the training pictures below.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from trainer.data.pictures import open_picture
from trainer.validation import grid, write_png


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.figure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the PNG to write")
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of runs of one configuration")
    parser.add_argument("--row", type=int, default=0, help="number of the prompt, from 0 (default: 0)")
    parser.add_argument("--columns", type=int, default=8, help="number of steps shown, from the first (default: 8)")
    options = parser.parse_args(arguments)
    reports = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in options.runs]
    prompt = reports[0]["config"]["validation"]["prompts"][options.row]
    steps = sorted(
        int(path.name.split("-")[1]) for path in (options.runs[0] / "samples").glob(f"step-*-{options.row}.png")
    )
    steps = steps[: options.columns]
    folder = Path(reports[0]["config"]["data"]["images"])
    rows, titles = list[list[Image.Image]](), list[str]()
    for run, report in zip(options.runs, reports, strict=True):
        rows.append([open_picture(run / "samples" / f"step-{step:06d}-{options.row}.png") for step in steps])
        losses = {entry["step"]: entry["val_loss"] for entry in report["validations"] if "val_loss" in entry}
        shown = f"held-out loss {losses[steps[0]]:.3f} at step 0, best {min(losses.values()):.3f}" if losses else ""
        titles.append(f"{report['init']['method']}: {prompt} ({shown})")
    training = [folder / entry["picture"] for entry in reports[0]["data"]["train"]]
    rows.append([open_picture(path) for path in training[: len(steps)]])
    titles.append("the training pictures")
    write_png(options.output, grid(rows, [f"step {step}" for step in steps], titles))
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
