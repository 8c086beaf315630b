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
from trainer import config, loop, qwen_image
from trainer.qwen_image import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"
DEPTH = 60
"""Blocks of the real transformer."""
CARDS = {"12 GB": 12.88e9, "16 GB": 17.17e9, "24 GB": 25.76e9, "80 GB": 85.1e9}
"""Bytes that CUDA tells of an RTX 4070, an RTX 4080, an RTX 4090 and an A100."""


@dataclass(frozen=True)
class Case:
    """A command on a card."""

    name: str
    card: str
    run: Callable[[World, str], None]
    """Given its own name, too."""


@dataclass
class Outcome:
    """What a case came to, as JSON can say it."""

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""


def settings(world: World, name: str) -> list[str]:
    """Where the files are; and as few steps, pictures and prompts as show everything once."""
    return [
        f'model.base="{world.base}"',
        f'data.images="{world.pictures}"',
        f'data.cache="{world.root / "cache"}"',
        "data.held_out=2",
        f'output="{world.output(name)}"',
        f'init.i2l.weights="{world.experts}"',
        f'init.i2l.encoders="{world.encoders}"',
        "train.steps=2",
        "train.warmup_steps=1",
        "validation.every=2",
        "validation.num_inference_steps=2",
        "validation.num_pictures=1",
        'validation.prompts=["mychar, a portrait photo"]',
    ]


def command(world: World, name: str, file: str, *words: str, changes: tuple[str, ...] = ()) -> None:
    """`train.py --config configs/FILE.toml ...`"""
    arguments = ["--config", str(CONFIGS / f"{file}.toml"), "--quiet", *words]
    for change in (*settings(world, name), *changes):
        arguments += ["--set", change]
    train.run(train.parse_arguments(arguments))


def whole_run(file: str, *changes: str) -> Callable[[World, str], None]:
    """Encode, predict, seed, validate, train, save, validate, export."""
    return lambda world, name: command(world, name, file, changes=changes)


def comparison(world: World, name: str) -> None:
    """The same from two starts."""
    words = ("--compare", "random", "i2l", "--seeds", "1", "--learning-rates", "1e-4")
    command(world, name, "qwen_image_24gb", *words, changes=(STRENGTH,))


def warm_start(world: World, name: str) -> None:
    """In a script that has its transformer on the GPU already."""
    model = ModelConfig(base=str(world.base), quantization="nf4")
    transformer = qwen_image.load_transformer(model, torch.device("cuda"))
    options = {"weights": str(world.experts), "encoders": str(world.encoders), "base": str(world.base)}
    initializers.warm_start(transformer, [world.pictures / "0.png"], experts=["style"], **options)


def expert_training(kind: str) -> Callable[[World, str], None]:
    """`python -m initializers.i2l train`, at the published size."""

    def run(world: World, name: str) -> None:
        changes = [
            f'model.base="{world.base}"',
            f'data.images="{world.pictures}"',
            f'data.cache="{world.root / "cache"}"',
            "data.held_out_subjects=2",
            f'output="{world.output(name)}"',
            f'expert.encoders="{world.encoders}"',
            f'expert.weights="{world.experts}"',
            "train.steps=2",
            "train.warmup_steps=1",
            "train.gradient_accumulation_steps=1",
            "validation.num_inference_steps=2",
            'validation.prompts=["a portrait photo"]',
        ]
        wanted = config.load(hypernetworks.HypernetworkConfig, CONFIGS / f"i2l_qwen_image_{kind}.toml", changes)
        hypernetworks.execute(wanted, resume=False, quiet=True)

    return run


STRENGTH = "init.i2l.strength=1.0"  # tried in other cases
RUNS = [
    Case("qwen_image_12gb", "12 GB", whole_run("qwen_image_12gb")),
    Case("qwen_image_16gb", "16 GB", whole_run("qwen_image_16gb")),
    Case("qwen_image_24gb", "24 GB", whole_run("qwen_image_24gb")),
    Case("qwen_image_80gb", "80 GB", whole_run("qwen_image_80gb")),
]
"""The shipped configurations."""
OTHERS = [
    Case("merge", "24 GB", whole_run("qwen_image_24gb", 'init.i2l.mode="merge"', STRENGTH)),
    Case("compare", "24 GB", comparison),
    Case("warm_start", "24 GB", warm_start),
    *(Case(f"i2l train {kind}", "80 GB", expert_training(kind)) for kind in ("style", "coarse", "fine")),
]
CASES = {case.name: case for case in (*RUNS, *OTHERS)}


def measure(case: Case, world: World) -> Outcome:
    """Run it on a GPU like its card."""
    depth = _Depth(world.num_blocks)
    with pretended(CARDS[case.card], depth.absent) as account, replaced(), marked(account), depth.watched():
        error = ""
        try:
            case.run(world, case.name)
        except Exception:
            error = traceback.format_exc()
    return Outcome({name: asdict(stage) for name, stage in account.stages.items()}, error)


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
