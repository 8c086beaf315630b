"""The lines that another trainer's configuration needs to start from a file, ready to paste."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.adapter import TARGETS
from trainer.formats.read_config import Recipe
from trainer.formats.rules import TRAINERS


@dataclass(frozen=True)
class Snippet:
    name: str
    """The name of the file."""
    text: str


def _musubi(file: Path, recipe: Recipe, types: list[str]) -> Snippet:
    left_out = [kind for kind in TARGETS["all"] if kind not in types]
    excluded = [f".*[.]{kind.replace('.', '[.]')}" for kind in left_out]
    patterns = [json.dumps(f"exclude_patterns={excluded}")]
    if any("_mod." in kind for kind in types):  # some versions exclude the modulation layers, others do not
        patterns.append(json.dumps("include_patterns=['.*_mod[.]1']"))
    text = f"""# For qwen_image_train_network.py --config_file, or as --network_weights ... on its command line.
network_module = "networks.lora_qwen_image"
network_weights = {json.dumps(str(file))}
network_dim = {recipe.rank}
network_alpha = {recipe.alpha:g}  # the scale is network_alpha / network_dim, whatever the file says; the default is 1
network_args = [{", ".join(patterns)}]  # only the LoRA's modules are trained
"""
    return Snippet("musubi.toml", text)


def _ai_toolkit(file: Path, recipe: Recipe, types: list[str]) -> Snippet:
    network = {
        "type": "lora",
        "linear": recipe.rank,
        "linear_alpha": recipe.rank,
        "pretrained_lora_path": str(file),
        "network_kwargs": {"only_if_contains": [f".{kind}" for kind in types]},
    }
    model = {"name_or_path": "Qwen/Qwen-Image", "arch": "qwen_image"}
    config = {"name": file.stem, "process": [{"type": "sd_trainer", "network": network, "model": model}]}
    text = yaml.safe_dump({"job": "extension", "config": config}, sort_keys=False)
    said = "# Into your YAML: the part below network. Use a new training folder: checkpoints come before the file.\n"
    return Snippet("ai_toolkit.yaml", said + text)


def _simpletuner(file: Path, recipe: Recipe, types: list[str]) -> Snippet:
    values = {
        "model_type": "lora",
        "model_family": "qwen_image",
        "lora_type": "standard",
        "lora_rank": recipe.rank,
        "lora_alpha": int(recipe.alpha) if recipe.alpha == int(recipe.alpha) else recipe.alpha,
        "lora_dropout": 0.0,
        "peft_lora_target_modules": str(file.with_name("targets.json")),
        "init_lora": str(file),
        "init_lora_step": 0,
    }
    return Snippet("config.json", json.dumps(values, indent=2) + "\n")


def _diffusion_pipe(file: Path, recipe: Recipe, types: list[str]) -> Snippet:
    text = f"""[model]
type = 'qwen_image'

[adapter]
type = 'lora'
rank = {recipe.rank}  # no alpha: it raises at that key
dtype = 'float32'  # in bfloat16 the seed is rounded
init_from_existing = {json.dumps(str(file.parent))}  # a folder with one .safetensors in it
"""
    return Snippet("diffusion_pipe.toml", text)


def _onetrainer(file: Path, recipe: Recipe, types: list[str]) -> Snippet:
    values = {
        "training_method": "LORA",
        "model_type": "QWEN",
        "peft_type": "LORA",
        "lora_model_name": str(file),
        "lora_rank": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_weight_dtype": "FLOAT_32",
        "layer_filter": ",".join(_layer_filter(types)),
        "layer_filter_preset": "custom",
        "layer_filter_regex": False,
        "text_encoder": {"train": False},
    }
    return Snippet("onetrainer.json", json.dumps(values, indent=2) + "\n")


def _layer_filter(types: list[str]) -> list[str]:
    """Parts of names. Each must be the first to match some module, or OneTrainer raises."""
    attention = [kind for kind in TARGETS["attention"] if kind in types]
    if len(attention) == len(TARGETS["attention"]):
        return ["attn", *(kind for kind in types if kind not in attention)]
    return list(types)


def _diffsynth(file: Path, recipe: Recipe, types: list[str]) -> Snippet:
    names = [kind.removeprefix("attn.") for kind in types]
    text = f"""# Add your data, model and output arguments. In bf16 this trainer rounds the seed.
