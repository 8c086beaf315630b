"""The layouts of LoRA files for Qwen-Image: one table. A layout is how modules and their factors are named.

A key is prefix + module + half, and optionally there is an `.alpha` for each module:

    prefix     none | "transformer." | "diffusion_model." | "base_model.model."    module names with dots
               "lora_unet_" (kohya)                                                module names with underscores
    half       lora_A | lora_down | lora.down (rank, in_features);  lora_B | lora_up | lora.up (out_features, rank)
               then optionally the adapter's name, such as ".default", then ".weight"
               or a part of a LoHa (hada_w1_a ...) or LoKr (lokr_w1 ...), which `methods` makes factors of

We write the layouts of `LAYOUTS`. `module_name` and `sort_keys` read more: any of the prefixes that are in use, alone
or after one another, names of wrappers such as `_orig_mod.` anywhere, dots or underscores.

To add a layout, add an entry to `LAYOUTS`, and its keys to the golden list in tests/formats/test_layouts.py. To read a
prefix, add it to `_PREFIXES`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from trainer.adapter import TARGETS
from trainer.formats import methods

OUTER_MODULES = (
    "img_in",
    "txt_in",
    "proj_out",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)
"""Qwen-Image's Linear layers outside of its blocks."""

PEFT_PREFIX = "base_model.model."
KOHYA_PREFIX = "lora_unet_"


@dataclass(frozen=True)
class Layout:
    prefix: str
    halves: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    """The ends of the keys of a and of b."""
    flat: bool = False
    """Module names have underscores instead of dots."""
    alpha: bool = False
    """Each module has an `.alpha`: the file's dW is alpha / rank * b a. Without it, b a."""

    def stem(self, module: str) -> str:
        """What the keys of a module begin with, by its name in the transformer."""
        return self.prefix + (module.replace(".", "_") if self.flat else module)

    def keys(self, module: str) -> tuple[str, str, str]:
        """The keys of a, b and alpha of a module, by its name in the transformer."""
        stem = self.stem(module)
        return f"{stem}.{self.halves[0]}", f"{stem}.{self.halves[1]}", f"{stem}.alpha"


LAYOUTS: dict[str, Layout] = {
    "diffusion_model": Layout("diffusion_model."),
    "transformer": Layout("transformer."),
    "kohya": Layout(KOHYA_PREFIX, ("lora_down.weight", "lora_up.weight"), flat=True, alpha=True),
    "onetrainer": Layout("transformer.", ("lora_down.weight", "lora_up.weight"), alpha=True),
    "bare": Layout(""),
    "bare.default": Layout("", ("lora_A.default.weight", "lora_B.default.weight")),
    "peft": Layout(PEFT_PREFIX),
}
"""`peft` needs adapter_config.json beside it, which holds alpha; `bare.default` is what i2L writes; `onetrainer` is the
only one that its old versions take."""

_KEY = re.compile(
    r"(?P<module>.+)(?:\.|_(?=lora\.(?:down|up)))"
    r"(?:(?:(?P<half>lora_A|lora_B|lora_down|lora_up|(?:lora|lora_linear_layer)\.(?:down|up))"
    r"|(?P<part>hada_w[12]_[ab]|lokr_w[12](?:_[ab])?))"
    r"(?:\.default|(?:\.(?P<adapter>[^.]+))?\.weight)?|(?P<alpha>alpha))"
)
_PREFIXES = (
    "base_model_model",  # PEFT
    "diffusion_model",  # ComfyUI
    "model",
    "transformer",  # diffusers
    "unet",
    "lora_unet",  # kohya
    "lora_transformer",
    "lycoris",
    "pipe",  # DiffSynth-Studio: pipe.dit
    "dit",
)
"""What stands before a module's name, with underscores for dots."""
_FLAT_TYPES = {name.replace(".", "_"): name for name in TARGETS["all"]}
_FLAT_OUTER = {name.replace(".", "_"): name for name in OUTER_MODULES}
_MODULE = re.compile(
    rf"(?:(?:{'|'.join(_PREFIXES)})_)*"
    rf"(?:transformer_blocks_(?P<block>\d+)_(?P<kind>{'|'.join(_FLAT_TYPES)})|(?P<outer>{'|'.join(_FLAT_OUTER)}))"
)
_WRAPPER = re.compile(r"(?<![^_])(?:orig_mod|(?:(?:fsdp|checkpoint)_wrapped_)?module)_")
"""What torch.compile, FSDP, checkpointing and DDP put into names."""


