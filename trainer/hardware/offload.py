"""Less of the GPU's memory, more of the CPU's: blocks whose weights come when they are needed, activations that wait.

The frozen tensors of an offloaded block lie in one piece of the CPU's memory. Before its forward pass a hook copies
them to the GPU and puts parameters that are views of the copy into the modules; after it a hook puts those on the CPU
back. Nothing is copied to the CPU. Under gradient checkpointing autograd keeps no weights until the backward pass
computes the block again, through the same hooks, and then as long as it needs them. The next block comes while one is
computed. An adapter, which is injected later, stays on the GPU.

diffusers' group offloading is for inference. Checkpointing ends the second computation of a block by an exception, once
it has what it needs; the hook that offloads is not called then, and after a backward pass all blocks lie on the GPU. It
also takes the adapters along, and expects the blocks in the order of the forward pass.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from trainer.hardware import parallel

log = logging.getLogger("trainer")

AT_HAND = 2
"""Offloaded blocks on the GPU at once: one is computed, one on its way."""
PIECE = 2 << 30
"""Bytes that are pinned together, in whole blocks: torch rounds them up to a power of two."""
ALIGNED_TO = 512
"""Bytes: where tensors begin in the memory of a block."""


def problems(blocks: int, *, gradient_checkpointing: bool) -> list[str]:
    """What `[model] offload_blocks` does not go with."""
    found = []
    if blocks and not gradient_checkpointing:
        found.append(
            "[model] offload_blocks saves nothing without [train] gradient_checkpointing = true, since what is kept "
            "for the backward pass includes every weight that was fetched"
        )
    if blocks and (parallel.uses_fsdp() or parallel.num_processes() > 1):
        found.append(
            "[model] offload_blocks is for one process without FSDP; set it to 0: with several GPUs, "
            "configs/accelerate/fsdp2_offload.yaml keeps weights in the CPU's memory"
        )
    return found


def gpu_bytes(outside: float, block: float, total: int, offloaded: int) -> float:
    """Bytes of weights on the GPU. outside: of what is in no block; block: of each of the `total` blocks."""
    offloaded = min(offloaded, total)
    return outside + (total - offloaded + min(offloaded, AT_HAND)) * block


def cpu_bytes(block: float, total: int, offloaded: int) -> float:
    """Bytes of pinned memory that offloaded blocks of so many bytes take."""
    return sum(_rounded(number * block) for number in _together(block, min(offloaded, total)))


def activation_bytes(kept: float, total: int) -> float:
    """Bytes of pinned memory that offloaded activations take. kept: of the inputs of each of the `total` blocks."""
    return total * _rounded(kept)


def _together(block: float, count: int) -> list[int]:
    """The number of blocks in each piece of memory."""
    most = max(1, int(PIECE // block))
    return [min(most, count - start) for start in range(0, count, most)]


def _rounded(num_bytes: float) -> float:
    return 2.0 ** math.ceil(math.log2(num_bytes))


def place(model: nn.Module, blocks: nn.ModuleList, count: int, device: torch.device) -> None:
    """Move a frozen model to `device`, but for `count` of its blocks (all, if they are fewer), which go into the CPU's
    memory; before an adapter is injected. They are spread evenly, so that each has time to come."""
    total = len(blocks)
    count = min(count, total)
    chosen = [block for i, block in enumerate(blocks) if (i + 1) * count // total > i * count // total]
    for child in (*model.children(), *blocks):
        if child is not blocks and child not in chosen:
            child.to(device)
    for block in chosen:
        _replace_4bit(block)
    memories = _memories(max(_size(block) for block in chosen), count, pinned=device.type == "cuda")
    _Fetcher([_Block(block, memory) for block, memory in zip(chosen, memories, strict=True)], device)


def _memories(size: int, count: int, *, pinned: bool) -> Iterator[Tensor]:
    """`count` pieces of memory of `size` bytes, from which a GPU can copy while it computes if they are pinned."""
    for number in _together(size, count):
        try:
            whole = torch.empty(number * size, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            log.warning("memory of the CPU cannot be pinned (%s): blocks come to the GPU more slowly", error)
            whole = torch.empty(number * size, dtype=torch.uint8)
        yield from whole.split(size)


class _Block:
    """A block whose frozen tensors lie one after the other in one piece of memory."""

    def __init__(self, module: nn.Module, memory: Tensor):
        """memory: where the tensors are to lie while the block is not needed."""
        self.module, self.memory = module, memory
        self._slots = list[tuple[dict[str, Any], str, Tensor]]()
        parts = _Parts(memory)
        for store, name, tensor in _tensors(module):
            store[name] = _made_of(tensor, lambda part: parts.next(part).copy_(part))
            self._slots.append((store, name, store[name]))

    def use(self, memory: Tensor) -> None:
        """Compute with a copy of the block's memory, until `put_back`."""
        parts = _Parts(memory)
        for store, name, own in self._slots:
            store[name] = _made_of(own, parts.next)

    def put_back(self) -> None:
        for store, name, own in self._slots:
            store[name] = own


class _Parts:
    """Tensors in a piece of memory."""

    def __init__(self, memory: Tensor):
        self._left = memory

    def next(self, like: Tensor) -> Tensor:
        """The next tensor, which has the shape and type of `like`."""
        found = self._left[: like.nbytes].view(like.dtype).view(like.shape)
        self._left = self._left[_aligned(like.nbytes) :]
        return found


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNED_TO) * ALIGNED_TO


