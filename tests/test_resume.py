"""What a resumed run may find changed, and what not; how a run ends, and what it then says."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

import initializers
import initializers.random
from tests.helpers import BAD_INPUT, FAILED, FINISHED, INTERRUPTED, adapter_bytes, files, metrics, run
from trainer import cli, folder, loop, objective, qwen_image
from trainer.adapter import AdapterWeights, Seed
from trainer.errors import Interrupted, TrainingError, UserError
from trainer.files import write_json
from trainer.formats import write_lora
from trainer.lowrank import LowRank
from trainer.plan import load_config, notes, prepare

ROOT = Path(__file__).parents[1]
PLAIN = ("validation.prompts=[]",)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object] | None = None) -> None:
    real = objective.LoraObjective.loss

    def loss(self: objective.LoraObjective, now: int, micro: int) -> Any:
        if now == step:
            (action or (lambda: os.kill(os.getpid(), signal.SIGTERM)))()
        return real(self, now, micro)

    monkeypatch.setattr(objective.LoraObjective, "loss", loss)


def raising(error: BaseException) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


def status(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "run.json").read_text(encoding="utf-8")))


def half_done(run_toml: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    """A run of four steps, stopped after two."""
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert run(run_toml, output, *PLAIN, *settings) == INTERRUPTED


def change_one_weight(file: Path) -> None:
    """Size and header stay."""
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[tensors[name].numel() // 3] += 1
    save_file(tensors, file, {"format": "pt"})


# --- other models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_other_weights_of_the_base_are_refused(
    part: str,
    run_toml: Path,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The change lies where a sample of the file's beginning, middle and end does not look."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    half_done(run_toml, tmp_path / "out", monkeypatch, f"model.base={base}")
    (file,) = (base / part).glob("*.safetensors")
    change_one_weight(file)
    assert run(run_toml, tmp_path / "out", *PLAIN, f"model.base={base}", resume=True) == BAD_INPUT
    assert f"model.base is another model than that of the checkpoint: other content in {file.name}" in caplog.text


def test_the_start_s_file_may_be_gone_but_not_another(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The seed is in the checkpoint."""
    assert run(run_toml, tmp_path / "first", *PLAIN, "train.steps=2") == FINISHED
    lora = tmp_path / "lora.safetensors"
    shutil.copy(tmp_path / "first" / "adapter" / "pytorch_lora_weights.safetensors", lora)
    start = f"init.method={lora}"
    assert run(run_toml, tmp_path / "through", *PLAIN, start) == FINISHED
    half_done(run_toml, tmp_path / "out", monkeypatch, start)
    kept = lora.read_bytes()
    change_one_weight(lora)
    assert run(run_toml, tmp_path / "out", *PLAIN, start, resume=True) == BAD_INPUT
    assert "init.file is another model than that of the checkpoint" in caplog.text
    lora.unlink()
    assert run(run_toml, tmp_path / "new", *PLAIN, start) == BAD_INPUT
    half_done_again = (run_toml, tmp_path / "out", *PLAIN, start)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run(*half_done_again, resume=True) == INTERRUPTED
    lora.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))  # the checkpoint written without the file still knows it
    assert run(*half_done_again, resume=True) == BAD_INPUT
    lora.unlink()
    assert run(*half_done_again, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "through")
    assert status(tmp_path / "out")["init"] == status(tmp_path / "out")["init"] | {"method": "file", "path": str(lora)}


