"""Encode pictures for i2L experts: with SigLIP2 and DINOv3, and for Coarse and Fine also with Qwen2.5-VL.

The preprocessing is that of the published pipeline, by PIL and numpy alone. The encoders are loaded one after another,
and each is freed before the next is loaded.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from initializers.i2l.layout import COARSE_TOKENS, FINE_TOKENS, layout_md5
from trainer import qwen_image
from trainer.files import LayoutError, content_hash, read_header, write_json, write_tensors
from trainer.hardware import memory
from trainer.hub import sources
from trainer.hub.sources import Need

SIGLIP_FOLDER, DINOV3_FOLDER = "SigLIP2-G384", "DINOv3-7B"
ENCODER_FILES = (f"{SIGLIP_FOLDER}/model.safetensors", f"{DINOV3_FOLDER}/model.safetensors")
SIGLIP_MD5, DINOV3_MD5 = "469c78b61e3e31bc9eec0d0af3d3f2f8", "5722b5c873720009de96422993b15682"

PUBLISHED_BYTES = (2.32e9, 13.43e9)  # of these files
TOKENS = (24 * 24, 14 * 14 + 5)  # of a picture in each of them
TEXT_TOKENS = {"coarse": 64 + COARSE_TOKENS, "fine": 64 + FINE_TOKENS}  # of a picture in Qwen-VL, with the system text

CROP_SIZE = 1024  # pixels: every picture is first resized to this square, then to the encoder's own size
CHUNK = 8  # pictures that are encoded together
SMALL = 128  # pixels: the largest side of squares that `encode_squares` takes
RESIDUAL_SCALE = 0.05
RESOLUTIONS = {"coarse": 224, "fine": 1024}
"""Side of the squares, in pixels, that Qwen-VL reads for an expert's residual."""

_SIGLIP_MEAN, _SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Pixels = NDArray[np.float32]  # 3 H W


def published_siglip_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=40,
        num_attention_heads=16,
        image_size=384,
        patch_size=16,
        hidden_act="gelu_pytorch_tanh",
    )


def published_dinov3_config() -> DINOv3ViTConfig:
    return DINOv3ViTConfig(
        hidden_size=4096,
        intermediate_size=8192,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_register_tokens=4,
        image_size=224,
        patch_size=16,
        hidden_act="silu",
        use_gated_mlp=True,
        query_bias=False,
        key_bias=False,
        value_bias=False,
        proj_bias=True,
        mlp_bias=True,
    )


# Preprocessing


def cover_crop(picture: Image.Image, size: int) -> Image.Image:
    """The picture, resized (bilinear) so that it covers a square of `size` pixels, and cropped to its middle."""
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def siglip_pixels(picture: Image.Image, image_size: int) -> Pixels:
    """Any picture -> (3, image_size, image_size). SigLIP2's processor: bilinear in 8 bits (not SigLIP's bicubic)."""
    square = cover_crop(picture, CROP_SIZE).resize((image_size, image_size), Image.Resampling.BILINEAR)
    return _normalise(np.asarray(square, dtype=np.float32) / 255, _SIGLIP_MEAN, _SIGLIP_STD)


def dinov3_pixels(picture: Image.Image, image_size: int) -> Pixels:
    """Any picture -> (3, image_size, image_size). DINOv3's processor: bilinear in floating point."""
    square = np.asarray(cover_crop(picture, CROP_SIZE), dtype=np.float32) / 255
    channels = [
        Image.fromarray(square[..., channel]).resize((image_size, image_size), Image.Resampling.BILINEAR)
        for channel in range(3)
    ]
    resized = np.stack([np.asarray(channel, np.float32) for channel in channels], axis=-1)
    return _normalise(resized, _IMAGENET_MEAN, _IMAGENET_STD)


