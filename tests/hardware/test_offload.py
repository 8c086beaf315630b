"""Blocks and activations in the CPU's memory: the same numbers to the bit, with two blocks at hand instead of all."""

import contextlib
import os
import shutil
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers.quantizers.bitsandbytes.bnb_quantizer as bnb_quantizer
import psutil
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from initializers.i2l import layout
from initializers.i2l.training.batch_lora import BatchLora
from tests import tiny
from tests.compare.test_runs import arm, compared, nothing, some, subjects
from tests.helpers import BAD_INPUT, FINISHED, INTERRUPTED, adapter_bytes, files, metrics, run
from tests.test_run import before_step, make_plan
from trainer import adapter, qwen_image
from trainer.adapter import AdapterConfig, Seed
from trainer.compare.runs import Workbench
from trainer.errors import UserError
from trainer.hardware import machine, memory, offload, parallel
from trainer.hardware.live import LiveBytes, fused_attention
from trainer.loop import TrainConfig
from trainer.qwen_image import ModelConfig

CPU, META = torch.device("cpu"), torch.device("meta")
NUM_BLOCKS = 5
THRIFTY = "train.gradient_checkpointing=true"
__all__ = ["subjects"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformer whose blocks are large beside their activations."""
    folder = tmp_path_factory.mktemp("offload")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        QwenImageTransformer2DModel(
            num_layers=NUM_BLOCKS,
            num_attention_heads=2,
            attention_head_dim=128,
            axes_dims_rope=(32, 48, 48),
            in_channels=64,
            out_channels=16,
            joint_attention_dim=64,
        ).save_pretrained(folder / "transformer")
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).mkdir()
    return str(folder)


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks for a GPU before it quantises to 4 bits; bitsandbytes itself works on a CPU."""
    monkeypatch.setattr(bnb_quantizer.BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    # in eval mode it would pack weights for a CPU's kernel that has no backward, and keep them so
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def prepared(base: str, blocks: int, device: torch.device = CPU, *, activations: bool = False, **model: Any) -> Any:
    """A transformer with an adapter, ready to be trained."""
    config = ModelConfig(base=base, offload_blocks=blocks, **model)
    transformer = qwen_image.load_transformer(config, device)
    adapter.inject(transformer, AdapterConfig(rank=2))
    for name, tensor in adapter.tensors(transformer).items():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    qwen_image.set_up(transformer, config, gradient_checkpointing=True, offload_activations=activations)
    return transformer.train()


def velocity(transformer: Any) -> Tensor:
    random = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(1, 16, 1, 4, 4, generator=random), torch.randn(1, 3, 64, generator=random)
    device, dtype = transformer.device, transformer.dtype
    sigmas = torch.tensor([0.3], device=device)
    return qwen_image.predict_velocity(transformer, latents.to(device, dtype), sigmas, prompt.to(device), None)


def gradients(transformer: Any) -> dict[str, Tensor]:
    loss = velocity(transformer).float().square().mean()
    loss.backward()
    found = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    for parameter in transformer.parameters():
        parameter.grad = None
    return {**found, "loss": loss.detach()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 50
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def block_bytes(transformer: Any) -> int:
    """Of what is frozen in the first block."""
    sizes = list[int]()

    def count(part: Tensor) -> Tensor:
        sizes.append(part.nbytes)
        return part

    for _, _, tensor in offload._tensors(transformer.transformer_blocks[0]):
        if not tensor.requires_grad:
            offload._made_of(tensor, count)
    return sum(sizes)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The blocks that were fetched, in order. At no time more than two are there, at the end none is."""
    order, alive, real = list[int](), set[int](), offload._Fetcher._fetch

    def fetch(self: Any, index: int) -> Any:
        result, number = real(self, index), len(order)
        order.append(index)
        alive.add(number)
        weakref.finalize(result.memory.untyped_storage(), alive.discard, number)
        assert len(alive) <= offload.AT_HAND
        return result

    monkeypatch.setattr(offload._Fetcher, "_fetch", fetch)
    yield order
    assert not alive


# --- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3, 60])
def test_gradients_are_equal_and_blocks_come_in_order(base: str, blocks: int, fetched: list[int]) -> None:
    expected = gradients(prepared(base, 0))
    assert fetched == []
    transformer, last = prepared(base, blocks), min(blocks, NUM_BLOCKS) - 1
    kept = {name: p.clone() for name, p in transformer.named_parameters() if not p.requires_grad}
    for _ in range(2):
        assert_equal(gradients(transformer), expected)
    forward = [*range(last + 1)]
    assert fetched == 2 * (forward + forward[::-1])
    fetched.clear()
    with torch.no_grad():
        velocity(transformer)
        velocity(transformer)
    assert fetched == 2 * forward
    now = dict(transformer.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("quantization", ["nf4", "fp8"])
def test_quantised_blocks_are_fetched_as_they_are_stored(base: str, quantization: str, fetched: list[int]) -> None:
    """And are gone after use: bitsandbytes' own layers would keep them from the forward pass on."""
    kind: dict[str, Any] = {"dtype": "bf16", "quantization": quantization}
    expected, transformer = gradients(prepared(base, 0, **kind)), prepared(base, NUM_BLOCKS, **kind)
    assert_equal(gradients(transformer), expected)
    assert len(fetched) == 2 * NUM_BLOCKS
    whole = block_bytes(qwen_image.transformer_on_meta(base).requires_grad_(False)) / 2  # in bf16
    assert block_bytes(transformer) < 0.7 * whole


def test_a_layer_in_4_bits_is_that_of_bitsandbytes(base: str) -> None:
    """Also where the scales are quantised once more, as in some published files."""
    from bitsandbytes.nn import Linear4bit

    for twice in (False, True):
        options = {"compute_dtype": torch.bfloat16, "compress_statistics": twice, "quant_type": "nf4"}
        layer = Linear4bit(128, 256, **options)
        layer.load_state_dict(nn.Linear(128, 256).state_dict())
        holder = nn.Sequential(layer.to(torch.bfloat16).to("cpu"))
        given = torch.randn(3, 5, 128, dtype=torch.bfloat16, requires_grad=True)
        expected = holder(given)
        (expected_gradient,) = torch.autograd.grad(expected.float().square().sum(), given)
        offload._replace_4bit(holder)
        assert holder[0] is not layer
        found = holder(given)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.float().square().sum(), given)[0], expected_gradient)


def test_all_but_the_offloaded_blocks_is_on_the_device(base: str) -> None:
    """With the meta device in place of a GPU."""

    def places(transformer: Any) -> dict[str, str]:
        return {name: p.device.type for name, p in transformer.named_parameters()}

    def peak(transformer: Any) -> int:
        with LiveBytes("meta") as counted:
            velocity(transformer).sum().backward()
        return counted.peak

    transformer = prepared(base, 2, META, dtype="bf16")
    before = places(transformer)
    on_cpu = {name for name, place in before.items() if place == "cpu"}
    assert {name.split(".")[1] for name in on_cpu} == {"2", "4"} and not any("lora" in name for name in on_cpu)
    assert {name for name in before if name.startswith("transformer_blocks.2.") and "lora" not in name} <= on_cpu
    more = peak(transformer) - peak(prepared(base, 0, META, dtype="bf16"))
    assert 1.9 < more / block_bytes(transformer) < 2.1
    assert places(transformer) == before
    gradients = [p.grad for p in transformer.parameters() if p.grad is not None]
    assert len(gradients) > 50 and all(gradient.is_meta for gradient in gradients)


def test_a_pass_that_breaks_off_leaves_the_weights_where_they_lie(base: str, fetched: list[int]) -> None:
    transformer, broken = prepared(base, NUM_BLOCKS), list[int]()
    expected = gradients(transformer)

    def full(*_: object) -> None:
        if not broken:
            broken.append(1)
            raise torch.OutOfMemoryError

    layer = transformer.transformer_blocks[2].attn.to_out[0].base_layer
    layer.register_forward_hook(full)
    lying = layer.weight
    fetched.clear()
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        velocity(transformer)
    assert layer.weight is lying and fetched == [0, 1, 2, 3]  # the next one was on its way
    fetched.clear()
    assert_equal(gradients(transformer), expected)
    assert fetched[:2] == [0, 1]


class FakeStream:
    """What a stream of CUDA is asked, in order, with the copies that are made."""

    done: list[str]

    def __init__(self, name: Any = "side"):
        self.name = name if isinstance(name, str) else "side"

    def wait_stream(self, other: "FakeStream") -> None:
        self.done.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.done.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.done.append(f"{self.name} is marked")
        return f"the mark of {self.name}"


def test_streams_wait_for_each_other(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits for what was computed with its memory before; computing waits for the copy."""
    done, compute, inside = list[str](), FakeStream("compute"), list[str]()
    monkeypatch.setattr(FakeStream, "done", done, raising=False)

    @contextlib.contextmanager
    def within(stream: FakeStream) -> Iterator[None]:
        inside.append(stream.name)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: compute)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(Tensor, "copy_", lambda self, *_, non_blocking=False: done.append(f"copy on {inside}") or self)
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    cells = [offload._Block(block, torch.empty(1024, dtype=torch.uint8)) for block in blocks]
    fetcher = offload._Fetcher(cells, torch.device("cuda"))
    fetcher._device = CPU  # where memory can be had
    done.clear()
    copied = ["side waits for compute", "copy on ['side']", "side is marked"]
    fetcher._before(0)
    assert done == [*copied, "compute waits for the mark of side", *copied]
    done.clear()
    fetcher._before(1)
    assert done == ["compute waits for the mark of side"]
    fetcher._before(0)
    fetcher._before(0)
    done.clear()
    fetcher._ahead = fetcher._fetch(0)
    done.clear()
    fetcher._before(1)  # what came ahead is given back: not before it is whole
    assert done[0] == "compute waits for the mark of side" and done[1:4] == copied


# --- activations ------------------------------------------------------------------------------------------


def test_what_checkpointing_keeps_goes_to_the_cpu_and_nothing_else(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, real = list[tuple[int, ...]](), torch.autograd.graph.save_on_cpu

    class Watched(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool):
            hooks = real(pin_memory)

            def pack(tensor: Tensor) -> Any:
                kept.append((*tensor.shape,))
                return hooks.pack_hook(tensor.clone())

            super().__init__(pack, hooks.unpack_hook)

    expected = gradients(prepared(base, 0))
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
    assert_equal(gradients(prepared(base, 2, activations=True)), expected)
    assert sorted(kept) == sorted(NUM_BLOCKS * [(1, 4, 256), (1, 3, 256), (1, 256)])  # picture, caption, time


@pytest.mark.parametrize("rank", [2, 64])
def test_a_step_with_offloaded_activations_is_estimated(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many blocks, whose gradients count when activations do not; what numpy holds is the CPU's memory here."""
    shape: dict[str, Any] = {
        "num_layers": 9,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "joint_attention_dim": 32,
        "in_channels": 64,
        "axes_dims_rope": (8, 12, 12),
    }

    class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool):
            super().__init__(lambda x: x.detach().numpy().copy(), lambda kept: torch.from_numpy(kept).clone())

    def peak(real: Any) -> int:
        with fused_attention(), LiveBytes("cpu") as counted:
            memory.forward(real, 1, 128**2, of_input=False).square().mean().backward()
        return counted.peak

    with META:
        like = QwenImageTransformer2DModel(**shape)
    settings, model = AdapterConfig(rank=rank), ModelConfig(base="x/y", dtype="fp32")
    real = memory.few_blocks(memory.shape_of(like), torch.float32, settings, 9, CPU)
    real.enable_gradient_checkpointing()
    plain = peak(real)
    real.zero_grad()
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Elsewhere)
    real.enable_gradient_checkpointing(offload.checkpoint_on_cpu)
    config = TrainConfig(gradient_checkpointing=True, offload_activations=True)
    found = peak(real)
    assert memory.step_bytes(like, model, config, settings, 128**2) == pytest.approx(found, rel=0.06)
    assert found < plain