def _tensors(block: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Each parameter and buffer, with the dictionary of its module that holds it."""
    stores = [store for module in block.modules() for store in (module._parameters, module._buffers)]
    return [(store, name, tensor) for store in stores for name, tensor in store.items() if tensor is not None]


def _size(block: nn.Module) -> int:
    """Bytes of the memory of a block."""
    total = 0

    def count(part: Tensor) -> Tensor:
        nonlocal total
        total += _aligned(part.nbytes)
        return part

    for _, _, tensor in _tensors(block):
        _made_of(tensor, count)
    return total


def _made_of(tensor: Tensor, other: Callable[[Tensor], Tensor]) -> Tensor:
    """A frozen tensor of the same kind, made of the others of what it is made of: one tensor, or several if torchao
    has quantised it."""
    made: Any = tensor
    if is_traceable_wrapper_subclass(made):
        names, context = made.__tensor_flatten__()
        inner = {name: other(getattr(made, name)) for name in names}
        made = type(made).__tensor_unflatten__(inner, context, made.size(), made.stride())
    else:
        made = other(made)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


@dataclass(frozen=True)
class _Fetched:
    """A copy of a block's memory on the GPU, which is whole after the event."""

    index: int
    memory: Tensor
    event: Any


class _Fetcher:
    """Hooks that bring each block when it is needed, and the next one meanwhile: forward, or backward.

    Copies are made on a stream of their own, into memory of the stream that computes. So either stream waits for the
    other: for what was computed with that memory before, and for the copy.
    """

    def __init__(self, blocks: list[_Block], device: torch.device):
        self._blocks, self._device = blocks, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last = -1
        self._ahead: _Fetched | None = None
        for index, block in enumerate(blocks):
            block.module.register_forward_pre_hook(partial(self._before, index))
            block.module.register_forward_hook(partial(self._after, index), always_call=True)

    def _before(self, index: int, *_: Any) -> None:
        fetched = self._take(index)
        self._blocks[index].use(fetched.memory)
        last, self._last = self._last, index
        backward = last == index + 1 or last == index > 0
        following = index - 1 if backward else index + 1
        if 0 <= following < len(self._blocks):
            self._ahead = self._fetch(following)

    def _after(self, index: int, *_: Any) -> None:
        self._blocks[index].put_back()

    def _take(self, index: int) -> _Fetched:
        """The block that is ahead; if it is another one, which was not needed after all, fetch that one now."""
        fetched, self._ahead = self._ahead, None
        self._wait(fetched)  # also if it is given back
        if fetched is None or fetched.index != index:
            del fetched
            fetched = self._fetch(index)
            self._wait(fetched)
        return fetched

    def _fetch(self, index: int) -> _Fetched:
        own = self._blocks[index].memory
        memory = torch.empty_like(own, device=self._device)
        if self._stream is None:
            return _Fetched(index, memory.copy_(own), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            memory.copy_(own, non_blocking=True)
        return _Fetched(index, memory, self._stream.record_event())

    def _wait(self, fetched: _Fetched | None) -> None:
        if fetched is not None and fetched.event is not None:
            torch.cuda.current_stream(self._device).wait_event(fetched.event)


def _replace_4bit(block: nn.Module) -> None:
    """bitsandbytes' layers keep their weights for the backward pass where checkpointing cannot see it: as long as the
    first computation's graph lives. Ours does not."""
    for module in [*block.modules()]:
        for name, child in module.named_children():
            if getattr(child.weight if isinstance(child, nn.Linear) else None, "quant_state", None) is not None:
                module._modules[name] = _Linear4bit(child)


class _Linear4bit(nn.Linear):
    """A layer of bitsandbytes in 4 bits, with the same results, whose tensors are all parameters and buffers."""

    absmax: Tensor
    code: Tensor

    def __init__(self, layer: Any):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        state = layer.weight.quant_state
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        self.weight, self.bias = nn.Parameter(layer.weight.detach(), requires_grad=False), layer.bias
        self.register_buffer("absmax", absmax.float())
        self.register_buffer("code", state.code)
        self._state = partial(
            QuantState, shape=state.shape, blocksize=state.blocksize, quant_type=state.quant_type, dtype=state.dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = _Matmul4bit.apply(input, self.bias, self._state, self.weight, self.absmax, self.code)
        return result


class _Matmul4bit(torch.autograd.Function):
    """input times the transposed weight, plus bias."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, state: Callable[..., Any], *quantised: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        weight, absmax, code = quantised
        ctx.save_for_backward(*quantised)
        ctx.state = state
        result: Tensor = matmul_4bit(input, weight.t(), state(absmax=absmax, code=code), bias=bias)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from bitsandbytes.functional import dequantize_4bit

        weight, absmax, code = ctx.saved_tensors
        whole = dequantize_4bit(weight, ctx.state(absmax=absmax, code=code))
        return gradient @ whole.to(gradient.dtype), None, None, None, None, None


def checkpoint_on_cpu(block: Callable[..., Any], *inputs: Any) -> Any:
    """For `enable_gradient_checkpointing`: what is kept, the inputs of a block, waits in the CPU's memory.

    Only that: inside, checkpointing's own hooks tell autograd what to keep.
    """
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(block, *inputs, use_reentrant=False)
