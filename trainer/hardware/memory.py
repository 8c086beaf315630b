"""How much memory a run needs on the GPU, stage by stage, before anything is loaded.

Weights, adapter and optimizer are arithmetic on shapes. What a forward pass or a step makes is counted: the real
classes run on the meta device, with three and with four blocks, and the peak of what is alive is carried on to all.
Attention counts as a fused kernel.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer import adapter, flow, qwen_image
from trainer.adapter import AdapterConfig, Stage, Work
from trainer.files import DTYPES
from trainer.hardware import offload
from trainer.hardware.live import LiveBytes, fused_attention
from trainer.optimizer import TrainConfig
from trainer.qwen_image import ModelConfig

PROMPT_TOKENS = 128  # of a caption, in estimates
CONTEXT_BYTES = 0.6e9  # CUDA's own
BYTES_PER_STATE = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2}  # both moments of one parameter
QUANTISED = {"none": None, "fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}  # bytes for each weight of a Linear layer
BLOCKS_AT_HAND = 3  # with weights on the CPU: one in use, one on its way in, one on its way out


def usable(gigabytes: float) -> float:
    """Bytes of a card sold with so many GB. It has as many GiB, 7.4 % more: they are left for cuDNN's workspaces,
    fragmentation and the screen."""
    return 1e9 * gigabytes


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run whose needs are asked for."""

    transformer: QwenImageTransformer2DModel
    """On the meta device."""
    model: ModelConfig
    adapter: AdapterConfig
    train: TrainConfig
    pixels: int
    """In the largest bucket."""
    start: Work = Work()
    draws: bool = True
    """Whether sample pictures are drawn."""
    prior_pixels: int = 0
    """In the largest picture of a prior, which is trained on beside each batch; 0: there is none."""
    draws_prior: bool = False
    """Whether the base draws pictures before the training."""

    @property
    def passes(self) -> tuple[int, ...]:
        """Pixels of the pictures of each forward pass that is kept for one backward pass."""
        return (self.pixels, self.prior_pixels) if self.prior_pixels else (self.pixels,)


@dataclass(frozen=True)
class Needs:
    """Peak bytes on the GPU of each stage of a run; one stage ends before the next begins."""

    stages: tuple[Stage, ...]
    parts: Mapping[str, float]
    """Bytes of each part of the stage "training"."""

    @property
    def highest(self) -> Stage:
        """The stage that needs most, where each makes do with the least it can."""
        return max(self.stages, key=lambda stage: stage.least)

    @property
    def peak(self) -> float:
        """The most bytes that must be on the GPU at once."""
        return self.highest.least

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def estimate(run: Request) -> Needs:
    """The stages come in their order."""
    parts = resident_bytes(run.transformer, run.model, run.adapter, run.train)
    itemsize = DTYPES[run.model.dtype].itemsize
    if run.start.stays:
        parts["the prediction beside it"] = float(itemsize * run.start.numbers)
    held, cast = sum(parts.values()), cast_bytes(run.transformer, run.model)
    drawing = pass_bytes(run.transformer, run.model, run.adapter, run.train.batch_size, run.pixels) + cast
    parts["activations and gradients"] = step_bytes(run.transformer, run.model, run.train, run.adapter, *run.passes)
    if cast:
        parts["weights as they are computed"] = cast
    vae, encoding, decoding, in_tiles = vae_bytes(run.model.base, run.pixels)
    text = with_activations(qwen_image.text_encoder_bytes(run.model.base, run.model.text_encoder_quantization))
    found = [Stage("encoding pictures", vae + encoding), Stage("encoding captions", text, 0.0, "on the CPU")]
    found += run.start.stages
    if run.start.passes:
        tried = placed_bytes(run.transformer, run.model)[0] + itemsize * run.start.numbers
        found.append(Stage("trying strengths", tried + drawing))
    if run.draws_prior:  # one by one, without the adapter
        one = pass_bytes(run.transformer, run.model, run.adapter, 1, run.pixels) + cast
        found.append(Stage("drawing the prior", placed_bytes(run.transformer, run.model)[0] + one))
    found.append(Stage("training", sum(parts.values())))
    if run.draws:
        found.append(Stage("drawing samples", held + drawing))
        found.append(Stage("decoding samples", held + vae + decoding, held + vae + in_tiles, "in tiles"))
    return Needs(tuple(stage.plus(CONTEXT_BYTES) for stage in found), parts)


def with_activations(weights: float) -> float:
    """Bytes of an encoder while it reads a caption or pictures; of the largest, what was counted at the published
    sizes."""
    return weights + min(0.1 * weights, 0.6e9)


def resident_bytes(
    transformer: nn.Module, model: ModelConfig, settings: AdapterConfig, train: TrainConfig
) -> dict[str, float]:
    """Bytes of what stays on the GPU from the first step to the last, by arithmetic on shapes."""
    modules = adapter.target_modules(transformer, settings)
    trained = adapter.num_parameters(settings, modules)
    return {
        "weights": placed_bytes(transformer, model)[0],
        "adapter": 4.0 * trained,
        "optimizer": float(BYTES_PER_STATE.get(train.optimizer, 8) * trained),  # another: as if it had two moments
        **({"average": 4.0 * trained} if train.ema else {}),
    }


