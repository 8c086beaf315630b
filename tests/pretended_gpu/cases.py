"""What is run on the pretended GPU: the program's commands, whole, with the shipped configurations."""

import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

import initializers
import train
from initializers.i2l.training import train as hypernetworks
from tests.pretended_gpu.device import KNOWN, current, pretended
from tests.pretended_gpu.replaced import replaced
from tests.pretended_gpu.stages import marked
from tests.pretended_gpu.world import World
from trainer import config, loop, plan, qwen_image
from trainer.hardware import memory
from trainer.qwen_image import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"
DEPTH = 60
"""Blocks of the real transformer."""
CARDS = {12: 12.88e9, 16: 17.17e9, 24: 25.76e9, 80: 85.1e9, 180: 191.5e9}
"""GB that a card is sold with, and the bytes that CUDA tells of an RTX 4070, RTX 4080, RTX 4090, A100 and B200."""


@dataclass(frozen=True)
class Size:
    """A few blocks in place of 60."""

    blocks: int
    changes: tuple[str, ...] = ()
    """Keys of the configuration to set."""
    more: int = 0
    """How often what this has more than the first size is to be added to that, for 60 blocks."""
    resident: int = 0
    """With offloaded blocks: how many more of the 60 would stay on the GPU, as the first one does."""


@dataclass(frozen=True)
class Case:
    """A command on a card."""

    name: str
    card: int
    """GB"""
    run: Callable[[World, tuple[str, ...]], None]
    """Given keys to set, too."""
    file: str = ""
    """The configuration, if `run` is a whole run of it, which has a plan."""
    changes: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = (Size(2), Size(3, more=DEPTH - 2))


@dataclass
class Outcome:
    """What a case came to, as JSON can say it."""

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> what `device.Stage` tells of it."""
    planned: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> what `adapter.Stage` tells of it, by the plan of this very model."""
    error: str = ""


def paths(world: World) -> list[str]:
    return [
        f'model.base="{world.base}"',
        f'data.images="{world.pictures}"',
        f'data.cache="{world.root / "cache"}"',
        f'output="{world.output()}"',
    ]


SHORT = ["train.steps=2", "train.warmup_steps=1", "validation.num_inference_steps=2"]
"""Two steps, the second of which finds an optimizer with its states; samples that guidance is seen in."""


def words(world: World, file: str, changes: tuple[str, ...]) -> list[str]:
    """The arguments of `train.py` for `configs/FILE.toml`, with few pictures."""
    found = ["--config", str(CONFIGS / f"{file}.toml"), "--quiet"]
    own = [f'init.i2l.weights="{world.experts}"', f'init.i2l.encoders="{world.encoders}"']
    few = ["validation.every=2", "validation.num_pictures=1"]
    for change in (*paths(world), *own, *SHORT, *few, *changes):
        found += ["--set", change]
    return found


def whole(name: str, card: int, *changes: str, sizes: tuple[Size, ...] = Case.sizes) -> Case:
    """Encode, predict, try strengths, seed, validate, train, save, validate, export: as shipped for such a card."""
    file = f"qwen_image_{card}gb"

    def run(world: World, given: tuple[str, ...]) -> None:
        train.run(train.parse_arguments(words(world, file, given)))

    return Case(name, card, run, file, changes, sizes)


