"""`python -m trainer.evaluate --config C --lora FILE`, and its commands `blind` and `votes`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.cli import guarded


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    commands = {"blind": _blind, "votes": _votes}
    if arguments[:1] and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _evaluate(arguments)


def _evaluate(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)

    def program() -> None:
        import initializers
        from trainer.evaluate import plan, report, run

        request = plan.Request(
            config=options.config,
            loras=tuple(options.lora),
            overrides=tuple(options.set),
            output=options.output,
            seeds=options.seeds,
            sigmas=tuple(options.sigmas),
            blind=options.blind,
        )
        evaluation = plan.prepare(request, initializers)
        written = run.execute(evaluation, quiet=options.quiet)
        print(report.table(written))
        print("", *written["notes"], sep="\n")
        print(evaluation.output / run.PAGE)
        if options.blind:
            print(evaluation.output / run.BLIND_PAGE)

    return guarded(program)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description="Measure LoRAs against held-out pictures, the base always beside them. Further commands: `blind`, "
        "pairs of pictures for people to choose from, and `votes`, which counts what they chose; see `blind --help`.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the TOML of the run they are of")
    parser.add_argument(
        "--lora",
        action="append",
        required=True,
        metavar="FILE[:STRENGTH]",
        help="give it once for each LoRA",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="new folder (default: evaluation in the run's); given again, what was stopped there goes on",
    )
    parser.add_argument("--seeds", type=int, default=4, help="samples of each prompt (default: 4)")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="noise to redraw from (default: 0.3 0.5 0.7)"
    )
    parser.add_argument("--blind", action="store_true", help="also a page of pairs without names, blind.html")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one key: --set data.held_out=4"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _blind(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate blind",
        description="Write a page that shows pairs of pictures without names. Each person opens it in a browser, "
        "chooses, and saves the votes as a file.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="two or more folders of the same samples")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page; key.json lies beside it")
    parser.add_argument("--key", type=Path, metavar="FILE", help="another file for which side is whose")
    parser.add_argument("--real", type=Path, metavar="DIR", help="real pictures of the subject, shown above each pair")
    parser.add_argument("--question", help="what people are asked (default: Which picture is better?)")
    parser.add_argument("--seed", type=int, default=0, help="decides the sides and the order (default: 0)")
    options = parser.parse_args(arguments)

    def program() -> None:
        from trainer.data.pictures import pictures_in
        from trainer.errors import UserError
        from trainer.evaluate import blind

        if options.real and not options.real.is_dir():
            raise UserError(f"--real {options.real}: there is no such folder")
        if options.output.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--output {options.output}: the page must be called .html, else no browser shows it")
        pairs = blind.pair_up(blind.read_folders(options.folders), options.seed)
        real = pictures_in(options.real) if options.real else []
        question = options.question or blind.QUESTION
        key = blind.write_page(options.output, pairs, question=question, real=real, key=options.key)
        print(f"{options.output}: {len(pairs)} pairs. {key} says which side is whose: keep it from those who vote")

    return guarded(program)


def _votes(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate votes", description="Count the votes that a blind page has saved."
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="VOTES", help="files of votes, one of each person")
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="the page's key.json")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a JSON file for the count, too")
    options = parser.parse_args(arguments)

    def program() -> None:
        from trainer.evaluate import votes
        from trainer.files import write_json

        read, notes = votes.read_votes(options.files, options.key)
        counted = votes.count(read)
        if options.output:
            write_json(options.output, counted)
        print("\n".join([*(f"note: {note}" for note in notes), votes.in_words(counted)]))

    return guarded(program)


if __name__ == "__main__":
    sys.exit(main())
