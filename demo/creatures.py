"""Paint creatures that no model of the demo has seen: python -m demo.creatures FOLDER [--creatures 10]

FOLDER/<tier>/<number>/ holds six pictures with captions, and its held_out/ six others of other scenes, for
`train.py --compare ... --subjects FOLDER`. The tiers:

    new      a new creature with known traits
    trait    with horns, every second one with spots: the base knows them, hypernetwork training has not shown them
    foreign  with features that neither knows
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from demo import painter
from trainer.files import new_folder, write_text

CONFIG = Path("configs/creatures.toml")
TIERS: tuple[painter.Tier, ...] = ("new", "trait", "foreign")
NUM_PICTURES = 6  # for training; as many are held out
FIRST_CREATURE = 100  # index in a tier: not the creature that the repository ships


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.creatures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to paint into; creatures that are there are kept")
    parser.add_argument("--creatures", type=int, default=10, help="number of creatures in each tier (default: 10)")
    options = parser.parse_args(arguments)
    for tier in TIERS:
        for index in range(FIRST_CREATURE, FIRST_CREATURE + options.creatures):
            paint(options.folder, tier, index)
    print(f"{len(TIERS) * options.creatures} creatures in {options.folder}")
    return 0


def paint(folder: Path, tier: painter.Tier, index: int) -> Path:
    """The creature's folder, painted if it does not exist yet, with the scenes 0..11, which are in no training of the
    demo's models."""
    path = folder / tier / f"{index:03d}"
    if path.exists():
        return path
    with new_folder(path) as partial:
        (partial / "held_out").mkdir()
        for number in range(2 * NUM_PICTURES):
            where = painter.scene(number)
            target = partial if number < NUM_PICTURES else partial / "held_out"
            Image.fromarray(painter.paint(painter.identity(tier, index), where)).save(target / f"{number}.png")
            write_text(target / f"{number}.txt", painter.caption(where))
    return path


if __name__ == "__main__":
    sys.exit(main())
