"""The demo's base, loaded once, for the programs that train adapters on it one after another."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import initializers
from demo import creatures
from trainer import adapter, loop, objective, plan, qwen_image, run
from trainer.adapter import Seed
from trainer.hardware import parallel
from trainer.loop import Result
from trainer.objective import Encoded, Trials
from trainer.plan import Plan
from trainer.tracking import Tracker

Sample = Callable[[int, Tracker], Mapping[str, float]]


class Workbench:
    """Runs lie in OUTPUT/runs/, what they share in OUTPUT/cache/."""

    def __init__(self, output: Path):
        self.output, self.accelerator = output, parallel.make_accelerator("fp32")
        config, _ = plan.load_config(creatures.CONFIG, [], initializers)
        self.device = self.accelerator.device
        self.text_encoder = qwen_image.TextEncoder(config.model.base, self.device)
        self.transformer = qwen_image.load_transformer(config.model, self.device)

    def plan(self, name: str, images: Path, *settings: str) -> Plan:
        """A run of configs/creatures.toml with other settings. What an earlier one of that name has left is deleted."""
        folder = self.output / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        given = [f"data.images={images}", f"data.cache={self.output / 'cache'}", f"output={folder}"]
        given += ["validation.diagnose=false", *settings]
        return plan.prepare(*plan.load_config(creatures.CONFIG, given, initializers), resume=False)

    def encode(self, prepared: Plan) -> Encoded:
        return objective.encode(prepared, self.device, self.text_encoder, quiet=True)

    def trials(self, prepared: Plan, encoded: Encoded) -> Trials:
        return Trials(prepared, encoded, self.text_encoder, lambda: self.transformer)

    def seed(self, prepared: Plan, encoded: Encoded) -> Seed:
        context = run.init_context(prepared, self.device, self.trials(prepared, encoded), self.text_encoder)
        return prepared.start.initialize(replace(context, log=lambda message: None), prepared.start.options)

    def train(
        self, prepared: Plan, encoded: Encoded, seed: Seed, sample: Sample | None = None
    ) -> tuple[Result, dict[str, Any]]:
        """What came of the run, and the report of `adapter.apply_seed`. sample: see `LoraObjective`. Afterwards the
        base has no adapter."""
        objective.draw_prior(prepared, self.transformer, encoded, self.accelerator, quiet=True)
        settings = prepared.config
        _, applied = run.install(self.transformer, seed, settings.adapter, random_seed=settings.seed)
        try:
            training = objective.LoraObjective(
                prepared, self.transformer, encoded, self.accelerator, sample, seed.others
            )
            return loop.train(training, prepared.job(), self.accelerator, quiet=True, nested=True), applied
        finally:
            adapter.remove(self.transformer)
            self.accelerator.free_memory()
