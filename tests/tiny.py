"""A tiny Qwen-Image of the real classes with random weights, a folder of painted pictures, and i2L that fits them."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from transformers import DINOv3ViTConfig, DINOv3ViTModel, SiglipVisionConfig, SiglipVisionModel

from demo import base, build, painter, text_encoder
from initializers.i2l import encoders
from initializers.i2l.expert import Expert, save_expert
from initializers.i2l.layout import FILES, Geometry, module_shapes

WIDTH = 64
RUN = """
output = "{output}"
[model]
base = "{base}"
dtype = "fp32"
[data]
images = "{images}"
resolution = 64
held_out = 2
[adapter]
rank = 4
[train]
steps = 4
batch_size = 2
learning_rate = 1e-3
[validation]
every = 2
prompts = ["a big creature in the middle, in a meadow"]
num_inference_steps = 2
[checkpoint]
every = 2
"""
"""A small run's configuration."""


def make_base(folder: Path) -> None:
    """A model folder in diffusers' layout: 2 blocks of width 64, tiny VAE, the demo's text encoder."""
    text_encoder.save(folder)
    base.save_scheduler(folder / "scheduler")
    build.write_model_index(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder / "vae")
        QwenImageTransformer2DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            axes_dims_rope=(8, 12, 12),
            in_channels=64,
            out_channels=16,
            joint_attention_dim=text_encoder.HIDDEN_SIZE,
        ).save_pretrained(folder / "transformer")


def make_pictures(folder: Path) -> None:
    """Six pictures of one creature with captions beside them."""
    folder.mkdir()
    for number in range(6):
        where = painter.scene(number)
        Image.fromarray(painter.paint(painter.identity("new", 0), where)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(painter.caption(where))


def make_i2l(experts: Path, vision: Path) -> None:
    """Style and Bias with random weights that fit the tiny base, and random image encoders that fit Style."""
    geometry = Geometry(num_blocks=2, hidden_size=WIDTH, embedding_size=24, compress=5)
    random = torch.Generator().manual_seed(1)
    expert = Expert(geometry, generator=random)
    with torch.no_grad():
        for name, weight in expert.named_parameters():
            if name.endswith("proj_b.proj_out.weight"):  # which starts at 0
                weight.copy_(0.05 * torch.randn(weight.shape, generator=random))
    save_expert(expert, experts / FILES["style"], torch.float16)
    bias = {}
    for module, (in_features, out_features) in module_shapes(geometry).items():
        bias[f"{module}.lora_A.default.weight"] = 0.1 * torch.randn(2, in_features, generator=random)
        bias[f"{module}.lora_B.default.weight"] = 0.1 * torch.randn(out_features, 2, generator=random)
    save_file(bias, experts / FILES["bias"])
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        siglip = SiglipVisionModel(SiglipVisionConfig(hidden_size=16, intermediate_size=24, **size))
        dinov3 = DINOv3ViTModel(DINOv3ViTConfig(hidden_size=8, intermediate_size=24, **size))
    encoders.save_siglip(siglip, vision / encoders.SIGLIP_FOLDER)
    encoders.save_dinov3(dinov3, vision / encoders.DINOV3_FOLDER)