# --- whole runs -------------------------------------------------------------------------------------------


def assert_same_runs(one: Path, two: Path) -> None:
    assert adapter_bytes(one) == adapter_bytes(two)
    first, second = ([{**line, "seconds": 0} for line in metrics(output)] for output in (one, two))
    assert first == second
    pictures = [file for file in files(one) if file.startswith("samples/")]
    assert pictures and all((one / file).read_bytes() == (two / file).read_bytes() for file in pictures)


@pytest.fixture
def i2l(tmp_path: Path) -> tuple[str, ...]:
    """Settings of a start by i2L that tries strengths, and keeps the whole prediction beside the adapter."""
    tiny.make_i2l(tmp_path / "i2l", tmp_path / "encoders")
    table = {"weights": tmp_path / "i2l", "encoders": tmp_path / "encoders", "experts": ["style", "bias"]}
    options = {**table, "strength": "auto", "mode": "merge"}
    return ("init.method=i2l", *(f"init.i2l.{name}={value}" for name, value in options.items()))


@pytest.mark.parametrize("start", ["gaussian", "i2l"])
def test_a_run_with_offloaded_blocks_is_the_run_without(
    start: str, run_toml: Path, tmp_path: Path, i2l: tuple[str, ...], fetched: list[int]
) -> None:
    """With validations, samples, and checkpoints."""
    settings = (THRIFTY, f"data.cache={tmp_path / 'cache'}", *(i2l if start == "i2l" else ("init.method=gaussian",)))
    assert run(run_toml, tmp_path / "all", *settings) == FINISHED
    assert fetched == []
    saving = ("model.offload_blocks=1", "train.offload_activations=true")
    assert run(run_toml, tmp_path / "few", *settings, *saving) == FINISHED
    assert fetched
    assert_same_runs(tmp_path / "all", tmp_path / "few")


