"""Estimates of time: against arithmetic, and against what a run really does."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

import initializers
import train
from tests.helpers import BAD_INPUT, FINISHED
from trainer import adapter, qwen_image
from trainer import run as running
from trainer.adapter import AdapterConfig, Stage, Work
from trainer.data.dataset import Dataset, Example
from trainer.hardware import memory, seconds
from trainer.hardware.seconds import Card, Speed, Workload
from trainer.loop import TrainConfig
from trainer.plan import Plan, load_config, prepare
from trainer.tracking import duration

ROOT = Path(__file__).parents[2]
REAL = sorted((ROOT / "configs").glob("qwen_image*.toml"))
SMALL: dict[str, Any] = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 48,
    "in_channels": 64,
    "axes_dims_rope": (8, 12, 12),
}
WORK = Workload(
    num_bytes=60e9,
    captions=Stage("captions", 16e9, 0.0, "on the CPU", 5e12),
    pictures=10e12,
    start=Work(num_bytes=20e9, passes=10, stages=(Stage("text", 16e9, flop=40e12), Stage("pictures", 9e9, flop=20e12))),
    forward=70e12,
    step=220e12,
    copied=8e9,
    copies_a_step=2,
    validation_passes=30,
    decoding=100e12,
    validations=4,
    steps=100,
)
FAST, SLOW = Speed(100e12, 2e9, 80), Speed(50e12, 2e9, 80)


def on_meta(**options: Any) -> QwenImageTransformer2DModel:
    with torch.device("meta"):
        return QwenImageTransformer2DModel(**options)


def real_plan(path: Path, folder: Path, *overrides: str) -> Plan:
    """The shipped configuration with 20 pictures and 2 held out, none of which is there."""
    table = tomli.loads(path.read_text())
    (folder / table["data"]["images"]).mkdir(exist_ok=True)
    run, start = load_config(path, [*overrides], initializers)
    side = run.data.resolution
    examples = [Example(Path(f"{i}.png"), "", str(i), (side, side), (side, side), str(i)) for i in range(22)]
    dataset, transformer = Dataset(tuple(examples[:20]), tuple(examples[20:]), ()), on_meta()
    return Plan(run, start, dataset, transformer, adapter.target_modules(transformer, run.adapter))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place without models or pictures; hubs are not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qwen_image, "part_config", lambda *given: {})
    return tmp_path


# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_a_forward_pass_is_its_products() -> None:
    """Of each Linear layer with the tokens that it sees, of the adapter, and of attention: two products."""
    model, side, rank = on_meta(**SMALL), 128, 4
    images, texts = (side // 16) ** 2, memory.PROMPT_TOKENS
    expected, hidden = 0, 64
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            is_text = "txt" in name or "add" in name
            tokens = 1 if "mod" in name or "norm" in name or "time" in name else texts if is_text else images
            expected += 2 * layer.weight.numel() * tokens
            if any(name.endswith(kind) for kind in AdapterConfig().module_types):
                expected += 2 * rank * (layer.in_features + layer.out_features) * tokens
    expected += SMALL["num_layers"] * 2 * 2 * hidden * (images + texts) ** 2
    settings = AdapterConfig(rank=rank)
    counted = seconds.transformer_flop(model, settings, TrainConfig(), side**2, backward=False)
    assert counted == pytest.approx(expected, rel=1e-6)
    batch = seconds.transformer_flop(model, settings, TrainConfig(batch_size=3), side**2, backward=False)
    assert batch == pytest.approx(3 * counted, rel=1e-6)


def test_gradient_checkpointing_computes_the_blocks_once_more() -> None:
    model, settings, pixels = on_meta(**SMALL), AdapterConfig(rank=4), 128**2
    thrifty = TrainConfig(gradient_checkpointing=True)
    forward = seconds.transformer_flop(model, settings, thrifty, pixels, backward=False)
    plain, again = (
        seconds.transformer_flop(model, settings, one, pixels, backward=True) for one in (TrainConfig(), thrifty)
    )
    assert 0.9 * forward < again - plain < forward  # what is outside of the blocks is not repeated
    assert 2 * forward < plain < 2.5 * forward  # the frozen weights have no gradient of their own


def test_the_real_one() -> None:
    """Qwen-Image at 1024 x 1024: 13 of its 20 B parameters work on the picture's 4096 tokens, but for modulations."""
    thrifty, model = TrainConfig(gradient_checkpointing=True), on_meta()
    forward = seconds.transformer_flop(model, AdapterConfig(), thrifty, 1024**2, backward=False)
    block = model.transformer_blocks[0]
    per_token = (
        2
        * 60
        * sum(
            layer.weight.numel()
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear) and not any(word in name for word in ("mod", "txt", "add"))
        )
    )
    attention = 60 * 2 * 2 * 3072 * (4096 + memory.PROMPT_TOKENS) ** 2
    assert forward == pytest.approx(per_token * 4096 + attention, rel=0.05)
    assert forward / 1e12 == pytest.approx(70.9, abs=0.05)