def test_a_run_goes_on_in_another_place(
    run_toml: Path, pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, pictures and base have moved, as to another disk."""
    assert run(run_toml, tmp_path / "through", *PLAIN) == FINISHED
    here = tmp_path / "here"
    shutil.copytree(tiny_base, here / "base")
    shutil.copytree(pictures, here / "pictures")
    shutil.copy(run_toml, here)
    half_done(here / run_toml.name, here / "out", monkeypatch,
              f"model.base={here / 'base'}", f"data.images={here / 'pictures'}")  # fmt: skip
    there = tmp_path / "there"
    here.rename(there)
    monkeypatch.chdir(there)
    moved = ("model.base=base", "data.images=./pictures/")
    assert run(there / run_toml.name, Path("out"), *PLAIN, *moved, resume=True) == FINISHED
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):  # whose metadata name the base
        a, b = (load_file(output / "adapter" / name) for output in (there / "out", tmp_path / "through"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_another_mask_is_refused_and_the_same_goes_on(
    run_toml: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(6):
        Image.new("L", (64, 64), "white").save(pictures / f"{number}.mask.png")
    half_done(run_toml, tmp_path / "out", monkeypatch)
    before = {path.name: path.read_bytes() for path in pictures.glob("*.mask.png")}
    for path in pictures.glob("*.mask.png"):
        mask = Image.open(path)
        mask.paste(0, (0, 0, 10, 10))
        mask.save(path)
    assert run(run_toml, tmp_path / "out", *PLAIN, resume=True) == BAD_INPUT
    assert "masks of training pictures have changed, come or gone: those of 4 pictures" in caplog.text
    for name, data in before.items():
        (pictures / name).write_bytes(data)
    assert run(run_toml, tmp_path / "out", *PLAIN, "data.mask_outside=0.2", resume=True) == BAD_INPUT
    assert "data.mask_outside is 0.2, the checkpoint has 0.1" in caplog.text
    (tmp_path / "masks").mkdir()
    for path in pictures.glob("*.mask.png"):  # the same content at another place
        path.rename(tmp_path / "masks" / path.name)
    assert run(run_toml, tmp_path / "out", *PLAIN, f"data.masks={tmp_path / 'masks'}", resume=True) == FINISHED
    assert {"val_loss_masked", "train_stable_loss_masked"} <= status(tmp_path / "out")["validations"][-1].keys()


def test_what_only_saves_memory_or_time_may_change(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the advice is after running out of memory."""
    half_done(run_toml, tmp_path / "out", monkeypatch)
    allowed = ("train.gradient_checkpointing=true", "model.attention=_native_math")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run(run_toml, tmp_path / "out", *PLAIN, *allowed, resume=True) == INTERRUPTED
    for key, value, before in (("train.learning_rate", "0.002", "0.001"), ("model.dtype", '"bf16"', '"fp32"')):
        assert run(run_toml, tmp_path / "out", *PLAIN, f"{key}={value}", resume=True) == BAD_INPUT
        assert f"{key} is {value}, the checkpoint has {before}" in caplog.text
        assert status(tmp_path / "out")["status"] == "interrupted"  # a refused command changes nothing
    courses = []
    for optimizer in ("adamw", "adamw8bit", "paged_adamw8bit"):
        settings, start = load_config(run_toml, [f"train.optimizer={optimizer}", "model.compile=true"], initializers)
        plan = prepare(replace(settings, output=str(tmp_path / "x")), start, resume=False)
        job = loop.Job(plan.output, settings.train, settings.checkpoint, 1, plan.course())
        courses.append(loop._course(job, Accelerator()))
    assert courses[1] == courses[2] != courses[0]


def test_fewer_steps_than_are_done_are_told(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    half_done(run_toml, tmp_path / "out", monkeypatch)
    assert run(run_toml, tmp_path / "out", *PLAIN, "train.steps=1", resume=True) == BAD_INPUT
    assert (
        "[train] steps = 1: the run in" in caplog.text and "has done 2 already; set steps to at least 2" in caplog.text
    )


def test_the_held_term_goes_with_its_run(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run with a frozen LoRA fails before its first checkpoint, and is started again from something else."""
    plain = (*PLAIN, "data.held_out=0")  # with held-out pictures the start is saved, too
    name, kept = "transformer_blocks.0.attn.to_q", initializers.random.initialize
    frozen = AdapterWeights({name: LowRank(torch.ones(2, 64), torch.ones(64, 2))})
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            initializers.random, "initialize", lambda *_: Seed(AdapterWeights({}), {"method": "x"}, frozen=frozen)
        )
        stop_at(patch, 0, raising(TrainingError("ended here")))
        assert run(run_toml, output, *plain) == FAILED
        assert (output / "frozen.safetensors").exists()
    assert initializers.random.initialize is kept
    assert run(run_toml, output, *plain, "init.method=gaussian", resume=True) == FINISHED
    assert not (output / "frozen.safetensors").exists()
    assert run(run_toml, tmp_path / "through", *plain, "init.method=gaussian") == FINISHED
    assert adapter_bytes(output) == adapter_bytes(tmp_path / "through")
    # and one that was not of this run is never put on the base
    half_done(run_toml, tmp_path / "other", monkeypatch, "data.held_out=0", "init.method=gaussian")
    write_lora(tmp_path / "other" / "frozen.safetensors", frozen, {})
    assert run(run_toml, tmp_path / "other", *plain, "init.method=gaussian", resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(tmp_path / "through")


# --- how it ends ------------------------------------------------------------------------------------------


WHOLE = "the checkpoint of step 2 is whole: continue with --resume"
ENDINGS = [
    (KeyboardInterrupt(), FAILED, "interrupted", f"stopped at once; {WHOLE}"),
    (Interrupted("stopped"), INTERRUPTED, "interrupted", f"stopped; {WHOLE}"),
    (OSError("the disk is gone"), FAILED, "failed", f"the disk is gone\nwhen this is solved: {WHOLE}"),
    (torch.OutOfMemoryError("9 GB"), FAILED, "failed", f"--plan --vram GB lists settings that fit\nthen: {WHOLE}"),
    (RuntimeError("DefaultCPUAllocator: not enough memory"), FAILED, "failed", "the CPU's memory is full"),
    (TrainingError("loss nan"), FAILED, "failed", f"training stopped: loss nan\n{WHOLE}"),
]


@pytest.mark.parametrize(("error", "code", "ended", "said"), ENDINGS)
def test_the_end_is_told_in_run_json_and_in_words(
    error: BaseException,
    code: int,
    ended: str,
    said: str,
    run_toml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = (*PLAIN, "checkpoint.every=2", "validation.every=100")
    with monkeypatch.context() as patch:
        stop_at(patch, 2, raising(error))
        assert run(run_toml, tmp_path / "out", *settings) == code
    assert said in caplog.text
    assert status(tmp_path / "out")["status"] == ended
    assert status(tmp_path / "out")["ended_by"] == (str(error) or type(error).__name__)
    assert run(run_toml, tmp_path / "out", *settings, resume=True) == FINISHED
    assert status(tmp_path / "out")["status"] == "finished" and "ended_by" not in status(tmp_path / "out")


def test_a_checkpoint_is_spoken_of_only_where_one_is(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop_at(monkeypatch, 0, raising(OSError("gone")))
    assert run(run_toml, tmp_path / "chosen", *PLAIN) == FAILED
    assert "the checkpoint of step 0 is whole: continue with --resume" in caplog.text
    assert run(run_toml, tmp_path / "out", *PLAIN, "data.held_out=0") == FAILED
    assert "no checkpoint was saved yet: --resume starts from the beginning" in caplog.text
    caplog.clear()
    monkeypatch.setattr("trainer.run.encode", lambda *_, **__: raising(OSError("gone"))())
    assert run(run_toml, tmp_path / "early", *PLAIN) == FAILED
    assert "nothing was saved yet: give the same command again" in caplog.text and "checkpoint" not in caplog.text
    assert run(run_toml, tmp_path / "early", *PLAIN) == FAILED  # and the same command is not refused


def test_only_errors_for_users_end_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    assert cli.guarded(raising(UserError("write it so"))) == BAD_INPUT
    assert "write it so" in caplog.text
    for fault in (ValueError("a fault of the program"), KeyError("x"), RuntimeError("shape mismatch")):
        with pytest.raises(type(fault)):
            cli.guarded(raising(fault))
    for error in (initializers.UnknownInitializer, qwen_image.ModelError, TrainingError):
        assert issubclass(error, UserError) is (error is not TrainingError)


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_and_a_console_without_utf_8(
    run_toml: Path, pictures: Path, tmp_path: Path
) -> None:
    """`--plan | head -1`, in a locale that cannot show the names of the pictures."""
    shutil.copytree(pictures, tmp_path / "小明")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(run_toml), "--output", str(tmp_path / "out")]
    command += ["--set", f"data.images={tmp_path / '小明'}", "--set", "data.trigger=小明", "--plan"]
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None and started.stderr is not None
    started.stdout.close()  # before anything is written
    said = started.stderr.read().decode("ascii")
    assert started.wait() == 0 and said == "", said
    command[-1:] = ["--set", "data.resolution=17", "--plan"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == BAD_INPUT and b"Traceback" not in done.stderr and b"resolution = 17" in done.stderr


# --- two runs in one folder -------------------------------------------------------------------------------


def _hold(output: str, ready: Any, done: Any) -> None:
    with folder.held(Path(output)):
        ready.set()
        done.wait(60)


def test_a_second_run_in_the_folder_is_refused(
    run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By another process, which is named; when that one is killed, its lock does not stand in the way."""
    processes = multiprocessing.get_context("spawn")
    ready, done = processes.Event(), processes.Event()
    other = processes.Process(target=_hold, args=(str(tmp_path / "out"), ready, done))
    other.start()
    assert ready.wait(60)
    assert run(run_toml, tmp_path / "out", *PLAIN) == BAD_INPUT
    assert f"is in use by process {other.pid} on {socket.gethostname()}, since 20" in caplog.text
    assert files(tmp_path / "out") == {".run.lock", ".run.json"}
    other.kill()
    other.join()
    assert (tmp_path / "out" / ".run.json").exists()  # stale
    assert run(run_toml, tmp_path / "out", *PLAIN) == FINISHED
    assert not (tmp_path / "out" / ".run.json").exists()


def test_a_folder_is_held_by_parts(tmp_path: Path) -> None:
    with folder.held(tmp_path, "part-1"), folder.held(tmp_path, "part-2"):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} "), folder.held(tmp_path, "part-1"):
            pass
        write_json(tmp_path / ".part-1.json", {})  # as if it were being written
        with pytest.raises(UserError, match="in use by another process"), folder.held(tmp_path, "part-1"):
            pass


# --- samples ----------------------------------------------------------------------------------------------


def test_samples_that_fail_do_not_end_the_training(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(qwen_image, "decode_latents", lambda *_: raising(torch.OutOfMemoryError("9 GB"))())
    assert run(run_toml, tmp_path / "out") == FINISHED
    assert "no sample pictures of step 0: 9 GB; the training goes on without them" in caplog.text
    assert not (tmp_path / "out" / "samples").exists()


def test_samples_of_nan_are_left_out_and_named(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    real = qwen_image.Sampler.latents

    def latents(*arguments: Any, **options: Any) -> torch.Tensor:
        found = real(*arguments, **options)
        return found * torch.nan if options["seeds"] == [1] else found

    monkeypatch.setattr(qwen_image.Sampler, "latents", latents)
    prompts = 'validation.prompts=["one", "two"]'
    assert run(run_toml, tmp_path / "out", prompts, "train.batch_size=1") == FINISHED
    assert 'step 0: the sample of "two" is NaN and left out; use bf16, not fp16' in caplog.text
    drawn = {name for name in files(tmp_path / "out") if name.startswith("samples/")}
    assert drawn == {f"samples/step-00000{step}-0.png" for step in (0, 2, 4)}


# --- the environment --------------------------------------------------------------------------------------


def test_an_exported_number_of_accumulation_steps_does_not_divide_again(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*PLAIN, "train.gradient_accumulation_steps=2", "train.steps=2")
    assert run(run_toml, tmp_path / "a", *settings) == FINISHED
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert run(run_toml, tmp_path / "b", *settings) == FINISHED
    norms = [[line["grad_norm"] for line in metrics(tmp_path / name) if "grad_norm" in line] for name in "ab"]
    assert norms[0] == norms[1] and adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


def test_captions_that_are_cut_are_told(
    run_toml: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, tmp_path / "captioned")
    words = " ".join(f"word{number}" for number in range(1200))
    (tmp_path / "captioned" / "1.txt").write_text(words)
    settings, start = load_config(
        run_toml, [f"data.images={tmp_path / 'captioned'}", f"output={tmp_path / 'out'}"], initializers
    )
    plan = prepare(settings, start, resume=False)
    (cut,) = qwen_image.cut_prompts(settings.model.base, [e.caption for e in plan.dataset.train]).items()
    encoded = qwen_image.PromptEncoder(qwen_image.TextEncoder(settings.model.base, torch.device("cpu")), torch.float32)
    whole, end = cut
    last_read = whole[: whole.index(end) + len(end)]
    one_more, changed = f"{last_read} more more more", f"{last_read[: -len(end)]} other more more more more"
    a, b, c = encoded([whole, one_more, changed])
    assert torch.equal(a, b) and not torch.equal(a, c)
    (note,) = (note for note in notes(plan) if "text encoder" in note)
    assert note.startswith('too long for the text encoder, which reads only up to "') and note.endswith('": 1.png')