def _normalise(picture: NDArray[Any], mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """(H, W, 3) in [0, 1] -> (3, H, W)"""
    normal = (picture - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def square_pixels(pictures: Tensor, siglip_size: int, dinov3_size: int) -> tuple[Tensor, Tensor]:
    """`siglip_pixels` and `dinov3_pixels` for a batch of small squares, as matrix products, which training can afford.

    pictures: B 3 S S in [0, 1]. Equal to resizing each picture through 1024x1024, except for the rounding to 8 bits.
    """

    def pixels(size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        matrix = _resampling(pictures.shape[-1], size).to(pictures)
        resized = matrix @ pictures @ matrix.T
        return (resized - resized.new_tensor(mean).view(3, 1, 1)) / resized.new_tensor(std).view(3, 1, 1)

    return (
        pixels(siglip_size, _SIGLIP_MEAN, _SIGLIP_STD),
        pixels(dinov3_size, _IMAGENET_MEAN, _IMAGENET_STD),
    )


def _resampling(source: int, target: int) -> Tensor:
    """The matrix (target, source) that resizes a column of `source` pixels to CROP_SIZE and then to `target` pixels:
    bilinear resizing is linear."""
    matrix = np.eye(source, dtype=np.float32)
    for size in (CROP_SIZE, target):
        matrix = np.asarray(Image.fromarray(matrix).resize((source, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(matrix.copy())


# SigLIP2 and DINOv3


def embedding_sizes(encoders: str) -> list[int] | None:
    """Widths of SigLIP2's and DINOv3's embeddings, by the files' headers; None if they are not on this machine."""
    sizes = []
    for file, tensor in zip(ENCODER_FILES, ("head.probe", "embeddings.cls_token"), strict=True):
        if (path := sources.cached(encoders, file)) is None:
            return None
        shapes = read_header(path).shapes
        if tensor not in shapes:
            raise LayoutError(f"{path}: not an encoder in the published layout: it has no {tensor}")
        sizes.append(shapes[tensor][-1])
    return sizes


def embedding_size(encoders: str) -> int | None:
    """Width of an image embedding; None if the encoders are not on this machine."""
    sizes = embedding_sizes(encoders)
    return None if sizes is None else sum(sizes)


def load_siglip(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SiglipVisionModel:
    """SigLIP2 from `folder/model.safetensors` with the published names of tensors.

    Its architecture is that of `config.json` beside it, else the published one. LayoutError if the file does not fit.
    """
    config = _config(folder, SiglipVisionConfig, {SIGLIP_MD5: published_siglip_config})
    return _load(folder, SiglipVisionModel, config, siglip_key, dtype, device)


def load_dinov3(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DINOv3ViTModel:
    """As `load_siglip`."""
    config = _config(folder, DINOv3ViTConfig, {DINOV3_MD5: published_dinov3_config})
    return _load(folder, DINOv3ViTModel, config, dinov3_key, dtype, device)


def save_siglip(model: SiglipVisionModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `folder/model.safetensors` with the published names, in `dtype` if given, and `config.json` beside it."""
    _save(model, folder, siglip_key, dtype)


def save_dinov3(model: DINOv3ViTModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """As `save_siglip`."""
    _save(model, folder, dinov3_key, dtype)


def embed_siglip(model: SiglipVisionModel, pixels: Tensor) -> Tensor:
    """The pooled output, B hidden_size."""
    return model(pixel_values=pixels).pooler_output


def embed_dinov3(model: DINOv3ViTModel, pixels: Tensor) -> Tensor:
    """CLS after the last norm, B hidden_size. The model must be in eval mode: train mode shifts positions at random."""
    return model(pixel_values=pixels).last_hidden_state[:, 0]


def siglip_key(key: str) -> str:
    """transformers' name of a tensor -> the published one."""
    return key.removeprefix("vision_model.")


def dinov3_key(key: str) -> str:
    """transformers' name of a tensor -> the published one."""
    return key.removeprefix("model.") if key.startswith("model.layer.") else key


@torch.no_grad()
def encode_pictures(
    pictures: Sequence[Image.Image],
    encoders: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The image embedding of each picture, B embedding_size in fp32 on the CPU: SigLIP2's pooled output, DINOv3's CLS.

    encoders: a folder or id that holds `SigLIP2-G384` and `DINOv3-7B`, as the published one does.
    """
    parts = []
    for name, file, load, embed, preprocess in (
        ("SigLIP2", ENCODER_FILES[0], load_siglip, embed_siglip, siglip_pixels),
        ("DINOv3", ENCODER_FILES[1], load_dinov3, embed_dinov3, dinov3_pixels),
    ):
        path = sources.locate(str(encoders), file)
        needed = memory.with_activations(num_bytes(path, dtype))
        model = load(path.parent, dtype, qwen_image.device_with_room(needed, torch.device(device), name))
        parts.append(_encode(model, embed, preprocess, pictures, name).cpu())
        del model
        qwen_image.free_memory()
    return torch.cat(parts, dim=1)


def num_bytes(path: Path, dtype: torch.dtype) -> float:
    """Bytes of an encoder's weights in that precision."""
    return float(dtype.itemsize * sum(map(math.prod, read_header(path).shapes.values())))


@torch.no_grad()
def encode_squares(
    pictures: Tensor, encoders: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """`encode_pictures` for many small squares, about 17 times as fast on a CPU. pictures: N 3 S S in uint8."""
    siglip_folder, dinov3_folder = (sources.locate(str(encoders), file).parent for file in ENCODER_FILES)
    parts = []
    for number, (load, folder, embed) in enumerate(
        ((load_siglip, siglip_folder, embed_siglip), (load_dinov3, dinov3_folder, embed_dinov3))
    ):
        model = load(folder, dtype, device)
        size = model.config.image_size
        rows = []
        for batch in pictures.split(64):
            pixels = square_pixels(batch.to(device).float() / 255, size, size)[number]
            rows.append(embed(model, pixels.to(dtype)).float())
        parts.append(torch.cat(rows))
        del model
        qwen_image.free_memory()
    return torch.cat(parts, dim=1)


def are_small_squares(sizes: Collection[tuple[int, int]]) -> bool:
    """Whether pictures of these sizes may go through `encode_squares`."""
    return len(set(sizes)) == 1 and all(width == height <= SMALL for width, height in sizes)


def stacked(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as one tensor, N 3 H W in uint8."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _encode(
    model: Any,
    embed: Callable[[Any, Tensor], Tensor],
    preprocess: Callable[[Image.Image, int], Pixels],
    pictures: Sequence[Image.Image],
    name: str,
) -> Tensor:
    parts = []
    for start in tqdm(range(0, len(pictures), CHUNK), name, unit="batch", leave=False, disable=None):
        pixels = np.stack([preprocess(picture, model.config.image_size) for picture in pictures[start : start + CHUNK]])
        parts.append(embed(model, torch.from_numpy(pixels).to(model.device, model.dtype)).float())
    return torch.cat(parts)


def identity(encoders: str) -> list[str]:
    """What caches know these encoders by: hashes of their files; names of files that are not here yet."""
    return [content_hash(path) if (path := sources.cached(encoders, file)) else file for file in ENCODER_FILES]


def need(encoders: str) -> Need:
    """The files of both encoders, and `config.json` beside them, where there is one."""
    return Need(encoders, ENCODER_FILES, tuple(f"{folder}/config.json" for folder in (SIGLIP_FOLDER, DINOV3_FOLDER)))


def _config(folder: Path, kind: type[PretrainedConfig], published: Mapping[str, Callable[[], Any]]) -> Any:
    if (folder / "config.json").is_file():
        return kind.from_json_file(folder / "config.json")
    md5 = layout_md5(read_header(folder / "model.safetensors").shapes)
    if md5 not in published:
        raise LayoutError(
            f"{folder / 'model.safetensors'}: not the published encoder (layout md5 {md5}, expected "
            f"{', '.join(published)}). Another encoder needs transformers' config.json beside it."
        )
    return published[md5]()


def _load(
    folder: Path,
    kind: type[PreTrainedModel],
    config: Any,
    published_key: Callable[[str], str],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Any:
    path = folder / "model.safetensors"
    shapes = read_header(path).shapes
    with init_empty_weights(include_buffers=False):  # buffers are not in the file: they must be real
        model = kind(config)
    names = {name: published_key(name) for name in model.state_dict()}
    expected = {names[name]: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrong := [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]:
        raise LayoutError(
            f"{path}: does not fit its configuration: {len(wrong)} tensors missing, foreign or of another shape, "
            f"such as {wrong[0]} (file: {shapes.get(wrong[0])}, configuration: {expected.get(wrong[0])})"
        )
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(stored).to(device, dtype) for name, stored in names.items()}
    model.load_state_dict(weights, assign=True)
    model.to(device)  # the buffers
    return model.eval()


def _save(model: Any, folder: Path, published_key: Callable[[str], str], dtype: torch.dtype | None) -> None:
    tensors = {published_key(name): tensor.to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", model.config.to_diff_dict())


# Qwen2.5-VL


def edit_template() -> tuple[str, int]:
    """The prompt template of `QwenImageEditPipeline`, and how many of its first tokens are dropped."""
    from diffusers import QwenImageEditPipeline

    nothing: dict[str, Any] = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
    )
    pipeline: Any = QwenImageEditPipeline(**nothing)
    return pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx


def qwen_vl_residual(
    pictures: Sequence[Image.Image],
    base: str,
    resolution: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The residual at one resolution (224 for Coarse, 1024 for Fine): B num_tokens hidden_size."""
    return qwen_vl_residuals({resolution: pictures}, base, device, dtype)[resolution]


@torch.no_grad()
def qwen_vl_residuals(
    pictures: Mapping[int, Sequence[Image.Image]],
    base: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    text_encoder: qwen_image.TextEncoder | None = None,
) -> dict[int, Tensor]:
    """Resolution -> pictures in, resolution -> residual (B num_tokens hidden_size, fp32, on the CPU) out.

    A residual is 0.05 times the last hidden states of Qwen2.5-VL for the edit template with the picture and an empty
    prompt, without those of the system text. base: folder or id of the Qwen-Image pipeline. text_encoder: the base's,
    if it may be loaded already. It is unloaded in the end.
    """
    from transformers import Qwen2Tokenizer

    text_encoder = text_encoder or qwen_image.TextEncoder(base, torch.device(device))
    folder = sources.local(base)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, subfolder="tokenizer")
    processor = qwen_image.picture_processor(folder / "processor")
    model = text_encoder.model(dtype).model
    template, drop = edit_template()
    before, after = (tokenizer(part).input_ids for part in template.format("").split("<|image_pad|>"))
    result = {}
    for resolution, group in pictures.items():
        states = []
        chunk = max(1, CHUNK * RESOLUTIONS["coarse"] ** 2 // resolution**2)
        what = f"Qwen-VL at {resolution} pixels"
        for start in tqdm(range(0, len(group), chunk), what, unit="batch", leave=False, disable=None):
            squares = [cover_crop(picture, resolution) for picture in group[start : start + chunk]]
            patches = processor(images=squares, return_tensors="pt").to(model.device)
            num_image_tokens = int(patches["image_grid_thw"][0].prod()) // processor.merge_size**2  # equal for all
            hidden = _hidden_states(model, patches, before, num_image_tokens, after)[:, drop:]
            states.append((hidden.float() * RESIDUAL_SCALE).cpu())  # 20 MB a picture at 1024 pixels
        result[resolution] = torch.cat(states)
    del model
    text_encoder.unload()
    return result


def _hidden_states(model: Any, patches: Any, before: list[int], num_image_tokens: int, after: list[int]) -> Tensor:
    """Last hidden states of a batch of pictures, B L D. before, after: ids of the text around each picture."""
    count, device = len(patches["image_grid_thw"]), patches["pixel_values"].device
    ids = before + [model.config.image_token_id] * num_image_tokens + after
    # without token types the picture's tokens would get the positions of plain text
    token_types = [0] * len(before) + [1] * num_image_tokens + [0] * len(after)
    return model(
        input_ids=torch.tensor([ids] * count, device=device),
        mm_token_type_ids=torch.tensor([token_types] * count, device=device),
        pixel_values=patches["pixel_values"].to(model.dtype),
        image_grid_thw=patches["image_grid_thw"],
        use_cache=False,
    ).last_hidden_state
