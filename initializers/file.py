"""Start from the LoRA, LoHa or LoKr in a file, in any layout. It is truncated or padded to the rank of the run."""

import math
from dataclasses import dataclass
from pathlib import Path

from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.files import content_hash
from trainer.formats import FormatError
from trainer.formats.lora import open_lora
from trainer.formats.origin import PEFT_CONFIG
from trainer.lowrank import rank, scale


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.file]`"""

    path: str = ""
    """The LoRA, LoHa or LoKr: a .safetensors file, or a folder of PEFT or diffusers. `--init PATH` sets it."""
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
        open_lora(Path(config.path).expanduser())
    except FormatError as error:
        found.append(f"path: {error}")
    return found


def notes(config: Config) -> list[str]:
    """What is left out of the file, and the model that it was made for, if it is another."""
    return [f"{config.path}: {note}" for note in open_lora(Path(config.path).expanduser()).notes]


def identity(config: Config) -> list[str]:
    """Hashes of the file, and of PEFT's description beside it, which holds alpha."""
    path = Path(config.path).expanduser()
    files = [path, path.with_name(PEFT_CONFIG)] if path.is_file() else sorted(path.glob("*.safetensors"))
    files += [] if path.is_file() else [path / PEFT_CONFIG]
    return [f"{file.name} {content_hash(file)}" for file in files if file.is_file()]


def initialize(context: InitContext, config: Config) -> Seed:
    """The file's effective factors times `strength`; of a LoHa or LoKr what the largest rank of the adapter keeps.
    FormatError if it cannot be read."""
    file = open_lora(Path(config.path).expanduser())
    weights, metadata = file.read(max((context.rank, *context.rank_pattern.values())))
    factors = {name: scale(factor, config.strength) for name, factor in weights.factors.items()}
    lost = {name: value * config.strength**2 for name, value in weights.lost.items()}
    scaled = AdapterWeights(factors, lost)
    kept = scaled.kept()
    if file.method != "LoRA":
        context.log(f"{config.path} is a {file.method}: reading kept {100 * kept['total']:.1f} % of its energy")
    report = {
        "method": "file",
        "path": config.path,
        "kind": file.method,
        "strength": config.strength,
        "modules": len(factors),
        "ranks": sorted({rank(factor) for factor in factors.values()}),
        "energy_kept": kept,
        "notes": file.notes,
        "metadata": metadata,
    }
    return Seed(scaled, report)
