"""Whole runs on a tiny model: the same result whatever happens on the way, and nothing left half done."""

import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import initializers
import initializers.random
import trainer.files
import trainer.page
from tests import tiny
from tests.helpers import (
    BAD_INPUT,
    FAILED,
    FINISHED,
    INTERRUPTED,
    adapter_bytes,
    files,
    kill_me,
    killed,
    metrics,
    run,
)
from trainer import adapter, checkpoint, diagnosis, qwen_image, tracking, validation
from trainer import objective as program
from trainer.adapter import InitContext, Seed
from trainer.draw import __main__ as draw
from trainer.export import result as export
from trainer.formats import read_lora
from trainer.objective import LoraObjective
from trainer.plan import Plan, load_config, prepare
from trainer.plan_words import plan_text
from trainer.qwen_image import TextEncoder

PLAIN = ("validation.prompts=[]",)  # without sample pictures, where they do not matter


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """A setting: runs that share it encode once."""
    return f"data.cache={tmp_path / 'shared cache'}"


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object], micro_step: int = 0) -> None:
    real = LoraObjective.loss

    def loss(self: LoraObjective, now: int, micro: int) -> Any:
        if (now, micro) == (step, micro_step):
            action()
        return real(self, now, micro)

    monkeypatch.setattr(LoraObjective, "loss", loss)


def make_plan(config: Path, *overrides: str) -> Plan:
    overrides = (f"output={config.parent / 'never made'}", *overrides)
    settings, start = load_config(config, [*overrides], initializers)
    return prepare(settings, start, resume=False)


# --- the same bytes ---------------------------------------------------------------------------------------


