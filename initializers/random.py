"""PEFT's default start: a uniform in +-1 / sqrt(in_features), b zero, so that dW is zero."""

from dataclasses import dataclass

from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.flow import generator
from trainer.lowrank import pad, zeros


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.random]`: there are no keys."""


def initialize(context: InitContext, config: Config) -> Seed:
    """The same values that `apply_seed` puts into a module that a seed does not cover: equal for every initializer."""
    factors = {
        name: pad(zeros(in_features, out_features), context.rank_of(name), generator(context.seed, "adapter", name))
        for name, (in_features, out_features) in context.modules.items()
    }
    return Seed(AdapterWeights(factors), {"method": "random", "modules": len(factors)})
