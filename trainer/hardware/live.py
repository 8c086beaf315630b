"""Count the bytes of the tensors that are alive, on the meta device: the peak of real code, without its memory."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

ROUNDED_TO = 512
"""Bytes: the caching allocator's smallest piece."""


class LiveBytes(TorchDispatchMode):
    """Counts, inside, each storage that an operator makes, until it is freed; on devices of one kind.

    What was there before does not count.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.live = self.peak = 0
        self._device, self._seen = device, WeakIdKeyDictionary()

    def _count(self, tensor: Tensor) -> None:
        """Once for each storage."""
        storage = tensor.untyped_storage()
        if tensor.device.type != self._device or storage in self._seen:
            return
        num_bytes = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
        self._seen[storage] = num_bytes
        weakref.finalize(storage, self._free, num_bytes)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):  # not seen yet: it was made outside
                self._seen.setdefault(one.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._count(one)
        return result


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: inputs, output, a number for each row; going back it adds up in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        _sums = query.new_empty(query.shape, dtype=torch.float32)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, torch's attention allocates what a fused kernel does, and computes nothing."""
    functional: Any = nn.functional
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _FusedAttention.apply(
        query, key, value
    )
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before
