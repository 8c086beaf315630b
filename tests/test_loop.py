"""The loop on a problem small enough to solve by hand."""

import importlib
import json
import logging
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer import checkpoint, loop
from trainer.checkpoint import CheckpointConfig, CheckpointError
from trainer.errors import Interrupted, TrainingError
from trainer.flow import generator
from trainer.loop import Loss, Measured
from trainer.optimizer import TrainConfig
from trainer.tracking import Tracker


class Fit:
    """A linear layer; each micro step draws other numbers. `before` is called with each (step, micro_step)."""

    def __init__(self, before: Callable[[int, int], object] = lambda step, micro_step: None, batch_size: int = 2):
        self.module: nn.Module = nn.Linear(3, 2)
        with torch.no_grad():
            self.module.weight.copy_(torch.arange(6).view(2, 3) / 10)  # type: ignore[arg-type, operator]
            self.module.bias.zero_()  # type: ignore[operator]
        self.before, self.batch_size, self.validated = before, batch_size, []

    def inputs(self, step: int, micro_step: int) -> Tensor:
        return torch.randn(self.batch_size, 3, generator=generator("inputs", step, micro_step))

    def loss(self, step: int, micro_step: int) -> Loss:
        extra = self.before(step, micro_step)
        value = (self.module(self.inputs(step, micro_step)) - 1).square().mean()
        return Loss(value + extra if isinstance(extra, float) else value, f"numbers {step}.{micro_step}")

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.module.named_parameters()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.module.load_state_dict(tensors)

    def validate(self, step: int, tracker: Tracker) -> Measured:
        assert not torch.is_grad_enabled()
        self.validated.append(step)
        return Measured({"val_loss": float(step)})


def train(
    output: Path,
    objective: Fit | None = None,
    *,
    config: TrainConfig,
    every: int = 100,
    validate_every: int = 100,
    resume: bool = False,
    course: dict[str, Any] | None = None,
    accelerator: Accelerator | None = None,
) -> Fit:
    objective = objective or Fit()
    job = loop.Job(output, config, CheckpointConfig(every=every), validate_every, course or {})
    loop.train(objective, job, accelerator or Accelerator(), resume=resume, quiet=True)
    return objective


def same(a: Fit, b: Fit) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


