"""`python -m trainer.draw`: pictures from prompts, with LoRAs of pictures, files, a library, or a run's steps"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import initializers
from initializers.i2l.predict_file import predict
from trainer import config
from trainer.adapter import AdapterWeights
from trainer.cli import guarded
from trainer.draw.plan import DrawPlan, Predictor, prepare
from trainer.draw.run import FOLDERS, SHEET_FILE, draw
from trainer.draw.views import VIEWS
from trainer.hardware import parallel
from trainer.plan import Start, load_config
from trainer.qwen_image import TextEncoder
from trainer.validation import GREY

EXAMPLES = """examples:
  a LoRA from one picture, and pictures from it, without training:
    python -m trainer.draw --config configs/creatures.toml --pictures demo/images/zorp/0.png \\
        --prompts "a big creature in the middle, in a meadow"
  two LoRAs at once; then each by itself, at three strengths:
    ... --lora mychar.safetensors style.safetensors:0.6
    ... --lora mychar.safetensors style.safetensors --each --strengths 0.5 0.8 1
  the steps of a run beside one another:
    ... --run outputs/creatures
  the LoRA that fits each prompt, from a folder of them:
    ... --library my_loras
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return guarded(lambda: _draw(options))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.draw",
        description="Draw pictures with a base and LoRAs on it: single PNGs, each with what made it in its metadata, "
        "and one sheet of all. Nothing is trained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run's TOML: base, sizes, i2L")
    parser.add_argument("--prompts", nargs="+", default=[], help="default: [validation] prompts")
    parser.add_argument(
        "--seeds", type=int, default=4, metavar="N", help="pictures of each prompt, from other noise (default: 4)"
    )
    parser.add_argument("--first-seed", type=int, metavar="N", help="default: [validation] seed; the others follow it")
    what = parser.add_argument_group("with which LoRA", "the base alone, if none of these is given")
    what.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRAs in any layout, also LoHa and LoKr, all at once; a folder of PEFT or diffusers, too",
    )
    what.add_argument(
        "--pictures", nargs="+", type=Path, default=[], metavar="FILE", help="i2L predicts a LoRA from these pictures"
    )
    what.add_argument("--keep", type=Path, metavar="FILE", help="write that LoRA into a .safetensors file, too")
    what.add_argument("--library", type=Path, metavar="DIR", help="a folder of LoRAs; each prompt gets what fits it")
    what.add_argument("--run", type=Path, metavar="DIR", help="a run's output folder: its checkpoints, side by side")
    what.add_argument("--at", type=int, nargs="+", default=[], metavar="STEP", help="only these of its steps")
    what.add_argument("--each", action="store_true", help="each LoRA by itself, side by side")
    what.add_argument(
        "--strengths", type=float, nargs="+", default=[], metavar="S", help="times these strengths, side by side"
    )
    what.add_argument("--with-base", action="store_true", help="also without any LoRA, beside the others")
    how = parser.add_argument_group("how", "what is not given is as in [validation] and [data]")
    how.add_argument("--guidance", type=float, metavar="SCALE", help="true CFG; 1 is none, and takes half the time")
    how.add_argument(
        "--negative",
        metavar="grey|FILE[:STRENGTH]",
        help="asymmetric guidance: the negative branch gets this LoRA and no other; grey: what i2L predicts from grey "
        "pictures, as many and as large as --pictures, else as those of [data] images (guidance then is 4 if it was 1)",
    )
    how.add_argument(
        "--views", nargs="+", default=[], metavar="VIEW", help=f"each prompt from several sides: {', '.join(VIEWS)}"
    )
    how.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    how.add_argument("--size", type=_size, metavar="WxH", help="width and height in pixels")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"a new folder (default: {FOLDERS}/001, 002, ...); given again, "
        "the same request goes on where it was stopped"
    )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of the TOML")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(arguments)


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write width x height, such as 1024x768") from None
    return width, height


def _draw(options: argparse.Namespace) -> None:
    plan, predictor, start = _plan(options)
    folder, lines = draw(plan, predictor, start, options.output, quiet=options.quiet)
    for line in lines:
        print(line)
    print(folder / SHEET_FILE)


def _plan(options: argparse.Namespace) -> tuple[DrawPlan, Predictor, Start]:
    """The start in it is i2l if it is asked for, whatever the configuration starts from."""
    uses_i2l = bool(options.pictures) or options.negative == GREY
    overrides = [*options.set, *(["init.method=i2l"] if uses_i2l else [])]
    run, start = load_config(options.config, overrides, initializers)

    def predicted(
        pictures: Sequence[Path], cache: Path, text_encoder: TextEncoder
    ) -> tuple[AdapterWeights, dict[str, Any]]:
        return predict(pictures, run.model.base, start.options, cache=cache, text_encoder=text_encoder)

    problems = [f"[init.i2l] {problem}" for problem in start.problems]
    predictor = Predictor(problems, start.needs if uses_i2l else [], config.to_dict(start.options), predicted)
    device = parallel.one_device()
    return prepare(options, run, start, predictor, device), predictor, start


if __name__ == "__main__":
    sys.exit(main())