# --- seconds -------------------------------------------------------------------------------------------------------


def test_seconds_add_up() -> None:
    found = seconds.estimate(WORK, FAST)
    assert dict(found.before) == pytest.approx(
        {
            "reading models": 80 / 2,
            "encoding captions and pictures": 15 / 100,
            "predicting the start": 60 / 100,
            "trying strengths": 7.0,
            "drawing the prior": 0.0,
            "the first validation": 22.0,
        }
    )
    assert found.step == 2.2 and found.validation == 22.0
    assert found.first_step == pytest.approx(40 + 0.15 + 0.6 + 7 + 22)
    assert found.total == pytest.approx(found.first_step + 100 * 2.2 + 3 * 22)
    assert found.validating == pytest.approx(4 * 22 / found.total)


def test_a_slower_card_is_slower_and_a_slower_disk_too() -> None:
    fast, slow = (seconds.estimate(WORK, speed) for speed in (FAST, SLOW))
    assert slow.step == 2 * fast.step and slow.validation == 2 * fast.validation
    assert slow.total - slow.before["reading models"] == pytest.approx(2 * (fast.total - fast.before["reading models"]))
    disk = seconds.estimate(WORK, replace(FAST, disk=1e9))
    assert disk.total - fast.total == pytest.approx(40)


def test_blocks_that_come_slower_than_they_are_computed_are_waited_for() -> None:
    fast, slow = seconds.estimate(WORK, FAST), seconds.estimate(replace(WORK, copied=32e9), FAST)
    assert WORK.copied / seconds.LINK < WORK.forward / FAST.flop < 32e9 / seconds.LINK == 2.0
    assert fast.step == 2.2 and slow.step == 4.0
    assert slow.validation == pytest.approx(30 * 2.0 + 1.0) and slow.before["trying strengths"] == 20.0


def test_an_encoder_too_large_for_the_card_computes_on_the_cpu() -> None:
    small = seconds.estimate(WORK, replace(FAST, gigabytes=16))
    assert small.before["encoding captions and pictures"] == pytest.approx(5e12 / seconds.CPU_FLOP + 0.1)
    assert small.before["predicting the start"] == pytest.approx(40e12 / seconds.CPU_FLOP + 0.2)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_shipped_configurations_validate_a_tenth_of_the_time(path: Path, elsewhere: Path) -> None:
    work = seconds.count(real_plan(path, elsewhere))
    assert len(tomli.loads(path.read_text())["validation"]["prompts"]) > 0
    meant = re.search(r"_(\d+)gb$", path.stem)  # for cards of so many GB
    cards = [card for card in seconds.CARDS if meant is None or card.gigabytes == int(meant[1])]
    assert cards
    for card in cards:
        speed = Speed(seconds.SHARE_OF_PEAK * card.teraflops * 1e12, seconds.DISK, card.gigabytes)
        assert 0.03 < seconds.estimate(work, speed).validating <= 0.1, card.name


SHOWN = (
    ("80gb", "H100"),
    ("80gb", "A100"),
    ("24gb", "RTX 4090"),
    ("24gb", "RTX 3090"),
    ("16gb", "RTX 4080"),
    ("12gb", "RTX 4070"),
)


@pytest.mark.parametrize(("name", "card"), SHOWN)
def test_the_pages_tell_what_is_estimated(name: str, card: str, elsewhere: Path) -> None:
    chosen, plan = seconds.card(card), real_plan(ROOT / "configs" / f"qwen_image_{name}.toml", elsewhere)
    speed = Speed(seconds.SHARE_OF_PEAK * chosen.teraflops * 1e12, seconds.DISK, chosen.gigabytes)
    found = seconds.estimate(seconds.count(plan), speed)

    def row(page: str, start: str) -> list[str]:
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith(f"| {start} |"))
        return [cell.strip() for cell in line.strip("|").split("|")]

    steps = found.steps * found.step
    assert row("docs/real_size.md", card) == [
        card,
        f"{chosen.teraflops:g} TFLOP/s",
        str(plan.config.data.resolution),
        duration(found.first_step),
        f"{found.step:.2g} s",
        duration(steps),
        duration(found.validation),
        duration(found.total),
    ]
    minutes = [round(value / 60) for value in (found.first_step, found.total)]
    told = [f"{m // 60} h {m % 60} min" if m > 60 else f"{m} min" for m in minutes]
    assert row("README.md", f"{card}, {chosen.gigabytes:g} GB")[-2:] == told


