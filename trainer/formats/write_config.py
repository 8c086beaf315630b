"""The lines that another trainer's configuration needs to start from a file, ready to paste."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.adapter import TARGETS
from trainer.formats.layouts import OUTER_MODULES
from trainer.formats.read_config import Recipe
from trainer.formats.rules import TRAINERS
from trainer.qwen_image import is_2512

REPLACE = "REPLACE"
"""Marks what a user must fill in."""


@dataclass(frozen=True)
class Start:
    """What another trainer is to start from."""

    file: Path
    recipe: Recipe
    types: list[str]
    """Names of the Linear layers to train, as they end in each block."""
    base: str
    """Id or folder of the model."""

    @property
    def hub_name(self) -> str:
        """The model's id, if `base` is a folder of one of the two on the hub."""
        return "Qwen/Qwen-Image-2512" if is_2512(self.base) else "Qwen/Qwen-Image"


@dataclass(frozen=True)
class Snippet:
    name: str
    """The name of the file."""
    text: str


def _musubi(start: Start) -> Snippet:
    recipe = start.recipe
    left_out = [kind for kind in TARGETS["all"] if kind not in start.types]
    excluded = [f".*[.]{kind.replace('.', '[.]')}" for kind in left_out]
    patterns = [json.dumps(f"exclude_patterns={excluded}")]
    if any("_mod." in kind for kind in start.types):  # some versions exclude the modulation layers, others do not
        patterns.append(json.dumps("include_patterns=['.*_mod[.]1']"))
    text = f"""# For qwen_image_train_network.py --config_file, with cached data. Change the lines with {REPLACE}.
dit = "{REPLACE}/qwen_image_bf16.safetensors"
vae = "{REPLACE}/diffusion_pytorch_model.safetensors"
text_encoder = "{REPLACE}/qwen_2.5_vl_7b.safetensors"
dataset_config = "{REPLACE}/dataset.toml"
output_dir = "{REPLACE}/output"
output_name = {json.dumps(start.file.stem)}

network_module = "networks.lora_qwen_image"
network_weights = {json.dumps(str(start.file))}
network_dim = {recipe.rank}
network_alpha = {recipe.alpha:g}  # the scale is network_alpha / network_dim, whatever the file says; the default is 1
network_args = [{", ".join(patterns)}]  # only the LoRA's modules are trained

sdpa = true
mixed_precision = "bf16"
gradient_checkpointing = true
timestep_sampling = "shift"
discrete_flow_shift = 2.2
optimizer_type = "adamw8bit"
learning_rate = 5e-5
max_train_epochs = 16
save_every_n_epochs = 1
seed = 42
"""
    return Snippet("musubi.toml", text)


def _ai_toolkit(start: Start) -> Snippet:
    outer = [kind for kind in start.types if kind in OUTER_MODULES]
    network = {
        "type": "lora",
        "linear": start.recipe.rank,
        "linear_alpha": start.recipe.rank,
        "pretrained_lora_path": str(start.file),
        **({"transformer_only": False} if outer else {}),  # else layers outside of the blocks are left out
        "network_kwargs": {"only_if_contains": [f".{kind}" for kind in start.types]},
    }
    process = {
        "type": "sd_trainer",
        "training_folder": "output",
        "device": "cuda:0",
        "network": network,
        "save": {"dtype": "float16", "save_every": 250, "max_step_saves_to_keep": 4},
        "datasets": [
            {
                "folder_path": f"{REPLACE}/pictures",
                "caption_ext": "txt",
                "cache_latents_to_disk": True,
                "resolution": [1024],
            }
        ],
        "train": {
            "batch_size": 1,
            "steps": 2000,
            "gradient_accumulation": 1,
            "train_unet": True,
            "train_text_encoder": False,
            "gradient_checkpointing": True,
            "noise_scheduler": "flowmatch",
            "optimizer": "adamw8bit",
            "lr": 5e-5,
            "dtype": "bf16",
        },
        "model": {"name_or_path": start.base, "arch": "qwen_image", "quantize": True, "low_vram": True},
        "sample": {
            "sampler": "flowmatch",
            "sample_every": 250,
            "width": 1024,
            "height": 1024,
            "prompts": [f"{REPLACE} a prompt with your trigger word"],
            "seed": 42,
            "guidance_scale": 4,
            "sample_steps": 25,
        },
    }
    config = {"name": start.file.stem, "process": [process]}
    whole = {"job": "extension", "config": config, "meta": {"name": "[name]", "version": "1.0"}}
    text = yaml.safe_dump(whole, sort_keys=False)
    said = (
        f"# A job for run.py. Change the lines with {REPLACE}. Use a new training folder: checkpoints come before the "
        "file.\n"
    )
    return Snippet("ai_toolkit.yaml", said + text)