def placed_bytes(transformer: QwenImageTransformer2DModel, model: ModelConfig) -> tuple[float, float]:
    """Bytes of the frozen base's weights: on the GPU at once, and of blocks in the CPU's memory."""
    blocks: Any = transformer.transformer_blocks
    whole, block = weight_bytes(transformer, model), weight_bytes(blocks[-1], model)
    shape = block, len(blocks), model.offload_blocks
    return offload.gpu_bytes(whole - len(blocks) * block, *shape), offload.cpu_bytes(*shape)


def waiting_bytes(run: Request) -> float:
    """Bytes of what lies in the CPU's memory while it is not needed: blocks, and inputs of blocks."""
    blocks = placed_bytes(run.transformer, run.model)[1]
    if not run.train.offload_activations:
        return blocks
    total = int(run.transformer.config["num_layers"])
    kept = sum(_input_bytes(run.transformer, run.model, run.train, pixels) for pixels in run.passes)
    return blocks + offload.activation_bytes(kept, total)


def _input_bytes(
    transformer: QwenImageTransformer2DModel, model: ModelConfig, train: TrainConfig, pixels: int
) -> float:
    """Bytes of the input of a block: the tokens of picture and caption."""
    config = transformer.config
    tokens = train.batch_size * (pixels / qwen_image.PICTURE_MULTIPLE**2 + PROMPT_TOKENS)
    return float(tokens * config["num_attention_heads"] * config["attention_head_dim"] * DTYPES[model.dtype].itemsize)


def block_bytes(transformer: QwenImageTransformer2DModel, model: ModelConfig) -> float:
    """Bytes of one block's weights, not quantised."""
    return float(sum(p.numel() for p in transformer.transformer_blocks[0].parameters()) * DTYPES[model.dtype].itemsize)


def offloaded_bytes(transformer: QwenImageTransformer2DModel, model: ModelConfig, needs: Needs) -> float:
    """On the GPU while training, if the weights, adapter and optimizer stay on the CPU until a block is needed."""
    outside = sum(p.numel() for p in transformer.parameters()) * DTYPES[model.dtype].itemsize
    block = block_bytes(transformer, model)
    outside -= len(transformer.transformer_blocks) * block
    return outside + BLOCKS_AT_HAND * block + needs.parts["activations and gradients"] + CONTEXT_BYTES


def weight_bytes(transformer: nn.Module, model: ModelConfig) -> float:
    """Bytes of the frozen base."""
    each = DTYPES[model.dtype].itemsize
    quantised = sum(layer.weight.numel() for layer in quantised_layers(transformer, model))
    rest = sum(p.numel() for p in transformer.parameters()) - quantised
    return quantised * (QUANTISED[model.quantization] or each) + rest * each


def quantised_layers(transformer: nn.Module, model: ModelConfig) -> list[nn.Linear]:
    """The layers whose weights are stored in fewer bits."""
    if model.quantization == "none":
        return []
    layers = ((name, layer) for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear))
    return [layer for name, layer in layers if not model.stays_whole(name)]


def cast_bytes(transformer: nn.Module, model: ModelConfig) -> float:
    """Bytes of quantised weights that are alive in the model's precision at once: of a layer; with fp8 of a block,
    whose backward pass needs them all."""
    each = DTYPES[model.dtype].itemsize
    if model.quantization == "fp8":
        blocks: Any = transformer.transformer_blocks
        return float(each * sum(layer.weight.numel() for layer in quantised_layers(blocks[0], model)))
    return float(each * max((layer.weight.numel() for layer in quantised_layers(transformer, model)), default=0))


def step_bytes(
    transformer: QwenImageTransformer2DModel,
    model: ModelConfig,
    train: TrainConfig,
    settings: AdapterConfig,
    *pixels: int,
) -> float:
    """The peak of what a step makes of square pictures of so many pixels: activations, and gradients as they come. With
    several numbers there are as many forward passes before the backward pass."""
    sizes, whole = (train.batch_size, *pixels), 0.0
    if train.gradient_accumulation_steps > 1:  # those of the first batch are there while the second one is computed
        modules = adapter.target_modules(transformer, settings)
        whole = 4.0 * adapter.num_parameters(settings, modules)
    kinds = DTYPES[model.dtype], train.gradient_checkpointing, train.offload_activations
    return whole + _carried_on(transformer, *kinds, sizes, settings, backward=True)


def pass_bytes(
    transformer: QwenImageTransformer2DModel, model: ModelConfig, settings: AdapterConfig, batch_size: int, pixels: int
) -> float:
    """The peak of what a forward pass without gradients makes."""
    kinds = DTYPES[model.dtype], False, False
    return _carried_on(transformer, *kinds, (batch_size, pixels), settings, backward=False)


def _carried_on(like: QwenImageTransformer2DModel, *what: Any, backward: bool) -> float:
    """The peak with all blocks: each adds what the fourth adds to the third."""
    settings = replace(what[-1], rank_pattern={})
    three, four = (_peak(shape_of(like), *what[:-1], settings, blocks, backward) for blocks in (3, 4))
    return float(three + (int(like.config["num_layers"]) - 3) * (four - three))


