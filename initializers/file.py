"""A LoRA from a file, in any layout; the adapter brings it to the rank of the run."""

import math
from dataclasses import dataclass
from pathlib import Path

from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.files import sample
from trainer.formats import FormatError, check_lora, read_lora
from trainer.lowrank import rank, scale


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.file]`"""

    path: str = ""
    """A .safetensors file, or a folder as PEFT or diffusers writes it. `--init PATH` sets it."""
    strength: float = 1.0
    """The seed is multiplied by this: 1 is the file's own effect."""

    def problems(self) -> list[str]:
        if math.isfinite(self.strength) and self.strength != 0:
            return []
        return ['strength must be a number other than 0; to start without the file, choose method = "random"']


def check(config: Config) -> list[str]:
    """Whether the file can be read, from its header, before any model loads."""
    if not config.path:
        return [*config.problems(), "path must name a LoRA file or folder"]
    found = config.problems()
    try:
        check_lora(Path(config.path).expanduser())
    except FormatError as error:
        found.append(f"path: {error}")
    return found


def identity(config: Config) -> list[str]:
    path = Path(config.path).expanduser()
    return [sample(file) for file in ([path] if path.is_file() else sorted(path.glob("*.safetensors")))]


def initialize(context: InitContext, config: Config) -> Seed:
    """The file's effective factors times `strength`. FormatError if it cannot be read."""
    weights, metadata = read_lora(Path(config.path).expanduser())
    factors = {name: scale(factor, config.strength) for name, factor in weights.factors.items()}
    ranks = sorted({rank(factor) for factor in factors.values()})
    report = {"method": "file", "path": config.path, "strength": config.strength, "modules": len(factors)}
    return Seed(AdapterWeights(factors), {**report, "ranks": ranks, "metadata": metadata})