@dataclass
class ModuleKeys:
    """The keys of one module in a file."""

    a: str | None = None
    b: str | None = None
    alpha: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    """The keys of a LoHa or LoKr, which has no a and b, by the names of its parts: "lokr_w1"."""

    @property
    def method(self) -> str:
        """LoRA, LoHa or LoKr."""
        return methods.name_of(self.parts)

    @property
    def first(self) -> str:
        """A key that shows how the module is named."""
        return self.a or self.b or next(iter(self.parts.values()), "") or self.alpha or ""


def module_name(name: str) -> str | None:
    """The transformer's own name of a module in a file, or None if Qwen-Image has no such module."""
    flat = _WRAPPER.sub("", re.sub(r"[._$]+", "_", name).lstrip("_"))  # "$$" is ai-toolkit's dot
    match = _MODULE.fullmatch(flat)
    if match is None:
        return None
    return (
        _FLAT_OUTER[match["outer"]]
        if match["outer"]
        else f"transformer_blocks.{match['block']}.{_FLAT_TYPES[match['kind']]}"
    )


def module_type(module: str) -> str:
    """Its name in its block; of a module outside of blocks its name."""
    return module.split(".", 2)[2] if module.startswith("transformer_blocks.") else module


def module_types(modules: Iterable[str]) -> list[str]:
    """The types, in the order of a block; modules outside of blocks last."""
    order = {kind: number for number, kind in enumerate(TARGETS["all"])}
    return sorted({*map(module_type, modules)}, key=lambda kind: (order.get(kind, len(order)), kind))


@dataclass(frozen=True)
class Sorted:
    """The keys of a file by module, and what is none."""

    modules: dict[str, ModuleKeys]
    foreign: dict[str, list[str]]
    """Module names that Qwen-Image does not have, and their keys."""
    unread: list[str]
    """Keys that are not part of a LoRA."""
    twice: list[tuple[str, str]]
    """A module, and the key that repeats a part of it."""
    adapters: list[str]
    """The names of adapters in the keys, "" where there is none."""


def sort_keys(keys: Collection[str]) -> Sorted:
    modules, adapters = dict[str, ModuleKeys](), set[str]()
    found = Sorted(modules, {}, [], [], [])
    for key in sorted(keys):
        match = _KEY.fullmatch(key)
        if match is None:
            found.unread.append(key)
            continue
        name = module_name(match["module"])
        if name is None:
            found.foreign.setdefault(match["module"], []).append(key)
            continue
        if not match["alpha"]:
            adapters.add(match["adapter"] or "")
        if _put(modules.setdefault(name, ModuleKeys()), match):
            found.twice.append((name, key))
    found.adapters.extend(sorted(adapters))
    return found


def _put(keys: ModuleKeys, match: re.Match[str]) -> bool:
    """Into its place in `keys`; returns whether there was another."""
    if match["part"]:
        twice = match["part"] in keys.parts
        keys.parts[match["part"]] = match.string
        return twice
    name = "alpha" if match["alpha"] else "a" if match["half"].endswith(("A", "down")) else "b"
    twice = getattr(keys, name) is not None
    setattr(keys, name, match.string)
    return twice


def layouts_of(modules: Mapping[str, ModuleKeys]) -> list[str]:
    """The names of the layouts in which all factors are, as they are written; empty if in none. A file without
    `.alpha` may be in a layout that has it: alpha then is the rank."""
    return [
        name
        for name, layout in LAYOUTS.items()
        if all((keys.a, keys.b) == layout.keys(module)[:2] for module, keys in modules.items())
    ]
