"""What other programs do with a LoRA file: one table. Each rule names the file of that program that it was read in, and
where versions differ, the version or the date from which it holds.

A trainer builds its own adapter first, for the modules and the rank of its configuration, and then copies the file into
it. What can go wrong is the same everywhere: keys it does not know, a scale of its own, another rank, another set of
modules; and most of it happens in silence.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.adapter import TARGETS, matches
from trainer.formats.layouts import LAYOUTS, OUTER_MODULES, Layout, ModuleKeys

_DOWN_UP = LAYOUTS["onetrainer"].halves
_HALVES = (LAYOUTS["bare"].halves, LAYOUTS["bare.default"].halves, _DOWN_UP, ("lora.down.weight", "lora.up.weight"))
_COMFYUI_HALVES = (
    *_HALVES,
    ("lora_A", "lora_B"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)


def _layouts(prefixes: Iterable[str], halves: Iterable[tuple[str, str]], *, flat: bool = False) -> tuple[Layout, ...]:
    return tuple(Layout(prefix, pair, flat=flat) for prefix in prefixes for pair in halves)


_THREE = ("", "transformer.", "diffusion_model.")


@dataclass(frozen=True, kw_only=True)
class Rules:
    accepts: tuple[Layout, ...]
    """Factors in other layouts are foreign."""
    foreign: Literal["ignored", "error"] = "ignored"
    """Ignored means that the module starts at random, and that nobody hears of it."""
    alpha_keys: Literal["read", "ignored", "error"]
    """What becomes of `.alpha`."""
    alpha_error: str = "any key that it does not know is an error"
    """Why `.alpha` must not be in the file, where it must not."""
    scale: Literal["file", "one", "recipe"]
    """dW = scale * b a: alpha / rank of the file (1 without alpha), 1, or alpha / rank of the configuration."""
    rank: Literal["any", "one", "equal", "resized"]
    """What becomes of the file's rank. any: each module may have its own. one: all must have the same, which replaces
    the configuration's. equal: it must be the configuration's, or the trainer raises. resized: it is brought to the
    configuration's, by zeros in both factors or by the leading rows."""
    missing: Literal["random", "error", "none"] = "random"
    """Modules that are trained and not in the file; none: nothing is trained beside the file."""
    extra: Literal["ignored", "error", "none"] = "ignored"
    """Modules in the file that are not trained; none: whatever is in the file is taken."""
    reads_peft_metadata: bool = False
    """Heeds PEFT's configuration in the file's metadata."""
    source: str

    def takes(self, module: str, keys: ModuleKeys) -> bool:
        return any((keys.a, keys.b) == layout.keys(module)[:2] for layout in self.accepts)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    title: str
    layout: str
    """In which we write."""
    read: str
    """Which version, and what was run of it; its own code otherwise was read only."""
    rules: Rules
    script: Rules | None = None
    """Other rules where there is a configuration."""
    recipes: tuple[str, ...] = ()
    """What holds of its configurations, with the version or date from which it does."""
    since: str = ""
    """The version or date from which `rules` hold, where older ones differ."""
    older: Rules | None = None
    default_rank: int
    default_alpha: float | None
    """None: the rank."""
    default_targets: Callable[[str], bool] = lambda name: True
    """Whether a Linear layer is trained if its configuration does not say."""
    covers: Callable[[str], bool] = lambda name: True
    """Whether it can train a Linear layer at all."""

    def rules_for(self, with_recipe: bool) -> Rules:
        return self.script if with_recipe and self.script is not None else self.rules


def in_blocks(name: str) -> bool:
    return name not in OUTER_MODULES


def by_suffix(wanted: Iterable[str]) -> Callable[[str], bool]:
    """As PEFT takes `target_modules`."""
    endings = tuple(wanted)
    return lambda name: any(matches(name, ending) for ending in endings)


