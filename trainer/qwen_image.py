"""All that this project knows of Qwen-Image: load its parts, encode, pack, predict the velocity, sample.

Each part is loaded alone and let go after use, so that text encoder and VAE never share memory with training.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    BitsAndBytesConfig,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from trainer.files import sample
from trainer.flow import generator

log = logging.getLogger("trainer")

Dtype = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`[model]`"""

    base: str
    """A folder in diffusers' layout, or a Hugging Face id such as "Qwen/Qwen-Image"."""
    dtype: Dtype = "bf16"
    """Of the base model's weights and of the computation. The adapter stays in fp32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Of the frozen transformer's linear layers, by bitsandbytes."""

    def problems(self) -> list[str]:
        return check_base(self.base)


class ModelError(ValueError):
    """A model folder or id that cannot be used."""


def check_base(base: str) -> list[str]:
    """Problems of `base` that can be seen without loading it."""
    folder = Path(base)
    if folder.is_dir():
        missing = [part for part in ("transformer", "vae", "text_encoder", "tokenizer") if not (folder / part).is_dir()]
        if missing:
            return [f"base: {folder} is not a Qwen-Image folder in diffusers' layout: {', '.join(missing)} missing"]
        return []
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        return []  # a Hugging Face id
    return [f'base: there is no folder {folder.absolute()}, and "{base}" is no Hugging Face id (owner/name)']


def identity(base: str) -> list[str]:
    """What the cache takes for `base`: its commit on Hugging Face, or sizes and samples of a folder's encoders."""
    folder = Path(base)
    if not folder.is_dir():
        cached = huggingface_hub.try_to_load_from_cache(base, "vae/config.json")
        return [base, Path(cached).parents[1].name if isinstance(cached, str) else "unknown commit"]
    files = sorted(path for part in ("vae", "text_encoder", "tokenizer") for path in (folder / part).glob("*.*"))
    return [sample(path) for path in files]


def downloads(base: str) -> list[str]:
    """A line on what must be downloaded for `base`; none if it is a folder, or if all of it is in the local cache."""
    if Path(base).is_dir():
        return []
    try:
        huggingface_hub.snapshot_download(base, local_files_only=True)
        return []
    except (huggingface_hub.errors.LocalEntryNotFoundError, OSError):
        pass
    try:
        files = huggingface_hub.HfApi().model_info(base, files_metadata=True, timeout=10).siblings or []
        return [f"{base}: {sum(file.size or 0 for file in files) / 1e9:.1f} GB from Hugging Face"]
    except Exception as error:  # whatever the network does, a plan can be made without this number
        return [f"{base}: not on this machine, and its size cannot be asked for now ({type(error).__name__})"]


def load_transformer(config: ModelConfig, device: torch.device) -> QwenImageTransformer2DModel:
    """The transformer, frozen, on `device`."""
    options: dict[str, Any] = {"torch_dtype": DTYPES[config.dtype]}
    if config.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[config.dtype]
        )
    elif config.quantization == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    transformer = QwenImageTransformer2DModel.from_pretrained(config.base, subfolder="transformer", **options)
    if config.quantization == "none":
        transformer = transformer.to(device)
    return transformer.eval().requires_grad_(False)


def transformer_on_meta(base: str) -> QwenImageTransformer2DModel:
    """The transformer's shape without its weights: no memory, no download beyond `config.json`.

    Where that file cannot be had, the class's own defaults stand in: they are Qwen-Image's.
    """
    config = part_config(QwenImageTransformer2DModel, base, "transformer")
    if not config:
        log.warning("%s cannot be reached: planning with the published shape of Qwen-Image", base)
    with torch.device("meta"):
        return QwenImageTransformer2DModel.from_config(config)


def part_config(kind: Any, base: str, part: str) -> dict[str, Any]:
    """config.json of a part; empty if `base` is a Hugging Face id that is neither cached nor to be had now."""
    if Path(base).is_dir():
        return dict(kind.load_config(base, subfolder=part))
    cached = isinstance(huggingface_hub.try_to_load_from_cache(base, f"{part}/config.json"), str)
    if not cached and not _online(base):
        return {}
    return dict(kind.load_config(base, subfolder=part, local_files_only=cached))


@cache
def _online(base: str) -> bool:
    """Whether Hugging Face answers; asked once, since a download would try for half a minute. ModelError if it has no
    such repository."""
    try:
        huggingface_hub.HfApi().model_info(base, timeout=10)
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ModelError(f'[model] base: Hugging Face has no "{base}" that you may read ({error})') from error
    except Exception:  # whatever the network does, a plan can be made without it
        return False
    return True


def load_vae(base: str, device: torch.device) -> AutoencoderKLQwenImage:
    """The VAE in fp32: it is small, and its rounding would be trained into the adapter."""
    return AutoencoderKLQwenImage.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32).to(device).eval()


def picture_multiple(base: str) -> int:
    """Width and height of a picture must be a multiple of this many pixels: the VAE's step times the 2x2 patch."""
    vae = part_config(AutoencoderKLQwenImage, base, "vae")
    return 2 * 2 ** len(vae["temperal_downsample"]) if vae else 16


def roomy(num_bytes: float, device: torch.device, what: str) -> torch.device:
    """`device`, or the CPU if so many bytes would not fit into what is free of it."""
    if device.type != "cuda" or num_bytes * 1.1 < torch.cuda.mem_get_info(device)[0]:
        return device
    log.info("%s (%.1f GB) does not fit on the GPU: it runs on the CPU, which takes longer", what, num_bytes / 1e9)
    return torch.device("cpu")


