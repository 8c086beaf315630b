"""Train a LoRA on Qwen-Image, started by i2L or any other initializer.

python train.py --config configs/creatures.toml --init i2l
"""

import argparse
import json
import sys
from collections.abc import Sequence

from trainer.cli import add_run_arguments, guarded


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return guarded(lambda: run(options))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a LoRA on Qwen-Image from a folder of pictures."
    )
    add_run_arguments(parser, "configs/creatures.toml")
    parser.add_argument("--init", metavar="NAME_OR_FILE", help="random, gaussian, i2l, or a LoRA file to start from")
    parser.add_argument("--plan", action="store_true", help="check everything, say what the run would do, and stop")
    parser.add_argument("--help-config", action="store_true", help="explain every key of the configuration, and stop")
    options = parser.parse_args(arguments)
    if options.config is None and not options.help_config:
        parser.error("--config is needed; configs/creatures.toml is a good first one")
    return options


def run(options: argparse.Namespace) -> None:
    import initializers  # here, so that --help answers at once
    from trainer import config, run

    if options.help_config:
        print(config.describe(run.RunConfig))
        for name in initializers.names():
            print(f"\n[init.{name}]\n{config.describe(initializers.config_class(name))}")
        return
    overrides = [*options.set]
    for key, text in (("init.method", options.init), ("output", options.output)):
        if text:  # quoted, or --output 2026-01-01 would be a date
            overrides.append(f"{key}={json.dumps(text, ensure_ascii=False)}")
    run_config, start = run.load_config(options.config, overrides, initializers)
    plan = run.prepare(run_config, start, resume=options.resume)
    if options.plan:
        print(run.describe(plan))
    else:
        run.execute(plan, resume=options.resume, quiet=options.quiet)


if __name__ == "__main__":
    sys.exit(main())
