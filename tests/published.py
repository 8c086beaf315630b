"""The configuration files of the published models of this family, and folders with them.

The values are those of the repositories on Hugging Face, as of November 2026. Weights are headers, in as many shards as
are published, of files that are as long as the published ones and take no room on the disk: nothing but zeros follows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from trainer import qwen_image

FIRST, LATER = "Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"
EDIT, EDIT_2509, EDIT_2511 = "Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2511"
LAYERED, NEW_CLASS = "Qwen/Qwen-Image-Layered", "Qwen/Qwen-Image-2.1"

_TRANSFORMER = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
_FIRST_TRANSFORMER = {**_TRANSFORMER, "_diffusers_version": "0.34.0.dev0", "pooled_projection_dim": 768}
_LATER_TRANSFORMER = {**_TRANSFORMER, "_diffusers_version": "0.36.0.dev0"}
_TRANSFORMER_2_1 = {
    "_class_name": "QwenImage21Transformer2DModel",
    "_diffusers_version": "0.37.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "causal_condition": True,
    "context_in_dim": 4096,
    "eps": 1e-06,
    "in_channels": 64,
    "mlp_ratio": 3,
    "num_attention_heads": 32,
    "num_layers": 32,
    "out_channels": 64,
    "patch_size": 1,
}
_VAE = {
    "_class_name": "AutoencoderKLQwenImage",
    "_diffusers_version": "0.34.0.dev0",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.34.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
_ROPE = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
_LANGUAGE = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": _ROPE,
    "rope_theta": 1000000.0,
    "use_cache": True,
    "use_sliding_window": False,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
    "vocab_size": 152064,
}
_TEXT_ENCODER = {
    **_LANGUAGE,
    "image_token_id": 151655,
    "model_type": "qwen2_5_vl",
    "sliding_window": 32768,
    "text_config": {
        **_LANGUAGE,
        "image_token_id": None,
        "layer_types": ["full_attention"] * 28,
        "model_type": "qwen2_5_vl_text",
        "sliding_window": None,
        "torch_dtype": "float32",
        "video_token_id": None,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.1",
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_channels": 3,
        "in_chans": 3,
        "initializer_range": 0.02,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "torch_dtype": "float32",
        "window_size": 112,
    },
}


def _index(pipeline: str, version: str, **parts: str) -> dict[str, Any]:
    """model_index.json. parts: those that are not, or not as, in Qwen-Image."""
    names = {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        **parts,
    }
    of_transformers = ("text_encoder", "tokenizer", "processor")
    classes = {part: ["transformers" if part in of_transformers else "diffusers", name] for part, name in names.items()}
    return {"_class_name": pipeline, "_diffusers_version": version, **classes}


_PROCESSOR = {"processor": "Qwen2VLProcessor"}
_2_1 = {
    "processor": "Qwen3VLProcessor",
    "text_encoder": "Qwen3VLForConditionalGeneration",
    "transformer": "QwenImage21Transformer2DModel",
    "vae": "AutoencoderKLQwenImage21",
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    FIRST: (_index("QwenImagePipeline", "0.34.0.dev0"), _FIRST_TRANSFORMER),
    LATER: (_index("QwenImagePipeline", "0.36.0.dev0"), _LATER_TRANSFORMER),
    EDIT: (_index("QwenImageEditPipeline", "0.35.0.dev0", **_PROCESSOR), _FIRST_TRANSFORMER),
    EDIT_2509: (_index("QwenImageEditPlusPipeline", "0.36.0.dev0", **_PROCESSOR), _FIRST_TRANSFORMER),
    EDIT_2511: (
        _index("QwenImageEditPlusPipeline", "0.36.0.dev0", **_PROCESSOR),
        {**_LATER_TRANSFORMER, "zero_cond_t": True},
    ),
    LAYERED: (
        _index("QwenImageLayeredPipeline", "0.36.0.dev0", **_PROCESSOR),
        {**_LATER_TRANSFORMER, "use_additional_t_cond": True, "use_layer3d_rope": True, "zero_cond_t": False},
    ),
    NEW_CLASS: (_index("QwenImage21Pipeline", "0.37.0.dev0", **_2_1), _TRANSFORMER_2_1),
}
"""Repository -> model_index.json and transformer/config.json."""


def files(model: str) -> dict[str, dict[str, Any]]:
    """Name -> content of the JSON files that say what a model is."""
    index, transformer = MODELS[model]
    vae, text_encoder = dict(_VAE), dict(_TEXT_ENCODER)
    if model == LAYERED:
        vae["input_channels"] = 4
    if model == NEW_CLASS:
        vae["_class_name"], text_encoder["model_type"] = "AutoencoderKLQwenImage21", "qwen3_vl"
    return {
        "model_index.json": index,
        "transformer/config.json": transformer,
        "vae/config.json": vae,
        "text_encoder/config.json": text_encoder,
        "scheduler/scheduler_config.json": _SCHEDULER,
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"},
    }


def write(folder: Path, model: str, **changes: Mapping[str, Any]) -> Path:
    """A folder with the JSON files of a model. changes: part -> keys of its config.json to add or change."""
    for name, content in files(model).items():
        part = name.partition("/")[0]
        if model == NEW_CLASS and part == "tokenizer":
            continue  # it has a processor instead
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content | dict(changes.get(part, {})), indent=2))
    return folder


SHARDS = {"transformer": 9, "text_encoder": 4, "vae": 1}


def _stem(part: str) -> str:
    return "text_encoder/model" if part == "text_encoder" else f"{part}/diffusion_pytorch_model"


def _files(part: str) -> list[str]:
    if (count := SHARDS[part]) == 1:
        return [f"{_stem(part)}.safetensors"]
    return [f"{_stem(part)}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def weight_files() -> list[str]:
    """The files of the weights: of the transformer, the text encoder and the VAE."""
    return [file for part in SHARDS for file in _files(part)]


def write_indices(folder: Path) -> None:
    """An index for each part in shards, which names them, and a tensor in each."""
    for part in SHARDS:
        _write_index(folder, part, {f"tensor.{number}": file for number, file in enumerate(_files(part))}, 0)


def _write_index(folder: Path, part: str, files: Mapping[str, str], total: int) -> None:
    if SHARDS[part] > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: Path(file).name for name, file in files.items()},
        }
        (folder / f"{_stem(part)}.safetensors.index.json").write_text(json.dumps(index))


def write_weights(folder: Path) -> None:
    """Headers of the weights of Qwen-Image in bf16, divided evenly, with the indices."""
    with torch.device("meta"):
        models = {
            "transformer": QwenImageTransformer2DModel(
                **qwen_image.known_keys(QwenImageTransformer2DModel, _FIRST_TRANSFORMER)
            ),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_TEXT_ENCODER)),
            "vae": AutoencoderKLQwenImage(),
        }
    for part, model in models.items():
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        total, before, where, names = 2 * sum(x.numel() for x in shapes.values()), 0, dict[str, str](), _files(part)
        for name, shape in shapes.items():
            where[name] = names[before * len(names) // total]
            before += 2 * shape.numel()
        for file in names:
            _write_header(folder / file, {name: shape for name, shape in shapes.items() if where[name] == file})
        _write_index(folder, part, where, total)


def _write_header(path: Path, shapes: Mapping[str, torch.Size]) -> None:
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