def _simpletuner(start: Start) -> Snippet:
    own = {} if start.base == start.hub_name else {"pretrained_model_name_or_path": start.base}
    values = {
        "model_type": "lora",
        "model_family": "qwen_image",
        "model_flavour": "v2.0" if is_2512(start.base) else "v1.0",
        **own,
        "lora_type": "standard",
        "lora_rank": start.recipe.rank,
        "lora_alpha": start.recipe.rank,
        "lora_dropout": 0.0,
        "peft_lora_target_modules": str(start.file.with_name("targets.json")),
        "init_lora": str(start.file),
        "data_backend_config": f"{REPLACE}/multidatabackend.json",
        "output_dir": f"{REPLACE}/output",
        "base_model_precision": "int8-quanto",
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "resolution": 1024,
        "resolution_type": "pixel_area",
        "train_batch_size": 1,
        "optimizer": "adamw_bf16",
        "learning_rate": 5e-5,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": 2000,
        "num_train_epochs": 0,
        "checkpoint_step_interval": 250,
        "validation_prompt": f"{REPLACE} a prompt with your trigger word",
        "validation_step_interval": 250,
        "validation_resolution": "1024x1024",
        "seed": 42,
    }
    return Snippet("config.json", json.dumps(values, indent=2) + "\n")


def _diffusion_pipe(start: Start) -> Snippet:
    text = f"""# For deepspeed --num_gpus=1 train.py --deepspeed --config. Change the lines with {REPLACE}.
output_dir = '{REPLACE}/output'
dataset = '{REPLACE}/dataset.toml'
epochs = 100
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1.0
warmup_steps = 10
save_every_n_epochs = 10
activation_checkpointing = true
save_dtype = 'bfloat16'
caching_batch_size = 1

[model]
type = 'qwen_image'
diffusers_path = {json.dumps(start.base) if Path(start.base).is_dir() else f"'{REPLACE}/Qwen-Image'"}
dtype = 'bfloat16'
transformer_dtype = 'float8'
timestep_sample_method = 'logit_normal'

[adapter]
type = 'lora'
rank = {start.recipe.rank}  # no alpha: it raises at that key
dtype = 'float32'  # in bfloat16 the seed is rounded
init_from_existing = {json.dumps(str(start.file.parent))}  # a folder with one .safetensors in it

[optimizer]
type = 'adamw_optimi'
lr = 5e-5
betas = [0.9, 0.99]
weight_decay = 0.01
"""
    return Snippet("diffusion_pipe.toml", text)


def _onetrainer(start: Start) -> Snippet:
    values = {
        "__version": 11,
        "base_model_name": start.base,
        "training_method": "LORA",
        "model_type": "QWEN",
        "peft_type": "LORA",
        "lora_model_name": str(start.file),
        "lora_rank": start.recipe.rank,
        "lora_alpha": start.recipe.alpha,
        "lora_weight_dtype": "FLOAT_32",
        "layer_filter": ",".join(_layer_filter(start.types)),
        "layer_filter_preset": "custom",
        "layer_filter_regex": False,
        "text_encoder": {"train": False, "weight_dtype": "BFLOAT_16"},
        "transformer": {"train": True, "weight_dtype": "FLOAT_8"},
        "vae": {"weight_dtype": "FLOAT_32"},
        "quantization": {"layer_filter": "transformer_block", "layer_filter_preset": "blocks"},
        "weight_dtype": "BFLOAT_16",
        "timestep_distribution": "LOGIT_NORMAL",
        "train_dtype": "BFLOAT_16",
        "output_dtype": "BFLOAT_16",
        "resolution": "1024",
        "batch_size": 1,
        "learning_rate": 5e-5,
        "epochs": 100,
        "concept_file_name": f"{REPLACE}/concepts.json",
        "workspace_dir": f"{REPLACE}/workspace",
        "cache_dir": f"{REPLACE}/cache",
        "output_model_destination": f"{REPLACE}/{start.file.stem}_trained.safetensors",
    }
    return Snippet("onetrainer.json", json.dumps(values, indent=2) + "\n")