def shape_of(transformer: QwenImageTransformer2DModel) -> str:
    """Its configuration, as JSON, for `few_blocks`."""
    return json.dumps(qwen_image.known_keys(QwenImageTransformer2DModel, transformer.config), sort_keys=True)


@lru_cache(maxsize=64)  # settings that do not change it are asked for again and again
def _peak(
    shape: str,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    offload_activations: bool,
    sizes: tuple[int, ...],
    settings: AdapterConfig,
    blocks: int,
    backward: bool,
) -> int:
    """Peak bytes of a pass on the meta device. sizes: the batch's, and pixels of a picture of each forward pass."""
    transformer = few_blocks(shape, dtype, settings, blocks, torch.device("meta"))
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing(_checkpoint_elsewhere if offload_activations else None)
    transformer.train(backward)
    with fused_attention(), torch.set_grad_enabled(backward), LiveBytes() as counted:
        losses = [_loss(transformer, sizes[0], pixels, backward) for pixels in sizes[1:]]
        if backward:
            torch.stack(losses).sum().backward()
    return counted.peak


def _loss(transformer: Any, batch_size: int, pixels: int, backward: bool) -> Tensor:
    velocity = forward(transformer, batch_size, pixels, of_input=False)
    if not backward:
        return velocity
    return flow.losses(velocity, torch.empty_like(velocity), torch.empty_like(velocity)).mean()


def _checkpoint_elsewhere(block: Any, *inputs: Any) -> Any:
    """As `offload.checkpoint_on_cpu`, where there are no bytes that the CPU could keep."""

    def leave(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        return tensor.shape, tensor.dtype

    def come_back(kept: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(kept[0], dtype=kept[1], device="meta")

    with torch.autograd.graph.saved_tensors_hooks(leave, come_back):
        return checkpoint(block, *inputs, use_reentrant=False)


def few_blocks(
    shape: str,
    dtype: torch.dtype,
    settings: AdapterConfig | None,
    blocks: int,
    device: torch.device,
) -> Any:
    """A transformer of that shape with so many blocks, random weights and, unless `settings` are None, the adapter."""
    options = json.loads(shape) | {"num_layers": blocks}
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


def vae_bytes(base: str, pixels: int) -> tuple[float, float, float, float]:
    """The VAE's weights in fp32, and the peak of what it makes while it encodes and decodes a picture: whole, and in
    tiles."""
    config = qwen_image.part_config(AutoencoderKLQwenImage, base, "vae")
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(**config)
    step, side = 2 ** len(vae.config["temperal_downsample"]), round(pixels**0.5)
    tile = min(side, vae.tile_sample_min_height) // step
    return (
        4.0 * sum(parameter.numel() for parameter in vae.parameters()),
        float(qwen_image.encoding_bytes(vae, side, side)),
        float(qwen_image.decoding_bytes(vae, side // step, side // step)),
        qwen_image.decoding_bytes(vae, tile, tile) + 4.0 * 3 * 4 * pixels,  # the tiles, and the rows joined of them
    )


def ways_to_fit(run: Request) -> list[tuple[list[str], Needs]]:
    """The configuration, and with one saving after another, in the order of what they cost: keys to set, and needs."""
    savings: list[tuple[str, str, dict[str, Any]]] = []
    if not run.train.gradient_checkpointing:
        savings.append(("train.gradient_checkpointing=true", "train", {"gradient_checkpointing": True}))
    if run.train.optimizer != "adamw8bit":
        savings.append(("train.optimizer=adamw8bit", "train", {"optimizer": "adamw8bit"}))
    if run.train.batch_size > 1:
        savings.append(("train.batch_size=1", "train", {"batch_size": 1}))
    if run.adapter.kind == "lora" and run.model.quantization != "nf4":
        savings.append(("model.quantization=nf4", "model", {"quantization": "nf4"}))
    if run.adapter.kind == "lora" and run.model.quantization_skip != (few := qwen_image.LEFT_WHOLE_OF_SMALL):
        text = ",".join(f'"{name}"' for name in few)
        savings.append((f"model.quantization_skip=[{text}]", "model", {"quantization_skip": few}))
    total = int(run.transformer.config["num_layers"])
    for number in (total // 2, total):
        if run.model.offload_blocks < number:
            savings.append((f"model.offload_blocks={number}", "model", {"offload_blocks": number}))
    for side in (768, 512):
        if run.pixels > side**2:
            savings.append(
                (f"data.resolution={side}", "", {"pixels": side**2, "prior_pixels": min(run.prior_pixels, side**2)})
            )
    found: list[tuple[list[str], Needs]] = [([], estimate(run))]
    keys: list[str] = []
    for key, section, change in savings:
        keys = [*(k for k in keys if k.split("=")[0] != key.split("=")[0]), key]
        run = replace(run, **({section: replace(getattr(run, section), **change)} if section else change))
        found.append((keys, estimate(run)))
    return found
