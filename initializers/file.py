"""Start from the LoRA in a file, in any layout. The adapter truncates or pads it to the rank of the run."""

import math
from dataclasses import dataclass
from pathlib import Path

from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.files import content_hash
from trainer.formats import FormatError, check_lora, read_lora
from trainer.formats.lora import PEFT_CONFIG
from trainer.lowrank import rank, scale


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.file]`"""

    path: str = ""
    """The LoRA: a .safetensors file, or a folder that PEFT or diffusers has written. `--init PATH` sets it."""
    strength: float = 1.0
    """Factor of the LoRA: 1 is its own effect. Lower it if the LoRA is too strong a start."""

    def problems(self) -> list[str]:
        if math.isfinite(self.strength) and self.strength != 0:
            return []
        return ['strength must be a finite number other than 0; to start without the file, choose method = "random"']


FILE_KEYS = ("path",)


def check(config: Config) -> list[str]:
    """Problems of the configuration and of the file, from its header. Empty if there are none."""
    if not config.path:
        return [*config.problems(), "path must name a LoRA file or folder"]
    found = config.problems()
    try:
        check_lora(Path(config.path).expanduser())
    except FormatError as error:
        found.append(f"path: {error}")
    return found


def identity(config: Config) -> list[str]:
    """Hashes of the file, and of PEFT's description beside it, which holds alpha."""
    path = Path(config.path).expanduser()
    files = [path, path.with_name(PEFT_CONFIG)] if path.is_file() else sorted(path.glob("*.safetensors"))
    files += [] if path.is_file() else [path / PEFT_CONFIG]
    return [f"{file.name} {content_hash(file)}" for file in files if file.is_file()]


def initialize(context: InitContext, config: Config) -> Seed:
    """The file's effective factors times `strength`. FormatError if it cannot be read."""
    weights, metadata = read_lora(Path(config.path).expanduser())
    factors = {name: scale(factor, config.strength) for name, factor in weights.factors.items()}
    ranks = sorted({rank(factor) for factor in factors.values()})
    report = {"method": "file", "path": config.path, "strength": config.strength, "modules": len(factors)}
    return Seed(AdapterWeights(factors), {**report, "ranks": ranks, "metadata": metadata})