def planned(case: Case, world: World, changes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What `--plan` says of each stage."""
    options = train.parse_arguments(words(world, case.file, changes))
    prepared = plan.prepare(*plan.load_config(options.config, options.set, initializers), resume=False)
    return {stage.name: asdict(stage) for stage in memory.estimate(plan.memory_request(prepared)).stages}


def comparison(world: World, changes: tuple[str, ...]) -> None:
    """The same training from two starts."""
    starts = ["--compare", "random", "i2l", "--seeds", "1", "--learning-rates", "1e-4"]
    train.run(train.parse_arguments([*words(world, "qwen_image_24gb", (STYLE, *changes)), *starts]))


def warm_start(world: World, _: tuple[str, ...]) -> None:
    """In a script that has its transformer on the GPU already."""
    model = ModelConfig(base=str(world.base), quantization="nf4", keep_quantized=False)
    transformer = qwen_image.load_transformer(model, torch.device("cuda"))
    options = {"weights": str(world.experts), "encoders": str(world.encoders), "base": str(world.base)}
    initializers.warm_start(transformer, [world.pictures / "0.png"], experts=["style"], **options)


def expert_training(kind: str) -> Callable[[World, tuple[str, ...]], None]:
    """`python -m initializers.i2l train`, at the published size."""

    def run(world: World, _: tuple[str, ...]) -> None:
        own = [f'expert.encoders="{world.encoders}"', f'expert.weights="{world.experts}"']
        few = ["data.held_out_subjects=2", "train.gradient_accumulation_steps=1", 'validation.prompts=["a portrait"]']
        changes = [*paths(world), *own, *SHORT, *few]
        settings = config.load(hypernetworks.HypernetworkConfig, CONFIGS / f"i2l_qwen_image_{kind}.toml", changes)
        hypernetworks.execute(settings, resume=False, quiet=True)

    return run


def itself(world: World, _: tuple[str, ...]) -> None:
    """That the pretended GPU notices what it is there to notice."""
    gpu = current()
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="not known"):
        torch.empty(KNOWN + 1, device="cuda").argmax().item()
    mask = torch.tensor([True, False, True]).to("cuda")
    rows = torch.empty(3, KNOWN, device="cuda")[mask]
    assert rows.shape == (2, KNOWN) and mask.sum().item() == 2 and mask.cpu().tolist() == [True, False, True]
    assert torch.arange(5, device="cuda")[2:].square().tolist() == [4, 9, 16]
    before = gpu.account.on("cuda")
    with gpu.account.inside("one layer"):
        layer = torch.nn.Linear(3072, 3072, bias=False).to("cuda", torch.bfloat16)
        layer(torch.empty(4096, 3072, device="cuda", dtype=torch.bfloat16).float().bfloat16()).sum().item()
    weight, activation = 2 * 3072 * 3072, 2 * 4096 * 3072
    stage = gpu.account.stages["one layer"]
    assert stage.peak == before + weight + 3 * activation  # while the input is there in both types
    assert [*stage.large] == ["_to_copy (4096, 3072)"] and stage.syncs == 1
    assert gpu.account.on("cuda") == before + weight


OFFLOADED = 44
"""`offload_blocks` of the configuration for 12 GB."""
FEW_OFFLOADED = (
    Size(4, ("model.offload_blocks=3",), 0, DEPTH - OFFLOADED - 1),
    Size(5, ("model.offload_blocks=3",), DEPTH - OFFLOADED - 1, DEPTH - OFFLOADED - 2),
    Size(5, ("model.offload_blocks=4",), OFFLOADED - 3, DEPTH - OFFLOADED - 1),
)
STYLE = 'init.i2l.experts=["style", "bias"]'
"""Those for which Qwen-VL need not read the pictures, which takes longest here."""
RUNS = [
    whole("qwen_image_12gb", 12, sizes=FEW_OFFLOADED),
    *(whole(f"qwen_image_{card}gb", card) for card in (16, 24, 80)),
]
"""The shipped configurations."""
OTHERS = [
    whole("merge", 24, 'init.i2l.mode="merge"', STYLE),
    Case("compare", 24, comparison),
    Case("i2l_style", 80, expert_training("style")),
    Case("i2l_coarse", 180, expert_training("coarse")),
    Case("i2l_fine", 180, expert_training("fine")),
]
"""What else is on the page."""
QUICK = [
    Case("itself", 24, itself, sizes=(Size(2),)),
    whole("quick_24gb", 24, 'init.i2l.experts=["coarse", "bias"]'),
    whole("quick_12gb", 12, STYLE, sizes=FEW_OFFLOADED),
    whole("quick_16gb", 16, STYLE),
    whole("quick_80gb", 80, STYLE),
    whole("quick_prior", 80, STYLE, 'prior.method="prediction"', 'prior.prompts=["a portrait"]'),
    whole(
        "quick_recipe",
        80,
        STYLE,
        "train.ema=0.9",
        "adapter.lora_plus_ratio=4",
        'flow.loss_weighting="bell"',
        'validation.unrelated_prompts=["a house"]',
    ),
    whole("quick_loha", 80, STYLE, 'adapter.kind="loha"', 'export.layouts=["kohya"]'),
    whole("quick_lokr", 80, STYLE, 'adapter.kind="lokr"'),
    Case("warm_start", 24, warm_start),
]
"""What the tests run by default; of several sizes only the first where that says enough."""
CASES = {case.name: case for case in (*RUNS, *OTHERS, *QUICK)}


def measure(case: Case, root: Path, size: Size) -> Outcome:
    """Run it on a GPU like its card; what is made for it, and what it leaves, lies in `root`."""
    world, changes, error = World(root, case.name, size.blocks), (*case.changes, *size.changes), ""
    depth = _Depth(size)
    with pretended(CARDS[case.card], depth.absent) as account, replaced(), marked(account), depth.watched():
        try:
            case.run(world, changes)
        except Exception:
            error = traceback.format_exc()
    told = planned(case, world, changes) if case.file else {}
    return Outcome({name: asdict(stage) for name, stage in account.stages.items()}, told, error)


class _Depth:
    """The bytes that the blocks would take which the model lacks: each as many as its last one, or the first one."""

    def __init__(self, size: Size):
        self._missing = {0: size.resident, -1: DEPTH - size.blocks - size.resident}
        self._models = weakref.WeakSet[Any]()
        self._optimizers = weakref.WeakSet[Any]()

    @contextmanager
    def watched(self) -> Iterator[None]:
        load, make = qwen_image.load_transformer, loop.make_optimizer

        def loading(*args: Any, **options: Any) -> QwenImageTransformer2DModel:
            model = load(*args, **options)
            self._models.add(model)
            return model

        def making(*args: Any, **options: Any) -> torch.optim.Optimizer:
            optimizer = make(*args, **options)
            self._optimizers.add(optimizer)
            return optimizer

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(qwen_image, "load_transformer", loading))
            stack.enter_context(mock.patch.object(loop, "make_optimizer", making))
            yield

    def absent(self) -> int:
        blocks = [model.transformer_blocks for model in self._models]
        return sum(count * self._bytes(one[index]) for one in blocks for index, count in self._missing.items())

    def _bytes(self, block: torch.nn.Module) -> int:
        """Of its weights, with what bitsandbytes keeps beside them, and of gradients and optimizer states."""
        tensors = list[Tensor]()
        for parameter in block.parameters():
            state = getattr(parameter, "quant_state", None)
            tensors += [parameter] if parameter.grad is None else [parameter, parameter.grad]
            tensors += [] if state is None else [x for x in vars(state).values() if isinstance(x, Tensor)]
            for optimizer in self._optimizers:
                tensors += [x for x in optimizer.state.get(parameter, {}).values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in tensors if x.device.type == "cuda")
