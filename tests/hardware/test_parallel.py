"""Several processes: what `accelerate launch` runs on GPUs, here on CPUs with gloo (accelerate would want MPI)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch import nn

from tests.helpers import BAD_INPUT, FAILED, FINISHED, metrics, run
from trainer import loop
from trainer.hardware import parallel
from trainer.optimizer import TrainConfig

ROOT = Path(__file__).parents[2]
DDP = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
FSDP = {**DDP, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launch(config: Path, output: Path, *settings: str, env: dict[str, str], resume: bool = False) -> list[str]:
    """The command of two processes."""
    port = 20000 + os.getpid() % 20000
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += [str(ROOT / "train.py"), "--config", str(config), "--output", str(output), "--quiet"]
    command += [word for setting in settings for word in ("--set", setting)]
    return [*command, *(["--resume"] if resume else [])]


def both(config: Path, output: Path, *settings: str, env: dict[str, str], resume: bool = False) -> str:
    """Run it; returns what was printed."""
    command = launch(config, output, *settings, env=env, resume=resume)
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("done in ") == 1  # one process speaks
    return done.stderr


def assert_same(one: Path, two: Path) -> None:
    """The same curves and adapters, but for rounding."""
    curves = [metrics(output) for output in (one, two)]
    assert [line["step"] for line in curves[0]] == [line["step"] for line in curves[1]]
    for single, shared in zip(*curves, strict=True):
        assert single.keys() == shared.keys()
        for name in single.keys() - {"seconds"}:
            assert shared[name] == pytest.approx(single[name], rel=1e-4), name
    first, second = (load_file(output / "adapter" / "adapter_model.safetensors") for output in (one, two))
    assert first.keys() == second.keys() and len(first) == 48
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 1e-3 * tensor.norm(), name
    pictures = [sorted(path.name for path in (output / "samples").iterdir()) for output in (one, two)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 9


SETTINGS = ("init.method=gaussian", "validation.prompts=['a', 'b', 'c']", "train.gradient_checkpointing=true")


@pytest.fixture
def single(run_toml: Path, tmp_path: Path) -> Path:
    """One process that takes two batches a step."""
    assert run(run_toml, tmp_path / "one", *SETTINGS, "train.gradient_accumulation_steps=2") == FINISHED
    return tmp_path / "one"


def test_ddp_gives_the_adapter_of_one_process(run_toml: Path, tmp_path: Path, single: Path) -> None:
    both(run_toml, tmp_path / "two", *SETTINGS, env=DDP)
    assert_same(single, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("env", [DDP, FSDP])
def test_a_prior_is_divided_among_processes(env: dict[str, str], run_toml: Path, tmp_path: Path) -> None:
    """Drawn by both processes, or predicted by a base that may be sharded."""
    prediction = ("data.trigger=zorp", "prior.method=prediction")
    drawn = ("prior.method=pictures", "prior.prompts=['a', 'b', 'c']", "prior.num_pictures=3")
    settings = (*SETTINGS, *(drawn if env is DDP else prediction))
    assert run(run_toml, tmp_path / "one", *settings, "train.gradient_accumulation_steps=2") == FINISHED
    both(run_toml, tmp_path / "two", *settings, env=env)
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("env", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_stages_an_average_and_what_validations_measure_are_those_of_one_process(
    env: dict[str, str], run_toml: Path, tmp_path: Path
) -> None:
    run_toml.write_text(run_toml.read_text().replace("steps = 4\n", "", 1))
    stages = "stages=[{steps = 2, sigma_range = [0.5, 1.0], blocks = [0]}, {steps = 2, learning_rate = 5e-4}]"
    measured = ("validation.unrelated_prompts=['a dog', 'a cat', 'a house']", "validation.diagnose=true")
    settings = (*SETTINGS, stages, "train.ema=0.9", "adapter.lora_plus_ratio=2", *measured)
    assert run(run_toml, tmp_path / "one", *settings, "train.gradient_accumulation_steps=2") == FINISHED
    both(run_toml, tmp_path / "two", *settings, env=env)
    assert_same(tmp_path / "one", tmp_path / "two")
    lines = [[json.loads(line) for line in (tmp_path / name / "pictures.jsonl").read_text().splitlines()]
             for name in ("one", "two")]  # fmt: skip
    assert len(lines[0]) == len(lines[1]) > 20
    for one, other in zip(*lines, strict=True):
        assert other.pop("errors") == pytest.approx(one.pop("errors"), rel=1e-4) and one == other
    choices = [json.loads((tmp_path / name / "choice.json").read_text())["step"] for name in ("one", "two")]
    assert choices[0] == choices[1]
    last = [load_file(tmp_path / name / "adapter_last" / "adapter_model.safetensors") for name in ("one", "two")]
    assert all((last[0][name] - last[1][name]).norm() <= 1e-3 * last[0][name].norm() for name in last[0])


@pytest.mark.slow
def test_fsdp_gives_the_adapter_of_one_process_and_goes_on_where_it_stopped(
    run_toml: Path, tmp_path: Path, single: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From one process to two sharded ones, and back."""
    two, accumulated = tmp_path / "two", "train.gradient_accumulation_steps=2"
    assert run(run_toml, two, *SETTINGS, accumulated, "train.steps=1") == FINISHED
    for steps in (2, 3):
        said = both(run_toml, two, *SETTINGS, f"train.steps={steps}", env=FSDP, resume=True)
        assert f"resuming after step {steps - 1}" in said
    assert run(run_toml, two, *SETTINGS, resume=True) == BAD_INPUT
    assert "x processes is 1, the checkpoint has 2" in caplog.text
    assert run(run_toml, two, *SETTINGS, accumulated, resume=True) == FINISHED
    lines = [line for line in metrics(two) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for ours, theirs in zip(lines, [line for line in metrics(single) if "loss" in line], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    first, second = (load_file(output / "adapter" / "adapter_model.safetensors") for output in (single, two))
    assert all((first[name] - second[name]).norm() <= 1e-3 * first[name].norm() for name in first)


@pytest.mark.slow
def test_ddp_with_a_base_in_fp8(run_toml: Path, tmp_path: Path) -> None:
    settings = ("model.dtype=bf16", "model.quantization=fp8", "train.gradient_checkpointing=true", "train.steps=2")
    both(run_toml, tmp_path / "two", *settings, env=DDP)
    assert run(run_toml, tmp_path / "one", *settings, "train.gradient_accumulation_steps=2") == FINISHED
    curves = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.slow
def test_fsdp_with_a_bf16_base_and_accumulation(run_toml: Path, tmp_path: Path) -> None:
    """An adapter in fp32 beside weights in bf16, in one unit."""
    settings = ("model.dtype=bf16", "init.method=gaussian", "train.steps=2")
    both(run_toml, tmp_path / "shards", *settings, "train.gradient_accumulation_steps=2", env=FSDP)
    assert run(run_toml, tmp_path / "whole", *settings, "train.gradient_accumulation_steps=4") == FINISHED
    curves = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("shards", "whole")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)
    found, expected = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("shards", "whole")
    )
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: torch.float32 for name in expected}
    assert all((found[name] - expected[name]).norm() <= 0.05 * expected[name].norm() for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("env", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_when_one_process_dies_the_run_ends_with_a_message(run_toml: Path, tmp_path: Path, env: dict[str, str]) -> None:
    endless = [f"{key}=1000000" for key in ("train.steps", "validation.every", "checkpoint.every")]
    command = launch(run_toml, tmp_path / "out", *endless, env=env)
    process = subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)
    try:
        lines, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 300
        while not lines.exists() or len(lines.read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        workers = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGKILL)
        _, error = process.communicate(timeout=120)
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
    assert process.returncode == FAILED
    assert "another process of this run has ended" in error, error[-3000:]


def test_what_cannot_be_sharded_is_told_with_all_else(
    run_toml: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    settings = ("model.quantization=nf4", "model.dtype=fp16", "train.optimizer=adamw8bit")
    assert run(run_toml, run_toml.parent / "out", *settings, "adapter.target_modules=['attn.to_z']") == BAD_INPUT
    for part in ("DeepSpeed", "fsdp_version", "accelerate launch", '"nf4"', '"fp16"', '"adamw8bit"', "to_z"):
        assert part in caplog.text, part


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_offload"])
def test_the_ready_configurations_are_read_by_accelerate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config_file", f"configs/accelerate/{name}.yaml", "train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("WORLD_SIZE", str(arguments.num_processes))
    assert parallel.uses_fsdp() == (name != "ddp")
    assert parallel.problems("bf16", "none", "adamw") == []
    assert os.environ.get("FSDP_OFFLOAD_PARAMS", "false") == ("true" if name == "fsdp2_offload" else "false")


def test_the_things_of_all_processes_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        device, num_processes = torch.device("cpu"), 3

        def __init__(self, process_index: int):
            self.process_index = process_index

        def reduce(self, tensor: torch.Tensor, _: str) -> torch.Tensor:
            placed.append(tensor)
            return tensor

    for count in (1, 2, 3, 7):
        placed: list[torch.Tensor] = []
        values = torch.arange(1.0, count + 1)[:, None].expand(-1, 2)
        sizes = set()
        for process in range(3):
            rows = parallel.rows_of_process(Fake(process), count)  # type: ignore[arg-type]
            sizes.add(len(rows))
            parallel.collect_rows(Fake(process), count, rows, values[rows])  # type: ignore[arg-type]
        assert len(sizes) == 1  # every process does as many
        assert torch.equal(sum(placed), values)  # type: ignore[arg-type]


def test_whole_tensors_and_plain_modules_are_left_as_they_are() -> None:
    module = nn.Linear(2, 3)
    state = {"a": [module.weight, 3], "b": {"c": module.bias}}
    assert parallel.unsharded(state)["a"][0] is module.weight and parallel.unsharded(state)["b"]["c"] is module.bias
    assert parallel.sharded_like(module.bias, module.weight) is module.bias
    before = dict(module.named_parameters())
    parallel.unshard(module)
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    optimizer = loop.make_optimizer([*module.parameters()], TrainConfig())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    again = loop.make_optimizer([*module.parameters()], TrainConfig())
    parallel.load_optimizer(again, optimizer.state_dict())
    assert torch.equal(again.state[module.weight]["exp_avg"], optimizer.state[module.weight]["exp_avg"])
