"""Measure prior preservation on creatures: python -m demo.priors [--creatures 3] [--output outputs/priors]

Each new creature is trained on from `random` and from `i2l`, without a prior and with each method at each weight. The
table has, relative to the base: the held-out stable loss, and the drift, the squared distance of the velocity from the
base's at noised pictures of unrelated prompts, over the square of the base's. Both after the last step; the creature's
best weight is that with the lowest held-out loss.

The report is written to OUTPUT/report.json and OUTPUT/report.md.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from demo import creatures, painter
from demo.workbench import Workbench
from trainer import flow, objective, plan, qwen_image
from trainer.cli import guarded
from trainer.files import write_json, write_text

STARTS = ("random", "i2l")
WEIGHTS = (0.3, 1.0, 3.0)
STEPS, RATE = 60, 1e-3
RUN = (f"train.steps={STEPS}", f"train.learning_rate={RATE}", f"validation.every={STEPS}", "validation.prompts=[]",
       "train.batch_size=3", "init.i2l.strength=1.0", "data.trigger=zorp")  # fmt: skip
DRAWING = ("prior.num_pictures=24", "prior.num_inference_steps=10", "prior.true_cfg_scale=1.0")
NUM_PROMPTS, FIRST_SCENE = 24, 500
"""Prompts of the prior, from a scene on that no creature is painted in."""
SIGMAS = flow.stratified_sigmas(4)
Way = tuple[str, float]
WAYS: tuple[Way, ...] = (("none", 0.0), *product(("pictures", "prediction"), WEIGHTS))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.priors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--creatures", type=int, default=3, help="number of creatures (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("outputs/priors"), help="folder of the report")
    options = parser.parse_args(arguments)
    return guarded(lambda: measure_all(options.creatures, options.output))


def measure_all(count: int, output: Path) -> None:
    bench = Workbench(output)
    numbers = range(creatures.FIRST_CREATURE, creatures.FIRST_CREATURE + count)
    subjects = [creatures.paint(output / "creatures", "new", number) for number in numbers]
    cells, rows = [*product(subjects, STARTS)], list[dict[str, Any]]()
    for subject, start in tqdm(cells, "creatures and starts", unit="pair"):
        rows += measure(bench, subject, start)
        write_json(output / "report.json", rows)
    text = table(rows)
    write_text(output / "report.md", text)
    print(text)


def measure(bench: Workbench, subject: Path, start: str) -> Iterator[dict[str, Any]]:
    """A row for each way."""
    plans = [_plan(bench, subject, start, way) for way in WAYS]
    encoded = [bench.encode(one) for one in plans]
    seed = bench.seed(plans[0], encoded[0])
    unrelated = _unrelated(plans[0], encoded[0], bench.transformer.eval())
    plain = _velocity(bench.transformer, unrelated)
    losses = objective.stable_losses(plans[0], bench.transformer, encoded[0], bench.accelerator)
    base_loss = losses["val_loss"]

    def drift(step: int, tracker: Any) -> Mapping[str, float]:
        distance = _velocity(bench.transformer, unrelated) - plain
        return {"drift": float(distance.square().mean() / plain.square().mean())}

    for (method, weight), prepared, given in zip(WAYS, plans, encoded, strict=True):
        points = bench.train(prepared, given, seed, drift)[0].validations
        relative = [{"held_out": one["val_loss"] / base_loss, "drift": one["drift"]} for one in points]
        yield {"subject": subject.name, "start": start, "method": method, "weight": weight,
               "before": relative[0], "after": relative[-1]}  # fmt: skip


def _plan(bench: Workbench, subject: Path, start: str, way: Way) -> plan.Plan:
    method, weight = way
    given = [f"data.held_out={subject / 'held_out'}", f"init.method={start}", *RUN]
    if method != "none":
        given += [f"prior.method={method}", f"prior.weight={weight}"]
    if method == "pictures":
        given += [f"prior.prompts={prior_prompts()}", *DRAWING]
    return bench.plan(f"{subject.name}-{start}-{method}-{weight:g}", subject, *given)


@torch.no_grad()
def _velocity(transformer: Any, inputs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """At all sigmas, for each latents (C 1 h w) and prompt (L D), always with the same noise."""
    found = []
    for number, (latents, prompt) in enumerate(inputs):
        shape = len(SIGMAS), *latents.shape
        noise = torch.randn(shape, generator=flow.generator("drift", number))
        noisy = flow.interpolate(latents.expand(shape), noise, SIGMAS)
        prompts = prompt.expand(len(SIGMAS), -1, -1)
        found.append(qwen_image.predict_velocity(transformer, noisy, SIGMAS, prompts, None))
    return torch.cat(found)


def prior_prompts() -> list[str]:
    """Other creatures, in words, as the base was trained on."""
    scenes = [painter.scene(FIRST_SCENE + number) for number in range(NUM_PROMPTS)]
    texts = [painter.caption(where, painter.identity("pretrain", i)) for i, where in enumerate(scenes)]
    return [*dict.fromkeys(texts)]


def _unrelated(prepared: plan.Plan, encoded: objective.Encoded, transformer: Any) -> list[tuple[Tensor, Tensor]]:
    """Latents that the base draws for the unrelated prompts of the configuration, with their prompts."""
    prompts = [encoded.prompts[text] for text in prepared.config.validation.unrelated_prompts]
    latents = qwen_image.Sampler(prepared.config.model.base).latents(
        transformer, prompts, size=(painter.SIZE, painter.SIZE), seeds=range(len(prompts)), num_inference_steps=20
    )
    return [*zip(latents, prompts, strict=True)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over creatures with their standard deviations, as Markdown."""
    lines = ["| prior | weight | " + " | ".join(f"{start}: held-out, drift" for start in STARTS) + " |"]
    lines.append("|---" * (2 + len(STARTS)) + "|")

    def cell(start: str, way: Way, when: str) -> str:
        own = [row[when] for row in rows if (row["start"], row["method"], row["weight"]) == (start, *way)]
        losses, drifts = ([one[name] for one in own] for name in ("held_out", "drift"))
        spread = f" ± {stdev(losses):.3f}" if len(own) > 1 else ""
        return f"{mean(losses):.3f}{spread}, {mean(drifts):.3f}"

    lines.append("| before training | | " + " | ".join(cell(start, WAYS[0], "before") for start in STARTS) + " |")
    for way in WAYS:
        cells = " | ".join(cell(start, way, "after") for start in STARTS)
        lines.append(f"| {way[0]} | {way[1]:g} | {cells} |")
    for method in ("pictures", "prediction"):
        cells = " | ".join(_best(rows, start, method) for start in STARTS)
        lines.append(f"| {method} | best of each creature | {cells} |")
    return "\n".join(lines) + "\n"


def _best(rows: Sequence[Mapping[str, Any]], start: str, method: str) -> str:
    """Each creature at the weight with its lowest held-out loss, against no prior."""
    losses, drifts = list[float](), list[float]()
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if (row["subject"], row["start"]) == (subject, start)]
        plain = next(row["after"] for row in own if row["method"] == "none")
        best = min((row["after"] for row in own if row["method"] == method), key=lambda one: one["held_out"])
        losses.append(best["held_out"] / plain["held_out"] - 1)
        drifts.append(best["drift"] / plain["drift"] - 1)
    lower = sum(loss < 0 for loss in losses)
    return f"held-out {mean(losses):+.1%} ({lower} of {len(losses)} lower), drift {mean(drifts):+.0%}"


if __name__ == "__main__":
    logging.getLogger("trainer").setLevel(logging.WARNING)
    sys.exit(main())
