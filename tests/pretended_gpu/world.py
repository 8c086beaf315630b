"""Qwen-Image with its text encoder, i2L and its encoders at the published sizes, as hollow files; and some pictures."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from transformers import (
    DINOv3ViTModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionModel,
)

from initializers.i2l import encoders
from initializers.i2l.layout import FILES, PUBLISHED, Geometry, expert_layout, module_shapes
from tests import published
from tests.pretended_gpu import hollow
from trainer.files import random_tensors, stream_tensors

DEMO = Path(__file__).parents[2] / "demo" / "model"
BIAS_RANK = 4
CAPTION = "mychar, a photograph of it in a place, doing this and that" + ", and so on" * 24


@dataclass(frozen=True)
class World:
    """Where all of it lies, for a base of so many blocks. What does not depend on their number is made once."""

    root: Path
    name: str
    """Of the run."""
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

    def output(self) -> Path:
        """A folder that is not there yet."""
        folder = self.root / "outputs" / self.name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        folder = self.root / name
        if not folder.exists():
            make(folder)
        return folder


def write_weights(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """In bf16, as all of them are published."""
    tensors = {name: torch.empty(*shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    hollow.write(path, tensors, {"format": "pt"})


def shapes_of(model: torch.nn.Module, key: Callable[[str], str] = str) -> dict[str, Sequence[int]]:
    return {key(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def make_base(folder: Path, num_blocks: int) -> None:
    """`Qwen/Qwen-Image` with so many blocks; the tokenizer, and so the numbers of special tokens, are the demo's."""
    known = json.loads((DEMO / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    ids = {name: value for name, value in known.items() if name.endswith("_token_id") and isinstance(value, int)}
    published.write(folder, published.FIRST, transformer={"num_layers": num_blocks}, text_encoder=ids)
    for part in ("tokenizer", "processor"):
        shutil.copytree(DEMO / part, folder / part, dirs_exist_ok=True)
    text = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=num_blocks)
        vae, language = AutoencoderKLQwenImage(), Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**text))
    write_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors", shapes_of(transformer))
    write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", shapes_of(vae))
    write_weights(folder / "text_encoder" / "model.safetensors", shapes_of(language))


def make_experts(folder: Path, num_blocks: int) -> None:
    """All four for a base of so many blocks; Bias has numbers."""
    for kind, known in PUBLISHED.items():
        write_weights(folder / FILES[kind], expert_layout(replace(known.geometry, num_blocks=num_blocks)))
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
        write_weights(folder / name / "model.safetensors", shapes_of(model, key))


def make_pictures(folder: Path, count: int) -> None:
    """Squares of 1024 pixels with captions of about as many tokens as a plan counts with."""
    folder.mkdir(parents=True)
    for number in range(count):
        gradient = Image.linear_gradient("L").resize((1024, 1024)).rotate(30 * number)
        gradient.convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTION, encoding="utf-8")
