"""What each i2L expert is worth at step 0, before any training: python -m demo.experts [--creatures 20]

For creatures of the tier new: six reference pictures, six held-out ones of other scenes. For each set of experts the
held-out stable loss, over three draws of its noise, with the creature's own pictures and with the next creature's, and
the drift on prompts that have nothing to do with it: the mean squared distance of the samples' latents from the base's
own at equal seeds. Results go to OUTPUT/report.json and OUTPUT/report.md.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import initializers
from demo import painter, tiers
from initializers.i2l import predict
from trainer import adapter, qwen_image, run, validation
from trainer.adapter import AdapterConfig, AdapterWeights, InitContext, target_modules
from trainer.files import write_json, write_text
from trainer.lowrank import truncate

SETS: dict[str, tuple[str, ...]] = {
    "Style": ("style",),
    "Coarse": ("coarse",),
    "Coarse + Fine": ("coarse", "fine"),
    "Coarse + Fine + Bias": ("coarse", "fine", "bias"),
}
NOISE_SEEDS = (0, 1, 2)
FIRST_CREATURE = 200  # of the tier new
RANK = 8  # of the adapter that the seed is truncated to, as in configs/creatures.toml
UNRELATED = tuple(
    painter.caption(painter.scene(40 + i), painter.identity("new", 5000 + i)) for i in range(4)
)  # creatures described in words
DEVICE = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--creatures", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--output", type=Path, default=Path("outputs/experts"))
    options = parser.parse_args(arguments)
    began, rows = time.monotonic(), []
    world = _World()
    for index in range(FIRST_CREATURE, FIRST_CREATURE + options.creatures):
        tiers.paint(options.output, "new", index)
    for index in tqdm(range(FIRST_CREATURE, FIRST_CREATURE + options.creatures), "creatures", unit="creature"):
        other = FIRST_CREATURE + (index + 1 - FIRST_CREATURE) % options.creatures
        rows += world.measure(options.output, index, other)
    summary = summarise(rows)
    report = {"seconds": time.monotonic() - began, "summary": summary, "rows": rows}
    write_json(options.output / "report.json", report)
    text = table(summary, options.creatures)
    write_text(options.output / "report.md", text)
    print(text)
    return 0


class _World:
    """The demo's base with whatever seed is held on it."""

    def __init__(self) -> None:
        self._config, start = run.load_config(tiers.CONFIG, ["init.method=i2l"], initializers)
        self._options: predict.Config = start.options
        base = self._config.model.base
        self._transformer = qwen_image.load_transformer(self._config.model, DEVICE)
        self._modules = target_modules(self._transformer, AdapterConfig())
        self._sampler = qwen_image.Sampler(base)
        self._prompts = qwen_image.PromptEncoder(base, DEVICE, torch.float32)(UNRELATED)
        self._plain = self._samples()

    def measure(self, output: Path, index: int, other: int) -> list[dict[str, Any]]:
        items = self._held_out(output, index)
        rows: list[dict[str, Any]] = [
            {"creature": index, "set": "none", "pictures": "none", "loss": self._losses(items), "drift": 0.0}
        ]
        for name, experts in SETS.items():
            for pictures, shown in (("right", index), ("wrong", other)):
                weights = self._seed(output, shown, experts)
                handles = adapter.hold(self._transformer, weights)
                drift = float((self._samples() - self._plain).square().mean())
                row = {"creature": index, "set": name, "pictures": pictures, "loss": self._losses(items)}
                rows.append({**row, "drift": drift})
                for handle in handles:
                    handle.remove()
        return rows

    def _seed(self, output: Path, index: int, experts: tuple[str, ...]) -> AdapterWeights:
        folder = tiers.creature_folder(output, "new", index) / "pictures"
        context = InitContext(
            images=tuple(sorted(folder.glob("*.png"))),
            modules=self._modules,
            rank=RANK,
            seed=0,
            device=DEVICE,
            base=self._config.model.base,
            say=lambda message: None,
            cache=output / "cache",
        )
        options = predict.Config(experts=experts, weights=self._options.weights, encoders=self._options.encoders)
        factors = predict.initialize(context, options).weights.factors
        return AdapterWeights({name: truncate(x, RANK)[0] for name, x in factors.items()})

    def _held_out(self, output: Path, index: int) -> list[validation.Item]:
        folder = tiers.creature_folder(output, "new", index)
        overrides = [f"output={folder / 'plan'}", f"data.images={folder / 'pictures'}", "data.trigger="]
        overrides += [f"data.held_out={folder / 'held_out'}", f"data.cache={output / 'cache'}"]
        settings, start = run.load_config(tiers.CONFIG, overrides, initializers)
        plan = run.prepare(settings, start, resume=False)
        encoded = run.encode(plan, DEVICE, quiet=True)
        return [encoded.item(example) for example in plan.dataset.held_out]

    def _losses(self, items: Sequence[validation.Item]) -> list[float]:
        return [
            validation.stable_loss(self._transformer, items, DEVICE, torch.float32, seed=seed) for seed in NOISE_SEEDS
        ]

    def _samples(self) -> Tensor:
        size = (painter.SIZE, painter.SIZE)
        return torch.cat(
            [
                self._sampler.latents(self._transformer, prompt, size=size, seed=number, num_inference_steps=12)
                for number, prompt in enumerate(self._prompts)
            ]
        )


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each set and pictures: mean loss over creatures and noise, its spread over noise seeds, how often it is
    below the base, and the drift."""
    base = {row["creature"]: mean(row["loss"]) for row in rows if row["set"] == "none"}
    found = []
    for name, pictures in dict.fromkeys((row["set"], row["pictures"]) for row in rows):
        own = [row for row in rows if (row["set"], row["pictures"]) == (name, pictures)]
        by_seed = [mean(losses) for losses in zip(*(row["loss"] for row in own), strict=True)]
        found.append(
            {
                "set": name,
                "pictures": pictures,
                "loss": mean(by_seed),
                "spread": stdev(by_seed),
                "below_base": sum(mean(row["loss"]) < base[row["creature"]] for row in own),
                "drift": mean(row["drift"] for row in own),
            }
        )
    return found


def table(summary: Sequence[Mapping[str, Any]], creatures: int) -> str:
    """The summary as Markdown."""
    lines = [
        f"Held-out stable loss at step 0 over {creatures} creatures of the tier new, seeds of rank {RANK}, "
        f"mean (spread over {len(NOISE_SEEDS)} noise seeds).",
        "",
        "| experts | right pictures | below the base | wrong pictures | below the base | drift, right | drift, wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = {(row["set"], row["pictures"]): row for row in summary}
    none = cells["none", "none"]
    lines.append(f"| none | {none['loss']:.4f} ({none['spread']:.4f}) | | | | 0 | |")
    for name in SETS:
        right, wrong = cells[name, "right"], cells[name, "wrong"]
        lines.append(
            f"| {name} | {right['loss']:.4f} ({right['spread']:.4f}) | {right['below_base']} of {creatures} "
            f"| {wrong['loss']:.4f} ({wrong['spread']:.4f}) | {wrong['below_base']} of {creatures} "
            f"| {right['drift']:.3f} | {wrong['drift']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
