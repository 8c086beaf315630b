"""How much memory a run needs, before anything is loaded.

Weights, adapter and optimizer are arithmetic on shapes. Activations are counted: the transformer runs once on the meta
device, with one block and with two, and what autograd keeps is added up. Attention counts as a fused kernel that keeps
its inputs, its output and a number for each row.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from trainer import adapter, qwen_image
from trainer.adapter import AdapterConfig
from trainer.files import DTYPES
from trainer.hardware.live import fused_attention
from trainer.loop import TrainConfig
from trainer.qwen_image import ModelConfig

ENCODING = "encoding captions"
PROMPT_TOKENS = 128  # of a caption, in estimates
CONTEXT_BYTES = 0.6e9  # CUDA's own
BYTES_PER_STATE = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2}  # both moments of one parameter
QUANTISED = {"none": None, "fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}  # bytes for each weight of a Linear layer
BLOCKS_AT_HAND = 3  # with weights on the CPU: one in use, one on its way in, one on its way out


@dataclass(frozen=True)
class Needs:
    """Peak bytes of each stage of a run; one stage ends before the next begins."""

    stages: Mapping[str, float]
    parts: Mapping[str, float]
    """Bytes of each part of the stage "training"."""

    @property
    def peak(self) -> float:
        """The most bytes that must be on the GPU at once. The text encoder does not count: where it is too large,
        captions are encoded on the CPU."""
        return max(value for name, value in self.stages.items() if name != ENCODING)


def estimate(
    base: str,
    transformer: QwenImageTransformer2DModel,
    model: ModelConfig,
    settings: AdapterConfig,
    train: TrainConfig,
    pixels: int,
) -> Needs:
    """transformer: on the meta device; pixels: of the largest bucket."""
    parts = resident_bytes(transformer, model, settings, train)
    total = sum(parts.values())
    parts["activations"] = activation_bytes(transformer, model, train, pixels, settings)
    if model.quantization == "fp8":  # the block that is computed again, in the model's precision
        parts["one block cast"] = block_bytes(transformer, model)
    thrifty = replace(train, gradient_checkpointing=True)
    block = activation_bytes(transformer, model, thrifty, pixels, settings, blocks=1)
    stages = {
        ENCODING: qwen_image.text_encoder_bytes(base),
        "training": sum(parts.values()),
        "drawing samples": total + max(block, vae_bytes(base, pixels)),
    }
    return Needs({name: value + CONTEXT_BYTES for name, value in stages.items()}, parts)


def resident_bytes(
    transformer: nn.Module, model: ModelConfig, settings: AdapterConfig, train: TrainConfig
) -> dict[str, float]:
    """Bytes of what stays in memory from the first step to the last, by arithmetic on shapes."""
    modules = adapter.target_modules(transformer, settings)
    trained = sum(settings.rank_of(name) * (a + b) for name, (a, b) in modules.items())
    return {
        "weights": weight_bytes(transformer, model),
        "adapter": 4.0 * trained,
        "gradients": 4.0 * trained,
        "optimizer": float(BYTES_PER_STATE[train.optimizer] * trained),
    }


def block_bytes(transformer: QwenImageTransformer2DModel, model: ModelConfig) -> float:
    """Bytes of one block's weights, not quantised."""
    return float(sum(p.numel() for p in transformer.transformer_blocks[0].parameters()) * DTYPES[model.dtype].itemsize)


def offloaded_bytes(transformer: QwenImageTransformer2DModel, model: ModelConfig, needs: Needs) -> float:
    """On the GPU while training, if the weights, adapter and optimizer stay on the CPU until a block is needed."""
    outside = sum(p.numel() for p in transformer.parameters()) * DTYPES[model.dtype].itemsize
    block = block_bytes(transformer, model)
    outside -= len(transformer.transformer_blocks) * block
    return outside + BLOCKS_AT_HAND * block + needs.parts["activations"] + CONTEXT_BYTES


def weight_bytes(transformer: nn.Module, model: ModelConfig) -> float:
    """Bytes of the frozen base. Quantised are the weights of all Linear layers (with fp8 not the few in norms)."""
    each = DTYPES[model.dtype].itemsize
    linear = sum(layer.weight.numel() for layer in transformer.modules() if isinstance(layer, nn.Linear))
    rest = sum(p.numel() for p in transformer.parameters()) - linear
    quantised = QUANTISED[model.quantization]
    return linear * (each if quantised is None else quantised) + rest * each


def activation_bytes(
    transformer: QwenImageTransformer2DModel,
    model: ModelConfig,
    train: TrainConfig,
    pixels: int,
    settings: AdapterConfig | None = None,
    blocks: int | None = None,
) -> float:
    """What the backward pass needs, for square pictures of so many pixels; of all blocks, or of so many."""
    dtype, sizes = DTYPES[model.dtype], (train.batch_size, pixels)
    settings = settings and replace(settings, rank_pattern={})
    one, two = (_kept(transformer, dtype, sizes, train.gradient_checkpointing, settings, number) for number in (1, 2))
    count = int(transformer.config["num_layers"]) if blocks is None else blocks
    total = one + (count - 1) * (two - one)
    if train.gradient_checkpointing:  # one block at a time is computed again, and keeps everything
        first, second = (_kept(transformer, dtype, sizes, False, settings, number) for number in (1, 2))
        total += second - first
    return total


