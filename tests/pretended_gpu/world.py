"""Qwen-Image with its text encoder, i2L and its encoders at the published sizes, as hollow files; and some pictures."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from transformers import (
    DINOv3ViTModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionModel,
)

from demo import base, build
from initializers.i2l import encoders
from initializers.i2l.layout import FILES, PUBLISHED, Geometry, expert_layout, module_shapes
from tests.pretended_gpu import hollow
from trainer.files import random_tensors, stream_tensors, write_json

DEMO = Path(__file__).parents[2] / "demo" / "model"
BIAS_RANK = 4
TRANSFORMER = {
    "_class_name": "QwenImageTransformer2DModel",
    "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 768,
}
"""config.json as published with Qwen/Qwen-Image: the class does not know its last key any more."""
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
CAPTION = "mychar, a photograph of it in a place, doing this and that, number {}" + ", and so on" * 24


@dataclass(frozen=True)
class World:
    """Where all of it lies, for a base of so many blocks. What does not depend on their number is made once."""

    root: Path
    num_blocks: int

    @property
    def base(self) -> Path:
        return self._made(f"base-{self.num_blocks}", lambda folder: make_base(folder, self.num_blocks))

    @property
    def experts(self) -> Path:
        return self._made(f"i2l-{self.num_blocks}", lambda folder: make_experts(folder, self.num_blocks))

    @property
    def encoders(self) -> Path:
        return self._made("encoders", make_encoders)

    @property
    def pictures(self) -> Path:
        return self._made("pictures", lambda folder: make_pictures(folder, 4))

    def output(self, name: str) -> Path:
        """A folder that is not there yet."""
        folder = self.root / "outputs" / f"{name}-{self.num_blocks}"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        folder = self.root / name
        if not folder.exists():
            make(folder)
        return folder


def in_bf16(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[Sequence[int], torch.dtype]]:
    return {name: (shape, torch.bfloat16) for name, shape in shapes.items()}


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def make_base(folder: Path, num_blocks: int) -> None:
    """Files of `Qwen/Qwen-Image`, with so many blocks; the tokenizer is the demo's."""
    for part in ("tokenizer", "processor"):
        shutil.copytree(DEMO / part, folder / part)
    base.save_scheduler(folder / "scheduler")
    build.write_model_index(folder)
    write_json(folder / "transformer" / "config.json", TRANSFORMER | {"num_layers": num_blocks})
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=num_blocks)
        vae = AutoencoderKLQwenImage()
    hollow.write(folder / "transformer" / "diffusion_pytorch_model.safetensors", in_bf16(shapes_of(transformer)))
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKLQwenImage", **_plain(vae.config)})
    hollow.write(folder / "vae" / "diffusion_pytorch_model.safetensors", in_bf16(shapes_of(vae)))
    _make_text_encoder(folder / "text_encoder")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in json.loads(json.dumps(dict(config))).items() if name[0] != "_"}


def _make_text_encoder(folder: Path) -> None:
    """Qwen2.5-VL-7B; its tokens are those of the demo's tokenizer."""
    known = json.loads((DEMO / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    ids = {name: value for name, value in known.items() if name.endswith("_token_id") and isinstance(value, int)}
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False, **ids)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    write_json(folder / "config.json", json.loads(config.to_json_string(use_diff=False)))
    hollow.write(folder / "model.safetensors", in_bf16(shapes_of(model)))


def make_experts(folder: Path, num_blocks: int) -> None:
    """All four for a base of so many blocks; Bias has numbers."""
    for kind, published in PUBLISHED.items():
        shapes = expert_layout(replace(published.geometry, num_blocks=num_blocks))
        hollow.write(folder / FILES[kind], in_bf16(shapes), {"format": "pt"})
    factors: dict[str, Sequence[int]] = {}
    for module, (in_features, out_features) in module_shapes(Geometry(num_blocks=num_blocks)).items():
        factors[f"{module}.lora_A.default.weight"] = (BIAS_RANK, in_features)
        factors[f"{module}.lora_B.default.weight"] = (out_features, BIAS_RANK)
    stream_tensors(folder / FILES["bias"], factors, random_tensors(factors, torch.bfloat16), torch.bfloat16)


def make_encoders(folder: Path) -> None:
    """SigLIP2 and DINOv3 in the published layout."""
    for name, kind, config, key in (
        (encoders.SIGLIP_FOLDER, SiglipVisionModel, encoders.published_siglip_config(), encoders.siglip_key),
        (encoders.DINOV3_FOLDER, DINOv3ViTModel, encoders.published_dinov3_config(), encoders.dinov3_key),
    ):
        with torch.device("meta"):
            model = kind(config)
        shapes = {key(own): shape for own, shape in shapes_of(model).items()}
        hollow.write(folder / name / "model.safetensors", in_bf16(shapes))


def make_pictures(folder: Path, count: int) -> None:
    """Squares of 1024 pixels with captions of about as many tokens as a plan counts with."""
    folder.mkdir(parents=True)
    for number in range(count):
        gradient = Image.linear_gradient("L").resize((1024, 1024)).rotate(30 * number)
        gradient.convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTION.format(number), encoding="utf-8")
