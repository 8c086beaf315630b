"""`python -m trainer.data audit`, `caption`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import config
from trainer.cli import guarded
from trainer.data.audit.rules import Rules
from trainer.data.caption.templates import LANGUAGES, SHIPPED, load

if TYPE_CHECKING:
    from trainer.data.audit.run import Audit
    from trainer.data.caption.run import Asked

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
    _add_caption(commands)
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


def _add_caption(commands: Commands) -> None:
    parser = commands.add_parser(
        "caption",
        help="have the base's own Qwen2.5-VL describe every picture",
        description="Writes captions into --output; FOLDER is only read. `[data] captions` has a run read them. A\n"
        "command that was stopped goes on where it was when it is given again.",
        epilog=f"The templates, which --template can replace, are in {SHIPPED}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="of pictures")
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="a run's TOML, for its [model] and the trigger and recursive of its [data]",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the captions")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one key: --set model.dtype=fp32"
    )
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="English, Chinese, or both (default: en)")
    parser.add_argument("--detail", type=int, choices=(1, 2, 3), default=2, help="from a sentence to many (default: 2)")
    parser.add_argument("--pose", action="store_true", help="with how body, head, arms, hands and legs are held")
    parser.add_argument("--trigger", metavar="WORD", help="what the subject is called, instead of [data] trigger")
    parser.add_argument("--template", type=Path, metavar="FILE", help="questions and forms of captions, in TOML")
    parser.add_argument(
        "--captioner",
        metavar="MODEL",
        help="a folder or id in the layout of Qwen/Qwen2.5-VL-7B-Instruct, instead of the base's text encoder",
    )
    parser.add_argument("--format", choices=("txt", "jsonl"), default="txt", help="a file each, or metadata.jsonl")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="pictures at once (default: 4)")
    parser.set_defaults(run=_caption)


def _caption(options: argparse.Namespace) -> None:
    from trainer.data.caption import run

    print(run.summary(run.caption(_caption_asked(options), options.output), options.output))
    print(f'to train on them: [data] captions = "{options.output.as_posix()}"')


def _caption_asked(options: argparse.Namespace) -> "Asked":
    """As `_asked`."""
    from trainer.data.caption.run import Asked, look
    from trainer.data.dataset import DataConfig
    from trainer.qwen_image import ModelConfig

    problems: list[str] = []
    table = config.apply_overrides(config.load_table(options.config, [], problems), options.set, problems)
    about = {name: value for name, value in _table(table, "data").items() if name in ("trigger", "recursive")}
    about |= {"images": options.folder, **({} if options.trigger is None else {"trigger": options.trigger})}
    data = config.parse(DataConfig, about, "data", problems)
    model = config.parse(ModelConfig, _table(table, "model"), "model", problems)
    template = load(options.template, options.language, problems)
    if template is not None and options.pose and not template.pose:
        problems.append(f"--pose: [{options.language}] of {options.template} has no pose to ask for")
    if options.batch_size < 1:
        problems.append("--batch-size must be at least 1")
    pictures = look(data, model, options.captioner, options.output, problems) if data and model else {}
    if problems or data is None or model is None or template is None:
        raise config.ConfigError(problems)
    return Asked(
        pictures=pictures,
        trigger=data.trigger,
        model=model,
        captioner=options.captioner,
        template=template,
        detail=options.detail,
        pose=options.pose,
        kind=options.format,
        batch_size=options.batch_size,
    )


def _table(table: dict[str, Any], name: str) -> dict[str, Any]:
    found = table.get(name, {})
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
