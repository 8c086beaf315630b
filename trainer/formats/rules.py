"""What other programs do with a LoRA file: one table. Each rule names the file of that program that it was read in.

A trainer builds its own adapter first, for the modules and the rank of its configuration, and then copies the file into
it. What can go wrong is the same everywhere: keys it does not know, a scale of its own, another rank, another set of
modules; and most of it happens in silence.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.adapter import TARGETS, matches
from trainer.formats.layouts import LAYOUTS, OUTER_MODULES, Layout, ModuleKeys

_DIFFUSION_MODEL_DOWN_UP = Layout("diffusion_model.", LAYOUTS["onetrainer"].halves)
_DIFFUSERS_OLD = Layout("transformer.", ("lora.down.weight", "lora.up.weight"))


@dataclass(frozen=True, kw_only=True)
class Rules:
    accepts: tuple[Layout, ...]
    """Factors in other layouts are foreign."""
    foreign: Literal["ignored", "error"] = "ignored"
    """Ignored means that the module starts at random, and that nobody hears of it."""
    alpha_keys: Literal["read", "ignored", "error"]
    """What becomes of `.alpha`."""
    scale: Literal["file", "one", "recipe"]
    """dW = scale * b a: alpha / rank of the file (1 without alpha), 1, or alpha / rank of the configuration."""
    rank: Literal["any", "equal", "resized"]
    """What becomes of the file's rank. any: each module may have its own. equal: it must be the configuration's, or the
    trainer raises. resized: it is brought to the configuration's, by zeros in both factors or by the leading rows."""
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
    rules: Rules
    script: Rules | None = None
    """Other rules where there is a configuration."""
    default_rank: int
    default_alpha: float | None
    """None: the rank."""
    default_targets: Callable[[str], bool] = lambda name: True
    """Whether a Linear layer is trained if its configuration does not say."""

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
        rules=Rules(
            accepts=(LAYOUTS["kohya"],),
            alpha_keys="ignored",
            scale="recipe",
            rank="equal",
            source="kohya-ss/musubi-tuner: src/musubi_tuner/networks/lora.py, networks/lora_qwen_image.py",
        ),
        default_rank=4,
        default_alpha=1.0,
        default_targets=in_blocks,
    ),
    "ai-toolkit": Trainer(
        title="ai-toolkit",
        layout="diffusion_model",
        rules=Rules(
            accepts=(
                LAYOUTS["diffusion_model"],
                LAYOUTS["transformer"],
                _DIFFUSION_MODEL_DOWN_UP,
                LAYOUTS["onetrainer"],
            ),
            alpha_keys="ignored",
            scale="one",
            rank="resized",
            source="ostris/ai-toolkit: toolkit/network_mixins.py, jobs/process/BaseSDTrainProcess.py",
        ),
        default_rank=4,
        default_alpha=None,
        default_targets=in_blocks,
    ),
    "simpletuner": Trainer(
        title="SimpleTuner",
        layout="transformer",
        rules=Rules(
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
        rules=Rules(
            accepts=(LAYOUTS["diffusion_model"], LAYOUTS["transformer"], LAYOUTS["bare"]),
            foreign="error",
            alpha_keys="error",
            scale="one",
            rank="equal",
            source="tdrussell/diffusion-pipe: models/base.py, train.py",
        ),
        default_rank=32,
        default_alpha=None,
        default_targets=in_blocks,
    ),
    "onetrainer": Trainer(
        title="OneTrainer",
        layout="onetrainer",
        rules=Rules(
            accepts=(
                *LAYOUTS.values(),
                _DIFFUSION_MODEL_DOWN_UP,
                _DIFFUSERS_OLD,
            ),
            foreign="error",
            alpha_keys="read",
            scale="file",
            rank="equal",
            missing="error",
            extra="error",
            source="Nerogar/OneTrainer: modules/util/load_lora_util.py, modules/module/LoRAModule.py",
        ),
        default_rank=16,
        default_alpha=1.0,
        default_targets=lambda name: any(part in name for part in ("attn", "img_mlp", "txt_mlp")),  # of its presets
    ),
    "diffsynth": Trainer(
        title="DiffSynth-Studio",
        layout="bare.default",
        rules=Rules(
            accepts=(LAYOUTS["bare"], LAYOUTS["bare.default"], LAYOUTS["diffusion_model"]),
            alpha_keys="ignored",  # older versions drop it, newer ones read it: only alpha = rank is safe
            scale="one",
            rank="equal",
            source="modelscope/DiffSynth-Studio: diffsynth/diffusion/training_module.py",
        ),
        default_rank=32,
        default_alpha=None,
        default_targets=by_suffix(TARGETS["i2l"]),  # of its example
    ),
    "diffusers": Trainer(
        title="diffusers",
        layout="transformer",
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
            accepts=(*LAYOUTS.values(), _DIFFUSION_MODEL_DOWN_UP, _DIFFUSERS_OLD),
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
        rules=Rules(
            accepts=(
                *(LAYOUTS[name] for name in ("diffusion_model", "transformer", "bare", "bare.default", "kohya")),
                LAYOUTS["onetrainer"],
                _DIFFUSION_MODEL_DOWN_UP,
                _DIFFUSERS_OLD,
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
