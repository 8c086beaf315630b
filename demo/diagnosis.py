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
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

import initializers
from demo import creatures, painter
from demo.painter import Identity, Scene
from initializers.i2l import initializer as i2l
from initializers.i2l.predictions import predict_pictures
from trainer import adapter, diagnosis, loop, objective, plan, qwen_image, run, validation
from trainer.adapter import AdapterWeights, InitContext
from trainer.cli import guarded
from trainer.files import new_folder, write_json, write_text
from trainer.tracking import Tracker

FIRST_CREATURE = 500  # index in the tier "new"; the diagnosis was made with creatures 400 to 415
NUM_PICTURES, NUM_SCENES = 12, 30
OTHERS = 50_000  # index from which on other creatures are taken
FAULTS = ("none", "another scene, another creature", "another place, a like creature")
STARTS = ("i2l", "random")
STEPS, EVERY = 100, 20
RUN = (f"train.steps={STEPS}", f"validation.every={EVERY}", f"checkpoint.every={STEPS}", "train.batch_size=3",
       "validation.prompts=[]", "validation.unrelated_prompts=[]", "validation.num_pictures=1", "data.held_out=0",
       "data.trigger=zorp")  # fmt: skip


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
    base, rows = _Base(output, rate), list[dict[str, Any]]()
    cells = [*product(numbers, FAULTS, STARTS)]
    for number, fault, start in tqdm(cells, "runs", unit="run"):
        folder = Folder.of(number, fault)
        found = base.diagnosed(folder, start)
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


class _Base:
    """The demo's base, on which creatures are trained one after another."""

    def __init__(self, output: Path, rate: float):
        self._output, self._rate, self._accelerator = output, rate, Accelerator(cpu=True)
        config, _ = plan.load_config(creatures.CONFIG, [], initializers)
        self._device = self._accelerator.device
        self._text_encoder = qwen_image.TextEncoder(config.model.base, self._device)
        self._transformer = qwen_image.load_transformer(config.model, self._device)

    def diagnosed(self, folder: Folder, start: str) -> diagnosis.Diagnosis:
        """What a short run tells of its pictures."""
        kept = self._output / "runs" / f"{folder.name}-{start}"
        pictures = folder.paint(self._output / "pictures")
        with tempfile.TemporaryDirectory() as temporary:
            given = [f"data.images={pictures}", f"data.cache={self._output / 'cache'}", f"init.method={start}", *RUN]
            given += [f"output={temporary}/run", f"train.learning_rate={self._rate}"]
            prepared = plan.prepare(*plan.load_config(creatures.CONFIG, given, initializers), resume=False)
            records = self._records(prepared)
        write_text(kept / diagnosis.RECORDS_FILE, "".join(f"{json.dumps(record)}\n" for record in records))
        return diagnosis.write_diagnosis(kept)

    def _records(self, prepared: plan.Plan) -> list[dict[str, Any]]:
        encoded = objective.encode(prepared, self._device, self._text_encoder, quiet=True)
        trials = objective.Trials(prepared, encoded, self._text_encoder, lambda: self._transformer)
        context = run.init_context(prepared, self._device, trials, self._text_encoder)
        context = replace(context, log=lambda message: None)
        items = [encoded.item(example) for example in prepared.dataset.train]
        empty = encoded.prompts[qwen_image.EMPTY_PROMPT]
        self._transformer.eval()
        records = _records(0, "base", items, self._errors(items))
        records += _records(0, "no caption", items, self._errors([replace(item, prompt=empty) for item in items]))
        seed = prepared.start.initialize(context, prepared.start.options)
        if prepared.start.method == "i2l":
            records += _records(0, "others' seed", items, self._with_others_seeds(context, prepared, items))
        run.install(self._transformer, seed, prepared.config.adapter, random_seed=prepared.config.seed)

        def record(step: int, tracker: Tracker) -> Mapping[str, float]:
            records.extend(_records(step, "adapter", items, self._errors(items)))
            return {}

        try:
            training = objective.LoraObjective(prepared, self._transformer, encoded, self._accelerator, record)
            job = loop.Job(prepared.output, prepared.config.train, prepared.config.checkpoint, EVERY, {})
            loop.train(training, job, self._accelerator, quiet=True, nested=True)
        finally:
            adapter.remove(self._transformer)
            self._accelerator.free_memory()
        return records

    def _errors(self, items: Sequence[validation.Item]) -> list[list[float]]:
        found: list[list[float]] = validation.stable_errors(
            self._transformer, items, self._device, torch.float32
        ).tolist()
        return found

    def _with_others_seeds(
        self, context: InitContext, prepared: plan.Plan, items: Sequence[validation.Item]
    ) -> list[list[float]]:
        """The errors of each picture with the whole seed of the other ones, at strength 1."""
        options, found = prepared.start.options, list[list[float]]()
        located = i2l._locate(context, options)
        predictions = predict_pictures(context, options.encoders, located, context.images, {})
        for place, item in enumerate(items):
            others = [other for other in range(len(items)) if other != place]
            with self._attached(AdapterWeights(dict(predictions.combine(options.expert_weights, others)))):
                found += self._errors([item])
        return found

    @contextmanager
    def _attached(self, weights: AdapterWeights) -> Iterator[None]:
        handles = adapter.attach_frozen(self._transformer, weights)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _records(
    step: int, what: str, items: Sequence[validation.Item], errors: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """As a run writes them into pictures.jsonl."""
    return [
        {"step": step, "part": "train", "picture": item.name, "what": what, "errors": row}
        for item, row in zip(items, errors, strict=True)
    ]


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
