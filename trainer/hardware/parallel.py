"""Several processes, as `accelerate launch` starts them: DDP, or parameters sharded over all of them by torch's FSDP2.

Sharded tensors are torch's DTensors. What is saved is always whole, so that a checkpoint does not depend on how many
processes wrote it.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

log = logging.getLogger("trainer")

WAITING = timedelta(hours=6)  # of the others while one process downloads, encodes and predicts


_LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "ncclRemoteError")


def lost_a_process(error: BaseException) -> bool:
    """Whether torch says by this error that it waited for another process in vain."""
    return any(sign in str(error) for sign in _LOST)


def make_accelerator(dtype: str) -> Accelerator:
    """fp16 needs loss scaling; in bf16 the frozen base runs in bf16 and the adapter in fp32, without autocast."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else transformers leaves models empty on other processes
    mixed = "fp16" if dtype == "fp16" and torch.cuda.is_available() else "no"
    # the last block's text side meets no loss: it has parameters without a gradient, which DDP must be told to expect
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        mixed_precision=mixed,
        kwargs_handlers=[unused, InitProcessGroupKwargs(timeout=WAITING)],
        # the loop divides itself: what `accelerate launch` or the environment says must not divide once more
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if not accelerator.is_main_process:
        log.setLevel(logging.WARNING)  # said once is enough
    return accelerator


def problems(dtype: str, quantization: str, optimizer: str) -> list[str]:
    """What is wrong with the settings of `accelerate launch`."""
    found = []
    if _set("ACCELERATE_USE_DEEPSPEED"):
        found.append(
            "accelerate: DeepSpeed is not supported, since it updates before NaN can be looked for; "
            "configs/accelerate/fsdp2.yaml shards as its ZeRO 3 does"
        )
    if _set("ACCELERATE_USE_MEGATRON_LM"):
        found.append("accelerate: Megatron-LM is not supported; take one of configs/accelerate")
    if not uses_fsdp():
        return found
    if "WORLD_SIZE" not in os.environ:
        found.append("accelerate: FSDP needs processes that `accelerate launch` starts, also if it is only one")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        found.append("accelerate: fsdp_version must be 2, as in configs/accelerate/fsdp2.yaml")
    for name, value, good in (
        ("[model] quantization", quantization, ("none",)),
        ("[model] dtype", dtype, ("bf16", "fp32")),
        ("[train] optimizer", optimizer, ("adamw",)),
    ):
        if value not in good:
            found.append(f'{name}: "{value}" cannot be sharded by FSDP; use {" or ".join(good)}')
    return found


def one_device() -> torch.device:
    """The GPU if there is one, else the CPU: for programs of one process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was told to use FSDP."""
    return _set("ACCELERATE_USE_FSDP")


def uses_cpu_offload() -> bool:
    """Whether sharded weights are to stay in the CPU's memory."""
    return uses_fsdp() and _set("FSDP_OFFLOAD_PARAMS")


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def loading_device(device: torch.device) -> torch.device:
    """Where a model is to be loaded: what will be sharded may be too large for one GPU."""
    return torch.device("cpu") if uses_fsdp() else device


def wrap_ddp(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """DDP, where there are several processes. What is frozen is the same everywhere, and is not sent around."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
    placed = len({parameter.device for parameter in module.parameters()}) > 1  # parts of it are to stay on the CPU
    return accelerator.prepare(module, device_placement=[False if placed else None])


def shard(module: nn.Module, device: torch.device) -> None:
    """Replace the parameters by this process's parts, on `device`, or on the CPU if accelerate was told to offload.

    Each item of a ModuleList is gathered when it is needed, and freed again. Mixed precisions are allowed, as
    long as all that is trained has the same.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = CPUOffloadPolicy() if uses_cpu_offload() and device.type != "cpu" else OffloadPolicy()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # none is changed in place
    for block in _blocks(module):
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(module, mesh=mesh, offload_policy=policy)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The items of the outermost ModuleLists."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


@contextmanager
def no_sync(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Gradients stay with each process: there are more to come."""
    if not isinstance(module, FSDPModule):
        with accelerator.no_sync(module):
            yield
        return
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def unshard(module: nn.Module) -> None:
    """Make what was trained whole again, to be read; the module cannot be run any more. By all processes together."""
    for name, parameter in [*module.named_parameters()]:
        if parameter.requires_grad and isinstance(parameter, DTensor):
            parent, _, own = name.rpartition(".")
            module.get_submodule(parent)._parameters[own] = nn.Parameter(parameter.full_tensor())


def unsharded(values: Any) -> Any:
    """The same nested dicts and lists with whole tensors in place of sharded ones. By all processes together."""
    if isinstance(values, dict):
        return {name: unsharded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [unsharded(value) for value in values]
    return values.full_tensor() if isinstance(values, DTensor) else values


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value` sharded as `parameter` is; itself if that is whole, or if it is no tensor of that shape."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a whole state back, sharded as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        index: {
            name: sharded_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})


def rows_of_process(accelerator: Accelerator, count: int) -> list[int]:
    """Which of `count` things this process does: every process as many, so some are done twice where they do not divide
    evenly, because sharded models need all processes in each forward pass."""
    rounds = -(-count // accelerator.num_processes)
    return [(accelerator.process_index + i * accelerator.num_processes) % count for i in range(rounds)]


def collect_rows(accelerator: Accelerator, count: int, rows: list[int], values: Tensor) -> Tensor:
    """`values` (one for each of `rows`, any shape) of all processes, in order: `count` of them, on every process."""
    if accelerator.num_processes == 1:
        return values
    placed = torch.zeros(count, *values.shape[1:], dtype=values.dtype, device=accelerator.device)
    first = accelerator.process_index + accelerator.num_processes * torch.arange(len(rows))
    own = (first < count).tolist()  # not what is done twice
    placed[[row for row, mine in zip(rows, own, strict=True) if mine]] = values.to(accelerator.device)[own]
    return accelerator.reduce(placed, "sum")
