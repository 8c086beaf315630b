"""PEFT's default start: a uniform within 1 / sqrt(in_features), b zero, so that dW is zero."""

from dataclasses import dataclass

from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.flow import generator
from trainer.lowrank import pad, zeros


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.random]`: nothing to choose."""


def initialize(context: InitContext, config: Config) -> Seed:
    """The rows that `apply_seed` gives to a module without a seed, so that every method starts those alike."""
    factors = {
        name: pad(zeros(in_features, out_features), context.rank, generator(context.seed, "adapter", name))
        for name, (in_features, out_features) in context.modules.items()
    }
    return Seed(AdapterWeights(factors), {"method": "random", "modules": len(factors)})
