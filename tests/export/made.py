"""What the tests of deliveries share: LoRAs with random factors that fit a base."""

from pathlib import Path

import torch

from trainer import adapter, qwen_image
from trainer.adapter import AdapterConfig, AdapterWeights
from trainer.export.__main__ import main
from trainer.formats import write_lora
from trainer.lowrank import LowRank


def random_lora(
    base: Path, path: Path, *, seed: int = 0, rank: int = 3, layout: str = "diffusion_model"
) -> AdapterWeights:
    """A LoRA on all modules that a LoRA can be on, in a file; its effective factors."""
    random = torch.Generator().manual_seed(seed)
    modules = adapter.target_modules(qwen_image.transformer_on_meta(str(base)), AdapterConfig(target_modules="all"))
    weights = AdapterWeights(
        {
            name: LowRank(0.2 * torch.randn(3, width, generator=random), 0.2 * torch.randn(height, 3, generator=random))
            for name, (width, height) in modules.items()
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, weights, {}, layout=layout)
    return weights


def export(*arguments: object) -> int:
    """`python -m trainer.export ...`; its exit code."""
    return main([str(word) for word in arguments])


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, hidden or not."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }
