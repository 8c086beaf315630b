"""Measure how well the miniature captioner names creatures that it has never seen: python -m demo.captions

Fifty held-out creatures are painted and captioned by `python -m trainer.data caption`; of each caption is read whether
it names shape, colour, headgear, place and background rightly.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from demo import painter
from trainer.data import __main__ as commands
from trainer.files import write_text

MODEL, CAPTIONER = Path("demo/model"), Path("demo/captioner")
NUM_CREATURES, FIRST_CREATURE = 50, 5000
BAR = 0.9
"""The share of creatures of which all must be named rightly."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.captions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--creatures", type=int, default=NUM_CREATURES, metavar="N", help="default: 50")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        shares = measure(Path(folder), options.creatures)
    print(", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return 0 if shares["all"] >= BAR else 1


def measure(folder: Path, count: int) -> dict[str, float]:
    """The share of creatures of which each trait is named rightly, and of which all are."""
    pairs = [(painter.identity("new", FIRST_CREATURE + i), painter.scene(800 + i)) for i in range(count)]
    pictures, captions, config = folder / "pictures", folder / "captions", folder / "run.toml"
    pictures.mkdir()
    for number, (who, where) in enumerate(pairs):
        Image.fromarray(painter.paint(who, where)).save(pictures / f"{number:03d}.png")
    write_text(config, f"[model]\nbase = '{MODEL.as_posix()}'\ndtype = 'fp32'\n")
    arguments = ["caption", pictures, "--config", config, "--output", captions, "--batch-size", 10]
    arguments += ["--captioner", CAPTIONER, "--template", "demo/captioner.toml"]
    if commands.main([str(argument) for argument in arguments]) != 0:
        raise SystemExit("the captions could not be written")
    texts = [(captions / f"{number:03d}.txt").read_text(encoding="utf-8") for number in range(count)]
    rows = [named(text, *pair) for text, pair in zip(texts, pairs, strict=True)]
    shares = {name: sum(row[name] for row in rows) / count for name in rows[0]}
    return shares | {"all": sum(all(row.values()) for row in rows) / count}


def named(text: str, who: painter.Identity, where: painter.Scene) -> dict[str, bool]:
    """What a caption names rightly."""
    creature = re.search(r"(\w+) (\w+) creature", text)
    worn = [name for name in painter.HEADGEAR if re.search(rf"\b{name}\b", text)] or ["nothing"]
    return {
        "shape": creature is not None and creature[2] == who.shape,
        "colour": creature is not None and creature[1] == who.colour,
        "headgear": worn == [who.headgear],
        "place": [name for name, words in painter.PLACES.items() if words in text] == [where.place],
        "background": [name for name, words in painter.BACKGROUNDS.items() if words in text] == [where.background],
    }


if __name__ == "__main__":
    sys.exit(main())
