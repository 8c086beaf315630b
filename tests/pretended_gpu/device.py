"""A GPU that is only pretended: tensors on "cuda" have shape, type and place, but no content and no memory.

Everything on the CPU is real. An operator with a tensor on the GPU, or that makes one there, runs in torch's
FakeTensorMode, which checks shapes, types and devices as a GPU does. What code asks of small tensors on the GPU (masks,
positions, a seed that is verified) is true all the same: their content is computed beside them, on the CPU. Other
numbers are made up: they fall from one half, so that a later one is a little better.
"""

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

CUDA = torch.device("cuda", 0)
KNOWN = 600_000
"""Numbers of a tensor on the GPU whose content is known: a factor of rank 32 of the widest layer has so many."""
FEW = 16
"""Numbers of a tensor that are made up one by one: losses, for instance."""
OTHER = "other"
"""What is in no stage."""
CONTEXT = 0.6e9
"""Bytes that CUDA itself takes."""
LARGE = 20e6
"""Bytes from which an allocation is told."""
ROUNDED_TO = 512
"""Bytes: the caching allocator's smallest piece."""


@dataclass
class Stage:
    """What happened in a stage of a run."""

    peak: int = 0
    absent: int = 0
    """Bytes that were there, too, were the model as deep as the real one."""
    at_peak: dict[str, int] = field(default_factory=dict)
    """Bytes on the GPU by type."""
    large: dict[str, int] = field(default_factory=dict)
    """Allocations on the GPU in fp32, with operator and shape."""
    copies: dict[str, int] = field(default_factory=dict)
    """Bytes between the devices."""
    syncs: int = 0
    """How often the CPU waited for a number from the GPU."""
    times: int = 0


