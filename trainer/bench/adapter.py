"""What the adapter costs: kernels, memory traffic, memory and time of one transformer block, with it and without.

The block has the base's shape and random weights, so that nothing is loaded; it is not quantised. All is measured three
times: the base alone (with gradients of its input), the adapter as PEFT computes it, and as `adapter.inject` makes it.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import adapter, plan
from trainer.files import DTYPES
from trainer.hardware import machine, memory
from trainer.plan import Plan

BASE, PEFT, HERE = "base alone", "as PEFT has it", "as it is here"
REPETITIONS = 5
NO_KERNELS = ("aten::empty", "aten::_unsafe_view", "aten::lift_fresh", "aten::detach")  # and all views


def profile(prepared: Plan, device: torch.device) -> dict[str, Any]:
    """`size`: what was measured, in words; `num_layers` with an adapter; and for each way `kernels`, `bytes_moved`,
    `bytes_kept` for the backward pass, and the seconds `forward` and `backward`."""
    run, area = prepared.config, plan.pixels(prepared)
    blocks = {
        way: memory.few_blocks(
            memory.shape_of(prepared.transformer),
            DTYPES[run.model.dtype],
            None if way == BASE else run.adapter,
            1,
            device,
        )
        for way in (BASE, PEFT, HERE)
    }
    blocks[BASE].requires_grad_(False)
    layers = [layer for _, layer in adapter.layers(blocks[PEFT])]
    for layer in layers:
        layer.cast_input_dtype_enabled = True
        vars(layer).pop("forward", None)
    rows = {way: _counts(block, run.train.batch_size, area, way == BASE) for way, block in blocks.items()}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in blocks}
    for _ in range(REPETITIONS + 1):
        for way, block in blocks.items():
            seconds[way].append(_seconds(block, run.train.batch_size, area, way == BASE))
    for way, found in seconds.items():
        forward, backward = (statistics.median(part[1:]) for part in zip(*found, strict=True))
        rows[way] |= {"forward": forward, "backward": backward}
    config = prepared.transformer.config
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    picture = f"{math.isqrt(area)} x {math.isqrt(area)} pixels"
    size = f"a block of width {width} in {run.model.dtype}, batches of {run.train.batch_size} of {picture}"
    return {"size": size, "num_layers": len(layers), "ways": rows}


def report_text(report: dict[str, Any]) -> str:
    base, layers = report["ways"][BASE], report["num_layers"]
    lines = [
        f"{report['size']}, and what each of its {layers} layers with an adapter adds:",
        _line(BASE, base, 1, f"{1e3 * base['forward']:,.1f} ms{1e3 * base['backward']:>12,.1f} ms"),
    ]
    for way in (PEFT, HERE):
        row = report["ways"][way]
        more = {name: row[name] - base[name] for name in base}
        slower = [f"{row[name] / base[name] - 1:+.1%}" for name in ("forward", "backward")]
        lines.append(_line(way, more, layers, f"{slower[0]} in all{slower[1]:>8} in all"))
    return "\n".join([lines[0], " " * 16 + "  kernels  MB moved   MB kept       forward       backward", *lines[1:]])


def _line(way: str, row: dict[str, float], layers: int, seconds: str) -> str:
    megabytes = [row[name] / layers / 1e6 for name in ("bytes_moved", "bytes_kept")]
    return f"{way:<16}{row['kernels'] / layers:>9.1f}{megabytes[0]:>10,.2f}{megabytes[1]:>10,.2f}  {seconds}"


def _counts(block: Any, batch_size: int, pixels: int, of_input: bool) -> dict[str, int]:
    with _Kernels() as kernels:
        with memory.kept_by_autograd(block) as kept:
            velocity = memory.forward(block, batch_size, pixels, of_input=of_input)
        velocity.backward(torch.ones_like(velocity))
    block.zero_grad()
    return {"kernels": kernels.count, "bytes_moved": kernels.num_bytes, "bytes_kept": sum(kept.values())}


class _Kernels(TorchDispatchMode):
    """Counts operators that compute or copy, and the bytes of the tensors that they read and write."""

    count = num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in NO_KERNELS:
            self.count += 1
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.num_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def _seconds(block: Any, batch_size: int, pixels: int, of_input: bool) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    begin = machine.now(block.device)
    velocity = memory.forward(block, batch_size, pixels, of_input=of_input)
    between = machine.now(block.device)
    velocity.backward(torch.ones_like(velocity))
    end = machine.now(block.device)
    block.zero_grad()
    return between - begin, end - between
