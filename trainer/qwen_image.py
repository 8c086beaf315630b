"""All that this project knows of Qwen-Image: load its parts, encode, pack, predict the velocity, sample.

Each part is loaded alone and freed after use, so that text encoder and VAE never share memory with training.
"""

import gc
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage,
    BitsAndBytesConfig,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    TorchAoConfig,
)
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from trainer.errors import UserError
from trainer.files import DTYPES, cache_folder, content_hash, read_header, read_json, size
from trainer.flow import generator
from trainer.hardware import offload
from trainer.hardware.live import LiveBytes
from trainer.hub import sources
from trainer.hub.sources import Need

log = logging.getLogger("trainer")

Dtype = Literal["bf16", "fp16", "fp32"]
Attention = Literal[
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_math",
    "flash_varlen",
    "_flash_varlen_3",
    "flex",
    "xformers",
]
GPU_ATTENTION = ("_native_cudnn", "flash_varlen", "_flash_varlen_3", "flex", "xformers")
EMPTY_PROMPT = " "
"""What guidance leads away from, as in the published examples, and what a picture whose caption is dropped is trained
with: guidance then meets what was trained."""
NAN_ADVICE = "use bf16, not fp16, a lower learning rate, or true_cfg_scale = 1"
PROMPT_LIMIT = int(inspect.signature(QwenImagePipeline.__call__).parameters["max_sequence_length"].default)
"""Tokens of a prompt, with the end of the template, that the pipeline reads unless it is told otherwise: what lies
beyond them is neither trained nor drawn with."""
PICTURE_MULTIPLE = 16
"""Sides of pictures are multiples of this many pixels in the published model: the VAE's step of 8, 2 x 2 in a patch."""


LEFT_WHOLE = ("img_in", "txt_in", "proj_out", "norm_out", "time_text_embed", "img_mod", "txt_mod")
"""What others leave unquantised: what comes in and goes out, and the modulations, which act on every token."""
LEFT_WHOLE_OF_SMALL = ("img_in", "txt_in", "proj_out", "norm_out", "time_text_embed", "transformer_blocks.0.img_mod")
"""What is left where all modulations in bf16 would not fit: they are 6.8 B of 20.4 B parameters."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`[model]`"""

    base: str
    """The model to train on: a folder in diffusers' layout, or a Hugging Face id such as "Qwen/Qwen-Image". "@" and a
    branch, tag or commit may follow the id. "modelscope:Qwen/Qwen-Image" is on ModelScope."""
    dtype: Dtype = "bf16"
    """The precision of the base model's weights and of the computation. The adapter is always in fp32."""
    quantization: Literal["none", "fp8", "int8", "nf4"] = "none"
    """How the frozen transformer's linear layers are stored. int8 and nf4 are computed by bitsandbytes and need a GPU.
    fp8 (e4m3, a scale for each row) is torchao's, and only stored so: each layer is cast to `dtype` when it is needed.
    A base that is stored quantised is loaded as it is."""
    quantization_skip: tuple[str, ...] = LEFT_WHOLE
    """Modules, or parts of modules' names, whose layers stay in `dtype`. With fewer the base is smaller: the
    modulations img_mod and txt_mod are a third of it."""
    keep_quantized: bool = True
    """Keep a base in nf4 or int8 in the user's cache folder after it was quantised once: later starts read that
    instead of the whole base."""
    text_encoder_quantization: Literal["none", "nf4"] = "none"
    """How the text encoder is stored. nf4 makes it fit on small GPUs, with slightly other embeddings: 6.2 GB instead of
    16.6 GB. Without it, it runs on the CPU where the GPU has no room."""
    attention: Attention = "native"
    """Which of diffusers' attention backends is used. "native" lets torch choose. flash_varlen (flash-attn 2),
    _flash_varlen_3 (flash-attn 3) and xformers must be installed first."""
    compile: bool = False
    """Compile each block with torch.compile. It takes minutes at the beginning, then steps are faster. A C++ compiler
    must be installed."""
    offload_blocks: int = 0
    """How many of the transformer's blocks (Qwen-Image has 60) lie in the CPU's memory, and come to the GPU when they
    are needed. A number above means all. Each saves its weights on the GPU and takes as much of the CPU's memory. Steps
    are slower where blocks do not come fast enough. It needs [train] gradient_checkpointing."""

    def problems(self) -> list[str]:
        found = check_base(self.base)
        if self.quantization == "fp8" and importlib.util.find_spec("torchao") is None:
            found.append('quantization: "fp8" needs torchao: pip install -e ".[fp8]"')
        if self.offload_blocks < 0:
            found.append(f"offload_blocks must be at least 0, not {self.offload_blocks}")
        if self.offload_blocks and self.compile:
            found.append("compile does not go with offload_blocks: each block has other weights whenever it is called")
        if self.offload_blocks and self.quantization == "int8":
            found.append('quantization: "int8" does not go with offload_blocks; use "nf4", "fp8" or "none"')
        return found

    def stays_whole(self, module: str) -> bool:
        """Whether a layer of that name is left unquantised; by the rule of diffusers."""
        return any(f"{name}." in f"{module}." for name in self.quantization_skip)