def test_two_runs_are_bit_identical(run_toml: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.rand(5 if name == "a" else 3)  # whatever the global random state may be
        assert run(run_toml, tmp_path / name) == FINISHED
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    for name in sorted(file for file in files(tmp_path / "a") if file.endswith(".png")):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    values = [[{**line, "seconds": 0} for line in metrics(tmp_path / name)] for name in ("a", "b")]
    assert values[0] == values[1]
    assert run(run_toml, tmp_path / "c", "seed=1") == FINISHED
    assert adapter_bytes(tmp_path / "c") != adapter_bytes(tmp_path / "a")


COURSES = {
    "plain": (),
    "accumulation": ("train.gradient_accumulation_steps=2", "data.caption_dropout=0.5", "train.lr_schedule=cosine"),
    "adapter dropout": ("adapter.dropout=0.3", "train.warmup_steps=5", "train.lr_schedule=linear"),
    "dora": ("adapter.use_dora=true", "adapter.use_rslora=true", "adapter.alpha=8", "init.method=gaussian"),
    "8 bit": ("train.optimizer=adamw8bit", "flow.sigma_sampling=resolution_shift"),
    "checkpointing": ("train.gradient_checkpointing=true", "adapter.dropout=0.3"),
    "Muon": ("train.optimizer=torch.optim.Muon", "train.learning_rate=0.01", "train.ema=0.9"),
    "Prodigy": ("train.optimizer=prodigyopt.Prodigy", "train.learning_rate=1", "train.optimizer_options={d_coef = 2}"),
    "CAME": ("train.optimizer=pytorch_optimizer.CAME", "adapter.lora_plus_ratio=4", "flow.loss_weighting=bell"),
}


@pytest.mark.parametrize(
    "course",
    [name if name == "plain" else pytest.param(name, marks=pytest.mark.slow) for name in COURSES],
)
def test_ten_and_ten_steps_are_twenty(
    course: str, run_toml: Path, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*PLAIN, *COURSES[course], cache, "train.steps=20", "checkpoint.every=7", "validation.every=1000")
    assert run(run_toml, tmp_path / "through", *settings) == FINISHED
    with monkeypatch.context() as patch:
        before_step(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(run_toml, tmp_path / "halves", *settings) == INTERRUPTED
    assert not (tmp_path / "halves" / "adapter").exists()
    saved = checkpoint.latest(tmp_path / "halves" / "checkpoints")
    assert saved is not None and saved.step == 10
    assert run(run_toml, tmp_path / "halves", *settings, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "halves") == adapter_bytes(tmp_path / "through")
    through, halves = ([{**line, "seconds": 0} for line in metrics(tmp_path / name)] for name in ("through", "halves"))
    assert halves == through and [line["step"] for line in through] == [0, *range(1, 21), 20]


def test_validation_does_not_disturb_training(run_toml: Path, tmp_path: Path, cache: str) -> None:
    settings = ("train.steps=4", "adapter.dropout=0.2")
    for name, more in (("every", "validation.every=1"), ("never", "validation.every=1000")):
        assert run(run_toml, tmp_path / name, *settings, cache, more) == FINISHED
    assert adapter_bytes(tmp_path / "every") == adapter_bytes(tmp_path / "never")
    prompts = f'validation.prompts=["{"a very long prompt " * 9}", "two"]'  # encoded anew, together with the captions
    assert run(run_toml, tmp_path / "prompts", *settings, prompts) == FINISHED
    assert adapter_bytes(tmp_path / "prompts") == adapter_bytes(tmp_path / "never")
    counts = [sum("val_loss" in line for line in metrics(tmp_path / name)) for name in ("every", "never")]
    assert counts == [5, 2]


def test_a_loss_is_a_function_of_step_and_micro_step(run_toml: Path, tiny_base: Path) -> None:
    plan = make_plan(run_toml, "adapter.dropout=0.5", "data.caption_dropout=0.5")
    transformer = qwen_image.load_transformer(plan.config.model, torch.device("cpu"))
    adapter.inject(transformer, plan.config.adapter)
    for name, tensor in adapter.tensors(transformer).items():
        tensor.fill_(0.01 if "lora_B" in name else 0.02)  # so that dropout has an effect
    cpu = torch.device("cpu")
    encoded = program.encode(plan, cpu, TextEncoder(plan.config.model.base, cpu), quiet=True)
    objective = LoraObjective(plan, transformer, encoded, Accelerator())
    order = [(0, 0), (0, 1), (1, 0), (2, 0), (5, 1)]
    with torch.no_grad():
        first = {at: objective.loss(*at) for at in order}
        torch.rand(3)
        again = {at: objective.loss(*at) for at in reversed(order)}
    assert {at: (float(loss.value), loss.batch) for at, loss in first.items()} == {
        at: (float(loss.value), loss.batch) for at, loss in again.items()
    }
    assert len({float(loss.value) for loss in first.values()}) == len(order)
    transformer.eval()
    with torch.no_grad():
        assert float(objective.loss(0, 0).value) != float(first[0, 0].value)  # so dropout was at work
    for loss in first.values():
        assert all(str(Path(plan.config.data.images)) in name for name in loss.batch.split(", "))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_checkpointing_is_at_work_where_it_is_configured(
    checkpointing: bool, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = LoraObjective.loss

    def loss(self: LoraObjective, step: int, micro_step: int) -> Any:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            found = real(self, step, micro_step)
        seen.append(sum(kept))
        return found

    monkeypatch.setattr(LoraObjective, "loss", loss)
    setting = f"train.gradient_checkpointing={str(checkpointing).lower()}"
    assert run(run_toml, tmp_path / "out", *PLAIN, setting, "train.steps=1") == FINISHED
    assert len(seen) == 1 and (seen[0] < 100_000) == checkpointing, seen  # numbers kept for the way back


# --- killed, interrupted, refused -------------------------------------------------------------------------


def die_in(owner: Any, name: str, call: int) -> None:
    """SIGKILL after the given number of calls; for a child process, so nothing is put back."""
    real, calls = getattr(owner, name), []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) > call:
            kill_me()
        return real(*arguments, **options)

    setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("owner", "name", "call", "resumes_at"),
    [
        pytest.param(LoraObjective, "validate", 0, None, marks=pytest.mark.slow),
        pytest.param(LoraObjective, "loss", 0, 0, marks=pytest.mark.slow),
        (LoraObjective, "loss", 3, 2),
        # lines of steps 0 to 4 are written, not that of the validation
        pytest.param(tracking.Tracker, "scalars", 6, 4, marks=pytest.mark.slow),
        (trainer.files, "save_file", 4, 2),  # in the third checkpoint; the first is that of the start
        pytest.param(trainer.files, "save_file", 8, 6, marks=pytest.mark.slow),  # in the adapter
        (export, "export", 0, 6),
    ],
)
def test_a_killed_run_can_be_resumed_to_the_same_bytes(
    owner: Any, name: str, call: int, resumes_at: int | None, run_toml: Path, tmp_path: Path, cache: str
) -> None:
    settings = (*PLAIN, cache, "train.steps=6", "data.caption_dropout=0.5")
    assert run(run_toml, tmp_path / "through", *settings) == FINISHED

    def until_killed() -> None:
        die_in(owner, name, call)
        run(run_toml, tmp_path / "killed", *settings)

    assert killed(until_killed)
    saved = checkpoint.latest(tmp_path / "killed" / "checkpoints")
    assert (saved.step if saved else None) == resumes_at
    assert not (tmp_path / "killed" / "adapter").exists()
    assert run(run_toml, tmp_path / "killed", *settings) == BAD_INPUT  # --resume must be said
    assert run(run_toml, tmp_path / "killed", *settings, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "through")
    steps = [line["step"] for line in metrics(tmp_path / "killed")]
    assert steps == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert {name for name in files(tmp_path / "killed") if not name.startswith("tensorboard")} == {
        name for name in files(tmp_path / "through") if not name.startswith("tensorboard")
    }
    assert [path.name for path in (tmp_path / "killed").rglob(".*")] == [".run.lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_clean_stop(
    number: signal.Signals,
    run_toml: Path,
    tmp_path: Path,
    cache: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    assert run(run_toml, tmp_path / "out", *PLAIN, cache) == INTERRUPTED
    assert f"{number.name}: finishing this step" in caplog.text
    assert "stopped after step 3; the checkpoint of step 3 is whole: continue with --resume" in caplog.text
    assert files(tmp_path / "out" / "checkpoints") >= {"step-00000003/state.json"}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of everything but locks, which versions of filelock touch."""
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.suffix != ".lock"
    }


def test_a_used_folder_needs_resume_and_resume_a_used_folder(
    run_toml: Path, tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*PLAIN, cache)
    assert run(run_toml, tmp_path / "out", *settings, resume=True) == BAD_INPUT
    assert "holds no run to resume; start it without --resume" in caplog.text
    assert not (tmp_path / "out").exists()
    assert run(run_toml, tmp_path / "out", *settings) == FINISHED
    before = snapshot(tmp_path / "out")
    assert run(run_toml, tmp_path / "out", *settings) == BAD_INPUT
    assert "already holds a run; continue it with --resume, or choose another --output" in caplog.text
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate is 0.0001, the checkpoint has 0.001"),
        ("seed=3", "seed is 3, the checkpoint has 0"),
        ("adapter.rank=8", "adapter.rank is 8, the checkpoint has 4"),
        ("init.method=gaussian", 'init.method is "gaussian", the checkpoint has "random"'),
        ("caption", 'such as "another caption", which was "a '),
    ],
)
def test_resuming_with_other_settings_is_refused(
    change: str, said: str, run_toml: Path, pictures: Path, tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*PLAIN, cache, "data.held_out=0")
    assert run(run_toml, tmp_path / "out", *settings) == FINISHED
    before = snapshot(tmp_path / "out")
    if change == "caption":
        (pictures / "1.txt").write_text("another caption")
    more = () if change == "caption" else (change,)
    assert run(run_toml, tmp_path / "out", *settings, *more, resume=True) == BAD_INPUT
    assert f"Cannot resume from {tmp_path / 'out' / 'checkpoints' / 'step-00000004'}" in caplog.text
    assert said in caplog.text
    assert snapshot(tmp_path / "out") == before  # run.json still tells the settings to resume with


def test_what_does_not_change_the_course_may_change_on_resume(run_toml: Path, tmp_path: Path, cache: str) -> None:
    assert run(run_toml, tmp_path / "out", cache) == FINISHED
    more = ("train.steps=6", "checkpoint.every=3", "checkpoint.keep=3", "validation.every=3")
    prompts = 'validation.prompts=["a small creature", "two prompts now"]'
    assert run(run_toml, tmp_path / "out", cache, *more, prompts, resume=True) == FINISHED
    assert run(run_toml, tmp_path / "through", *PLAIN, cache, "train.steps=6") == FINISHED
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "through")
    drawn = {name for name in files(tmp_path / "out") if name.startswith("samples/step-000006")}
    assert drawn == {"samples/step-000006-1.png", "samples/step-000006-2.png"}  # row 0 is of the prompt before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(
    run_toml: Path, tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*PLAIN, cache)
    assert run(run_toml, tmp_path / "out", *settings) == FINISHED
    expected = adapter_bytes(tmp_path / "out")
    damaged = tmp_path / "out" / "checkpoints" / "step-00000004" / "trainable.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    assert run(run_toml, tmp_path / "out", *settings, resume=True) == BAD_INPUT
    assert f"{damaged} cannot be read" in caplog.text and f"Delete the folder {damaged.parent}" in caplog.text
    shutil.rmtree(damaged.parent)
    shutil.rmtree(tmp_path / "out" / "adapter")
    assert run(run_toml, tmp_path / "out", *settings, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "out") == expected


# --- NaN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_before_the_update_and_names_the_pictures(
    kind: str,
    run_toml: Path,
    pictures: Path,
    tmp_path: Path,
    cache: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    objectives: list[LoraObjective] = []
    real = LoraObjective.loss

    def poisoned(self: LoraObjective, step: int, micro_step: int) -> Any:
        loss = real(self, step, micro_step)
        if step != 2:
            return loss
        objectives.append(self)
        seen.append({name: tensor.clone() for name, tensor in self.tensors().items()})
        if kind == "loss":
            return type(loss)(loss.value * float("nan"), loss.batch)
        loss.value.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(LoraObjective, "loss", poisoned)
    assert run(run_toml, tmp_path / "out", *PLAIN, cache) == FAILED
    assert "training stopped: step 3: loss" in caplog.text and "Nothing was updated" in caplog.text
    assert caplog.text.count(str(pictures)) == 2  # a batch of two
    after = objectives[0].tensors()
    assert after and all(torch.equal(after[name], tensor) for name, tensor in seen[0].items())
    assert [line["step"] for line in metrics(tmp_path / "out")] == [0, 1, 2, 2]
    assert not (tmp_path / "out" / "adapter").exists()


# --- what goes in, and what comes out ---------------------------------------------------------------------


def test_held_out_pictures_never_reach_an_initializer(
    run_toml: Path, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[InitContext] = []
    real = initializers.random.initialize

    def spy(context: InitContext, config: Any) -> Seed:
        contexts.append(context)
        return real(context, config)

    monkeypatch.setattr(initializers.random, "initialize", spy)
    assert run(run_toml, tmp_path / "out", *PLAIN, cache) == FINISHED
    dataset = make_plan(run_toml).dataset
    (context,) = contexts
    assert context.images == tuple(example.path for example in dataset.train) and len(context.images) == 4
    assert not {*context.images} & {example.path for example in dataset.held_out}
    assert context.rank == 4 and len(context.modules) == 2 * 12


def test_exactly_these_files_are_left_and_the_pictures_are_untouched(
    run_toml: Path, pictures: Path, tmp_path: Path
) -> None:
    before = snapshot(pictures)
    assert run(run_toml, tmp_path / "out", "train.steps=6") == FINISHED
    assert snapshot(pictures) == before
    left = files(tmp_path / "out")
    (events,) = (name for name in left if name.startswith("tensorboard/events.out.tfevents."))
    shards = {name for name in left if name.startswith("cache/")}
    assert len(shards) == 2 and all(name.endswith(".safetensors") for name in shards)
    assert left - {events} - shards == {
        ".run.lock",
        *(
            f"{folder}/{name}"
            for folder in ("adapter", "adapter_last")
            for name in (
                "adapter_config.json",
                "adapter_model.safetensors",
                "pytorch_lora_weights.safetensors",
                "README.md",
                "samples/step-000006-0.png",
            )
        ),
        "choice.json",
        "pictures.jsonl",
        *(
            f"checkpoints/step-0000000{step}/{name}"
            for step in (4, 6)
            for name in ("optimizer.safetensors", "state.json", "trainable.safetensors")
        ),
        "contact_sheet.png",
        "metrics.jsonl",
        "run.html",
        "run.json",
        *(f"samples/step-00000{step}-0.png" for step in (0, 2, 4, 6)),
    }


def test_metrics_have_the_documented_keys(run_toml: Path, tmp_path: Path, cache: str) -> None:
    assert run(run_toml, tmp_path / "out", *PLAIN, cache) == FINISHED
    lines = metrics(tmp_path / "out")
    training = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "loss" not in line]
    assert [[*line] for line in training] == [["step", "loss", "lr", "grad_norm"]] * 4
    assert [[*line] for line in validations] == [["step", "val_loss", "train_stable_loss", "seconds"]] * 3
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    assert all(line["lr"] == 1e-3 and line["grad_norm"] > 0 for line in training)
    assert run(run_toml, tmp_path / "none", *PLAIN, cache, "data.held_out=0") == FINISHED
    assert "val_loss" not in metrics(tmp_path / "none")[0] and "train_stable_loss" in metrics(tmp_path / "none")[0]


def test_run_json_tells_the_whole_story(run_toml: Path, pictures: Path, tmp_path: Path, cache: str) -> None:
    assert run(run_toml, tmp_path / "out", *PLAIN, cache) == FINISHED
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["status"] == "finished" and report["steps"] == 4
    assert report["config"]["adapter"]["rank"] == 4 and report["config"]["train"]["batch_size"] == 2
    assert report["versions"]["torch"] in torch.__version__ and report["hardware"]["device"] == "cpu"
    assert report["init"]["method"] == "random" and report["init"]["applied"]["random"] == 24
    assert [row["step"] for row in report["validations"]] == [0, 2, 4]
    assert report["peak_memory_bytes"]["process"] > 50e6 and report["seconds"]["total"] > 0
    listed = report["data"]["train"] + report["data"]["held_out"]
    assert {row["picture"]: row["sha256"] for row in listed} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures.glob("*.png")
    }
    assert len(report["data"]["held_out"]) == 2


def test_training_lowers_the_loss(run_toml: Path, tmp_path: Path, cache: str) -> None:
    settings = ("train.steps=40", "train.learning_rate=1e-2", "validation.every=1000", "train.batch_size=4")
    assert run(run_toml, tmp_path / "out", *PLAIN, cache, *settings) == FINISHED
    first, last = (line["train_stable_loss"] for line in metrics(tmp_path / "out") if "train_stable_loss" in line)
    assert last < 0.97 * first


def test_the_adapter_loads_in_peft_and_in_diffusers(
    run_toml: Path, tmp_path: Path, tiny_base: Path, cache: str
) -> None:
    settings = ("adapter.alpha=2", "train.learning_rate=0.05", "model.dtype=fp32")
    assert run(run_toml, tmp_path / "out", *PLAIN, cache, *settings) == FINISHED
    folder = tmp_path / "out" / "adapter"

    def velocity(transformer: torch.nn.Module) -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        latents, prompt = torch.randn(1, 16, 1, 8, 8, generator=random), torch.randn(1, 6, 64, generator=random)
        with torch.no_grad():
            return qwen_image.predict_velocity(transformer.eval(), latents, torch.tensor([0.5]), prompt, None)

    def base() -> QwenImageTransformer2DModel:
        return QwenImageTransformer2DModel.from_pretrained(tiny_base, subfolder="transformer")

    plain = velocity(base())
    in_peft = velocity(PeftModel.from_pretrained(base(), folder))
    pipeline = QwenImagePipeline.from_pretrained(tiny_base, torch_dtype=torch.float32)
    pipeline.load_lora_weights(folder)
    assert (in_peft - plain).abs().max() > 1e-3
    torch.testing.assert_close(velocity(pipeline.transformer), in_peft, rtol=1e-4, atol=1e-5)

    # and it is what was trained: the stable loss measured with it is that of the log
    plan = make_plan(run_toml, cache, *settings)
    cpu = torch.device("cpu")
    encoded = program.encode(plan, cpu, TextEncoder(plan.config.model.base, cpu), quiet=True)
    items = [encoded.item(example) for example in plan.dataset.held_out]
    measured = float(validation.stable_errors(pipeline.transformer, items, torch.device("cpu"), torch.float32).mean())
    assert measured == pytest.approx(metrics(tmp_path / "out")[-1]["val_loss"], rel=1e-5)


def test_a_result_starts_the_next_run(run_toml: Path, tmp_path: Path, cache: str) -> None:
    """The file initializer, end to end: where the one ended, the other begins."""
    assert run(run_toml, tmp_path / "first", *PLAIN, cache, "train.learning_rate=0.05") == FINISHED
    start = f"init.method={tmp_path / 'first' / 'adapter'}"
    assert run(run_toml, tmp_path / "second", *PLAIN, cache, "adapter.rank=6", "adapter.alpha=3", start) == FINISHED
    end, begin = metrics(tmp_path / "first")[-1], metrics(tmp_path / "second")[0]
    assert begin["val_loss"] == pytest.approx(end["val_loss"], rel=1e-5)
    assert begin["val_loss"] != pytest.approx(metrics(tmp_path / "first")[0]["val_loss"], rel=1e-4)


# --- before anything loads --------------------------------------------------------------------------------


def test_the_course_is_what_decides_training(run_toml: Path, pictures: Path, tmp_path: Path) -> None:
    first = make_plan(run_toml).course()
    assert make_plan(run_toml).course() == first
    for same in (
        "output=elsewhere",
        "train.steps=9",
        "validation.every=7",
        "checkpoint.keep=5",
        f"data.cache={tmp_path}",
    ):
        assert make_plan(run_toml, same).course() == first
    for other in ("seed=1", "train.batch_size=1", "flow.sigma_sampling=uniform", "init.method=gaussian",
                  "data.held_out=1", "data.trigger=zorp", "adapter.alpha=8", "train.weight_decay=0.0"):  # fmt: skip
        assert make_plan(run_toml, other).course() != first
    cosine = make_plan(run_toml, "train.lr_schedule=cosine").course()
    assert (
        make_plan(run_toml, "train.lr_schedule=cosine", "train.steps=9").course() != cosine
    )  # the curve depends on it
    (pictures / "0.txt").write_text("other words")
    (pictures / "1.txt").write_text("other words")
    (pictures / "2.txt").write_text("other words")
    assert make_plan(run_toml).course() != first


def test_the_plan_counts_what_will_be_trained(run_toml: Path, tiny_base: Path) -> None:
    plan = make_plan(run_toml, "adapter.rank=3", "train.gradient_accumulation_steps=2")
    transformer = qwen_image.load_transformer(plan.config.model, torch.device("cpu"))
    base_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    adapter.inject(transformer, plan.config.adapter)
    trainable = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    text = plan_text(plan)
    assert f"rank 3 on {len(plan.modules)} modules, {trainable:,} trainable parameters" in text
    assert f"{base_parameters / 1e6:,.1f} M parameters in fp32" in text
    assert "4 for training, 2 held out" in text and "64x64: 4" in text
    assert "4 steps of 4 pictures: 4.0 times through the data" in text


def test_all_that_prepare_finds_comes_at_once(
    run_toml: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "0.png").write_bytes(b"no picture")
    (pictures / "1.txt").unlink()
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    with caplog.at_level(logging.ERROR):
        assert run(run_toml, out, 'adapter.target_modules=["to_k", "img_mod.7"]') == BAD_INPUT
    for words in ("0.png: is not a", "1.png: has no caption", "already holds a run", '"img_mod.7" matches no module'):
        assert words in caplog.text


# --- the best step ----------------------------------------------------------------------------------------


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """Under the names of a checkpoint."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name: name.removeprefix("base_model.model.").replace(".weight", ".default.weight") for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items()}


@pytest.fixture
def overfitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """After step 2, held-out pictures are told to get worse."""
    real = LoraObjective.validate

    def validate(self: LoraObjective, step: int, tracker: tracking.Tracker) -> Any:
        found, worse = real(self, step, tracker), 0.5 * max(step - 2, 0)
        assert found.errors is not None
        values = {**found.values, "val_loss": found.values["val_loss"] + worse}
        return replace(found, values=values, errors=found.errors + worse)

    monkeypatch.setattr(LoraObjective, "validate", validate)


@pytest.mark.usefixtures("overfitting")
@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_the_best_step_is_exported_and_the_last_one_beside_it(
    ema: str, run_toml: Path, tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = (*PLAIN, cache, "train.learning_rate=0.01", "train.steps=8", f"train.ema={ema}")
    assert run(run_toml, tmp_path / "out", *settings) == FINISHED
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    choice = json.loads((tmp_path / "out" / "choice.json").read_text())
    losses = {line["step"]: line["val_loss"] for line in report["validations"]}
    assert report["choice"] == choice and choice["step"] == min(losses, key=lambda step: losses[step]) == 2
    assert choice["val_loss"] == pytest.approx(losses[choice["step"]]) and choice["text"] in caplog.text
    for folder, step in (("adapter", choice["step"]), ("adapter_last", 8)):
        saved = checkpoint.load(tmp_path / "out" / "checkpoints" / f"step-{step:08d}")
        assert bool(saved.average) is (ema != "0")
        found = exported(tmp_path / "out" / folder)
        assert found.keys() == saved.result.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in saved.result.items())
        assert f"{step} steps" in (tmp_path / "out" / folder / "README.md").read_text()
    with safe_open(tmp_path / "out" / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["warm_start"])["steps"] == choice["step"]


@pytest.mark.usefixtures("overfitting")
def test_patience_ends_a_run_early(run_toml: Path, tmp_path: Path, cache: str) -> None:
    settings = (*PLAIN, cache, "train.learning_rate=0.01", "train.steps=20", "validation.patience=2")
    assert run(run_toml, tmp_path / "out", *settings) == FINISHED
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (report["steps"], report["choice"]["step"]) == (6, 2)
    bytes_before = adapter_bytes(tmp_path / "out")
    assert run(run_toml, tmp_path / "out", *settings, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "out") == bytes_before
    assert metrics(tmp_path / "out")[-1]["step"] == report["steps"]


def test_without_held_out_pictures_it_says_that_the_last_step_is_taken(
    run_toml: Path, tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert run(run_toml, tmp_path / "out", *PLAIN, cache, "data.held_out=0") == FINISHED
    assert "no pictures are held out to choose the best step by: the last one is taken" in caplog.text
    assert not (tmp_path / "out" / "adapter_last").exists() and not (tmp_path / "out" / "choice.json").exists()


def test_drift_and_the_diagnosis_of_a_run(
    run_toml: Path, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*PLAIN, cache, "validation.diagnose=true", 'validation.unrelated_prompts=["a dog", "a blue house"]')
    assert run(run_toml, tmp_path / "through", *settings) == FINISHED
    drifts = [line["drift"] for line in metrics(tmp_path / "through") if "drift" in line]
    assert len(drifts) == 3 and drifts[0] == 0 and 0 < drifts[1] < drifts[2]
    found = diagnosis.read(tmp_path / "through")
    assert {one.picture for one in found.pictures} == {"0.png", "1.png", "2.png", "3.png", "4.png", "5.png"} - {
        entry["picture"] for entry in json.loads((tmp_path / "through" / "run.json").read_text())["data"]["held_out"]
    }
    # a run that is stopped and goes on has each record once
    before_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(run_toml, tmp_path / "cut", *settings) == INTERRUPTED
    monkeypatch.undo()
    assert run(run_toml, tmp_path / "cut", *settings, resume=True) == FINISHED
    for name in ("pictures.jsonl", "diagnosis.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "through" / name).read_bytes()


def test_a_page_that_cannot_be_written_is_no_reason_to_stop(
    run_toml: Path, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer.page, "write_page", Mock(side_effect=OSError("no space")))
    assert run(run_toml, tmp_path / "out", *PLAIN, cache) == FINISHED
    assert "run.html was not written: no space" in caplog.text


GUIDED = ("validation.true_cfg_scale=3", "validation.every=4")


def test_samples_with_another_lora_in_the_negative_branch(run_toml: Path, tmp_path: Path, cache: str) -> None:
    """Its samples are those that `trainer.draw` draws of the result, and training does not change by it."""
    assert run(run_toml, tmp_path / "plain", *GUIDED, cache) == FINISHED
    file = tmp_path / "plain" / "adapter" / "pytorch_lora_weights.safetensors"
    negative = f"validation.negative_lora={file}:50"
    assert run(run_toml, tmp_path / "negative", *GUIDED, cache, negative, "validation.seed=3") == FINISHED
    assert adapter_bytes(tmp_path / "negative") == adapter_bytes(tmp_path / "plain")
    words = ["--config", str(run_toml), "--lora", str(tmp_path / "plain" / "adapter_last"), "--negative", f"{file}:50"]
    words += ["--seeds", "1", "--first-seed", "3", "--guidance", "3", "--output", str(tmp_path / "drawn"), "--quiet"]
    assert draw.main(words) == FINISHED
    drawn, sampled = next((tmp_path / "drawn").glob("01*.png")), tmp_path / "negative" / "samples" / "step-000004-0.png"
    one, two = (np.asarray(Image.open(path), dtype=int) for path in (drawn, sampled))
    assert np.abs(one - two).max() <= 1  # PEFT adds in another order
    assert run(run_toml, tmp_path / "same", *GUIDED, cache, "validation.seed=3") == FINISHED
    other = np.asarray(Image.open(tmp_path / "same" / "samples" / "step-000004-0.png"), dtype=int)
    assert np.abs(two - other).max() > 1


def test_grey_pictures_in_the_negative_branch(
    run_toml: Path, tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Their LoRA is kept beside the run, and a resumed run takes it from there."""
    tiny.make_i2l(tmp_path / "i2l", tmp_path / "encoders")
    i2l = (f"init.i2l.weights={tmp_path / 'i2l'}", f"init.i2l.encoders={tmp_path / 'encoders'}", "init.method=i2l")
    grey = ("validation.negative_lora=grey", 'init.i2l.experts=["style", "bias"]', *i2l, *GUIDED, cache)
    assert run(run_toml, tmp_path / "out", *grey, "train.steps=2") == FINISHED
    kept = (tmp_path / "out" / "negative.safetensors").read_bytes()
    assert {len(factors.a) for factors in read_lora(tmp_path / "out" / "negative.safetensors")[0].factors.values()} == {
        4 * 4 + 2  # Style of four training pictures, and Bias
    }
    assert run(run_toml, tmp_path / "out", *grey, resume=True) == FINISHED
    assert (tmp_path / "out" / "negative.safetensors").read_bytes() == kept
    for settings, message in (
        (("validation.negative_lora=grey", *GUIDED), 'negative_lora: "grey" needs [init] method = "i2l"'),
        (("validation.negative_lora=none.safetensors", *GUIDED), "negative_lora: none.safetensors: there is no such"),
        (("validation.negative_lora=a.safetensors",), "negative_lora has no effect with true_cfg_scale = 1"),
        (("validation.negative_lora=a.safetensors:x", *GUIDED), '"x" after the colon is no finite number'),
    ):
        assert run(run_toml, tmp_path / "bad", *settings) == BAD_INPUT
        assert message in caplog.text