def lines(output: Path, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


# --- the update -------------------------------------------------------------------------------------------


def test_an_update_is_adamw_s_by_its_formula(tmp_path: Path) -> None:
    """Loshchilov & Hutter 2019 (arXiv:1711.05101), in float64."""
    config = TrainConfig(steps=3, learning_rate=0.1, weight_decay=0.1, max_grad_norm=0.0, lr_schedule="linear")
    trained = train(tmp_path, config=config)

    first = Fit()
    weight, bias = (tensor.double() for tensor in first.tensors().values())
    values = torch.cat([weight.flatten(), bias])
    mean = square = torch.zeros_like(values)
    for step in range(3):
        x = first.inputs(step, 0).double()
        difference = x @ values[:6].view(2, 3).T + values[6:] - 1
        outer = 2 * difference / difference.numel()
        gradient = torch.cat([(outer.T @ x).flatten(), outer.sum(0)])
        assert lines(tmp_path, "loss")[step + 1] == pytest.approx(float(difference.square().mean()), rel=1e-5)
        assert lines(tmp_path, "grad_norm")[step + 1] == pytest.approx(float(gradient.norm()), rel=1e-5)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        rate = 0.1 * (1 - step / 3)
        assert lines(tmp_path, "lr")[step + 1] == pytest.approx(rate)
        unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        values = values * (1 - rate * 0.1) - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    result = torch.cat([tensor.flatten() for tensor in trained.tensors().values()])
    torch.testing.assert_close(result.double(), values, rtol=1e-5, atol=1e-6)


class Gradients(torch.optim.SGD):
    """Rate 1 and no memory: what it moves is the gradient."""

    def __init__(self, parameters: list[nn.Parameter], config: TrainConfig):
        super().__init__(parameters, lr=config.learning_rate)


def moved(output: Path, config: TrainConfig, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(loop, "make_optimizer", Gradients)
    objective = Fit(batch_size=batch_size)
    start = torch.cat([tensor.flatten() for tensor in objective.tensors().values()])
    train(output, objective, config=config)
    return start - torch.cat([tensor.flatten() for tensor in objective.tensors().values()])


def test_accumulated_gradients_are_the_mean_over_the_micro_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 x batch 2 moves the weights as a batch of those 4 would; not half as far, not twice."""
    config = TrainConfig(steps=1, batch_size=2, gradient_accumulation_steps=2, learning_rate=1.0, max_grad_norm=0.0)
    step = moved(tmp_path / "a", config, 2, monkeypatch)
    halves = [Fit(batch_size=2).inputs(0, micro_step) for micro_step in range(2)]
    monkeypatch.setattr(Fit, "inputs", lambda *_: torch.cat(halves))
    once = TrainConfig(steps=1, learning_rate=1.0, max_grad_norm=0.0)
    torch.testing.assert_close(step, moved(tmp_path / "b", once, 4, monkeypatch))
    for name in ("loss", "grad_norm"):
        assert lines(tmp_path / "a", name) == pytest.approx(lines(tmp_path / "b", name))


def test_gradients_are_clipped_to_the_norm_and_logged_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(steps=1, learning_rate=1.0, max_grad_norm=0.0)
    free = moved(tmp_path / "free", config, 2, monkeypatch)
    clipped = moved(tmp_path / "clipped", TrainConfig(steps=1, learning_rate=1.0, max_grad_norm=0.01), 2, monkeypatch)
    assert float(free.norm()) > 0.1 and float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-4)
    assert lines(tmp_path / "clipped", "grad_norm") == pytest.approx({1: float(free.norm())})


def test_a_frozen_parameter_stays(tmp_path: Path) -> None:
    objective = Fit()
    objective.module.bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    train(tmp_path, objective, config=TrainConfig(steps=2))
    assert objective.tensors()["bias"].tolist() == [0, 0]
    assert not torch.equal(objective.tensors()["weight"], Fit().tensors()["weight"])


# --- NaN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("micro_step", [0, 1])
def test_a_bad_loss_stops_before_the_update(tmp_path: Path, bad: float, micro_step: int) -> None:
    config = TrainConfig(steps=5, gradient_accumulation_steps=2)
    objective = Fit(lambda *at: bad if at == (3, micro_step) else 0.0)  # added: the gradients stay good
    with pytest.raises(TrainingError, match=r"step 4: loss (nan|inf).*with numbers 3\.0; numbers 3\.1\. Nothing"):
        train(tmp_path, objective, config=config)
    assert same(objective, train(tmp_path / "three", config=TrainConfig(steps=3, gradient_accumulation_steps=2)))
    assert sorted(lines(tmp_path, "loss")) == [1, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_under_a_good_loss_stops_before_the_update(tmp_path: Path, bad: float) -> None:
    def poison(step: int, _: int) -> None:
        if step == 2:
            objective.module.bias.register_hook(lambda gradient: gradient * bad)  # type: ignore[union-attr, operator]

    objective = Fit(poison)
    with pytest.raises(TrainingError, match=r"step 3: loss \d.*gradient norm (nan|inf), with numbers 2\.0\. Nothing"):
        train(tmp_path, objective, config=TrainConfig(steps=5))
    assert same(objective, train(tmp_path / "two", config=TrainConfig(steps=2)))


@pytest.mark.parametrize("at", [0, 4])
def test_nan_in_validation_stops_and_names_the_checkpoint(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fit, "validate", lambda _self, step, _: Measured({"val_loss": math.nan if step == at else 1.0}))
    with pytest.raises(TrainingError, match=f"validation after step {at}: val_loss = nan") as error:
        train(tmp_path, config=TrainConfig(steps=6), every=2, validate_every=2)
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert (saved.step if saved else 0) == at
    assert (f"Delete {saved.path} to resume before it" in str(error.value)) if saved else at == 0


def with_scale(init_scale: float) -> Accelerator:
    """What accelerate makes for fp16 on a GPU, on the CPU."""
    accelerator = Accelerator()
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    accelerator.unscale_gradients = lambda optimizer: scaler.unscale_(optimizer.optimizer)  # type: ignore[method-assign]
    return accelerator


def test_fp16_lowers_an_overflowing_loss_scale_and_does_the_step_again(tmp_path: Path) -> None:
    """A power of two as scale changes nothing, so the result is that of fp32 without one."""
    accelerator = with_scale(2.0**127)  # gradients x this are infinite
    scaled = train(tmp_path / "scaled", config=TrainConfig(steps=4), accelerator=accelerator)
    assert accelerator.scaler.get_scale() < 2.0**127
    assert same(scaled, train(tmp_path / "plain", config=TrainConfig(steps=4)))
    assert sorted(lines(tmp_path / "scaled", "loss")) == [1, 2, 3, 4]

    accelerator = with_scale(2.0**16)
    objective = Fit(lambda step, _: objective.module.bias.register_hook(lambda g: g * math.nan) and None)  # type: ignore
    with pytest.raises(TrainingError, match="gradient norm nan"):  # no scale can mend this
        train(tmp_path / "nan", objective, config=TrainConfig(steps=4), accelerator=accelerator)
    assert same(objective, Fit())


# --- stop and go on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(number)
    objective = Fit(lambda step, _: os.kill(os.getpid(), number) if step == 2 else None)
    with caplog.at_level(logging.WARNING), pytest.raises(Interrupted, match=r"stopped after step 3"):
        train(tmp_path, objective, config=TrainConfig(steps=9))
    assert f"{number.name}: finishing this step" in caplog.text
    assert signal.getsignal(number) is before
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert saved is not None and saved.step == 3 and torch.equal(saved.tensors["weight"], objective.tensors()["weight"])

    resumed = train(tmp_path, config=TrainConfig(steps=9), resume=True)
    assert same(resumed, train(tmp_path / "through", config=TrainConfig(steps=9)))
    assert sorted(lines(tmp_path, "loss")) == [*range(1, 10)]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice(step: int, _: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Fit(twice), config=TrainConfig(steps=9))
    assert checkpoint.latest(tmp_path / "checkpoints") is None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_the_last_step_leaves_the_last_validation_to_resume(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, Fit(lambda step, _: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None),
              config=TrainConfig(steps=4))  # fmt: skip
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert saved is not None and saved.step == 4
    assert train(tmp_path, config=TrainConfig(steps=4), resume=True).validated == [4]
    assert train(tmp_path, config=TrainConfig(steps=4), resume=True).validated == []  # it is known now


def test_a_signal_during_a_validation_stops_between_two_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is there before the pictures are drawn; what was not drawn is drawn when the run goes on."""
    drawn, signals = [], [signal.SIGTERM]

    def validate(_: Fit, step: int, tracker: Tracker) -> Measured:
        for number in tracker.each(range(5), "pictures"):
            drawn.append((step, number))
            if (step, number) == (2, 1) and signals:
                saved = checkpoint.latest(tmp_path / "checkpoints")
                assert saved is not None and saved.step == 2 and len(saved.state["validations"]) == 1
                os.kill(os.getpid(), signals.pop())
        return Measured({"val_loss": 0.5})

    monkeypatch.setattr(Fit, "validate", validate)
    with pytest.raises(Interrupted, match="during a validation"):
        train(tmp_path, config=TrainConfig(steps=4), validate_every=2)
    assert drawn == [*((0, i) for i in range(5)), (2, 0), (2, 1)]
    drawn.clear()
    train(tmp_path, config=TrainConfig(steps=4), validate_every=2, resume=True)
    assert drawn == [(step, i) for step in (2, 4) for i in range(5)]
    assert lines(tmp_path, "val_loss") == {0: 0.5, 2: 0.5, 4: 0.5}


def test_a_validation_is_in_the_curves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after its line was written, before the checkpoint knew."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "add_to_state", Mock(side_effect=OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            train(tmp_path, config=TrainConfig(steps=4), validate_every=2)
    assert lines(tmp_path, "val_loss") == {0: 0.0, 2: 2.0}
    assert train(tmp_path, config=TrainConfig(steps=4), validate_every=2, resume=True).validated == [2, 4]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 2, 4]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "cosine_with_restarts", "trapezoid"])