def gpu_problems(model: ModelConfig, device: torch.device) -> list[str]:
    """Settings of the model that need a GPU, where there is none."""
    wanted = [
        ("[model] dtype", model.dtype, ("fp16",), '"fp32" or "bf16"'),
        ("[model] quantization", model.quantization, ("int8", "nf4"), '"fp8" or "none"'),
        ("[model] attention", model.attention, GPU_ATTENTION, '"native"'),
    ]
    if device.type == "cuda":
        return []
    return [needs_gpu(name, value, instead) for name, value, values, instead in wanted if value in values]


def needs_gpu(name: str, value: str, instead: str) -> str:
    return f'{name}: "{value}" needs a CUDA GPU, and there is none here; use {instead}'


class ModelError(UserError):
    """A model folder or id that cannot be used."""


PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_CLASSES = {  # what config.json says
    "transformer": ("_class_name", "QwenImageTransformer2DModel"),
    "vae": ("_class_name", "AutoencoderKLQwenImage"),
    "text_encoder": ("model_type", "qwen2_5_vl"),
}


TEXT_TO_IMAGE = "Qwen/Qwen-Image or Qwen/Qwen-Image-2512"
_CONFIG = "transformer/config.json"
_EDITS = "Qwen-Image-Edit, which is trained on pairs of pictures"
_LAYERED = "Qwen-Image-Layered, which draws several layers at once"
QWEN_IMAGE_21 = "Qwen-Image-2.1, a model of another architecture"
_FAMILY = {
    "2-1": QWEN_IMAGE_21,
    "2512": "Qwen-Image-2512",
    "layered": "Qwen-Image-Layered",
    "edit": "Qwen-Image-Edit",
    "edit-2509": "Qwen-Image-Edit-2509",
    "edit-plus": "Qwen-Image-Edit-2509",
    "edit-plus-2509": "Qwen-Image-Edit-2509",
    "edit-2511": "Qwen-Image-Edit-2511",
    "edit-plus-2511": "Qwen-Image-Edit-2511",
}
"""How Qwen, and the programs that train LoRAs, name the models of the family after "qwen-image-"."""
_MEMBER = re.compile(rf"qwen-?image(?:-({'|'.join(sorted(_FAMILY, key=len, reverse=True))})(?![a-z0-9]))?")
_OTHERS = (  # files of other models of the family, what each says, and what the model is
    ("model_index.json", "_class_name", "QwenImageEditPipeline", _EDITS),
    ("model_index.json", "_class_name", "QwenImageEditInpaintPipeline", _EDITS),
    ("model_index.json", "_class_name", "QwenImageEditPlusPipeline", _EDITS),
    ("model_index.json", "_class_name", "QwenImageLayeredPipeline", _LAYERED),
    ("model_index.json", "_class_name", "QwenImage21Pipeline", QWEN_IMAGE_21),
    (_CONFIG, "zero_cond_t", True, _EDITS),
    (_CONFIG, "use_layer3d_rope", True, _LAYERED),
    (_CONFIG, "use_additional_t_cond", True, _LAYERED),
    (_CONFIG, "_class_name", "QwenImage21Transformer2DModel", QWEN_IMAGE_21),
)


