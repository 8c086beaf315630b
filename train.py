"""Train a LoRA on Qwen-Image, started by i2L or any other initializer.

python train.py --config configs/creatures.toml --init i2l
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.cli import add_run_arguments, guarded

COMPARE_ONLY = ("seeds", "learning_rates", "controls", "subjects", "part")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return guarded(lambda: run(options))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a LoRA on Qwen-Image from a folder of pictures."
    )
    add_run_arguments(parser, "configs/creatures.toml")
    parser.add_argument("--init", metavar="NAME_OR_FILE", help="random, gaussian, i2l, or a LoRA file to start from")
    group = parser.add_argument_group(
        "comparison",
        "the same training from several starts; given again, it goes on where it was stopped, also without --resume",
    )
    group.add_argument(
        "--compare", nargs="+", default=[], metavar="NAME_OR_FILE", help="the starts, such as random i2l"
    )
    group.add_argument("--seeds", type=int, metavar="N", help="runs of each start with other noise (default: 3)")
    group.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        metavar="RATE",
        help="each start is taken at its own best of them (default: 3e-4 1e-3 3e-3)",
    )
    group.add_argument(
        "--controls",
        nargs="*",
        metavar="CONTROL",
        help="norm-matched, wrong-pictures, bias-only, no-training: what i2l must beat (default: all)",
    )
    group.add_argument(
        "--subjects", type=Path, metavar="DIR", help="a folder of folders of pictures, instead of the configuration's"
    )
    group.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="do the I-th of N parts of the runs; the parts may run side by side, on machines that share the folder "
        "(under `accelerate launch` each process takes its own)",
    )
    parser.add_argument("--plan", action="store_true", help="check everything, say what the run would do, and stop")
    parser.add_argument("--vram", type=float, metavar="GB", help="with --plan: settings that would fit such a card")
    parser.add_argument("--card", metavar="NAME", help='with --plan: seconds on that card, such as "RTX 4090"')
    parser.add_argument("--disk", type=float, metavar="GB", help="with --plan: GB that the disk reads in a second")
    parser.add_argument("--help-config", action="store_true", help="explain every key of the configuration, and stop")
    options = parser.parse_args(arguments)
    if options.config is None and not options.help_config:
        parser.error("--config is needed; configs/creatures.toml is a good first one")
    if not options.compare:
        without = [name for name in COMPARE_ONLY if getattr(options, name) is not None]
        if without:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in without)
            parser.error(f"{names}: only with --compare, which names the starts: --compare random i2l")
    elif options.init:
        parser.error("--compare names the starts: leave --init out")
    if options.vram is not None and not (options.plan and options.vram > 0):
        parser.error("--vram GB is a number above 0, and goes with --plan")
    if options.disk is not None and not (options.plan and options.disk > 0):
        parser.error("--disk GB is a number above 0, and goes with --plan")
    if options.card is not None and not (options.plan and not options.compare):
        parser.error("--card NAME goes with --plan, and not with --compare")
    return options


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not I/N, such as 1/4 for the first of four parts")
    return int(number), int(count)


def run(options: argparse.Namespace) -> None:
    import initializers  # here, so that --help answers at once
    from trainer import config, plan, plan_words, run
    from trainer.hardware import seconds

    if options.help_config:
        print(config.explain(plan.RunConfig))
        for name in initializers.names():
            keys = config.explain(initializers.config_class(name)) or "(no keys)"
            print(f"\n[init.{name}]\n{keys}")
        return
    overrides = [*options.set]
    for key, text in (("init.method", options.init), ("output", options.output)):
        if text:  # quoted, or --output 2026-01-01 would be a date
            overrides.append(f"{key}={json.dumps(text, ensure_ascii=False)}")
    if options.compare:
        compare(options, overrides)
        return
    card = seconds.card(options.card) if options.card else None
    run_config, start = plan.load_config(options.config, overrides, initializers)
    prepared = plan.prepare(run_config, start, resume=options.resume)
    if options.plan:
        print(plan_words.plan_text(prepared))
        print(seconds.text(prepared, card, options.disk))
        if vram := options.vram or (card and card.gigabytes):
            print("\n" + plan_words.fit_text(prepared, vram))
    else:
        run.execute(prepared, resume=options.resume, quiet=options.quiet)


def compare(options: argparse.Namespace, overrides: list[str]) -> None:
    import initializers
    from trainer.compare import execute as compare
    from trainer.compare import plan as comparison

    controls = tuple(comparison.CONTROLS) if options.controls == [] else tuple(options.controls or ())
    request = comparison.Request(
        initializers=tuple(options.compare),
        controls=controls,
        subjects=options.subjects,
        part=options.part or compare.own_part(),
    )
    if options.seeds is not None:
        request = replace(request, seeds=options.seeds)
    if options.learning_rates is not None:
        request = replace(request, learning_rates=tuple(options.learning_rates))
    prepared = comparison.prepare(options.config, overrides, request, initializers)
    if options.plan:
        print(comparison.plan_text(prepared))
    else:
        compare.execute(prepared, quiet=options.quiet)


if __name__ == "__main__":
    sys.exit(main())