accelerate launch examples/qwen_image/model_training/train.py \\
  --lora_base_model "dit" \\
  --lora_target_modules "{",".join(names)}" \\
  --lora_rank {recipe.rank} \\
  --lora_checkpoint "{file}" \\
  --remove_prefix_in_ckpt "pipe.dit."
"""
    return Snippet("diffsynth.sh", text)


def _diffusers(file: Path, recipe: Recipe, types: list[str]) -> Snippet:
    text = f"""# Add your data and output arguments. Then, in the script, right after transformer.add_adapter(...):
#     from initializers import warm_start
#     warm_start(transformer, init="{file}")
# which also keeps the adapter in fp32, and proves that it holds the file's dW.
accelerate launch train_dreambooth_lora_qwen_image.py \\
  --pretrained_model_name_or_path Qwen/Qwen-Image \\
  --rank {recipe.rank} --lora_alpha {recipe.alpha:g} \\
  --lora_layers "{",".join(types)}"
"""
    return Snippet("diffusers.sh", text)


SNIPPETS: Mapping[str, Callable[[Path, Recipe, list[str]], Snippet]] = {
    "musubi-tuner": _musubi,
    "ai-toolkit": _ai_toolkit,
    "simpletuner": _simpletuner,
    "diffusion-pipe": _diffusion_pipe,
    "onetrainer": _onetrainer,
    "diffsynth": _diffsynth,
    "diffusers": _diffusers,
}

STEP_0 = {
    "musubi-tuner": "The log must say `<All keys matched successfully>`; missing keys start at random. "
    + "Samples before the first step (--sample_at_first) must show your subject.",
    "ai-toolkit": "Leave `skip_first_sample` off: the first samples must show your subject. If the path is wrong, it "
    + "prints a line and starts at random.",
    "simpletuner": "Use an empty output_dir, or a checkpoint is loaded over the seed. The log must list "
    + "no missing keys.",
    "diffusion-pipe": "It raises at whatever does not fit, so that a start without an error is the LoRA's. Modules "
    + "that the LoRA lacks, such as mlp.net.0.proj, start at random and change nothing.",
    "onetrainer": "It raises at a module too many or too few. Sample before the first step: it must show your subject.",
    "diffsynth": 'The log must show no "LoRA key mismatch". That it says "LoRA checkpoint loaded" proves nothing.',
    "diffusers": "`warm_start` raises if the adapter does not hold the file's dW. To draw with it, "
    + "`pipe.load_lora_weights(FILE)` is enough.",
    "comfyui": 'Put the file into models/loras. The console must show no "lora key not loaded".',
}


def readme(
    trainer: str, file_name: str, extra: Sequence[str], lines: Sequence[str], snippet: Snippet | None, rank: int
) -> str:
    """What is in the folder, and what to look at before the first step."""
    parts = [f"# {file_name} for {TRAINERS[trainer].title}\n", *[f"- {line}" for line in lines], ""]
    if extra:
        parts.append(
            f"`{extra[0]}` is the same LoRA for network_alpha = 1, which is this trainer's default: with network_dim = "
            f"{rank} and no network_alpha, take that file.\n"
        )
    if snippet is not None:
        parts += [f"Into your configuration ({snippet.name}):\n", "```", snippet.text.rstrip(), "```\n"]
    parts.append(f"At step 0: {STEP_0[trainer]}\n")
    command = f"python -m trainer.formats check {file_name} --for {trainer}"
    parts.append(f"Rules read in {TRAINERS[trainer].rules_for(True).source}. A file is checked by\n")
    parts.append(f"    {command} --recipe YOUR_CONFIG" if snippet is not None else f"    {command}")
    return "\n".join(parts) + "\n"