def _other_model(base: str, find: Callable[[str, str], Path | None]) -> list[str]:
    """A problem, if the files of `base` say that it is a model of the family that is trained in another way. find: as
    `sources.cached`."""
    said = {name: _said(base, name, find) for name in ("model_index.json", _CONFIG)}
    for name, key, value, model in _OTHERS:
        if said[name].get(key) == value:
            what = f"{name} says {key} = {json.dumps(value)}"
            return [f"{base} is {model} ({what}), and cannot be trained here: choose {TEXT_TO_IMAGE}"]
    return []


def is_2512(base: str) -> bool:
    """Whether `base` is Qwen-Image-2512, by its name, or that of the model it was made from: in all else its files are
    as those of the first Qwen-Image."""
    made_from = (_said(base, name, sources.cached).get("_name_or_path") for name in ("model_index.json", _CONFIG))
    return any(family_member(str(name)) == "Qwen-Image-2512" for name in (base, *made_from))


def family_member(name: str) -> str | None:
    """The model that a name, an id or a path speaks of last, if it is of the family and not the first."""
    found = _MEMBER.findall(re.sub(r"[^a-z0-9]+", "-", name.lower()))
    return _FAMILY.get(found[-1]) if found else None


def _said(base: str, name: str, find: Callable[[str, str], Path | None]) -> dict[str, Any]:
    """What a JSON file of `base` says; empty if it cannot be had or read, which others tell."""
    try:
        file = find(base, name)
        return {} if file is None else dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def check_base(base: str) -> list[str]:
    """Problems of `base` that can be seen by its name, and the folders in it."""
    folder = Path(base)
    if folder.is_dir():
        if other := _other_model(base, sources.cached):
            return [f"base: {problem}" for problem in other]
        missing = [part for part in ("transformer", "vae", "text_encoder", "tokenizer") if not (folder / part).is_dir()]
        if missing:
            return [f"base: {folder} is not a Qwen-Image folder in diffusers' layout: {', '.join(missing)} missing"]
        return []
    return [f"base: {problem}"] if (problem := sources.problem(base)) else []


def need(base: str, parts: Sequence[str] = PARTS) -> Need:
    """The files of some parts of `base`, to be fetched and checked."""
    files = [f"{part}/*.json" for part in parts]
    files += [f"{part}/{_WEIGHTS[part]}*.safetensors" for part in parts if part in _WEIGHTS]
    extra = ("tokenizer/*.txt", "processor/*.json") if "tokenizer" in parts else ()
    early = partial(_other_model, base, sources.config_file)
    return Need(base, tuple(files), ("model_index.json", *extra), partial(_misfits, base, tuple(parts)), early)


def _misfits(base: str, parts: Sequence[str]) -> list[str]:
    """Parts of a base on this machine that are of another class, or whose weights do not fit their configuration."""
    problems = _other_model(base, sources.cached)
    if problems:
        return problems
    for part, (key, expected) in _CLASSES.items():
        if part not in parts:
            continue
        file = sources.local(base) / part / "config.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"{file}: cannot be read ({error})")
            continue
        if found.get(key) != expected:
            problems.append(f"{file}: {key} is {found.get(key)}, but {expected} is needed")
        elif part == "transformer" and "quantization_config" not in found:
            problems += _misshapen(base)
    return problems


def _misshapen(base: str) -> list[str]:
    """A problem, if tensors of the transformer are missing or have another shape than its configuration says."""
    folder, stored = sources.local(base) / "transformer", dict[str, Any]()
    for path in folder.glob(f"{_WEIGHTS['transformer']}*.safetensors"):
        stored |= read_header(path).shapes
    expected = {name: tuple(tensor.shape) for name, tensor in transformer_on_meta(base).state_dict().items()}
    wrong = [name for name, shape in expected.items() if stored.get(name) != shape]
    if not wrong:
        return []
    return [
        f"{folder}: the weights do not fit config.json: {len(wrong)} of {len(expected)} tensors are missing or of "
        f"another shape, such as {wrong[0]} (weights: {stored.get(wrong[0])}, configuration: {expected[wrong[0]]})"
    ]


