"""What is run on the pretended GPU: the program's commands, whole, with the shipped configurations."""

import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

import initializers
import train
from initializers.i2l.training import train as hypernetworks
from tests.pretended_gpu.device import pretended
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


@dataclass(frozen=True)
class Case:
    """A command on a card."""

    name: str
    card: int
    """GB"""
    run: Callable[[World, tuple[str, ...]], None]
    file: str = ""
    """The configuration of the run, if it has a plan."""
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


def whole(file: str, *changes: str) -> Callable[[World, tuple[str, ...]], None]:
    """Encode, predict, try strengths, seed, validate, train, save, validate, export."""
    return lambda world, more: train.run(train.parse_arguments(words(world, file, (*changes, *more))))


def planned(case: Case, world: World, changes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What `--plan` says of each stage."""
    options = train.parse_arguments(words(world, case.file, changes))
    prepared = plan.prepare(*plan.load_config(options.config, options.set, initializers), resume=False)
    return {stage.name: asdict(stage) for stage in memory.estimate(plan.memory_request(prepared)).stages}


def comparison(world: World, changes: tuple[str, ...]) -> None:
    """The same training from two starts."""
    starts = ["--compare", "random", "i2l", "--seeds", "1", "--learning-rates", "1e-4"]
    train.run(train.parse_arguments([*words(world, "qwen_image_24gb", (*STYLE, *changes)), *starts]))


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


STYLE = ('init.i2l.experts=["style", "bias"]',)
"""Without those for which Qwen-VL would have to read the pictures, which takes longest here."""
OFFLOADED = 44
"""`offload_blocks` of the configuration for 12 GB."""
RUNS = [
    Case(
        "qwen_image_12gb",
        12,
        whole("qwen_image_12gb", *STYLE),
        "qwen_image_12gb",
        (
            Size(3, ("model.offload_blocks=2",)),
            Size(4, ("model.offload_blocks=2",), more=DEPTH - OFFLOADED - 1),
            Size(4, ("model.offload_blocks=3",), more=OFFLOADED - 2),
        ),
    ),
    Case("qwen_image_16gb", 16, whole("qwen_image_16gb", *STYLE), "qwen_image_16gb"),
    Case("qwen_image_24gb", 24, whole("qwen_image_24gb"), "qwen_image_24gb"),
    Case("qwen_image_80gb", 80, whole("qwen_image_80gb", *STYLE), "qwen_image_80gb"),
]
"""The shipped configurations."""
OTHERS = [
    Case("merge", 24, whole("qwen_image_24gb", 'init.i2l.mode="merge"', *STYLE), "qwen_image_24gb"),
    Case("compare", 24, comparison),
    Case("warm_start", 24, warm_start),
    *(Case(f"i2l_{kind}", 180, expert_training(kind)) for kind in ("style", "coarse", "fine")),
]
CASES = {case.name: case for case in (*RUNS, *OTHERS)}


def measure(case: Case, root: Path, size: Size) -> Outcome:
    """Run it on a GPU like its card."""
    world, error = World(root, case.name, size.blocks), ""
    depth = _Depth(size.blocks)
    with pretended(CARDS[case.card], depth.absent) as account, replaced(), marked(account), depth.watched():
        try:
            case.run(world, size.changes)
        except Exception:
            error = traceback.format_exc()
    told = planned(case, world, size.changes) if case.file else {}
    return Outcome({name: asdict(stage) for name, stage in account.stages.items()}, told, error)


class _Depth:
    """The bytes that the blocks would take which the model lacks: as many for each as its last one takes."""

    def __init__(self, num_blocks: int):
        self._missing = DEPTH - num_blocks
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
        return self._missing * sum(self._bytes(model.transformer_blocks[-1]) for model in self._models)

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
