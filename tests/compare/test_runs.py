"""One run of a comparison: what an initializer is told, where adapters start, what is drawn, and that nothing stays."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import initializers
from trainer import adapter, objective, qwen_image, run, validation
from trainer.adapter import AdapterConfig, AdapterWeights, InitContext, Seed
from trainer.compare.plan import Arm, Comparison, Request, Subject, prepare
from trainer.compare.runs import Workbench, norm_matched
from trainer.flow import generator
from trainer.lowrank import LowRank, singular_values
from trainer.plan import Start

CPU = torch.device("cpu")
FIRST, LAST = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.txt_mod.1"


def some(modules: dict[str, tuple[int, int]], rank: int = 6, size: float = 0.3) -> AdapterWeights:
    random = generator("some")
    return AdapterWeights(
        {
            name: LowRank(torch.randn(rank, i, generator=random) * size, torch.randn(o, rank, generator=random) * size)
            for name, (i, o) in modules.items()
        }
    )


def start(make: Callable[[InitContext], Seed]) -> Start:
    return Start("random", lambda context, options: make(context), initializers.config_class("random")(), [], [])


@pytest.fixture
def subjects(pictures: Path, tmp_path: Path) -> Path:
    """Two subjects of one group, with two pictures for training and one held out each."""
    for name, numbers in (("x", (0, 1, 2)), ("y", (3, 4, 5))):
        (tmp_path / "subjects" / name).mkdir(parents=True)
        for number in numbers:
            for suffix in (".png", ".txt"):
                shutil.copy(pictures / f"{number}{suffix}", tmp_path / "subjects" / name)
    return tmp_path / "subjects"


def compared(run_toml: Path, subjects: Path, *arms: Arm, settings: tuple[str, ...] = ()) -> Comparison:
    request = Request(initializers=("random",), seeds=2, learning_rates=(1e-2,), subjects=subjects)
    overrides = [f"output={run_toml.parent / 'out'}", "data.held_out=1", "validation.num_pictures=1", *settings]
    return replace(prepare(run_toml, overrides, request, initializers), arms=arms)


def arm(name: str, make: Callable[[InitContext], Seed], control: str | None = None) -> Arm:
    return Arm(name, start(make), control)


def nothing(context: InitContext) -> Seed:
    return Seed(AdapterWeights({}), {})


def ready(comparison: Comparison) -> Workbench:
    bench = Workbench(comparison, quiet=True)
    for subject in comparison.subjects:
        bench.prepare_subject(subject, [])
    return bench


def images(subject: Subject) -> tuple[Path, ...]:
    return tuple(example.path for example in subject.plan.dataset.train)


# --- what an initializer is told --------------------------------------------------------------------------


def test_each_arm_predicts_from_the_subject_s_pictures_with_the_run_s_seed(run_toml: Path, subjects: Path) -> None:
    """Only the control wrong-pictures gets those of the next subject, and finds nothing that was predicted already."""
    told: list[InitContext] = []

    def spy(context: InitContext) -> Seed:
        told.append(context)
        return Seed(some(context.modules), {})

    own, wrong = arm("own", spy), arm("wrong", spy, "wrong-pictures")
    comparison = compared(run_toml, subjects, own, wrong)
    bench, (x, y) = ready(comparison), comparison.subjects
    for subject, which, seed in ((x, own, 0), (x, own, 1), (x, wrong, 1), (y, wrong, 0)):
        bench._initialize(which, bench._context(subject, which, seed))
    assert [context.images for context in told] == [images(x), images(x), images(y), images(x)]
    assert [context.seed for context in told] == [0, 1, 1, 0]
    shown = [x, x, y, x]
    assert [context.cache for context in told] == [comparison.output / "cache" / "starts" / one.name for one in shown]


def test_the_control_of_equal_norm_is_made_of_the_arm_s_own_seed(run_toml: Path, subjects: Path) -> None:
    seeded = arm("i2l", lambda context: Seed(some(context.modules), {}))
    control = Arm("norm-matched", seeded.start, "norm-matched")
    comparison = compared(run_toml, subjects, seeded, control)
    bench, subject = ready(comparison), comparison.subjects[0]
    whole, found, other = (
        bench._initialize(of[0], bench._context(subject, *of)) for of in ((seeded, 0), (control, 0), (control, 1))
    )
    for name, x in whole.weights.factors.items():
        values, expected = singular_values(found.weights.factors[name]), singular_values(x)[:4]  # the adapter's rank
        assert torch.allclose(values, expected, rtol=1e-4)
        assert not torch.allclose(found.weights.factors[name].a, other.weights.factors[name].a)


def test_the_control_of_equal_norm_has_the_ranks_that_the_seed_asks_for() -> None:
    weights = some(dict.fromkeys("abc", (20, 30)), rank=7)
    for seed in (Seed(weights, {}, rank=2, rank_pattern={"c": 5}), Seed(weights, {})):
        control = norm_matched(seed, AdapterConfig(rank=4, rank_pattern={"b": 3}), 0)
        ranks = {"a": seed.rank or 4, "b": 3, "c": 5 if seed.rank else 4}
        assert (control.rank, control.rank_pattern) == (seed.rank, seed.rank_pattern)
        for name, x in weights.factors.items():
            values = torch.linalg.svdvals((x.b @ x.a).double())[: ranks[name]]
            found = control.weights.factors[name]
            assert torch.linalg.svdvals((found.b @ found.a).double())[: ranks[name]] == pytest.approx(values, rel=1e-4)
            assert float((found.b @ found.a).norm()) == pytest.approx(float(values.norm()), rel=1e-4)


def test_a_seed_is_asked_for_once_and_never_taken_for_another_s(run_toml: Path, subjects: Path) -> None:
    asked: list[tuple[tuple[Path, ...], int]] = []

    def telling(name: str) -> Callable[[InitContext], Seed]:
        def make(context: InitContext) -> Seed:
            asked.append((context.images, context.seed))
            return Seed(AdapterWeights({}), {"of": (name, context.images, context.seed)})

        return make

    comparison = compared(run_toml, subjects, arm("one", telling("one")), arm("two", telling("two")))
    bench = ready(comparison)
    (one, two), (x, y) = comparison.arms, comparison.subjects
    order = ((x, one, 0), (x, two, 0), (y, two, 0), (y, two, 1))  # one thing changes at a time
    cells = [comparison.cell(subject, which, 1e-2, seed) for subject, which, seed in order]
    for cell in cells:
        for rate in (1e-3, 1e-2):
            report = bench._seed(replace(cell, learning_rate=rate)).report
            assert report["of"] == (cell.arm.name, images(cell.subject), cell.seed)
    assert len(asked) == len(cells)


def test_the_loss_of_the_base_is_that_of_each_subject_s_held_out_pictures(run_toml: Path, subjects: Path) -> None:
    comparison = compared(run_toml, subjects, arm("random", nothing))
    bench, transformer = ready(comparison), qwen_image.load_transformer(comparison.config.model, CPU)
    losses = [bench._base_loss(subject) for subject in (*comparison.subjects, *comparison.subjects)]
    assert losses[:2] == losses[2:] and losses[0] != losses[1]
    for subject, loss in zip(comparison.subjects, losses, strict=False):
        encoder = qwen_image.TextEncoder(comparison.config.model.base, CPU)
        encoded = objective.encode(subject.plan, CPU, encoder, quiet=True)
        items = [encoded.item(example) for example in subject.plan.dataset.held_out]
        expected = validation.stable_errors(transformer, items, CPU, torch.float32).mean()
        assert loss == pytest.approx(float(expected), rel=1e-5)


# --- where the adapters start, and what they leave --------------------------------------------------------


def test_all_arms_of_a_seed_start_from_the_same_random_rows(
    run_toml: Path, subjects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a seed leaves out starts at random: were that another draw in each arm, it would be compared too."""
    rows: list[torch.Tensor] = []
    install = run.install

    def spied(transformer: Any, *arguments: Any, **options: Any) -> Any:
        result = install(transformer, *arguments, **options)
        rows.append(adapter.read(transformer).factors[LAST].a)
        return result

    monkeypatch.setattr(run, "install", spied)
    partly = arm("a longer name", lambda context: Seed(some({FIRST: context.modules[FIRST]}), {}))
    settings = ("train.steps=1", "validation.every=1", "validation.prompts=[]")
    comparison = compared(run_toml, subjects, arm("random", nothing), partly, settings=settings)
    bench = ready(comparison)
    cells = [cell for cell in comparison.cells() if cell.subject is comparison.subjects[0]]
    assert [(cell.seed, cell.arm.name) for cell in cells] == [
        (seed, name) for seed in (0, 1) for name in ("random", "a longer name")
    ]
    for cell in cells:
        assert bench.run(cell)["status"] == "finished"
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3]) and not torch.equal(rows[0], rows[2])