def test_blocks_may_be_offloaded_when_a_run_goes_on(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[int]
) -> None:
    settings = (THRIFTY, "init.method=gaussian", f"data.cache={tmp_path / 'cache'}")
    assert run(run_toml, tmp_path / "through", *settings) == FINISHED
    with monkeypatch.context() as patch:
        before_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(run_toml, tmp_path / "halves", *settings) == INTERRUPTED
    more = ("model.offload_blocks=2", "train.offload_activations=true")
    assert run(run_toml, tmp_path / "halves", *settings, *more, resume=True) == FINISHED
    assert fetched
    assert_same_runs(tmp_path / "through", tmp_path / "halves")


@pytest.mark.slow
def test_a_comparison_with_offloaded_blocks(run_toml: Path, subjects: Path, fetched: list[int]) -> None:
    arms = arm("some", lambda context: Seed(some(context.modules), {})), arm("nothing", nothing)
    curves = []
    for more in ((), ("model.offload_blocks=2", "train.offload_activations=true")):
        comparison = compared(run_toml, subjects, *arms, settings=(THRIFTY, "train.steps=2", *more))
        bench, subject = Workbench(comparison, quiet=True), comparison.subjects[0]
        runs = [bench.run(comparison.cell(subject, one, 1e-2, 0)) for one in comparison.arms]
        curves.append([{**values, "seconds": 0} for result in runs for values in result["curve"]])
        shutil.rmtree(comparison.output)
    assert curves[0] == curves[1] and len(curves[0]) == 4 and fetched