def test_ten_and_ten_steps_are_twenty(tmp_path: Path, schedule: str) -> None:
    own: dict[str, Any] = {"cosine_with_restarts": {"num_cycles": 2}, "trapezoid": {"decay_steps": 12}}.get(
        schedule, {}
    )
    shared: dict[str, Any] = {"steps": 20, "lr_schedule": schedule, "warmup_steps": 3}
    config = TrainConfig(**shared, gradient_accumulation_steps=2, ema=0.9, **own)
    through = train(tmp_path / "through", config=config)
    with pytest.raises(Interrupted):
        train(tmp_path, Fit(lambda *at: os.kill(os.getpid(), signal.SIGTERM) if at == (9, 0) else None), config=config)
    resumed = train(tmp_path, config=config, resume=True)
    assert same(resumed, through)
    for name in ("loss", "lr", "grad_norm"):
        assert lines(tmp_path, name) == lines(tmp_path / "through", name)


class Held(Fit):
    """With errors of held-out things that the test gives: step -> errors."""

    def __init__(self, errors: dict[int, list[float]]):
        super().__init__()
        self.errors = errors

    def validate(self, step: int, tracker: Tracker) -> Measured:
        self.validated.append(step)
        errors = torch.tensor([self.errors[step]])
        return Measured({"val_loss": float(errors.mean())}, errors)