ENCODERS = ("vae", "text_encoder", "tokenizer")


def identity(base: str, parts: Sequence[str] = ENCODERS) -> list[str]:
    """What tells a base from others: its commit on Hugging Face, or hashes of the files of these parts. What is encoded
    depends on the encoders only."""
    hub = sources.repository(base)
    if hub is not None and (commit := sources.commit(base)) is not None:
        return [hub.name, commit]
    folder = sources.local(base)
    files = sorted(path for part in parts for path in (folder / part).glob("*.*") if path.is_file())
    return [f"{path.name} {content_hash(path)}" for path in files]


def load_transformer(config: ModelConfig, device: torch.device) -> QwenImageTransformer2DModel:
    """The transformer, frozen, on `device`. ModelError if it lacks a package for `attention`."""
    options: dict[str, Any] = {"torch_dtype": DTYPES[config.dtype], "use_safetensors": True}
    folder, kept = sources.local(config.base) / "transformer", _quantised_folder(config)
    if kept is not None and kept.is_dir():
        log.info("the base in %s is read from %s", config.quantization, kept)
        folder = kept
    elif stored_quantization(config.base) is None:
        options |= _quantising(config)
    if config.quantization != "none":
        options["device_map"] = {"": torch.device("cpu") if config.offload_blocks else device}
    transformer = QwenImageTransformer2DModel.from_pretrained(folder, **options).requires_grad_(False)
    if kept is not None and folder != kept:
        _keep(transformer, kept)
    if config.offload_blocks:
        offload.place(transformer, transformer.transformer_blocks, config.offload_blocks, device)
        transformer.hf_device_map = {"": device}  # where accelerate believes a quantised model to be
    elif config.quantization == "none":
        transformer = transformer.to(device)
    set_attention(transformer, config.attention)
    return transformer.eval()


