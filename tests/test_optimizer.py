"""Learning rates over steps, and optimizers by name or by import path."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from trainer import optimizer
from trainer.optimizer import TrainConfig, learning_rate, make_optimizer


def test_constant_rate_after_a_warm_up() -> None:
    config = TrainConfig(steps=10, warmup_steps=4, learning_rate=8.0)
    assert [learning_rate(config, step) for step in range(10)] == [2.0, 4.0, 6.0, 8.0, *[8.0] * 6]
    assert learning_rate(TrainConfig(steps=3, learning_rate=0.5), 0) == 0.5


def test_linear_rate_reaches_zero_where_the_run_ends() -> None:
    config = TrainConfig(steps=12, warmup_steps=2, learning_rate=1.0, lr_schedule="linear")
    rates = [learning_rate(config, step) for step in range(13)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_cosine_rate_is_torch_s() -> None:
    config = TrainConfig(steps=20, learning_rate=0.3, lr_schedule="cosine")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        assert learning_rate(config, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_settings_that_cannot_train_are_problems() -> None:
    assert TrainConfig().problems() == []
    bad = TrainConfig(steps=0, batch_size=0, gradient_accumulation_steps=0, learning_rate=0.0, weight_decay=-1.0)
    assert [problem.split()[0] for problem in bad.problems()] == [
        "steps", "batch_size", "gradient_accumulation_steps", "weight_decay", "learning_rate", "warmup_steps",
    ]  # fmt: skip
    assert "leaves nothing" in TrainConfig(steps=5, warmup_steps=5).problems()[0]


def shares(schedule: Any, steps: int) -> list[float]:
    """What a schedule of transformers multiplies the rate by."""
    return [schedule.lr_lambdas[0](step) for step in range(steps)]


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_are_those_of_transformers(floor: float, warmup: int) -> None:
    of = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    common: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": 40}
    references = {
        "trapezoid": transformers.get_wsd_schedule(
            of, num_decay_steps=12, min_lr_ratio=floor, decay_type="linear", **common
        ),
        "cosine": transformers.get_cosine_with_min_lr_schedule_with_warmup(of, min_lr_rate=floor, **common),
        "cosine_with_restarts": transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
            of, num_cycles=3, **common
        ),
    }
    for name, schedule in references.items():
        own: dict[str, Any] = {"trapezoid": {"decay_steps": 12}, "cosine_with_restarts": {"num_cycles": 3}}
        shared: dict[str, Any] = {"lr_schedule": name, "min_lr_ratio": floor, **own.get(name, {})}
        config = TrainConfig(steps=40, warmup_steps=warmup, learning_rate=2.0, **shared)
        assert config.problems() == []
        expected = shares(schedule, 40)
        if name == "cosine_with_restarts":  # which has no floor there
            expected = [x if step < warmup else floor + (1 - floor) * x for step, x in enumerate(expected)]
        found = [learning_rate(config, step) / 2 for step in range(40)]
        assert found[warmup:] == pytest.approx(expected[warmup:])
        assert found[:warmup] == pytest.approx(
            [(step + 1) / 5 for step in range(warmup)]
        )  # ours reaches it a step sooner


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lr_schedule": "trapezoid"}, 'lr_schedule = "trapezoid" needs decay_steps'),
        ({"lr_schedule": "cosine_with_restarts"}, "needs num_cycles"),
        ({"decay_steps": 3}, 'decay_steps has no effect with lr_schedule = "constant"; it needs "trapezoid"'),
        ({"num_cycles": 3, "lr_schedule": "cosine"}, "num_cycles has no effect"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio has no effect"),
        ({"min_lr_ratio": 1.5, "lr_schedule": "linear"}, "min_lr_ratio must be between 0 and 1"),
        ({"lr_schedule": "trapezoid", "decay_steps": 0}, "decay_steps must be at least 1"),
        ({"steps": 10, "warmup_steps": 4, "lr_schedule": "trapezoid", "decay_steps": 7}, "are more than the 6 steps"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1, not 1"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"optimizer": "adamw9"}, 'did you mean "adamw"?'),
        ({"optimizer": "torch.optim.Adan"}, "torch.optim has no Adan; did you mean torch.optim.Adam"),
        ({"optimizer": "nowhere.Lion"}, "install it: pip install nowhere"),
        ({"optimizer": "torch.nn.Linear"}, "torch.nn.Linear is no torch optimizer"),
        ({"optimizer": "torch.optim.LBFGS", "weight_decay": 0.0}, "computes the loss several times a step"),
        ({"optimizer": "torch.optim.Rprop"}, "weight_decay: torch.optim.Rprop has none; set it to 0"),
        ({"optimizer": "torch.optim.SGD", "optimizer_options": {"momentun": 0.9}}, "did you mean momentum?"),
        ({"optimizer": "torch.optim.SGD", "optimizer_options": {"lr": 0.9}}, "lr is [train] learning_rate"),
        ({"optimizer": "torch.optim.SGD", "optimizer_options": {"momentum": -1.0}}, "Invalid momentum value: -1.0"),
        ({"optimizer": "torch.optim.SGD", "betas": (0.8, 0.9)}, "betas has no effect with torch.optim.SGD"),
        ({"optimizer_options": {"momentum": 0.9}}, "optimizer_options are of an optimizer given by its import path"),
        ({"optimizer": "pytorch_optimizer.ScheduleFreeAdamW"}, "must be switched between training and validation"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_problem(settings: dict[str, Any], problem: str) -> None:
    found = TrainConfig(**settings).problems()
    assert len(found) == 1 and problem in found[0]


def test_adamw_has_the_settings_of_the_configuration() -> None:
    config = TrainConfig(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2, learning_rate=0.5)
    group = make_optimizer([nn.Parameter(torch.zeros(2))], config).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 1e-6, 0.2, 0.5)


def test_adamw_is_fused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as can be seen without one."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, fused, **options: asked.append(fused))
    on_gpu = nn.Parameter(torch.zeros(2))
    monkeypatch.setattr(type(on_gpu), "device", torch.device("cuda", 0), raising=False)
    optimizer.make_optimizer([on_gpu], TrainConfig())
    monkeypatch.undo()
    assert asked == [True]