def test_offloaded_blocks_are_counted_in_their_precision(elsewhere: Path) -> None:
    path = ROOT / "configs" / "qwen_image_16gb.toml"
    none, some, more = (
        seconds.count(real_plan(path, elsewhere, f"model.offload_blocks={n}", "train.gradient_accumulation_steps=3"))
        for n in (0, 20, 99)
    )
    assert none.copied == 0 and more.copied == 3 * some.copied and none.copies_a_step == 6
    assert more.copied == pytest.approx(0.5625 * 60 * 340e6, rel=0.05)  # of 20.4 B parameters nearly all


def test_what_is_counted_is_what_a_run_does(run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that pass through the transformer without gradients: those of all validations, with both of guidance."""
    settings, start = load_config(
        run_toml,
        ["train.steps=5", "validation.every=2", 'validation.prompts=["a", "b"]', "validation.true_cfg_scale=2.0",
         "validation.num_inference_steps=3", "validation.num_pictures=2"],
        initializers,
    )  # fmt: skip
    prepared, seen = prepare(settings, start, resume=False), 0
    real = QwenImageTransformer2DModel.forward

    def forward(self: Any, hidden_states: torch.Tensor, *given: Any, **named: Any) -> Any:
        nonlocal seen
        seen += 0 if torch.is_grad_enabled() else len(hidden_states)
        return real(self, hidden_states, *given, **named)

    monkeypatch.setattr(QwenImageTransformer2DModel, "forward", forward)
    seconds._flop.cache_clear()  # of other tests
    work = seconds.count(prepared)
    assert seen == 2 * 1 and work.forward > 0  # with one block and with two, on the meta device
    seen = 0
    running.execute(prepared, resume=False, quiet=True)
    assert work.validations == 4 and work.steps == 5
    assert seen == work.validations * work.validation_passes + work.first_passes


# --- cards, disks, words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "4090", "GeForce RTX-4090"])
def test_a_card_is_known_however_it_is_spelt(name: str) -> None:
    assert seconds.card(name) == Card("RTX 4090", 24, 165)


def test_all_cards_are_told_apart() -> None:
    assert [seconds.card(one.name) for one in seconds.CARDS] == [*seconds.CARDS]


def test_plan_tells_seconds_and_what_fits_that_card(run_toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--config", str(run_toml), "--plan"]
    assert train.main([*base, "--card", "rtx 3090", "--disk", "0.5"]) == FINISHED
    shown = capsys.readouterr().out
    assert "to the first step" in shown and "a step" in shown and "in all" in shown
    assert "RTX 3090 at 35% of its peak of 71 TFLOP/s, which is a guess; a disk of 0.5 GB/s, as told" in shown
    assert "on a card with 24 GB" in shown
    assert train.main([*base, "--card", "rtx 3090", "--vram", "80"]) == FINISHED
    assert "on a card with 80 GB" in capsys.readouterr().out


def test_without_a_gpu_the_card_is_asked_for(
    run_toml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main(["--config", str(run_toml), "--plan"]) == FINISHED
    assert '--card "RTX 4090"' in capsys.readouterr().out


def test_bad_cards_and_disks(run_toml: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = ["--config", str(run_toml)]
    assert train.main([*base, "--plan", "--card", "RTX 409"]) == BAD_INPUT
    assert '"RTX 409" is not known' in caplog.text and "RTX 4090" in caplog.text and "H100 PCIe" in caplog.text
    for wrong in (["--card", "H100"], ["--plan", "--disk", "0"], ["--disk", "1"]):
        with pytest.raises(SystemExit) as stop:
            train.main([*base, *wrong])
        assert stop.value.code == BAD_INPUT


def test_the_disk_is_measured_by_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "READ_AT_ONCE", 2**16)
    ticks = iter(range(1000))
    monkeypatch.setattr(seconds.time, "perf_counter", lambda: float(next(ticks)))
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(os.urandom(4 * 2**16))
    assert seconds.disk_rate(files, 1000.0) == 8 * 2**16 / 9  # a look at the clock for each part, and at the end
    assert seconds.disk_rate([]) is None
    files[0].write_bytes(b"little")
    assert seconds.disk_rate(files[:1], 1000.0) is None


def test_a_disk_that_must_be_read_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, opened = tmp_path / "a.safetensors", os.open
    file.write_bytes(b"x" * 100)
    monkeypatch.setattr(os, "O_DIRECT", 1 << 20, raising=False)

    def refuse(path: Path, flags: int) -> int:
        if flags & (1 << 20):
            raise OSError(22, "Invalid argument")
        return opened(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    with seconds._unbuffered(file) as unbuffered:
        assert unbuffered.read() == b"x" * 100
