"""Whether a machine can train: what it has, a few steps of the miniature in each precision, a block of the real width.

python -m trainer.doctor

prints a page that can be pasted into an issue. Each run is a process of its own: if one crashes, the rest goes on.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from trainer.cli import guarded

ROOT = Path(__file__).parents[1]
MINIATURE = Path("configs/creatures.toml")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME", "HF_HUB_OFFLINE", "ACCELERATE_USE_CPU")
STEPS = 6
RUN = (
    f"train.steps={STEPS}", f"validation.every={STEPS}", f"checkpoint.every={STEPS // 2}", "init.i2l.strength=1.0",
    "validation.num_inference_steps=4", "validation.num_pictures=2", "train.gradient_checkpointing=true",
)  # fmt: skip
TOLERANCE = {"bf16": 0.03, "fp8": 0.06, "int8": 0.06, "nf4": 0.15}
"""How far a loss may be from that of the CPU in fp32: about twice what rounding the miniature's weights costs."""
LARGEST_ERROR = 1e-5
RESUMED = 1e-3
"""How far an adapter may be from one that was not stopped, beside its size."""
LIMIT = 600  # seconds of a run


@dataclass
class Page:
    """What is found, said line by line as it comes."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def say(self, line: str = "") -> None:
        self.lines.append(line)
        print(line, flush=True)

    def heading(self, text: str) -> None:
        self.say(f"\n## {text}\n")

    def row(self, name: str, value: object) -> None:
        self.say(private(f"- {name}: {value}"))

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.say(f"- **{text}**")

    def text(self) -> str:
        head = [f"- {problem}" for problem in self.problems] or ["- nothing that was tried failed"]
        return "\n".join(["# Doctor", "", *head, *self.lines, ""])


def private(text: str) -> str:
    """Without the user's name in paths."""
    return text.replace(str(Path.home()), "~")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.doctor",
        description="Look at the machine, train the miniature for a few steps in each precision (a minute or two), "
        "time a block of the real width, and print a page that can be pasted into an issue.",
    )
    parser.add_argument("--quick", action="store_true", help="only look at the machine: no runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page there, too, problems first")
    options = parser.parse_args(arguments)
    failed = False

    def program() -> None:
        nonlocal failed
        page = Page()
        try:
            examine(page, quick=options.quick)
        finally:  # after Ctrl-C, what is known so far
            page.heading("In short")
            for line in page.problems or ["nothing that was tried failed"]:
                page.say(f"- {line}")
            if options.output:
                options.output.write_text(page.text(), encoding="utf-8")
        failed = bool(page.problems)

    return guarded(program) or int(failed)


def examine(page: Page, *, quick: bool) -> None:

    page.say("# Doctor")
    look_at_machine(page)
    look_at_packages(page)
    if quick:
        return
    from trainer.hardware import parallel

    device = parallel.one_device()
    if (ROOT / MINIATURE).exists() and (ROOT / "demo" / "model").exists():
        try_miniature(page, device)
    else:
        page.heading("The miniature")
        page.row("not tried", f"{MINIATURE} and demo/ are not here: run this from a clone of the repository")
    time_block(page, device)


# --- what the machine has ------------------------------------------------------------------------------------------


def look_at_machine(page: Page) -> None:
    import psutil
    import torch

    from trainer.files import cache_folder, size

    page.heading("Machine")
    page.row("system", platform.platform())
    page.row("memory", f"{size(psutil.virtual_memory().total)}, {size(psutil.virtual_memory().available)} free")
    page.row("cores", os.cpu_count())
    for name, folder in (("models", _hub_cache()), ("own cache", cache_folder()), ("this folder", Path.cwd())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        page.row(f"disk of {name} ({folder})", f"{size(shutil.disk_usage(there).free)} free")
    for name in VARIABLES:
        if name in os.environ:
            page.row(name, os.environ[name])
    if not torch.cuda.is_available():
        page.row("GPU", _why_no_gpu(torch))
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"{properties.major}.{properties.minor}"
        page.row(
            f"GPU {number}", f"{properties.name}, {size(total)}, {size(free)} free, compute capability {capability}"
        )
        if properties.major < 8:
            page.problem(f"GPU {number} computes bf16 slowly or not at all: it is older than compute capability 8.0")
        if free < 0.8 * total:
            page.problem(f"GPU {number}: other programs hold {size(total - free)}; `nvidia-smi` names them")


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _why_no_gpu(torch: Any) -> str:
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA. With an NVIDIA card, install torch from https://pytorch.org"
    return "none that torch can use: look whether `nvidia-smi` shows a card, and whether its driver is new enough"


def look_at_packages(page: Page) -> None:
    import torch

    from trainer import qwen_image
    from trainer.hardware import machine

    page.heading("Packages")
    for name, version in machine.versions().items():
        page.row(name, version)
    page.row("CUDA of torch", torch.version.cuda or "none")
    page.row("bitsandbytes", _bitsandbytes(page))
    transformer: Any = qwen_image.QwenImageTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=32, axes_dims_rope=(8, 12, 12)
    )
    works, lacks = [], []
    for name in get_args(qwen_image.Attention):
        if name in qwen_image.GPU_ATTENTION and not torch.cuda.is_available():
            lacks.append(f"{name} (no GPU)")
            continue
        try:
            qwen_image.set_attention(transformer, name)
            works.append(name)
        except qwen_image.ModelError as error:
            lacks.append(f"{name} ({str(error).split(': ', 2)[-1].splitlines()[0][:80]})")
    page.row("attention that works", ", ".join(works))
    page.row("attention that does not", "; ".join(lacks) or "none")