class Account:
    """Bytes that are alive, and the peak in each stage. What is made inside an inner stage counts for that alone."""

    def __init__(self, absent: Callable[[], int]) -> None:
        self.absent = absent
        self.live = Counter[tuple[str, str]]()
        self.stages = dict[str, Stage]()
        self._seen, self._inside = WeakIdKeyDictionary(), [OTHER]

    @property
    def stage(self) -> Stage:
        return self.stages.setdefault(self._inside[-1], Stage())

    def on(self, device: str) -> int:
        return sum(count for (place, _), count in self.live.items() if place == device)

    def copied(self, way: str, num_bytes: int) -> None:
        self.stage.copies[way] = self.stage.copies.get(way, 0) + num_bytes

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self._inside.append(name)
        self.stage.times += 1
        self._look()
        try:
            yield
        finally:
            self.stage.absent = max(self.stage.absent, self.absent())
            self._inside.pop()

    def _look(self) -> None:
        if (now := self.on("cuda")) > self.stage.peak:
            self.stage.peak = now
            self.stage.at_peak = {
                kind: count for (place, kind), count in self.live.items() if place == "cuda" and count
            }

    def add(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        num_bytes = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
        self._seen[storage] = num_bytes
        name = (tensor.device.type, str(tensor.dtype).removeprefix("torch."))
        weakref.finalize(storage, self.live.subtract, {name: num_bytes})
        self.live[name] += num_bytes
        if tensor.device.type == "cuda":
            if num_bytes >= LARGE and tensor.dtype == torch.float32:
                what = f"{operator} {tuple(tensor.shape)}"
                self.stage.large[what] = self.stage.large.get(what, 0) + 1
            self._look()


def _tensors(values: Any) -> list[Any]:
    """Those in nested lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


class PretendedGPU(TorchDispatchMode):
    """Inside, tensors on "cuda" are fake."""

    def __init__(self, absent: Callable[[], int]) -> None:
        super().__init__()
        self.account = Account(absent)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._content = WeakIdKeyDictionary()  # storage of a fake tensor -> storage on the CPU
        self._weights = WeakIdKeyDictionary()  # storages that are, or are made of, nothing but weights
        self._numbers = itertools.count()
        self._noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {})}
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        tensors = _tensors((args, tuple(kwargs.values())))
        device = kwargs.get("device")
        on_gpu = device is not None and torch.device(device).type == "cuda"
        if not on_gpu and not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":
            return self._number(args[0])
        if not on_gpu and not any(x.device.type == "cuda" for x in tensors):
            return self._run_on_cpu(func, args, kwargs, tensors)
        if name == "_to_copy" and device is not None and not on_gpu:
            return self._to_cpu(args[0], kwargs.get("dtype"))
        if name == "copy_" and args[0].device.type == "cpu":
            return args[0].copy_(self._to_cpu(args[1], args[0].dtype))
        return self._run(func, name, args, kwargs, tensors)

    def on_cpu(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU that takes no memory, either: of weights."""
        with self.fake:
            result = torch.empty([*shape], dtype=dtype)
        self._are_weights([result])
        self.account.add(result, "weights")
        return result

    def _are_weights(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._weights[tensor.untyped_storage()] = True

    def _all_weights(self, tensors: list[Tensor]) -> bool:
        return bool(tensors) and all(
            isinstance(x, FakeTensor) and x.untyped_storage() in self._weights for x in tensors
        )

    def _run_on_cpu(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """With weights that are fake. What is made of them alone is fake, too; what is computed with them is noise."""
        if func._schema.is_mutable and not isinstance(args[0], FakeTensor):
            return args[0]  # weights are put into memory of the CPU
        try:
            result = self.fake.dispatch(func, (), args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            return self._computed(func, args, kwargs)
        if self._all_weights(tensors):
            made = _tensors((result,))
            self._are_weights(made)
            for tensor in made:
                self.account.add(tensor, func._schema.name)
            return result
        given = {x.untyped_storage() for x in tensors}
        return tree_map(
            lambda x: (
                self._noisy(x.shape, x.dtype) if isinstance(x, FakeTensor) and x.untyped_storage() not in given else x
            ),
            result,
        )

    def _run(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        try:
            result = self.fake.dispatch(func, (), args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            self.account.stage.syncs += 1
            return self._of_known_shape(func, args, kwargs, tensors)
        made = _tensors((result,))
        if name in ("_to_copy", "copy_") and tensors[-1].device.type != made[0].device.type:
            self.account.copied(f"{tensors[-1].device.type} to {made[0].device.type}", made[0].nbytes)
        if self._all_weights(tensors):
            self._are_weights(made)
        self._follow(func, args, kwargs, tensors, made)
        for tensor in made:
            self.account.add(tensor, name)
        return result

    def _of_known_shape(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What an operator makes whose shape depends on content: on a mask, say, whatever is where it is set."""
        unknown = any(self.content(x) is None for x in tensors)

        def lifted(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            made = self._run(torch.ops.aten._to_copy.default, "index", (value,), {"device": CUDA}, [value])
            if unknown:
                self._content.pop(made.untyped_storage(), None)
            return made

        return tree_map(lifted, self._computed(func, args, kwargs))

    # --- content --------------------------------------------------------------------------------------------

    def content(self, tensor: Tensor) -> Tensor | None:
        """What is in it, if that is known."""
        if not isinstance(tensor, FakeTensor):
            return tensor.detach()
        storage = self._content.get(tensor.untyped_storage())
        if storage is None:
            return None
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _follow(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """Compute the content of what was made or changed, if all that is given is known, and it is small."""
        changed = func._schema.is_mutable
        new = [x for x in made if x.untyped_storage() not in self._content]
        if not changed and (not new or any(x.numel() > KNOWN for x in new)):
            return
        if all(isinstance(x, FakeTensor) is False or x.untyped_storage() in self._content for x in given):
            found = self._computed(func, args, kwargs)
            for fake, real in zip(made, (x for x in tree_leaves(found) if isinstance(x, Tensor)), strict=True):
                if fake.untyped_storage() not in self._content:
                    self._know(fake, real)
        elif changed:
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[position] if position < len(args) else kwargs.get(argument.name)
                    for tensor in tree_leaves(value):
                        if isinstance(tensor, FakeTensor):
                            self._content.pop(tensor.untyped_storage(), None)

    def _know(self, fake: FakeTensor, real: Tensor) -> None:
        own = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
        self._content[fake.untyped_storage()] = own.copy_(real).untyped_storage()

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator on the CPU."""

        def real(value: Any) -> Any:
            if isinstance(value, Tensor):
                if (found := self.content(value)) is None:
                    assert value.is_floating_point(), f"{func} needs the content of a tensor that is not known"
                    found = torch.zeros(value.shape, dtype=value.dtype)
                return found
            return torch.device("cpu") if isinstance(value, torch.device) else value

        return func(*tree_map(real, args), **tree_map(real, kwargs))

    def _number(self, tensor: FakeTensor) -> Any:
        self.account.stage.syncs += tensor.device.type == "cuda"
        if (found := self.content(tensor)) is not None:
            return found.item()
        if tensor.dtype == torch.bool:  # "is it finite?"
            return True
        assert tensor.is_floating_point(), "a whole number is asked of the GPU that is not known"
        return self._made_up()

    def _made_up(self) -> float:
        return 0.5 * 0.999 ** next(self._numbers)

    def _to_cpu(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Its content, or noise; weights stay fake."""
        dtype = dtype or tensor.dtype
        self.account.copied("cuda to cpu", tensor.nbytes)
        if (found := self.content(tensor)) is not None:
            return found.to(dtype, copy=True)
        return self.on_cpu(tensor.shape, dtype) if self._all_weights([tensor]) else self._noisy(tensor.shape, dtype)

    def _noisy(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if dtype == torch.bool:  # "is it finite?"
            return torch.ones(shape, dtype=dtype)
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        if shape.numel() <= FEW:
            return torch.tensor([self._made_up() for _ in range(shape.numel())], dtype=dtype).view(shape)
        while len(self._noise) < shape.numel():
            self._noise = self._noise.repeat(2)
        return self._noise[: shape.numel()].to(dtype, copy=True).view(shape)


class Stream:
    """There is one only, and all is done at once."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in ("wait_stream", "wait_event", "record_event", "synchronize"):
            raise AttributeError(name)
        return lambda *_: None


_current: list[PretendedGPU] = []


def current() -> PretendedGPU:
    return _current[-1]


@contextlib.contextmanager
def pretended(total: float, absent: Callable[[], int] = lambda: 0) -> Iterator[Account]:
    """Inside, there is a GPU with so many bytes. absent: bytes that would be on it, too, were the model as deep as the
    real one; they are not free."""
    gpu = PretendedGPU(absent)

    def free(*_: Any) -> tuple[int, int]:
        return int(total - CONTEXT - gpu.account.on("cuda") - absent()), int(total)

    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "get_device_name": "pretended GPU",
        "get_device_capability": (8, 9),
        "is_bf16_supported": True,
        "manual_seed_all": None,
        "current_stream": Stream(),
        "Stream": Stream(),
        "stream": contextlib.nullcontext(),
    }
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, name, lambda *_, answer=answer, **__: answer) for name, answer in answers.items()
    ]
    real_fork = torch.random.fork_rng
    replaced += [
        (torch.cuda, "mem_get_info", free),
        (torch.cuda, "max_memory_allocated", lambda *_: max(x.peak for x in gpu.account.stages.values())),
        (torch.random, "fork_rng", lambda *_, **__: real_fork([])),
        (FakeTensorMode, "avoid_device_init", True),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor moves to the GPU by an operator that is seen
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(gpu)
        _current.append(gpu)
        stack.callback(_current.pop)
        yield gpu.account
