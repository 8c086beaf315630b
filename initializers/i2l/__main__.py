"""`python -m initializers.i2l inspect | predict | draw | train | bench`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from initializers.i2l.inspect_file import inspect_file
from initializers.i2l.predict_file import predict_file
from initializers.i2l.training.draw import draw_prompts
from trainer.cli import guarded
from trainer.files import DTYPES
from trainer.formats.rules import TRAINERS


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    if arguments[:1] == ["train"]:  # its arguments are parsed there
        from initializers.i2l.training import train

        return train.main(arguments[1:])
    if arguments[:1] == ["bench"]:
        from initializers.i2l.training import bench

        return bench.main(arguments[1:])
    options = parse_arguments(arguments)
    if options.command == "inspect":
        return inspect_file(options.file)
    command = predict_file if options.command == "predict" else draw_prompts
    return guarded(lambda: command(options))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m initializers.i2l", description="i2L: pictures in, a LoRA out")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="say which expert or encoder a file is, and whether it is complete")
    inspect.add_argument("file", type=Path)
    predict = commands.add_parser("predict", help="write the LoRA that the experts predict from pictures")
    predict.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="a run's TOML; [init.i2l] and [model] base are read"
    )
    predict.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of pictures; all are used")
    predict.add_argument("--rank", type=int, help="rank of the LoRA, by exact truncation; not needed with --recipe")
    predict.add_argument(
        "--output", type=Path, required=True, help="the .safetensors file to write; with --for, a new folder"
    )
    predict.add_argument(
        "--for", dest="trainer", choices=[*TRAINERS], help="write a folder for that trainer, with configuration lines"
    )
    predict.add_argument(
        "--recipe", type=Path, metavar="FILE", help="that trainer's configuration, to read rank, alpha and targets from"
    )
    predict.add_argument("--strength", type=float, help="factor of the LoRA (default: the configuration's; 1 for auto)")
    predict.add_argument("--dtype", choices=[*DTYPES], default="fp32", help="precision of the file (default: fp32)")
    draw = commands.add_parser("draw", help="let the base draw pictures from prompts, to train Bias on them")
    draw.add_argument("--base", required=True, help="folder or id of the pipeline, as [model] base")
    draw.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text file with one prompt a line")
    draw.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the pictures")
    draw.add_argument("--resolution", type=int, default=1024, help="side of the squares in pixels (default: 1024)")
    draw.add_argument("--dtype", choices=[*DTYPES], default="bf16", help="precision of the base (default: bf16)")
    draw.add_argument("--num-inference-steps", type=int, default=30, help="sampling steps (default: 30)")
    draw.add_argument("--true-cfg-scale", type=float, default=4.0, help="guidance (default: 4, Qwen-Image's own)")
    commands.add_parser("train", help="train an expert; see train --help")
    commands.add_parser("bench", help="measure time and memory at the published sizes; see bench --help")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