def _quantising(config: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` must be told to quantise."""
    skip = [*config.quantization_skip]
    match config.quantization:
        case "nf4":
            dtype = DTYPES[config.dtype]
            quantizer: Any = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=skip,
            )
        case "int8":
            quantizer = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        case "fp8":
            from torchao.quantization import Float8WeightOnlyConfig  # an extra, and slow to import

            quantizer = TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=skip)
        case "none":
            return {}
    return {"quantization_config": quantizer}


def _quantised_folder(config: ModelConfig) -> Path | None:
    """Where this base is kept, or to be kept, quantised; None if it is not."""
    if config.quantization not in ("nf4", "int8") or not config.keep_quantized or stored_quantization(config.base):
        return None
    names = [*identity(config.base, ("transformer",)), config.dtype, config.quantization, *config.quantization_skip]
    return cache_folder() / "quantized" / hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]


def _keep(transformer: QwenImageTransformer2DModel, folder: Path) -> None:
    """Write a quantised base for the next start, if there is room for it; it appears whole or not at all."""
    if os.environ.get("RANK", "0") != "0":
        return
    needed = sum(p.numel() * p.element_size() for p in transformer.parameters())
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < 1.1 * needed:
            log.info("the quantised base (%s) is not kept: too little room in %s", size(needed), folder.parent)
            return
        transformer.save_pretrained(partial)
        partial.rename(folder)
        log.info("the quantised base (%s) is kept in %s; you can delete it", size(needed), folder)
    except OSError as error:  # it is quantised again next time
        log.warning("the quantised base could not be kept in %s (%s)", folder, error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def stored_quantization(base: str) -> str | None:
    """How the transformer's files are quantised: "nf4", "int8", or what they call it; None if they are not."""
    file = sources.config_file(base, "transformer/config.json")
    found = {} if file is None else read_json(file).get("quantization_config")
    if not found:
        return None
    if found.get("quant_method") != "bitsandbytes":
        return str(found.get("quant_method"))
    return "nf4" if found.get("load_in_4bit") and found.get("bnb_4bit_quant_type") == "nf4" else "int8"


def set_attention(transformer: QwenImageTransformer2DModel, name: str) -> None:
    """Choose diffusers' attention backend. ModelError if its package is not installed."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    if name == _AttentionBackendRegistry.get_active_backend()[0].value:  # diffusers has one for all models of a process
        return
    try:
        transformer.set_attention_backend(name)
    except (RuntimeError, ImportError) as error:
        raise ModelError(f'[model] attention: "{name}" cannot be used here: {error}') from error


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
    """config.json of a part; empty if `base` is not on this machine and its hub does not answer now."""
    try:
        file = sources.config_file(base, f"{part}/config.json")
    except ValueError as error:
        raise ModelError(f"[model] base: {error}") from error
    return {} if file is None else known_keys(kind, kind.load_config(file.parent))


def known_keys(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the installed class takes of a configuration: published ones hold keys of other versions, too."""
    return {name: value for name, value in config.items() if name in inspect.signature(kind).parameters}


def load_vae(base: str, device: torch.device) -> AutoencoderKLQwenImage:
    """The VAE in fp32: it is small, and its rounding would be trained into the adapter."""
    options: dict[str, Any] = {"torch_dtype": torch.float32, "use_safetensors": True}
    return AutoencoderKLQwenImage.from_pretrained(sources.local(base), subfolder="vae", **options).to(device).eval()


def picture_multiple(base: str) -> int:
    """Width and height of a picture must be a multiple of this many pixels: the VAE's step times the 2x2 patch."""
    vae = part_config(AutoencoderKLQwenImage, base, "vae")
    return 2 * 2 ** len(vae["temperal_downsample"]) if vae else PICTURE_MULTIPLE


def set_up(
    transformer: QwenImageTransformer2DModel,
    config: ModelConfig,
    *,
    gradient_checkpointing: bool,
    offload_activations: bool = False,
) -> None:
    """Switch on gradient checkpointing and compile, as configured. The adapter must be injected before."""
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing(offload.checkpoint_on_cpu if offload_activations else None)
    if config.compile:
        transformer.compile_repeated_blocks()


def free_memory() -> None:
    """Give back the memory of what was deleted, on the CPU and on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits(num_bytes: float, device: torch.device) -> bool:
    """Whether so many bytes fit into what is free of a GPU; on a CPU yes."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    return num_bytes * 1.1 < torch.cuda.mem_get_info(device)[0]


def device_with_room(num_bytes: float, device: torch.device, what: str) -> torch.device:
    """`device`, or the CPU if so many bytes would not fit into what is free of it."""
    if fits(num_bytes, device):
        return device
    log.info("%s (%.1f GB) does not fit on the GPU: it runs on the CPU, which takes longer", what, num_bytes / 1e9)
    return torch.device("cpu")


def picture_processor(folder: Path) -> Any:
    """What cuts pictures up for Qwen2.5-VL, as `folder` says; else with the settings of Qwen/Qwen-Image-Edit."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if (folder / "preprocessor_config.json").is_file():
        return Qwen2VLImageProcessorPil.from_pretrained(folder)
    return Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056)


def text_encoder_bytes(base: str, quantization: str = "none", part: str = "text_encoder") -> float:
    """Bytes of the text encoder's weights: of the files on this machine, else of Qwen2.5-VL-7B in bf16 (8.29 B
    parameters); in nf4 all but the embeddings of tokens and what comes out."""
    folder = sources.folder(base)
    files = [] if folder is None else [path.stat().st_size for path in (folder / part).glob("*.safetensors")]
    return (float(sum(files)) if files else 16.6e9) * (0.375 if quantization == "nf4" else 1)


class TextEncoder:
    """Qwen2.5-VL of a pipeline, which reads prompts, and pictures for i2L and for captions: loaded when it is first
    asked for, once for all who ask before `unload`; on the CPU if it does not fit on `device`. part: "" for a model
    that lies in its folder without a pipeline around it."""

    def __init__(self, base: str, device: torch.device, quantization: str = "none", *, part: str = "text_encoder"):
        self.base, self.part, self._device, self._quantization = base, part, device, quantization
        self._loaded: Any = None

    def identity(self) -> list[str]:
        """What caches know its results by."""
        return identity(self.base) + ([] if self._quantization == "none" else [self._quantization])

    def model(self, dtype: torch.dtype) -> Any:
        """Qwen2_5_VLForConditionalGeneration, in `dtype`."""
        if self._loaded is None or self._loaded.dtype != dtype:
            self.unload()
            needed = text_encoder_bytes(self.base, self._quantization, self.part)
            device = device_with_room(needed, self._device, "the text encoder")
            folder, options = sources.local(self.base), dict[str, Any](dtype=dtype, use_safetensors=True)
            if self._quantization == "nf4":
                options["quantization_config"] = transformers.BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
                )
                options["device_map"] = {"": device}
            loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, subfolder=self.part, **options)
            self._loaded = (loaded if self._quantization == "nf4" else loaded.to(device)).eval()
        return self._loaded

    def unload(self) -> None:
        """Free its memory."""
        self._loaded = None
        free_memory()


def text_encoder(config: ModelConfig, device: torch.device) -> TextEncoder:
    """As configured; nothing is loaded yet."""
    return TextEncoder(config.base, device, config.text_encoder_quantization)


class PromptEncoder:
    """Prompts to `prompt_embeds`, by the pipeline's own code."""

    def __init__(self, text_encoder: TextEncoder, dtype: torch.dtype):
        self._pipeline = QwenImagePipeline(
            scheduler=None,
            vae=None,
            transformer=None,
            text_encoder=text_encoder.model(dtype),
            tokenizer=AutoTokenizer.from_pretrained(sources.local(text_encoder.base), subfolder="tokenizer"),
        )
        self._device = self._pipeline.text_encoder.device

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """prompt_embeds of each prompt: L D without padding, on the CPU, in the text encoder's precision."""
        prompt_embeds, mask = self._pipeline.encode_prompt(
            list(prompts), device=self._device, max_sequence_length=PROMPT_LIMIT
        )
        lengths = [prompt_embeds.shape[1]] * len(prompts) if mask is None else mask.sum(dim=1).tolist()
        return [embeds[:length].cpu() for embeds, length in zip(prompt_embeds, lengths, strict=True)]


def cut_prompts(base: str, texts: Iterable[str]) -> dict[str, str]:
    """Texts of which the text encoder does not read the end -> the last words that it reads."""
    long = [text for text in texts if len(text.encode()) > PROMPT_LIMIT]  # a token is at least one byte
    if not long:
        return {}
    tokenizer, tokens = _tokens(base, long)
    first = max(0, PROMPT_LIMIT - 12)
    cut = {text: found[first:PROMPT_LIMIT] for text, found in tokens if len(found) > PROMPT_LIMIT}
    return {text: tokenizer.decode(end).strip() for text, end in cut.items()}


def prompt_tokens(base: str, texts: Iterable[str]) -> dict[str, int]:
    """Texts -> the number of tokens of each, of which PROMPT_LIMIT are read."""
    return {text: len(found) for text, found in _tokens(base, texts)[1]}


def _tokens(base: str, texts: Iterable[str]) -> tuple[Any, list[tuple[str, list[int]]]]:
    """The base's tokenizer, and the tokens of each text in the pipeline's template, without those of the template."""
    tokenizer = AutoTokenizer.from_pretrained(sources.local(base), subfolder="tokenizer")
    pipeline = QwenImagePipeline(scheduler=None, vae=None, transformer=None, text_encoder=None, tokenizer=tokenizer)
    template, before = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
    after = len(tokenizer(template.split("{}")[1]).input_ids)
    return tokenizer, [(text, tokenizer(template.format(text)).input_ids[before:-after]) for text in texts]


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
    """Normalised latents, B C 1 h w in fp32 on the CPU: the mean of the VAE's posterior, no noise.

    `vae.encode` would keep every convolution's input for a next frame, of which pictures have none.
    """
    latents = vae.quant_conv(vae.encoder(to_pixels(pictures).to(vae.device))).chunk(2, dim=1)[0]
    mean, std = _statistics(vae, latents)
    return ((latents - mean) / std).cpu()


@torch.no_grad()
def decode_latents(vae: AutoencoderKLQwenImage, latents: Tensor) -> list[Image.Image]:
    """Pictures of normalised latents B C 1 h w, one after the other; in tiles where the GPU has no room for a whole
    one. Like `encode_pictures` without what `vae.decode` would keep for a next frame: equal to the bit."""
    whole = fits(decoding_bytes(vae, *latents.shape[-2:]), vae.device)
    mean, std = _statistics(vae, latents.to(vae.device))
    pictures = []
    for one in (latents.to(vae.device).float() * std + mean).split(1):
        if whole:
            pixels = vae.decoder(vae.post_quant_conv(one)).clamp(-1, 1)[:, :, 0]
        else:
            vae.enable_tiling()
            pixels = vae.decode(one).sample[:, :, 0]
        if not bool(pixels.isfinite().all()):
            log.warning("a sample picture has NaN or infinity in it, and is black there; %s", NAN_ADVICE)
        array = ((pixels.nan_to_num(-1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures.append(Image.fromarray(array[0]))
    return pictures


def decoding_bytes(vae: AutoencoderKLQwenImage, height: int, width: int) -> int:
    """The peak of what the VAE makes while it decodes latents of height x width."""
    return _vae_peak(json.dumps(dict(vae.config), default=str), "decode", height, width)


def encoding_bytes(vae: AutoencoderKLQwenImage, height: int, width: int) -> int:
    """The peak of what the VAE makes while it encodes a picture of height x width pixels."""
    return _vae_peak(json.dumps(dict(vae.config), default=str), "encode", height, width)


@lru_cache
def _vae_peak(config: str, way: Literal["encode", "decode"], height: int, width: int) -> int:
    """Counted on the meta device. config: as JSON."""
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(**known_keys(AutoencoderKLQwenImage, json.loads(config)))
        given = torch.empty(1, 3 if way == "encode" else vae.config["z_dim"], 1, height, width)
    with torch.no_grad(), LiveBytes() as counted:
        if way == "encode":
            vae.quant_conv(vae.encoder(given))
        else:
            vae.decoder(vae.post_quant_conv(given)).clamp(-1, 1)
    return counted.peak


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


class _Branches:
    """What the pipeline takes for its transformer: the negative branch of guidance is computed inside `negative`."""

    def __init__(self, transformer: QwenImageTransformer2DModel, negative: Callable[[], AbstractContextManager[Any]]):
        self._transformer, self._negative = transformer, negative

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._transformer(*arguments, **options)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """The pipeline is inside of "cond" or "uncond" while it computes a branch."""
        with self._transformer.cache_context(name), self._negative() if name == "uncond" else nullcontext():
            yield


class Sampler:
    """Draw pictures with the pipeline's own loop, given prompts already encoded."""

    def __init__(self, base: str):
        self._folder = sources.local(base)
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self._folder, subfolder="scheduler")

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
        negative: Callable[[], AbstractContextManager[Any]] | None = None,
        batch_size: int = 1,
        device: torch.device | None = None,
    ) -> Tensor:
        """Normalised latents (N C 1 h w) of a picture of size (width, height) for each prompt (L D), whose noise is
        fixed by its seed. `batch_size` of them are drawn at once, on `device` (default: the transformer's).

        negative: what the negative branch of guidance is computed inside, such as another LoRA on the transformer.
        """
        vae_config = AutoencoderKLQwenImage.load_config(self._folder, subfolder="vae")
        channels, step = vae_config["z_dim"], 2 ** len(vae_config["temperal_downsample"])
        width, height = size[0] // step, size[1] // step
        device, dtype = device or transformer.device, transformer.dtype

        class Pipeline(QwenImagePipeline):  # its own guess is where the weights lie, which may be the CPU
            _execution_device = device

        pipeline = Pipeline(
            scheduler=self._scheduler,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=transformer if negative is None else _Branches(transformer, negative),
        )
        pipeline.set_progress_bar_config(disable=True)

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