def test_a_hypernetwork_learns_the_same_through_offloaded_blocks(tiny_base: Path, fetched: list[int]) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = layout.module_shapes(layout.Geometry(num_blocks=2, hidden_size=64))
    values = {
        name: (torch.randn(2, 3, i, generator=random) * 0.1, torch.randn(2, o, 3, generator=random) * 0.1)
        for name, (i, o) in shapes.items()
    }
    latents, prompt = torch.randn(2, 16, 1, 4, 4, generator=random), torch.randn(2, 3, 64, generator=random)
    found = []
    for blocks in (0, 2):
        config = ModelConfig(base=str(tiny_base), dtype="fp32", offload_blocks=blocks)
        transformer = qwen_image.load_transformer(config, CPU)
        qwen_image.set_up(transformer, config, gradient_checkpointing=True, offload_activations=bool(blocks))
        factors = {name: tuple(x.clone().requires_grad_() for x in pair) for name, pair in values.items()}
        with BatchLora(transformer, shapes).applied(factors):
            velocity = qwen_image.predict_velocity(transformer, latents, torch.tensor([0.2, 0.7]), prompt, None)
        velocity.square().mean().backward()
        found.append([x.grad for pair in factors.values() for x in pair])
    assert len(fetched) == 4
    assert all(one is two is None or torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert sum(gradient is not None for gradient in found[0]) > 30


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.offload_blocks=1",), "offload_blocks saves nothing without [train] gradient_checkpointing = true"),
        (("model.offload_blocks=-1",), "offload_blocks must be at least 0, not -1"),
        (("model.offload_blocks=1", THRIFTY, "model.compile=true"), "compile does not go with offload_blocks"),
        (("model.offload_blocks=1", THRIFTY, "model.quantization=int8"), '"int8" does not go with offload_blocks'),
        (("model.offload_blocks=1", THRIFTY, "adapter.use_dora=true"), "set [model] offload_blocks = 0"),
        (("train.offload_activations=true",), "offload_activations needs gradient_checkpointing = true"),
    ],
)
def test_what_it_does_not_go_with(
    settings: tuple[str, ...], message: str, run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(run_toml, tmp_path / "out", *settings) == BAD_INPUT
    assert message in caplog.text


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "WORLD_SIZE"])
def test_it_is_for_one_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offload.problems(1, gradient_checkpointing=True) == []
    monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "true")
    (problem,) = offload.problems(1, gradient_checkpointing=True)
    assert "offload_blocks is for one process without FSDP" in problem
    assert offload.problems(0, gradient_checkpointing=False) == []


