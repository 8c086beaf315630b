"""What a LoRA can start from, and `warm_start`: one line for scripts. See `registry` for how to add an initializer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from initializers.registry import (
    UnknownInitializer,
    check,
    config_class,
    downloads,
    embed,
    get,
    identity,
    names,
    resolve,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "UnknownInitializer",
    "check",
    "config_class",
    "downloads",
    "embed",
    "get",
    "identity",
    "names",
    "resolve",
    "warm_start",
]


def warm_start(
    transformer: Any,
    images: "str | Path | Sequence[str | Path] | Sequence[Image] | None" = None,
    *,
    init: str = "i2l",
    rank: int | None = None,
    alpha: float | None = None,
    target_modules: "str | Sequence[str] | None" = None,
    adapter_name: str | None = None,
    base: str | None = None,
    seed: int = 0,
    cache: "str | Path | None" = None,
    **options: Any,
) -> dict[str, Any]:
    """Start the adapter of a script from pictures: one line, before the optimizer is made.

        transformer.add_adapter(lora_config)
        report = warm_start(transformer, "pictures/", strength=0.8)

    transformer: a `QwenImageTransformer2DModel`, quantised or not, or a `PeftModel` of one. If it has an adapter (LoRA
    with any rank, alpha, pattern, rslora or DoRA; LoHa; LoKr), that one is seeded; else a LoRA is added, at `rank`
    (16), `alpha` (the rank) and `target_modules` (the 12 types that i2L covers). images: a folder, paths, or PIL
    images; only training pictures. init: an initializer's name, or a LoRA file; `options` are the keys of its table,
    `[init.i2l]` for i2L. base: folder or Hugging Face id of the pipeline, if the transformer does not know it. cache: a
    folder for predictions.

    Returns a report: what the initializer did, which modules are seeded, random or dropped, the energy kept, and the
    proof. A LoRA in half precision is raised to fp32, since a seed would be rounded. ConfigError lists all that is
    wrong with the arguments; AdapterError if the seed cannot be in this adapter.
    """
    from initializers import script

    return script.warm_start(
        transformer,
        images,
        init=init,
        rank=rank,
        alpha=alpha,
        target_modules=target_modules,
        adapter_name=adapter_name,
        base=base,
        seed=seed,
        cache=cache,
        **options,
    )