@lru_cache(maxsize=64)  # settings that do not change the activations are asked for again and again
def _kept(
    like: QwenImageTransformer2DModel,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    gradient_checkpointing: bool,
    settings: AdapterConfig | None,
    blocks: int,
) -> float:
    """Bytes that autograd keeps of one forward pass on the meta device. sizes: the batch's, and pixels of a picture."""
    transformer = few_blocks(like, dtype, settings, blocks, torch.device("meta"))
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    with kept_by_autograd(transformer) as kept, fused_attention():
        forward(transformer, *sizes, of_input=settings is None)
    return float(sum(kept.values()))


def few_blocks(
    like: QwenImageTransformer2DModel,
    dtype: torch.dtype,
    settings: AdapterConfig | None,
    blocks: int,
    device: torch.device,
) -> Any:
    """A transformer of that shape with so many blocks, random weights and, unless `settings` are None, the adapter."""
    options = qwen_image.known_keys(QwenImageTransformer2DModel, like.config) | {"num_layers": blocks}
    with device:
        transformer: Any = QwenImageTransformer2DModel(**options)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    if settings is not None:
        known = adapter.linears(transformer)
        types = [kind for kind in settings.module_types if any(name.endswith(kind) for name in known)]
        adapter.inject(transformer, replace(settings, target_modules=tuple(types), rank_pattern={}))
    return transformer.train()


def forward(transformer: Any, batch_size: int, pixels: int, *, of_input: bool) -> Tensor:
    """The velocity of square pictures of so many pixels, from random inputs, which need a gradient if `of_input`."""
    side, config = max(1, round(pixels**0.5 / 16)), transformer.config
    with transformer.device:
        channels, options = int(config["in_channels"]) // 4, {"dtype": transformer.dtype}
        latents = torch.randn(batch_size, channels, 1, 2 * side, 2 * side, **options, requires_grad=of_input)
        prompt = torch.randn(batch_size, PROMPT_TOKENS, int(config["joint_attention_dim"]), **options)
        return qwen_image.predict_velocity(transformer, latents, torch.rand(batch_size), prompt, None)


@contextmanager
def kept_by_autograd(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps of what is computed inside; the module's weights do not count."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # or its number would be given to another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def vae_bytes(base: str, pixels: int) -> float:
    """The VAE in fp32 while it decodes one picture: its weights, and feature maps of the picture's size."""
    from diffusers import AutoencoderKLQwenImage

    config = qwen_image.part_config(AutoencoderKLQwenImage, base, "vae")
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage.from_config(config) if config else AutoencoderKLQwenImage()
    weights = sum(parameter.numel() for parameter in vae.parameters())
    side = round(pixels**0.5 / 2 ** len(vae.config["temperal_downsample"]))
    return 4.0 * weights + qwen_image.decoding_bytes(vae, side, side)


def ways_to_fit(
    base: str,
    transformer: QwenImageTransformer2DModel,
    model: ModelConfig,
    settings: AdapterConfig,
    train: TrainConfig,
    pixels: int,
) -> list[tuple[list[str], Needs]]:
    """The configuration, and with one saving after another, in the order of what they cost: keys to set, and needs."""
    savings: list[tuple[str, dict[str, Any]]] = []
    if not train.gradient_checkpointing:
        savings.append(("train.gradient_checkpointing=true", {"train": {"gradient_checkpointing": True}}))
    if train.optimizer != "adamw8bit":
        savings.append(("train.optimizer=adamw8bit", {"train": {"optimizer": "adamw8bit"}}))
    if train.batch_size > 1:
        savings.append(("train.batch_size=1", {"train": {"batch_size": 1}}))
    if model.quantization == "none":
        savings.append(("model.quantization=int8", {"model": {"quantization": "int8"}}))
    if model.quantization != "nf4":
        savings.append(("model.quantization=nf4", {"model": {"quantization": "nf4"}}))
    for side in (768, 512):
        if pixels > side**2:
            savings.append((f"data.resolution={side}", {"pixels": side**2}))
    found: list[tuple[list[str], Needs]] = [([], estimate(base, transformer, model, settings, train, pixels))]
    keys: list[str] = []
    for key, change in savings:
        keys = [*(k for k in keys if k.split("=")[0] != key.split("=")[0]), key]
        train, model = replace(train, **change.get("train", {})), replace(model, **change.get("model", {}))
        pixels = change.get("pixels", pixels)
        found.append((keys, estimate(base, transformer, model, settings, train, pixels)))
    return found