ERRORS = {0: [9.0, 8.0], 2: [5.0, 4.1], 4: [6.0, 5.0], 6: [7.0, 6.0], 8: [8.0, 7.0], 10: [1.0, 0.0]}


def train_held(output: Path, patience: int = 0, steps: int = 10, **options: Any) -> tuple[Held, loop.Result]:
    objective, seen = Held(ERRORS), list[int]()
    job = loop.Job(
        output, TrainConfig(steps=steps), CheckpointConfig(), 2, patience=patience,
        validated=lambda result: seen.append(len(result.validations)),
    )  # fmt: skip
    result = loop.train(objective, job, Accelerator(), quiet=True, **options)
    assert seen == [*range(len(result.validations) - len(seen) + 1, len(result.validations) + 1)]
    return objective, result


def test_the_checkpoint_of_the_best_step_is_kept(tmp_path: Path) -> None:
    _, result = train_held(tmp_path, steps=8)
    assert result.choice is not None and (result.choice.step, result.choice.waited) == (2, 3)
    assert result.chosen == tmp_path / "checkpoints" / "step-00000002"
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000002", "step-00000006", "step-00000008"]
    two = train(tmp_path / "two", config=TrainConfig(steps=2))
    found = checkpoint.load(result.chosen).result
    assert all(torch.equal(found[name], value) for name, value in two.tensors().items())


def test_patience_ends_a_run_and_a_resumed_one_knows(tmp_path: Path) -> None:
    objective, result = train_held(tmp_path, patience=2)
    assert (result.step, objective.validated) == (6, [0, 2, 4, 6])
    again, result = train_held(tmp_path, patience=2, resume=True)
    assert (result.step, again.validated) == (6, [])
    further, result = train_held(tmp_path, resume=True)  # without patience it goes on
    assert (result.step, further.validated) == (10, [8, 10])
    assert result.choice is not None and result.choice.step == 10


def test_a_run_stopped_after_its_first_validation_goes_on_from_step_0(tmp_path: Path) -> None:
    """The seed may be the best: it is saved."""
    train_held(tmp_path, steps=2)
    saved = checkpoint.load(tmp_path / "checkpoints" / "step-00000000")
    assert saved.state["errors"] == {"0": [[9.0, 8.0]]}
    assert all(torch.equal(saved.tensors[name], value) for name, value in Fit().tensors().items())
    for path in (tmp_path / "checkpoints").glob("step-*2"):
        shutil.rmtree(path)
    objective, result = train_held(tmp_path, steps=2, resume=True)
    assert (objective.validated, result.step) == ([2], 2)


def test_other_held_out_pictures_begin_the_choice_anew(tmp_path: Path) -> None:
    train_held(tmp_path, steps=4)

    class Others(Held):
        def validate(self, step: int, tracker: Tracker) -> Measured:
            return Measured({"val_loss": 0.5}, torch.tensor([[9.0 - step, 3.0, 1.0]]), ("other",))

    job = loop.Job(tmp_path, TrainConfig(steps=8), CheckpointConfig(), 2)
    result = loop.train(Others({}), job, Accelerator(), quiet=True, resume=True)
    assert [*result.errors] == [6, 8] and result.choice is not None


def test_a_best_step_that_was_deleted_is_missed(tmp_path: Path) -> None:
    train_held(tmp_path, steps=8)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    with pytest.raises(CheckpointError, match="step-00000002 is missing: it holds the best step"):
        train_held(tmp_path, steps=8, resume=True)


