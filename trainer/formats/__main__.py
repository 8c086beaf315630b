"""`python -m trainer.formats convert | check | merge | subtract | extract | trainers`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer import adapter, qwen_image
from trainer.adapter import AdapterWeights
from trainer.cli import guarded
from trainer.files import DTYPES
from trainer.flow import generator
from trainer.formats.check import judge, verdict_text
from trainer.formats.convert import Target, hand_off
from trainer.formats.extract import extract
from trainer.formats.layouts import LAYOUTS
from trainer.formats.lora import FormatError, interface_metadata, open_lora, write_lora
from trainer.formats.merge import merge
from trainer.formats.origin import PEFT_FILE, without_stale
from trainer.formats.overview import overview
from trainer.formats.read_config import Recipe, read_recipe
from trainer.formats.rules import TRAINERS
from trainer.formats.written import Form, add_arguments
from trainer.lowrank import LowRank, energy, energy_kept, ordered, rank, relative_difference


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    answer = 0

    def program() -> None:
        nonlocal answer
        match options.command:
            case "trainers":
                print(overview())
            case "convert":
                _convert(options)
            case "check":
                answer = _check(options)
            case "merge":
                merge(options.files, options.weights, Form.of(options))
            case "subtract":
                merge([options.file, options.other], ["1", "-1"], Form.of(options))
            case "extract":
                extract(options.tuned, options.base, Form.of(options))

    return guarded(program) or answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.formats",
        description="LoRA files for Qwen-Image: from one layout to another, what a trainer will do with one, sums of "
        "several, and one from a fine-tuned model.",
        epilog="Exit codes: 0 done; 1 check: the trainer's start would not equal the file; 2 something is wrong with "
        "the arguments or the files.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="write a LoRA as a trainer, or a layout, wants it")
    convert.add_argument("file", type=Path, help="a .safetensors file in any layout, or a folder of PEFT or diffusers")
    convert.add_argument("out", type=Path, help="with --for a new folder, with --layout a new file")
    to = convert.add_mutually_exclusive_group(required=True)
    to.add_argument("--for", dest="trainer", choices=[*TRAINERS], help="with its configuration's lines beside the file")
    to.add_argument("--layout", choices=[*LAYOUTS], help="only the file; peft: a folder")
    convert.add_argument(
        "--rank", type=int, help="of the new file, by exact truncation (default: the recipe's, or as it is)"
    )
    convert.add_argument("--dtype", choices=[*DTYPES], default="fp32", help="default: fp32")
    check = commands.add_parser("check", help="what a trainer will do with a LoRA file")
    check.add_argument("file", type=Path)
    check.add_argument("--for", dest="trainer", choices=[*TRAINERS], required=True)
    _add_sums(commands)
    commands.add_parser("trainers", help="what is known of each program: versions, layouts, alpha, what is strict")
    for command in (convert, check):
        command.add_argument(
            "--recipe",
            type=Path,
            metavar="FILE",
            help="that trainer's configuration, to read rank, alpha and targets from",
        )
        command.add_argument("--base", default="Qwen/Qwen-Image", help="the model (default: Qwen/Qwen-Image)")
    return parser


def _add_sums(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """merge, subtract, extract"""
    merged = commands.add_parser("merge", help="write the weighted sum of LoRAs as one, exactly or at a rank")
    merged.add_argument("files", type=Path, nargs="+", metavar="FILE", help="LoRA, LoHa or LoKr, in any layout")
    merged.add_argument("--weights", nargs="+", metavar="W", help="one for each file, in their order (default: 1 each)")
    less = commands.add_parser("subtract", help="write FILE - OTHER as a LoRA, exactly or at a rank")
    less.add_argument("file", type=Path)
    less.add_argument("other", type=Path)
    tuned = commands.add_parser("extract", help="write the LoRA nearest to TUNED - BASE, two transformers")
    tuned.add_argument("tuned", metavar="TUNED", help="folder of diffusers' transformer or pipeline, or .safetensors")
    tuned.add_argument("base", metavar="BASE", help="the same, or an id such as Qwen/Qwen-Image, to be fetched")
    for command in (merged, less, tuned):
        add_arguments(command)


def _recipe(options: argparse.Namespace) -> Recipe | None:
    return read_recipe(options.recipe, options.trainer) if options.recipe else None


def _check(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    verdict = judge(options.file, options.trainer, base_modules(options.base), recipe)
    if options.recipe is None and options.trainer != "comfyui":
        print("no --recipe: taken at the file's rank, with that trainer's defaults otherwise")
    print(verdict_text(verdict))
    return 0 if verdict.equal else 1


def base_modules(base: str) -> dict[str, tuple[int, int]]:
    """in_features and out_features of the model's Linear layers, from its configuration alone."""
    if problems := qwen_image.check_base(base):
        raise FormatError("; ".join(f"--{problem}" for problem in problems))
    return adapter.linears(qwen_image.transformer_on_meta(base))


def _convert(options: argparse.Namespace) -> None:
    problems = []
    if options.out.exists():
        problems.append(f"{options.out} is there already: choose another name")
    if options.rank is not None and options.rank < 1:
        problems.append("--rank must be at least 1")
    if options.layout and options.recipe:
        problems.append("--recipe has no effect with --layout: choose --for TRAINER")
    file, recipe = open_lora(options.file), _recipe(options) if options.trainer else None
    wanted = options.rank or (recipe.rank if recipe else None)
    if file.method != "LoRA" and wanted is None:
        most = max(rank for _, _, rank in file.sizes().values())
        problems.append(f"{options.file} is a {file.method}, of rank up to {most}: say by --rank which the LoRA gets")
    if problems:
        raise FormatError("\n".join(problems))
    for note in file.notes:
        print(f"note: {note}")
    weights, metadata = file.read(wanted)
    metadata = without_stale(metadata)
    if options.layout:
        _convert_layout(options, weights, metadata)
        return
    target = Target(
        trainer=options.trainer,
        modules=base_modules(options.base),
        base=options.base,
        recipe=recipe,
        rank=options.rank,
        dtype=options.dtype,
    )
    done = hand_off(weights, target, options.out, metadata)
    print("\n".join([f"{done.file}", *(f"  {line}" for line in done.lines), verdict_text(done.verdict)]))


def _convert_layout(options: argparse.Namespace, weights: AdapterWeights, metadata: dict[str, str]) -> None:
    """Rows in the order of their singular values, dW as it was, or at `--rank`."""
    path = options.out / PEFT_FILE if options.layout == "peft" else options.out
    if options.layout != "peft" and path.suffix != ".safetensors":
        raise FormatError(f"{path}: the file's name must end in .safetensors")
    factors, shares, energies, worst = dict[str, LowRank](), dict[str, float](), dict[str, float](), 0.0
    for name, x in weights.factors.items():
        factors[name], share = ordered(x, options.rank or rank(x), generator("hand off", name))
        energies[name] = energy(x) + weights.lost.get(name, 0.0)
        shares[name] = share * energy(x) / energies[name] if energies[name] else share
        worst = max(worst, relative_difference(x, factors[name]))
    entries = {**metadata, **interface_metadata(options.layout, path.stem, [rank(x) for x in factors.values()])}
    write_lora(path, AdapterWeights(factors), entries, DTYPES[options.dtype], layout=options.layout)
    rounded = f"before rounding to {options.dtype}, dW differs by {worst:.0e} at most"
    kept = energy_kept(shares, energies)["total"]
    print(f"{options.out}: {len(factors)} modules, with {kept:.2%} of the energy; {rounded}")


if __name__ == "__main__":
    sys.exit(main())
