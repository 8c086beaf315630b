"""PEFT's `init_lora_weights="gaussian"`: a normal, with standard deviation 1 / rank; b zero, so that dW is zero."""

from dataclasses import dataclass

import torch

from trainer.adapter import AdapterWeights, InitContext, RunFacts, Seed
from trainer.flow import generator
from trainer.lowrank import LowRank


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.gaussian]`: there are no keys."""


def check_run(config: Config, facts: RunFacts) -> list[str]:
    """What is wrong in a run of which the adapter is known."""
    kind = facts.adapter.kind
    return [] if kind == "lora" else [f'it has no effect with [adapter] kind = "{kind}"; use [init] method = "random"']


def initialize(context: InitContext, config: Config) -> Seed:
    factors = {}
    for name, (in_features, out_features) in context.modules.items():
        rank = context.rank_of(name)
        a = torch.randn(rank, in_features, generator=generator(context.seed, "gaussian", name)) / rank
        factors[name] = LowRank(a, torch.zeros(out_features, rank))
    return Seed(AdapterWeights(factors), {"method": "gaussian", "modules": len(factors)})