def test_accelerate_moves_nothing_that_is_meant_to_stay() -> None:
    module = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    accelerator = parallel.make_accelerator("fp32")
    assert parallel.wrap_ddp(accelerator, module)[0].weight.is_meta  # it cannot be moved
    accelerator.free_memory()


# --- memory -----------------------------------------------------------------------------------------------


def test_memory_that_is_pinned_is_what_the_plan_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, real = list[int](), torch.empty

    def empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        assert pin_memory
        taken.append(1 << (arguments[0] - 1).bit_length())
        return real(*arguments, **options, device="meta")

    monkeypatch.setattr(torch, "empty", empty)
    for size, count in ((679_624_704, 60), (191_000_064, 45), (191_000_064, 1), (3 << 30, 2)):
        taken.clear()
        pieces = [*offload._memories(size, count, pinned=True)]
        assert len(pieces) == count and {piece.nbytes for piece in pieces} == {size}
        assert sum(taken) == offload.cpu_bytes(size, 60, count)
        assert sum(taken) < 1.2 * size * count or count < 3
    assert offload.cpu_bytes(1e9, 60, 0) == 0


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = torch.empty

    def empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "empty", empty)
    assert [piece.nbytes for piece in offload._memories(512, 3, pinned=True)] == [512, 512, 512]
    assert "cannot be pinned (CUDA error: out of memory)" in caplog.text


def test_bytes_on_the_gpu() -> None:
    assert offload.gpu_bytes(10, 3, 60, 0) == 190
    assert offload.gpu_bytes(10, 3, 60, 20) == 10 + 42 * 3
    assert offload.gpu_bytes(10, 3, 60, 1) == 190  # it is at hand all the same
    assert offload.gpu_bytes(10, 3, 60, 99) == 16
    assert offload.activation_bytes(25_000_000, 60) == 60 << 25


def test_the_machine_is_looked_at_with_offloaded_blocks(run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU has room for one block more than is needed; the CPU is too small, then large enough."""
    settings = (THRIFTY, "model.offload_blocks=2")
    plan, without = make_plan(run_toml, *settings), make_plan(run_toml, THRIFTY)
    weights, waiting = memory.placed_bytes(plan.transformer, plan.config.model)
    assert weights == memory.placed_bytes(without.transformer, without.config.model)[0]
    assert waiting >= 2 * block_bytes(plan.transformer.requires_grad_(False))

    class Memory:
        total = 1000.0

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 10**9))
    with pytest.raises(UserError, match=r"offload_blocks: .* would lie in the CPU's memory, which has 0.0 MB"):
        machine.check(plan, torch.device("cuda"))
    machine.check(without, torch.device("cuda"))
    Memory.total = 1e9
    machine.check(plan, torch.device("cuda"))
    Memory.total = memory.weight_bytes(plan.transformer, plan.config.model) * 1.5
    machine.check(without, CPU)
    with pytest.raises(UserError, match="there is no GPU"):  # where blocks are copied from the CPU to the CPU
        machine.check(plan, CPU)