def test_an_average_is_validated_and_left_at_the_end(tmp_path: Path) -> None:
    """Against its formula: decay min(0.9, (1 + n) / (10 + n)) after n + 1 updates, and none at the first."""
    plain = {step: train(tmp_path / str(step), config=TrainConfig(steps=step)).tensors() for step in (1, 2, 3, 4, 5)}
    average = {name: value.double() for name, value in plain[1].items()}
    for n in range(1, 5):
        decay = min(0.9, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * plain[n + 1][name].double() for name in average}
    seen: list[dict[str, Tensor]] = []

    class Seen(Fit):
        def validate(self, step: int, tracker: Tracker) -> Measured:
            seen.append({name: value.clone() for name, value in self.tensors().items()})
            return super().validate(step, tracker)

    averaged = train(tmp_path / "ema", Seen(), config=TrainConfig(steps=5, ema=0.9))
    for name, value in averaged.tensors().items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(value, seen[-1][name]) and not torch.equal(value, plain[5][name])
    saved = checkpoint.latest(tmp_path / "ema" / "checkpoints")
    assert saved is not None
    for name, value in plain[5].items():
        assert torch.equal(saved.tensors[name], value)
        torch.testing.assert_close(saved.result[name].double(), average[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("prodigyopt.Prodigy", {"d_coef": 2.0, "slice_p": 2}),
        ("pytorch_optimizer.CAME", {}),
        ("pytorch_optimizer.Lion", {"betas": [0.9, 0.98]}),
        ("pytorch_optimizer.Prodigy", {}),
        ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_any_optimizer_is_the_package_s_own_and_resumes_exactly(
    tmp_path: Path, optimizer: str, options: dict[str, Any]
) -> None:
    shared: dict[str, Any] = {"optimizer": optimizer, "optimizer_options": options, "weight_decay": 0.0}
    config = TrainConfig(steps=8, learning_rate=0.1, max_grad_norm=0.0, **shared)
    assert config.problems() == []
    through = train(tmp_path / "through", config=config)

    module, _, name = optimizer.rpartition(".")
    reference = Fit()
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    kind = getattr(importlib.import_module(module), name)
    bare = kind(reference.module.parameters(), lr=0.1, weight_decay=0.0, **own)
    for step in range(8):
        reference.loss(step, 0).value.backward()  # type: ignore[no-untyped-call]
        bare.step()
        bare.zero_grad()
    for one, other in zip(through.tensors().values(), reference.tensors().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert not same(through, Fit())

    with pytest.raises(Interrupted):
        train(tmp_path, Fit(lambda *at: os.kill(os.getpid(), signal.SIGTERM) if at == (4, 0) else None), config=config)
    assert same(train(tmp_path, config=config, resume=True), through)


def test_rates_of_single_parameters_and_what_does_not_learn(tmp_path: Path) -> None:
    """Against two optimizers, each with its own rate; the bias learns only from step 3 on, with moments of its own."""
    job = loop.Job(
        tmp_path, TrainConfig(steps=6, learning_rate=0.01, max_grad_norm=0.0), CheckpointConfig(), 100,
        rate=lambda step: 0.01 * (step + 1), lr_factor=lambda name: 4.0 if name == "bias" else 1.0,
        learns=lambda step, name: name == "weight" or step >= 3,
    )  # fmt: skip
    objective, reference = Fit(), Fit()
    loop.train(objective, job, Accelerator(), quiet=True)
    weight, bias = reference.module.parameters()
    first, second = (torch.optim.AdamW([one], lr=0.0, weight_decay=0.01) for one in (weight, bias))
    for step in range(6):
        reference.loss(step, 0).value.backward()  # type: ignore[no-untyped-call]
        first.param_groups[0]["lr"], second.param_groups[0]["lr"] = 0.01 * (step + 1), 0.04 * (step + 1)
        first.step()
        if step >= 3:
            second.step()
        reference.module.zero_grad()
    for one, other in zip(objective.tensors().values(), reference.tensors().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_finished_constant_run_can_be_prolonged(tmp_path: Path) -> None:
    train(tmp_path, config=TrainConfig(steps=4))
    longer = train(tmp_path, config=TrainConfig(steps=7), resume=True)
    assert same(longer, train(tmp_path / "through", config=TrainConfig(steps=7)))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    finished = train(tmp_path, config=TrainConfig(steps=4))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = train(tmp_path, config=TrainConfig(steps=4), resume=True)
    assert same(again, finished) and again.validated == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resuming_another_course_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    train(tmp_path, config=TrainConfig(steps=2), course={"train.learning_rate": 1e-4})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"train.learning_rate is 0.0003, the checkpoint has 0.0001"):
        train(tmp_path, config=TrainConfig(steps=4), resume=True, course={"train.learning_rate": 3e-4})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_validation_and_checkpoints_come_when_asked_for(tmp_path: Path) -> None:
    objective = train(tmp_path, config=TrainConfig(steps=7), every=3, validate_every=2)
    assert objective.validated == [0, 2, 4, 6, 7]
    assert lines(tmp_path, "val_loss") == {step: float(step) for step in objective.validated}
    seconds = lines(tmp_path, "seconds")
    assert [*seconds] == objective.validated and [*seconds.values()] == sorted(seconds.values())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert saved is not None and [row["step"] for row in saved.state["validations"]] == objective.validated


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    objective = Fit()
    objective.module.requires_grad_(False)
    with pytest.raises(ValueError, match="empty parameter list"):
        train(tmp_path, objective, config=TrainConfig(steps=1))
