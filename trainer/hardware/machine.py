"""The machine that a run is on: whether it has what the configuration asks for, and what a report says of it."""

import importlib.metadata
import platform
import sys
import time
from typing import Any

import psutil
import torch

from trainer import config, qwen_image
from trainer.files import size
from trainer.hardware import memory, parallel
from trainer.hub import sources
from trainer.plan import Plan, memory_request

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def check(plan: Plan, device: torch.device) -> None:
    """ConfigError if the run asks for what this machine lacks, or for models that it can neither find nor fetch;
    `--plan` may be of another machine."""
    run = plan.config
    problems = qwen_image.gpu_problems(run.model, device)
    if device.type != "cuda" and run.train.optimizer == "paged_adamw8bit":
        problems.append(qwen_image.needs_gpu("[train] optimizer", run.train.optimizer, '"adamw" or "adamw8bit"'))
    if device.type == "cuda":
        try:
            qwen_image.set_attention(plan.transformer, run.model.attention)
        except qwen_image.ModelError as error:
            problems.append(str(error))
    on_gpu = device.type == "cuda" and not parallel.uses_cpu_offload()
    there = torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total
    if on_gpu and parallel.uses_fsdp():
        there *= parallel.num_processes()
    resident = memory.resident_bytes(plan.transformer, run.model, run.adapter, run.train)
    waiting = memory.waiting_bytes(memory_request(plan))
    needed = sum(resident.values()) + (0 if on_gpu else waiting)
    if on_gpu and waiting > (total := psutil.virtual_memory().total):
        problems.append(
            f"[model] offload_blocks: {size(waiting)} would lie in the CPU's memory, which has {size(total)}. "
            'Offload fewer blocks, or store them in less: quantization = "nf4"'
        )
    if needed > there:
        what = "the GPU has" if on_gpu else "the CPU has" if device.type == "cuda" else "there is no GPU, the CPU has"
        problems.append(
            f"[model] base, with adapter and optimizer, needs {size(needed)} of memory; {what} {size(there)}. "
            "--plan --vram GB lists settings that need less"
        )
    if problems := [*sources.download_problems(plan.needs), *problems]:
        raise config.ConfigError(problems)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads()}


def now(device: torch.device) -> float:
    """Seconds; on a GPU, when it has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_of_process() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of the process, and of the GPU where there is one."""
    peak = {"process": _peak_of_process()}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak
