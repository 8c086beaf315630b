"""`python -m trainer.bench loop | adapter | full-size | audit`"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.cli import guarded
from trainer.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return guarded(lambda: run(options))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.bench", description="What a training step costs, and an audit."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    loop = commands.add_parser("loop", help="seconds of a step, and what of it is the loop around it")
    adapter = commands.add_parser("adapter", help="what the adapter adds to a block with random weights")
    for command in (loop, adapter):
        command.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run's TOML")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key")
    loop.add_argument("--steps", type=int, default=50, help="of each of 9 turns (default: 50)")
    full_size = commands.add_parser(
        "full-size",
        help="a step of the published size, with random weights",
        description="Writes a transformer of Qwen-Image's shape with random weights, 41 GB in bf16, loads it as a real "
        "one is loaded, and times a step of each variant. Without a GPU a few blocks will do: --blocks 1 --resolution "
        "256 --variants none fp8",
    )
    full_size.add_argument("--variants", nargs="+", metavar="NAME", help="default: all")
    full_size.add_argument("--blocks", type=int, default=60, help="of the transformer (default: 60, as published)")
    full_size.add_argument("--resolution", type=int, default=1024, help="pixels of the square's side (default: 1024)")
    full_size.add_argument("--rank", type=int, default=16, help="of the adapter (default: 16)")
    full_size.add_argument("--steps", type=int, default=10, help="timed for each variant (default: 10)")
    full_size.add_argument(
        "--folder", type=Path, default=Path(), help="for the weights (default: here); they are deleted"
    )
    audit = commands.add_parser("audit", help="seconds and memory of an audit of pictures that are painted for it")
    audit.add_argument("--pictures", type=int, default=1000, help="default: 1000")
    audit.add_argument("--megapixels", type=float, default=2.0, help="of each (default: 2)")
    for command in (loop, adapter, full_size, audit):
        command.add_argument("--output", type=Path, metavar="FILE", help="write the report there, as JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    from trainer.files import write_json  # what takes seconds to import is imported here: --help answers at once

    measures = {"full-size": _full_size, "audit": _audit}
    text, report = measures.get(options.command, _step)(options)
    print(text)
    if options.output:
        write_json(options.output, report)


def _full_size(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from trainer.bench import full_size
    from trainer.qwen_image import PICTURE_MULTIPLE

    names = options.variants or [*full_size.VARIANTS]
    if unknown := [name for name in names if name not in full_size.VARIANTS]:
        raise UserError(f"--variants: {unknown[0]} is not one of {', '.join(full_size.VARIANTS)}")
    if (
        min(options.blocks, options.rank, options.steps, options.resolution) < 1
        or options.resolution % PICTURE_MULTIPLE
    ):
        raise UserError(f"--blocks, --rank, --steps must be at least 1, --resolution a multiple of {PICTURE_MULTIPLE}")
    sizes = {"num_blocks": options.blocks, "resolution": options.resolution, "rank": options.rank}
    report = full_size.measure_variants(names, **sizes, steps=options.steps, folder=options.folder)
    return full_size.report_text(report), report


def _audit(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from trainer.bench import audit

    if options.pictures < 1 or options.megapixels <= 0:
        raise UserError("--pictures must be at least 1, --megapixels above 0")
    report = audit.measure(options.pictures, options.megapixels)
    return audit.report_text(report), report


def _step(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure the configuration's run with a random start, which costs as much as any other."""
    from trainer import config, plan
    from trainer.bench import adapter, loop
    from trainer.hardware import machine, parallel

    if options.command == "loop" and options.steps <= loop.WARMUP:
        raise UserError(f"--steps must be more than {loop.WARMUP}, which do not count")
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        table = config.load_table(options.config, [*options.set, f"output={folder}"], problems)
        settings = config.parse(plan.RunConfig, {**table, "init": {}}, "", problems)
        if settings is None or problems:
            raise config.ConfigError(problems)
        prepared = plan.prepare(settings, plan.Start("random", _random, None, [], []), resume=False)
        accelerator = parallel.make_accelerator(settings.model.dtype)
        if options.command == "adapter":
            found = adapter.profile(prepared, accelerator.device)
            text = adapter.report_text(found)
        else:
            found = loop.measure(prepared, accelerator, options.steps)
            text = loop.report_text(found)
    about = {"config": config.to_dict(settings), "hardware": machine.hardware(accelerator.device)}
    return text, {**about, "versions": machine.versions(), **found}


def _random(context: InitContext, config: Any) -> Seed:
    return Seed(AdapterWeights({}), {})


if __name__ == "__main__":
    sys.exit(main())