def _layer_filter(types: list[str]) -> list[str]:
    """Parts of names. Each must be the first to match some module, or OneTrainer raises."""
    attention = [kind for kind in TARGETS["attention"] if kind in types]
    if len(attention) == len(TARGETS["attention"]):
        return ["attn", *(kind for kind in types if kind not in attention)]
    return list(types)


def _diffsynth(start: Start) -> Snippet:
    names = [kind.removeprefix("attn.") for kind in start.types]
    model = start.hub_name
    parts = ("transformer/diffusion_pytorch_model*", "text_encoder/model*", "vae/diffusion_pytorch_model")
    origins = ",".join(f"{model}:{part}.safetensors" for part in parts)
    text = f"""# Change the lines with {REPLACE}. In bf16 this trainer rounds the seed.
accelerate launch examples/qwen_image/model_training/train.py \\
  --dataset_base_path "{REPLACE}/pictures" \\
  --dataset_metadata_path "{REPLACE}/pictures/metadata.csv" \\
  --max_pixels 1048576 \\
  --dataset_repeat 50 \\
  --model_id_with_origin_paths "{origins}" \\
  --learning_rate 5e-5 \\
  --num_epochs 5 \\
  --remove_prefix_in_ckpt "pipe.dit." \\
  --output_path "{REPLACE}/output" \\
  --lora_base_model "dit" \\
  --lora_target_modules "{",".join(names)}" \\
  --lora_rank {start.recipe.rank} \\
  --lora_checkpoint "{start.file}" \\
  --use_gradient_checkpointing \\
  --dataset_num_workers 4 \\
  --find_unused_parameters
"""
    return Snippet("diffsynth.sh", text)


def _diffusers(start: Start) -> Snippet:
    text = f"""# Change the lines with {REPLACE}. Then, in the script, right after transformer.add_adapter(...):
#     from initializers import warm_start
#     warm_start(transformer, init="{start.file}")
# which also keeps the adapter in fp32, and proves that it holds the file's dW.
accelerate launch train_dreambooth_lora_qwen_image.py \\
  --pretrained_model_name_or_path "{start.base}" \\
  --instance_data_dir "{REPLACE}/pictures" \\
  --instance_prompt "{REPLACE} a prompt with your trigger word" \\
  --output_dir "{REPLACE}/output" \\
  --mixed_precision bf16 \\
  --resolution 1024 \\
  --train_batch_size 1 \\
  --gradient_checkpointing \\
  --learning_rate 5e-5 \\
  --max_train_steps 1000 \\
  --seed 42 \\
  --rank {start.recipe.rank} --lora_alpha {start.recipe.alpha:g} \\
  --lora_layers "{",".join(start.types)}"
"""
    return Snippet("diffusers.sh", text)


SNIPPETS: Mapping[str, Callable[[Start], Snippet]] = {
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
    "simpletuner": "`lora_alpha` must equal `lora_rank`, in each version. Use an empty output_dir, or a checkpoint is "
    + "loaded over the seed. The log must list no missing keys, and must not say `not part of the model and are "
    + "ignored`: then nothing was loaded, as with base_model_precision nf4-bnb. The file names no step, so counting "
    + "begins at 0; `init_lora_step`, which exists from 4.7.1 on, is not needed.",
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
        what = f"A whole configuration ({snippet.name}), in which the lines with {REPLACE} are yours to fill in:\n"
        parts += [what, "```", snippet.text.rstrip(), "```\n"]
    parts.append(f"At step 0: {STEP_0[trainer]}\n")
    command = f"python -m trainer.formats check {file_name} --for {trainer}"
    parts.append(f"Rules read in {TRAINERS[trainer].rules_for(True).source}. A file is checked by\n")
    parts.append(f"    {command} --recipe YOUR_CONFIG" if snippet is not None else f"    {command}")
    return "\n".join(parts) + "\n"