def test_nothing_of_a_run_stays_on_the_base(run_toml: Path, subjects: Path) -> None:
    """Neither an adapter nor a frozen LoRA, nor its part on layers that have no adapter."""
    other = {"transformer_blocks.0.img_mlp.net.0.proj": (64, 256)}
    held = arm("held", lambda context: Seed(AdapterWeights({}), {}, frozen=some({**context.modules, **other})))
    settings = ("train.steps=1", "validation.every=1", "validation.prompts=[]")
    comparison = compared(run_toml, subjects, held, arm("random", nothing), settings=settings)
    bench, subject = ready(comparison), comparison.subjects[0]
    first, second = (
        bench.run(comparison.cell(subject, which, 1e-2, 0))["curve"][0]["val_loss"] for which in comparison.arms
    )
    base = bench._base_loss(subject)
    assert second == pytest.approx(base, rel=1e-6) and first != pytest.approx(base, rel=1e-3)
    bench._base_losses.clear()
    assert bench._base_loss(subject) == pytest.approx(base, rel=1e-6)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_base_is_set_up_as_configured(checkpointing: bool, run_toml: Path, subjects: Path) -> None:
    setting = f"train.gradient_checkpointing={str(checkpointing).lower()}"
    bench = Workbench(compared(run_toml, subjects, arm("random", nothing), settings=(setting,)), quiet=True)
    assert bench._transformer.is_gradient_checkpointing == checkpointing