TRAINERS: Mapping[str, Trainer] = {
    "musubi-tuner": Trainer(
        title="musubi-tuner",
        layout="kohya",
        read="30c658c (2026-11): its loader was run",
        rules=Rules(
            accepts=(LAYOUTS["kohya"],),
            alpha_keys="ignored",
            scale="recipe",
            rank="equal",
            source="kohya-ss/musubi-tuner: src/musubi_tuner/networks/lora.py, networks/lora_qwen_image.py",
        ),
        recipes=("since 2026-02-15, patterns in network_args match whole names; before, their beginning",),
        default_rank=4,
        default_alpha=1.0,
        default_targets=in_blocks,
        covers=in_blocks,
    ),
    "ai-toolkit": Trainer(
        title="ai-toolkit",
        layout="diffusion_model",
        read="27a03a91 (2026-11): its loader was run",
        rules=Rules(
            accepts=(
                LAYOUTS["diffusion_model"],
                LAYOUTS["transformer"],
                Layout("diffusion_model.", _DOWN_UP),
                LAYOUTS["onetrainer"],
            ),
            alpha_keys="ignored",
            scale="one",
            rank="resized",
            source="ostris/ai-toolkit: toolkit/network_mixins.py, jobs/process/BaseSDTrainProcess.py",
        ),
        recipes=(
            "full_if_contains and parameter_threshold take modules away from the LoRA, as of 27a03a91",
            "transformer_only: false is needed for layers outside of the blocks, as of 27a03a91",
        ),
        default_rank=4,
        default_alpha=None,
        default_targets=in_blocks,
    ),
    "simpletuner": Trainer(
        title="SimpleTuner",
        layout="transformer",
        read="bc8e6ab7 (2026-11): its loader was run; 3.1.6 was read",
        rules=Rules(
            accepts=(LAYOUTS["transformer"],),
            alpha_keys="error",
            alpha_error="it would multiply by alpha / sqrt(rank), or leave them out",
            scale="file",
            rank="one",
            reads_peft_metadata=True,
            source="bghira/SimpleTuner: simpletuner/helpers/models/common.py",
        ),
        recipes=(
            "base_model_precision of bitsandbytes (nf4-bnb): nothing of the file is loaded",
            "since 4.7.0, lora_alpha is ignored: set it to lora_rank, which suits each version",
            "since 4.7.1, init_lora_step exists; without it counting goes on at the file's global_step, which we strip",
        ),
        since="4.7.0 (2026-08-10)",
        older=Rules(
            accepts=(LAYOUTS["transformer"],),
            alpha_keys="ignored",
            scale="recipe",
            rank="equal",
            source="bghira/SimpleTuner: simpletuner/helpers/models/common.py",
        ),
        default_rank=16,
        default_alpha=None,
        default_targets=by_suffix(TARGETS["diffusers"]),
    ),
    "diffusion-pipe": Trainer(
        title="diffusion-pipe",
        layout="diffusion_model",
        read="8f83dbf (2026-11): its loader was run",
        rules=Rules(
            accepts=(LAYOUTS["diffusion_model"], LAYOUTS["transformer"], LAYOUTS["bare"]),
            foreign="error",
            alpha_keys="error",
            scale="one",
            rank="equal",
            extra="error",
            source="tdrussell/diffusion-pipe: models/base.py, train.py",
        ),
        recipes=("since 2026-08-09, [adapter] exclude_modules leaves modules out, by PEFT's rule",),
        default_rank=32,
        default_alpha=None,
        default_targets=in_blocks,
        covers=in_blocks,
    ),
    "onetrainer": Trainer(
        title="OneTrainer",
        layout="onetrainer",
        read="23df3832 (2026-11): its loader was run",
        rules=Rules(
            accepts=(*LAYOUTS.values(), *_layouts(_THREE, _HALVES)),
            foreign="error",
            alpha_keys="read",
            scale="file",
            rank="equal",
            missing="error",
            extra="error",
            source="Nerogar/OneTrainer: modules/util/load_lora_util.py, modules/module/LoRAModule.py",
        ),
        recipes=(
            "text_encoder.train must be false: where it is absent, it is on",
            "a preset needs __version, as of 2026-11",
        ),
        default_rank=16,
        default_alpha=1.0,
        default_targets=lambda name: any(part in name for part in ("attn", "img_mlp", "txt_mlp")),  # of its presets
    ),
    "diffsynth": Trainer(
        title="DiffSynth-Studio",
        layout="bare.default",
        read="fed7b18f (2026-11): its loader was run; 2.1.12 was read",
        rules=Rules(
            accepts=_layouts(("", "diffusion_model."), _HALVES[:3]),
            alpha_keys="read",
            scale="file",
            rank="equal",
            source="modelscope/DiffSynth-Studio: diffsynth/utils/lora/general.py, diffusion/training_module.py",
        ),
        since="2026-03",
        older=Rules(
            accepts=(LAYOUTS["bare"], LAYOUTS["bare.default"], LAYOUTS["diffusion_model"]),
            alpha_keys="ignored",
            scale="one",
            rank="equal",
            source="modelscope/DiffSynth-Studio: diffsynth/diffusion/training_module.py",
        ),
        recipes=('--lora_target_modules "" means the blocks\' 14 types, as of 2.1.12',),
        default_rank=32,
        default_alpha=None,
        default_targets=by_suffix(TARGETS["i2l"]),  # of its example
    ),
    "diffusers": Trainer(
        title="diffusers",
        layout="transformer",
        read="0.42.1: its loader is run by the tests",
        rules=Rules(
            accepts=(*(LAYOUTS[name] for name in ("transformer", "diffusion_model", "kohya", "bare.default")),),
            alpha_keys="read",
            scale="file",
            rank="any",
            missing="none",
            extra="none",
            reads_peft_metadata=True,
            source="huggingface/diffusers: loaders/lora_pipeline.py, loaders/lora_conversion_utils.py",
        ),
        script=Rules(  # of `warm_start` in the script: it takes whatever `read_lora` does
            accepts=(*LAYOUTS.values(), *_layouts(_THREE, _HALVES)),
            alpha_keys="read",
            scale="file",
            rank="any",
            reads_peft_metadata=True,
            source="huggingface/diffusers: examples/dreambooth/train_dreambooth_lora_qwen_image.py",
        ),
        default_rank=4,
        default_alpha=4.0,
        default_targets=by_suffix(TARGETS["diffusers"]),
    ),
    "comfyui": Trainer(
        title="ComfyUI",
        layout="diffusion_model",
        read="2026-11: read",
        rules=Rules(
            accepts=(
                *_layouts(_THREE, _COMFYUI_HALVES),
                *_layouts(("lora_unet_", "lycoris_"), _COMFYUI_HALVES, flat=True),
            ),
            alpha_keys="read",
            scale="file",
            rank="any",
            missing="none",
            extra="none",
            source="comfyanonymous/ComfyUI: comfy/lora.py, comfy/weight_adapter/lora.py",
        ),
        default_rank=0,
        default_alpha=None,
    ),
}