def _bitsandbytes(page: Page) -> str:
    import torch

    try:
        import bitsandbytes
        from bitsandbytes.functional import quantize_4bit
    except Exception as error:  # it looks for CUDA's libraries at its import, and may fail in any way
        page.problem(f"bitsandbytes cannot be imported: {str(error).splitlines()[0]}; pip install -U bitsandbytes")
        return "cannot be imported"
    if not torch.cuda.is_available():
        return f"{bitsandbytes.__version__}; nf4 and int8 need a CUDA GPU"
    try:
        quantize_4bit(torch.randn(64, 64, device="cuda", dtype=torch.bfloat16), quant_type="nf4")
    except Exception as error:
        page.problem(
            f"bitsandbytes does not work on this GPU: {str(error).splitlines()[0]}; `python -m bitsandbytes` says more."
            ' Until then, use [model] quantization = "fp8" or "none" and [train] optimizer = "adamw"'
        )
    return str(bitsandbytes.__version__)


# --- a few steps of the miniature ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A run of the miniature. `error`: the last lines of its log, if it failed."""

    seconds: float
    losses: tuple[float, ...] = ()
    seed_error: float = 0.0
    black: bool = False
    error: str = ""


def try_miniature(page: Page, device: Any) -> None:
    """Each precision for a few steps, beside the CPU in fp32; and a run that is stopped and resumed."""
    page.heading("The miniature, a few steps in each precision")
    page.say("| run | seconds | held-out loss before, after | beside fp32 on the CPU | seed's largest error | |")
    page.say("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        reference = run_miniature(Path(folder) / "fp32", {"model.dtype": "fp32"}, on_cpu=True)
        _tell(page, "fp32, CPU", reference, None)
        if reference.error:
            return
        for name, options in variants(device):
            outcome = run_miniature(Path(folder) / name, options)
            _tell(page, f"{name}, {str(device).upper()}", outcome, reference, TOLERANCE[name])
        page.say()
        if device.type == "cpu":
            page.row("not tried", "nf4 and int8, which need a CUDA GPU")
        _try_resume(page, Path(folder))


def variants(device: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """What can be tried on the device: name, and keys to set."""
    import importlib.util

    yield "bf16", {"model.dtype": "bf16"}
    for name in ("nf4", "int8", "fp8"):
        if (name == "fp8" and importlib.util.find_spec("torchao")) or (name != "fp8" and device.type == "cuda"):
            keep = {} if name == "fp8" else {"model.keep_quantized": "false"}
            yield name, {"model.dtype": "bf16", "model.quantization": name, **keep}


def run_miniature(
    output: Path, options: Mapping[str, str], *, on_cpu: bool = False, more: Sequence[str] = ()
) -> Outcome:
    """train.py in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / MINIATURE), "--quiet"]
    command += ["--init", "i2l", "--output", str(output), *more]
    for change in (
        *RUN,
        f"data.cache={json.dumps(str(output.parent / 'cache'))}",
        *(f"{key}={value}" for key, value in options.items()),
    ):
        command += ["--set", change]
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(time.perf_counter() - began, error=f"not done after {LIMIT} s")
    seconds = time.perf_counter() - began
    if done.returncode:
        return Outcome(seconds, error=" ".join(done.stderr.split("\n")[-4:]).strip() or f"exit code {done.returncode}")
    return _read(output, seconds)


def _read(output: Path, seconds: float) -> Outcome:
    import numpy as np
    from PIL import Image

    report = json.loads((output / "run.json").read_text(encoding="utf-8"))
    samples = [Image.open(path) for path in sorted((output / "samples").glob("*.png"))]
    black = not samples or any(np.asarray(sample.convert("L")).max() < 8 for sample in samples)
    losses = tuple(float(values["val_loss"]) for values in report["validations"])
    return Outcome(seconds, losses, float(report["init"]["applied"]["largest_error"]), black)


def _tell(page: Page, name: str, outcome: Outcome, reference: Outcome | None, tolerance: float = 0.0) -> None:
    if outcome.error:
        page.say(f"| {name} | {outcome.seconds:.0f} | | | | failed |")
        page.problem(f"{name}: {private(outcome.error)}")
        return
    wrong = []
    if outcome.seed_error > LARGEST_ERROR:
        wrong.append(f"the seed is off by {outcome.seed_error:.0e}")
    if outcome.black:
        wrong.append("its samples are black")
    apart = 0.0
    if reference is not None:
        pairs = zip(outcome.losses, reference.losses, strict=True)
        differences = [abs(own / other - 1) for own, other in pairs]
        apart = max(differences) if all(map(math.isfinite, differences)) else math.inf
        if apart > tolerance:
            wrong.append(f"its loss is {apart:.1%} from the CPU's, more than {tolerance:.0%}")
    losses = ", ".join(f"{loss:.4f}" for loss in outcome.losses)
    beside = "" if reference is None else f"{apart:.1%} (at most {tolerance:.0%})"
    told = "wrong" if wrong else "good"
    page.say(f"| {name} | {outcome.seconds:.0f} | {losses} | {beside} | {outcome.seed_error:.0e} | {told} |")
    for what in wrong:
        page.problem(f"{name}: {what}")


def _try_resume(page: Page, folder: Path) -> None:
    """A run of half the steps, resumed to all of them, is the run without a stop."""
    options = {"model.dtype": "bf16"}
    half = run_miniature(folder / "resumed", {**options, "train.steps": str(STEPS // 2)})
    whole = half if half.error else run_miniature(folder / "resumed", options, more=["--resume"])
    if whole.error:
        page.problem(f"resuming: {private(whole.error)}")
        return
    files = [folder / name / "adapter" / "adapter_model.safetensors" for name in ("bf16", "resumed")]
    if not files[0].exists():
        return
    apart, name = _apart(*files), "stopped after half the steps and resumed"
    if apart == 0:
        page.row(name, "the same adapter, to the bit")
    elif apart < RESUMED:
        page.row(name, f"the same adapter but for {apart:.0e}: a GPU adds up in another order each time")
    else:
        page.problem(f"{name}: the adapter is {apart:.0e} from the one that was not stopped")


def _apart(one: Path, other: Path) -> float:
    """How far two adapters are from each other, beside the size of the first."""
    from safetensors.torch import load_file

    a, b = load_file(one), load_file(other)
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    return (difference / sum(float(x.double().square().sum()) for x in a.values())) ** 0.5


# --- a block of the real width -------------------------------------------------------------------------------------


def time_block(page: Page, device: Any) -> None:
    """One block of the 60, forward and backward with a LoRA in bf16."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    from trainer.adapter import AdapterConfig
    from trainer.bench import full_size
    from trainer.files import size
    from trainer.hardware import machine, memory

    side = 1024 if device.type == "cuda" else 256
    page.heading(f"One block of the real width at {side} x {side} pixels, in bf16")
    try:
        with torch.device("meta"):
            like = QwenImageTransformer2DModel(num_layers=1)
        block = memory.few_blocks(memory.shape_of(like), torch.bfloat16, AdapterConfig(rank=16), 1, device)
        block.enable_gradient_checkpointing()

        def step() -> float:
            began = machine.now(device)
            memory.forward(block, 1, side * side, of_input=False).float().square().mean().backward()
            return machine.now(device) - began

        seconds = statistics.median([step() for _ in range(4)][1:])
        rate = full_size.matmul_rate(device)
    except RuntimeError as error:
        page.problem(f"a block of the real width: {str(error).splitlines()[0]}")
        return
    page.row(
        "forward, and backward with checkpointing", f"{seconds:.3g} s; for 60 blocks about {60 * seconds:.2g} s a step"
    )
    page.row("a plain product in bf16", f"{rate / 1e12:.3g} TFLOP/s")
    if device.type == "cuda":
        page.row("peak on the GPU", size(torch.cuda.max_memory_allocated(device)))
    else:
        page.row("not tried", "1024 x 1024, nf4, int8: there is no GPU")


if __name__ == "__main__":
    sys.exit(main())
