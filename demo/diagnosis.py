"""Measure what the diagnosis of training pictures finds: python -m demo.diagnosis [--creatures 10]

Each new creature is painted in twelve scenes, with right captions, three times: without a fault; with one caption of
another scene and one picture of another creature, whose caption is right; and with faults that are harder to see: the
caption names only another place, and the other creature has the same shape, colour and number of eyes. Each folder is
trained on in a short run from i2l and from random, with validations; from the errors alone `trainer.diagnosis` has to
name the two pictures first, and none in the folder without a fault.

The report is written to OUTPUT/report.json and OUTPUT/report.md; OUTPUT/runs/ has the records and the diagnosis of each
run.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from demo import painter
from demo.painter import Identity, Scene
from demo.workbench import Workbench
from trainer import diagnosis
from trainer.cli import guarded
from trainer.files import new_folder, write_json, write_text

FIRST_CREATURE = 500  # index in the tier "new"; the diagnosis was made with creatures 400 to 415
NUM_PICTURES, NUM_SCENES = 12, 30
OTHERS = 50_000  # index from which on other creatures are taken
FAULTS = ("none", "another scene, another creature", "another place, a like creature")
STARTS = ("i2l", "random")
STEPS, EVERY = 100, 20
RUN = (f"train.steps={STEPS}", f"validation.every={EVERY}", f"checkpoint.every={STEPS}", "train.batch_size=3",
       "validation.prompts=[]", "validation.unrelated_prompts=[]", f"validation.num_pictures={NUM_PICTURES}",
       "validation.diagnose=true", "data.held_out=0", "data.trigger=zorp")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.diagnosis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--creatures", type=int, default=10, help="number of creatures (default: 10)")
    parser.add_argument("--first", type=int, default=FIRST_CREATURE, help=f"the first one (default: {FIRST_CREATURE})")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate (default: 3e-4)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/diagnosis"), help="folder of the report (outputs/diagnosis)"
    )
    options = parser.parse_args(arguments)
    numbers = range(options.first, options.first + options.creatures)
    return guarded(lambda: measure_all(numbers, options.output, options.rate))


def measure_all(numbers: Sequence[int], output: Path, rate: float) -> None:
    torch.set_num_threads(1)  # more are slower with models of this size
    bench, rows = Workbench(output), list[dict[str, Any]]()
    cells = [*product(numbers, FAULTS, STARTS)]
    for number, fault, start in tqdm(cells, "runs", unit="run"):
        folder = Folder.of(number, fault)
        found = diagnosed(bench, folder, start, rate)
        rows.append({"creature": number, "fault": fault, "start": start, **judged(folder, found)})
        write_json(output / "report.json", rows)
    text = table(rows)
    write_text(output / "report.md", text)
    print(text)


@dataclass(frozen=True)
class Folder:
    """Twelve pictures of a creature. `shown` and `said` are the scenes that are painted and captioned."""

    name: str
    shown: tuple[Scene, ...]
    said: tuple[Scene, ...]
    creatures: tuple[Identity, ...]
    bad_caption: int | None
    bad_subject: int | None

    @classmethod
    def of(cls, number: int, fault: str) -> "Folder":
        """Creature `number` of the tier "new". Which pictures are bad, and the scenes, are the same with each fault."""
        random, own = np.random.default_rng([number, NUM_PICTURES]), painter.identity("new", number)
        scenes = [painter.scene(int(seed)) for seed in random.permutation(NUM_SCENES)[:NUM_PICTURES]]
        bad_caption, bad_subject = (int(place) for place in random.permutation(NUM_PICTURES)[:2])
        name, said, who = f"{number}-{FAULTS.index(fault)}", [*scenes], [own] * NUM_PICTURES
        if fault == "none":
            return cls(name, tuple(scenes), tuple(said), tuple(who), None, None)
        right = scenes[bad_caption]
        if fault == FAULTS[1]:
            wrong = [scene for scene in map(painter.scene, range(NUM_SCENES)) if scene.background != right.background]
            said[bad_caption] = wrong[int(random.integers(len(wrong)))]
            who[bad_subject] = painter.identity("new", OTHERS + number)
        else:
            places = [place for place in painter.PLACES if place != right.place]
            said[bad_caption] = replace(right, place=str(random.choice(places)))
            who[bad_subject] = _like(own, OTHERS + 1000 * number)
        return cls(name, tuple(scenes), tuple(said), tuple(who), bad_caption, bad_subject)

    def paint(self, root: Path) -> Path:
        """The folder of pictures and captions, painted if it does not exist yet."""
        path = root / self.name
        if not path.exists():
            with new_folder(path) as partial:
                for place, (who, shown, said) in enumerate(zip(self.creatures, self.shown, self.said, strict=True)):
                    Image.fromarray(painter.paint(who, shown)).save(partial / f"{place}.png")
                    write_text(partial / f"{place}.txt", painter.caption(said))
        return path


def _like(own: Identity, first: int) -> Identity:
    """The first creature from an index on with the same shape, colour and number of eyes, and another pattern or
    headgear."""
    number = first
    while True:
        one = painter.identity("new", number)
        same = (one.shape, one.colour, one.num_eyes) == (own.shape, own.colour, own.num_eyes)
        if same and (one.pattern, one.headgear) != (own.pattern, own.headgear):
            return one
        number += 1


def diagnosed(bench: Workbench, folder: Folder, start: str, rate: float) -> diagnosis.Diagnosis:
    """What a short run tells of its pictures."""
    pictures = folder.paint(bench.output / "pictures")
    settings = (f"init.method={start}", f"train.learning_rate={rate}", *RUN)
    prepared = bench.plan(f"{folder.name}-{start}", pictures, *settings)
    encoded = bench.encode(prepared)
    bench.train(prepared, encoded, bench.seed(prepared, encoded))
    return diagnosis.write_diagnosis(prepared.output)


def judged(folder: Folder, found: diagnosis.Diagnosis) -> dict[str, Any]:
    """The ranks of the bad pictures, from 1, whether the right reason is given first, and how many good ones are
    doubted."""
    places = {one.picture: rank for rank, one in enumerate(found.pictures, 1)}
    row: dict[str, Any] = {}
    for name, bad, question in (
        ("caption", folder.bad_caption, "is the caption right?"),
        ("subject", folder.bad_subject, "is it the same subject?"),
    ):
        if bad is not None:
            rank = places[f"{bad}.png"]
            reasons = found.pictures[rank - 1].reasons
            row[name] = {"rank": rank, "told": bool(reasons) and reasons[0].endswith(question)}
    bad_names = {f"{bad}.png" for bad in (folder.bad_caption, folder.bad_subject)}
    row["good_doubted"] = sum(one.picture not in bad_names for one in found.doubtful)
    row["largest_good_score"] = max(one.score for one in found.pictures if one.picture not in bad_names)
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each fault and start, as Markdown."""
    heads = ["faults", "start", "both are the first two", "ranks of the bad caption; of the bad subject"]
    heads += ["told why: caption, subject", "folders with a good picture in doubt", "largest score of a good one"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for fault, start in product(FAULTS, STARTS):
        own = [row for row in rows if (row["fault"], row["start"]) == (fault, start)]
        alarms = f"{sum(row['good_doubted'] > 0 for row in own)} of {len(own)}"
        cells = [fault, start, "", "", ""]
        if fault != "none":
            ranks = {name: [row[name]["rank"] for row in own] for name in ("caption", "subject")}
            first = sum(max(pair) == 2 for pair in zip(*ranks.values(), strict=True))
            told = ", ".join(f"{sum(row[name]['told'] for row in own)} of {len(own)}" for name in ranks)
            shown = "; ".join(" ".join(map(str, found)) for found in ranks.values())
            cells = [fault, start, f"{first} of {len(own)}", shown, told]
        cells += [alarms, f"{max(row['largest_good_score'] for row in own):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.getLogger("trainer").setLevel(logging.WARNING)
    sys.exit(main())
