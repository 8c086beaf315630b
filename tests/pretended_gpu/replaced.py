"""What of the program and its libraries is replaced on the pretended GPU, and why. All else is the real code.

- Content hashes of hollow files: they would read gigabytes of nothing.
- Threads take turns: what makes tensors fake belongs to one thread.
- Attention allocates what a fused kernel does; torch without CUDA has none for "cuda".
- bitsandbytes' parameters cannot be made from fake tensors by `_make_subclass`; here they get a class of both.
- A module that moves gets new parameters: torch cannot put a fake tensor in the place of another one.
- `torch.tensor` asks for the numbers in a list of tensors where nobody sees it; here they are asked for before.
- The stable loss takes one batch of its sigmas: the others would show nothing new.
- Random starts of experts on the CPU take minutes, for numbers that nobody looks at. Small tensors, whose content is
  known on the GPU, are zero.
- Files of fake tensors, and of more than 64 MB, are written hollow.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from initializers.i2l import initializer
from initializers.i2l.expert import Expert
from tests.pretended_gpu import hollow
from tests.pretended_gpu.device import KNOWN
from trainer import files, validation
from trainer.hardware import threads
from trainer.hardware.live import fused_attention
from trainer.validation import NUM_SIGMAS

HOLLOW_FROM = 64e6  # bytes
_sha256, _save = files.sha256, files.save_file


def _quick_hash(path: Path) -> str:
    if path.suffix != ".safetensors" or not hollow.is_hollow(path):
        return _sha256(path)
    return hashlib.sha256(f"{path.name} {path.stat().st_size}".encode()).hexdigest()


def _save_file(tensors: dict[str, Tensor], path: Any, metadata: dict[str, str] | None = None) -> None:
    real = not any(isinstance(tensor, FakeTensor) for tensor in tensors.values())
    if real and sum(tensor.nbytes for tensor in tensors.values()) < HOLLOW_FROM:
        _save(tensors, path, metadata)
    else:
        hollow.write(Path(path), tensors, metadata)


def _first_batch(weighted_errors: Any) -> Any:
    def errors(*args: Any, chosen: Any = range(NUM_SIGMAS), batch_size: int = NUM_SIGMAS, **options: Any) -> Tensor:
        found = weighted_errors(*args, chosen=chosen[:batch_size], batch_size=batch_size, **options)
        return found[:, :1].expand(-1, len(chosen), -1)

    return errors


@torch.no_grad()
def _finite_start(expert: Expert, _: torch.Generator) -> None:
    for weight in expert.parameters():
        if weight.numel() <= KNOWN:
            weight.zero_()


def _attention(fused: Any) -> Any:
    """Without a gradient there is nothing to keep: the windows of Qwen-VL are thousands."""

    def attention(query: Tensor, *args: Any, **options: Any) -> Tensor:
        return fused(query, *args, **options) if torch.is_grad_enabled() else torch.empty_like(query)

    return attention


class _Turns:
    """A pool of threads without threads."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> "_Turns":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any) -> Any:
        return _Done(work(*args))


class _Done:
    def __init__(self, value: Any):
        self._value = value

    def result(self) -> Any:
        return self._value


class FakeParams4bit(FakeTensor, bitsandbytes.nn.Params4bit):
    """A weight in 4 bits, whose bytes are fake."""

    def __new__(cls, data: Any, requires_grad: bool = False, **state: Any) -> Any:
        made = data.detach()
        made.__class__ = cls
        made._is_param = True
        made.__dict__.update(
            {"blocksize": 64, "compress_statistics": True, "quant_type": "fp4", "quant_state": None, "module": None,
             "quant_storage": torch.uint8, "bnb_quantized": False} | state
        )  # fmt: skip
        return made

    def _quantize(self, device: Any) -> Any:
        weight, state = bitsandbytes.functional.quantize_4bit(
            self.detach().contiguous().to(device),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        own = {name: self.__dict__[name] for name in ("blocksize", "compress_statistics", "quant_type", "module")}
        made = FakeParams4bit(weight, **own, quant_storage=self.quant_storage, quant_state=state, bnb_quantized=True)
        if self.module is not None:
            self.module.quant_state = state
        return made

    @classmethod
    def of_stored(cls, data: Tensor, quantized_stats: Any, device: Any, module: Any = None, **_: Any) -> Any:
        state = bitsandbytes.functional.QuantState.from_dict(qs_dict=quantized_stats, device=device)
        made = cls(data.to(device), blocksize=state.blocksize, compress_statistics=state.nested,
                   quant_type=state.quant_type, quant_state=state, bnb_quantized=True, module=module)  # fmt: skip
        if module is not None:
            module.quant_state = state
        return made


def _apply(module: torch.nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """As torch's own."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            changed, grad = change(parameter), parameter.grad
            if changed is not parameter:
                made = changed if getattr(changed, "_is_param", False) else torch.nn.Parameter(changed)
                module._parameters[name] = made.requires_grad_(parameter.requires_grad)
                made.grad = None if grad is None else change(grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


_tensor = torch.tensor


def _tensor_of(data: Any, **options: Any) -> Tensor:
    if isinstance(data, list):
        data = [x.item() if isinstance(x, FakeTensor) and x.ndim == 0 else x for x in data]
    return _tensor(data, **options)


_make = bitsandbytes.nn.Params4bit.__new__


def _params4bit(cls: Any, data: Any = None, *args: Any, **state: Any) -> Any:
    return FakeParams4bit(data, *args, **state) if isinstance(data, FakeTensor) else _make(cls, data, *args, **state)


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (files, "sha256", _quick_hash),
            (initializer, "file_hashes", lambda one: {"layout_md5": one.path.name}),
            (threads, "ThreadPoolExecutor", _Turns),
            (files, "save_file", _save_file),
            (safetensors.torch, "save_file", _save_file),
            (Expert, "reset_parameters", _finite_start),
            (validation, "weighted_errors", _first_batch(validation.weighted_errors)),
            (torch.nn.Module, "_apply", _apply),
            (torch, "tensor", _tensor_of),
            (bitsandbytes.nn.Params4bit, "__new__", _params4bit),
            (bitsandbytes.nn.Params4bit, "from_prequantized", FakeParams4bit.of_stored),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(fused_attention())
        functional: Any = torch.nn.functional
        attention = _attention(functional.scaled_dot_product_attention)
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attention))
        yield
