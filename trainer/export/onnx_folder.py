"""A folder with the transformer as ONNX, LoRAs folded in, and the command that makes a TensorRT engine of it."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from torch.export import Dim
from tqdm import tqdm

from trainer import qwen_image
from trainer.data.dataset import buckets
from trainer.export.onnx_model import INPUTS, OUTPUT, OnnxTransformer
from trainer.export.request import MERGED_FILE, Request, check_room, record
from trainer.files import new_folder, size, write_json, write_text

OPSET = 18
"""The newest set of operators that all readers of the last years know."""
MODEL_FILE, COMMAND_FILE = "model.onnx", "trtexec.txt"
MOST = {"batch": 64, "height": 2048, "width": 2048, "length": 4096}
"""The dynamic sizes, each from 1: batch, rows and columns of patches, tokens of the prompt. RoPE goes to 4096."""


def problems(resolution: int) -> list[str]:
    """What is missing, or wrong with the arguments."""
    gone = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    found = [f'onnx needs {" and ".join(gone)}: pip install -e ".[onnx]"'] if gone else []
    if not 64 <= resolution <= 4096:
        found.append(f"--resolution must be from 64 to 4096, not {resolution}")
    return found


def export_onnx(request: Request, resolution: int, *, quiet: bool) -> list[str]:
    """Write `request.output`, whole or not at all; what became of it, in words. The transformer must fit into memory.

    ConfigError if the disk has too little room; UserError if the memory has.
    """
    num_bytes = sum(map(request.num_bytes, request.shards()))
    check_room(request.output, 1.05 * num_bytes, "the weights")
    if (free := psutil.virtual_memory().available) < 1.1 * num_bytes:
        raise qwen_image.ModelError(
            f"the transformer takes {size(1.1 * num_bytes)} of memory, and {size(free)} are free: choose --dtype bf16, "
            "or a larger machine"
        )
    multiple = qwen_image.picture_multiple(request.base)
    with new_folder(request.output) as partial:
        save(load(request, num_bytes, quiet=quiet), partial / MODEL_FILE)
        command = trtexec(resolution, multiple, qwen_image.transformer_on_meta(request.base).config)
        write_text(partial / COMMAND_FILE, command)
        if request.parts:
            write_json(partial / MERGED_FILE, record(request))
    return [f"{request.output}: {MODEL_FILE}, its weights ({size(num_bytes)}) beside it, {COMMAND_FILE}", "", command]


def load(request: Request, num_bytes: int, *, quiet: bool) -> QwenImageTransformer2DModel:
    """The transformer with the LoRAs folded in, in memory."""
    transformer = qwen_image.transformer_on_meta(request.base)
    tensors = dict[str, Tensor]()
    with tqdm(total=num_bytes, desc="reading", unit="B", unit_scale=True, disable=quiet or None) as bar:
        for shard in request.shards():
            for name, tensor in request.tensors(shard):
                tensors[name] = tensor
                bar.update(tensor.numel() * tensor.element_size())
    transformer.load_state_dict(tensors, assign=True)
    return transformer.requires_grad_(False).eval()


def save(transformer: QwenImageTransformer2DModel, path: Path) -> None:
    """Write a transformer as ONNX, with its weights in a file beside it. `transformer` is changed by that."""
    model = OnnxTransformer(transformer).eval()
    dims = {name: Dim(name, min=1, max=most) for name, most in MOST.items()}
    batch, height, width, length = dims.values()
    dynamic: dict[str, Any] = {
        "latents": {0: batch, 1: height, 2: width},
        "timestep": {0: batch},
        "prompt_embeds": {0: batch, 1: length},
        "prompt_mask": {0: batch, 1: length},
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            tuple(example(transformer, 2, 4, 6, 12).values()),
            input_names=INPUTS,
            output_names=[OUTPUT],
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)


def example(
    transformer: QwenImageTransformer2DModel, batch: int, height: int, width: int, length: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs of a size, by their names; the last prompt is one token shorter than the others."""
    config, dtype = transformer.config, transformer.dtype
    random = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, max(1, length - 1) :] = False
    return {
        "latents": torch.randn(batch, height, width, config["in_channels"], generator=random).to(dtype),
        "timestep": torch.rand(batch, generator=random).to(dtype),
        "prompt_embeds": torch.randn(batch, length, config["joint_attention_dim"], generator=random).to(dtype),
        "prompt_mask": mask,
    }


def trtexec(resolution: int, multiple: int, config: Mapping[str, Any]) -> str:
    """The command that makes a TensorRT engine for the buckets of a resolution: from their shortest to their longest
    side, best for a square; a picture with its guidance at once; prompts of any length that the pipeline reads.

    multiple: pixels to a patch's side; config: the transformer's."""
    sides = [(height // multiple, width // multiple) for width, height in buckets(resolution, multiple)]
    square = min(sides, key=lambda side: abs(side[0] - side[1]))
    shortest, longest = min(map(min, sides)), max(map(max, sides))
    shapes = {
        "minShapes": _shapes(config, 1, (shortest, shortest), 1),
        "optShapes": _shapes(config, 1, square, 128),
        "maxShapes": _shapes(config, 2, (longest, longest), qwen_image.PROMPT_LIMIT),
    }
    options = [f"--onnx={MODEL_FILE}", "--saveEngine=model.engine", "--stronglyTyped"]
    options += [f"--{name}={shape}" for name, shape in shapes.items()]
    return "trtexec " + " \\\n  ".join(options) + "\n"


def _shapes(config: Mapping[str, Any], batch: int, sides: tuple[int, int], length: int) -> str:
    """As trtexec takes them."""
    found = {
        "latents": (batch, *sides, config["in_channels"]),
        "timestep": (batch,),
        "prompt_embeds": (batch, length, config["joint_attention_dim"]),
        "prompt_mask": (batch, length),
    }
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in found.items())