# --- samples ----------------------------------------------------------------------------------------------


def test_samples_are_drawn_as_configured_from_the_same_noises_for_each_prompt(
    run_toml: Path, subjects: Path, tiny_base: Path
) -> None:
    """Against single pictures, with every argument written out."""
    settings = ("validation.true_cfg_scale=3.0", "validation.seed=5", "validation.prompts=['one', 'two']")
    comparison = compared(run_toml, subjects, arm("random", nothing), settings=settings)
    bench, subject = ready(comparison), comparison.subjects[0]
    found = bench._latents(subject.plan, ["one", "two"], 2)
    encoded = objective.encode(subject.plan, CPU, qwen_image.TextEncoder(str(tiny_base), CPU), quiet=True)
    transformer = qwen_image.load_transformer(comparison.config.model, CPU)
    expected = [
        qwen_image.Sampler(str(tiny_base)).latents(
            transformer,
            [encoded.prompts[text]],
            size=(64, 64),
            seeds=[seed],
            num_inference_steps=2,
            true_cfg_scale=3.0,
            negative_prompt=encoded.prompts[" "],
        )
        for text in ("one", "two")
        for seed in (5, 6)
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_drift_is_how_far_unrelated_samples_are_from_the_base_s(run_toml: Path, subjects: Path) -> None:
    settings = ("train.steps=1", "validation.every=1", "validation.unrelated_prompts=['a house']")
    seeded = arm("seeded", lambda context: Seed(some(context.modules), {}))
    comparison = compared(run_toml, subjects, seeded, settings=(*settings, "validation.prompts=[]"))
    bench, subject = ready(comparison), comparison.subjects[0]
    curve = bench.run(comparison.cell(subject, seeded, 1e-2, 0))["curve"]
    plain = bench._latents(subject.plan, ["a house"], 1)
    run.install(
        bench._transformer,
        bench._initialize(seeded, bench._context(subject, seeded, 0)),
        AdapterConfig(rank=4),
        random_seed=0,
    )
    drawn = bench._latents(subject.plan, ["a house"], 1)
    assert curve[0]["drift"] == pytest.approx(float((drawn - plain).square().mean()), rel=1e-4)
    assert curve[0]["drift"] > 0