def text_encoder_bytes(base: str) -> float:
    """Of its weights: of the files in a folder, else of Qwen2.5-VL-7B in bf16 (8.29 B parameters)."""
    folder = Path(base) / "text_encoder"
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return float(sum(files)) if files else 16.6e9


class PromptEncoder:
    """Prompts to `prompt_embeds`, by the pipeline's own code."""

    def __init__(self, base: str, device: torch.device, dtype: torch.dtype):
        device = roomy(text_encoder_bytes(base), device, "the text encoder")
        text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, subfolder="text_encoder", dtype=dtype)
        self._pipeline = QwenImagePipeline(
            scheduler=None,
            vae=None,
            transformer=None,
            text_encoder=text_encoder.to(device).eval(),
            tokenizer=AutoTokenizer.from_pretrained(base, subfolder="tokenizer"),
        )
        self._device = device

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """prompt_embeds of each prompt: L D without padding, on the CPU, in the text encoder's precision."""
        prompt_embeds, mask = self._pipeline.encode_prompt(list(prompts), device=self._device)
        lengths = [prompt_embeds.shape[1]] * len(prompts) if mask is None else mask.sum(dim=1).tolist()
        return [embeds[:length].cpu() for embeds, length in zip(prompt_embeds, lengths, strict=True)]


def stack_prompts(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Prompts of different lengths as one batch: prompt_embeds B L D, and their mask B L (None if all are as long)."""
    embeds, lengths = pad_sequence([*prompts], batch_first=True), [prompt.shape[0] for prompt in prompts]
    if min(lengths) == max(lengths):
        return embeds, None
    return embeds, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as the VAE takes them: B 3 1 H W in [-1, 1]."""
    array = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).unsqueeze(2) / 127.5 - 1


def _statistics(vae: AutoencoderKLQwenImage, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=like.device).view(shape)
    return mean, torch.tensor(vae.config.latents_std, device=like.device).view(shape)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLQwenImage, pictures: Sequence[Image.Image]) -> Tensor:
    """Normalised latents, B C 1 h w in fp32 on the CPU: the mean of the VAE's posterior, no noise."""
    latents = vae.encode(to_pixels(pictures).to(vae.device)).latent_dist.mean
    mean, std = _statistics(vae, latents)
    return ((latents - mean) / std).cpu()


@torch.no_grad()
def decode_latents(vae: AutoencoderKLQwenImage, latents: Tensor) -> list[Image.Image]:
    """Pictures of normalised latents B C 1 h w."""
    mean, std = _statistics(vae, latents.to(vae.device))
    pixels = vae.decode(latents.to(vae.device).float() * std + mean).sample[:, :, 0]
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def pack(latents: Tensor) -> Tensor:
    """B C 1 h w -> B (h/2 w/2) 4C: each 2x2 patch is one token."""
    batch, channels, _, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of height x width."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, 1, height, width)


def predict_velocity(
    transformer: torch.nn.Module,
    latents: Tensor,
    sigmas: Tensor,
    prompt_embeds: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The transformer's velocity at noisy `latents` (B C 1 h w) and `sigmas` (B), shaped as latents.

    prompt_embeds: B L D. Guidance-distilled variants are not supported: diffusers' class has no such path.
    """
    height, width = latents.shape[-2:]
    tokens = transformer(
        hidden_states=pack(latents),
        timestep=sigmas.to(latents),
        encoder_hidden_states=prompt_embeds.to(latents),
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


class Sampler:
    """Draw pictures with the pipeline's own loop, given prompts already encoded."""

    def __init__(self, base: str):
        self._base = base
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")

    @torch.no_grad()
    def latents(
        self,
        transformer: QwenImageTransformer2DModel,
        prompts: Sequence[Tensor],
        *,
        size: tuple[int, int],
        seeds: Sequence[int],
        num_inference_steps: int,
        true_cfg_scale: float = 1.0,
        negative_prompt: Tensor | None = None,
        batch_size: int = 1,
    ) -> Tensor:
        """Normalised latents (N C 1 h w) of a picture of size (width, height) for each prompt (L D), whose noise is
        fixed by its seed. `batch_size` of them are drawn at once."""
        vae_config = AutoencoderKLQwenImage.load_config(self._base, subfolder="vae")
        channels, step = vae_config["z_dim"], 2 ** len(vae_config["temperal_downsample"])
        width, height = size[0] // step, size[1] // step
        pipeline = QwenImagePipeline(
            scheduler=self._scheduler,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        device, dtype = transformer.device, transformer.dtype

        def embeds(name: str, texts: Sequence[Tensor]) -> dict[str, Tensor]:
            stacked, mask = stack_prompts(texts)
            mask = torch.ones(stacked.shape[:2], dtype=torch.bool) if mask is None else mask
            return {f"{name}_embeds": stacked.to(device, dtype), f"{name}_embeds_mask": mask.to(device)}

        parts = []
        for rows in torch.arange(len(prompts)).split(batch_size):
            noise = [torch.randn(channels, 1, height, width, generator=generator(seeds[i], "sample")) for i in rows]
            settings: dict[str, Any] = embeds("prompt", [prompts[i] for i in rows])
            if true_cfg_scale > 1 and negative_prompt is not None:
                settings |= embeds("negative_prompt", [negative_prompt] * len(rows))
                settings["true_cfg_scale"] = true_cfg_scale
            else:
                settings["true_cfg_scale"] = 1.0
            tokens = pipeline(
                width=width * 8,
                height=height * 8,
                num_inference_steps=num_inference_steps,
                latents=pack(torch.stack(noise)).to(device, dtype),
                output_type="latent",
                **settings,
            ).images
            parts.append(unpack(tokens, height, width))
        return torch.cat(parts)
