"""`python -m trainer.data audit`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import config
from trainer.cli import guarded
from trainer.data.audit.rules import Rules

if TYPE_CHECKING:
    from trainer.data.audit.run import Audit

Commands = Any
"""argparse's subparsers, which have no public name."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.data",
        description="Pictures and captions, before training.",
        epilog="Exit codes: 0 done; 1 stopped, or failed; 2 something is wrong with the arguments or the folder.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_audit(commands)
    options = parser.parse_args(arguments)
    return guarded(lambda: options.run(options))


def _add_audit(commands: Commands) -> None:
    parser = commands.add_parser(
        "audit",
        help="look at every picture, and say which to keep, to look at, or to leave out",
        description="Writes audit.json and audit.html into --output; FOLDER is only read.\n"
        "`[data] audit` has a run leave out what the audit says to.",
        epilog=f"The rules, with their defaults:\n\n{config.explain(Rules)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="of pictures, with captions beside them")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="an older audit there is replaced")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run's TOML, for its [data] and [model] base")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one key: --set data.trigger=mychar"
    )
    parser.add_argument("--base", metavar="MODEL", help="count the tokens of captions by this model's tokenizer")
    parser.add_argument("--rules", type=Path, metavar="FILE", help="limits, in TOML")
    parser.add_argument("--quick", action="store_true", help="without faces, hands, people and text, which take longer")
    parser.add_argument(
        "--masks",
        nargs="+",
        choices=["faces", "hands", "subject"],
        default=[],
        help="write masks of these into masks/ in DIR, for [data] masks; subject: the square around each person",
    )
    parser.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> None:
    from trainer.data.audit import run  # what takes seconds to import is imported here: --help answers at once

    report = run.audit(_asked(options), options.output)
    print(run.summary(report))
    print(f"to look at: {options.output / run.PAGE_FILE}")
    print(f'to train without what is left out: [data] audit = "{(options.output / run.DATA_FILE).as_posix()}"')
    if options.masks:
        print(f'to train with the masks: [data] masks = "{(options.output / run.masks.FOLDER).as_posix()}"')


def _asked(options: argparse.Namespace) -> "Audit":
    """What the arguments and files ask for. ConfigError lists all that is wrong with them."""
    from trainer import qwen_image
    from trainer.data.audit.run import Audit
    from trainer.data.dataset import DataConfig
    from trainer.hub import sources

    problems: list[str] = []
    table = config.load_table(options.config, [], problems) if options.config else {}
    table = config.apply_overrides(table, options.set, problems)
    about = {**_settings_of(options.folder, _table(table, "data")), "images": options.folder}
    about.pop("audit", None)  # that of an earlier audit, which may be old
    data = config.parse(DataConfig, about, "data", problems)
    rules = _rules(options.rules, problems)
    base = options.base or _table(table, "model").get("base")
    problems += qwen_image.check_base(base) if isinstance(base, str) else []
    if problems or data is None or rules is None:
        raise config.ConfigError(problems)
    here = isinstance(base, str) and sources.is_here(qwen_image.need(base, ("tokenizer",)))
    multiple = qwen_image.picture_multiple(str(base)) if here else qwen_image.PICTURE_MULTIPLE
    limit, masks = qwen_image.PROMPT_LIMIT, tuple(dict.fromkeys(options.masks))
    return Audit(data, rules, multiple, limit, base if here else None, options.quick, masks)


def _settings_of(folder: str, data: dict[str, Any]) -> dict[str, Any]:
    """`[data]` for one folder, with what its table in `[[data.folders]]` says, if it has one."""
    from trainer.data.folders import folder_path

    folders = data.get("folders", [])
    for one in folders if isinstance(folders, list) else []:
        if isinstance(one, dict) and folder_path(str(one.get("images"))).resolve() == folder_path(folder).resolve():
            data = {**data, **one}
    return {key: value for key, value in data.items() if key not in ("folders", "repeats")}


def _rules(path: Path | None, problems: list[str]) -> Rules | None:
    if path is None:
        return Rules()
    unreadable, wrong = list[str](), list[str]()
    table = config.read_toml(path, unreadable)
    rules = None if unreadable else config.parse(Rules, table, "", wrong)
    problems += [*unreadable, *(f"{path}: {problem}" for problem in wrong)]
    return rules


def _table(table: dict[str, Any], name: str) -> dict[str, Any]:
    found = table.get(name, {})
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
