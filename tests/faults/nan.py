"""NaN at each stage: it is told with what it is in, and never trained on or saved."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from initializers import gaussian
from initializers.i2l import encoders, expert
from tests.faults.table import Fault
from tests.faults.world import I2L, MERGE, RANDOM, Outcome, patched, run
from tests.helpers import BAD_INPUT, FAILED, FINISHED
from trainer import adapter, objective, qwen_image, validation
from trainer.adapter import AdapterWeights
from trainer.loop import Loss
from trainer.lowrank import LowRank
from trainer.objective import LoraObjective

KIND = "NaN"
_PLAIN = ("validation.prompts=[]", "validation.every=1000")


def poisoned(value: Any) -> Any:
    """With NaN in its first number; of several things, in the second one."""
    if isinstance(value, torch.Tensor):
        value = value.clone()
        value.view(-1)[0] = float("nan")
    elif isinstance(value, list):
        value = [value[0], *map(poisoned, value[1:2]), *value[2:]] if len(value) > 1 else [poisoned(value[0])]
    elif isinstance(value, Mapping):
        first = next(iter(value))
        value = {**value, first: poisoned(value[first])}
    elif isinstance(value, tuple):
        value = type(value)(*map(poisoned, value)) if hasattr(value, "_fields") else tuple(map(poisoned, value))
    return value


def _during(owner: Any, name: str, then: Callable[[], Outcome], spoil: Callable[[Any], Any] = poisoned) -> Outcome:
    real = getattr(owner, name)
    with patched(owner, name, lambda *given, **options: spoil(real(*given, **options))):
        return _nothing_bad_is_kept(then)


def _nothing_bad_is_kept(then: Callable[[], Outcome]) -> Outcome:
    done = then()
    for path in Path("new").rglob("*.safetensors"):
        bad = [name for name, tensor in load_file(path).items() if not bool(tensor.isfinite().all())]
        assert not bad, f"NaN was saved in {path}: {bad[0]}. It said: {done.message}"
    assert done.code == FINISHED or not Path("new/adapter").exists()
    return done


def _anew(toml: str = RANDOM, *settings: str, cached: bool = True) -> Outcome:
    cache = {RANDOM: "out", I2L: "out-i2l", MERGE: "out-merge"}[toml]
    own = [f"data.cache={cache}/cache"] if cached else []
    return run(toml, "output=new", *own, *(settings or _PLAIN))


def _in_embeddings() -> Outcome:
    """Of i2L's encoders; the predictions that are in the cache would hide it."""
    return _during(encoders, "encode_pictures", lambda: _anew(I2L, *_PLAIN, cached=False))


def _in_predictions() -> Outcome:
    def spoiled(weights: Any, *given: Any) -> Any:
        return poisoned(real(weights, *given))

    real = expert._Weights.times
    with patched(expert._Weights, "times", spoiled):
        return _nothing_bad_is_kept(lambda: _anew(I2L, *_PLAIN, cached=False))


def _seed(frozen: bool) -> Callable[[Any], Any]:
    """The seed of an initializer, with NaN in one layer."""
    bad = AdapterWeights({"transformer_blocks.0.attn.to_q": LowRank(poisoned(torch.zeros(4, 64)), torch.zeros(64, 4))})

    def spoil(seed: Any) -> Any:
        return type(seed)(AdapterWeights({}) if frozen else bad, seed.report, frozen=bad if frozen else None)

    return spoil


def _in_a_file() -> Outcome:
    """A LoRA to start from."""
    tensors = load_file("out/adapter/pytorch_lora_weights.safetensors")
    save_file(poisoned(tensors), "bad.safetensors")
    return _nothing_bad_is_kept(lambda: _anew(RANDOM, "init.method=bad.safetensors", *_PLAIN))


def _in_step_2(spoil: Callable[[Loss], Loss], *settings: str) -> Outcome:
    """The first step is as it should be."""
    real = LoraObjective.loss

    def loss(self: LoraObjective, step: int, micro_step: int) -> Loss:
        found = real(self, step, micro_step)
        return spoil(found) if step == 1 else found

    with patched(LoraObjective, "loss", loss):
        return _nothing_bad_is_kept(lambda: _anew(RANDOM, *_PLAIN))


def _gradient(loss: Loss) -> Loss:
    loss.value.register_hook(lambda gradient: gradient * float("nan"))
    return loss


def _in_weights() -> Outcome:
    """After an update whose loss and gradient were as they should be."""
    real = torch.optim.AdamW.step

    def step(self: Any, *given: Any, **options: Any) -> Any:
        result = real(self, *given, **options)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = float("nan")
        return result

    with patched(torch.optim.AdamW, "step", step):
        return _nothing_bad_is_kept(lambda: _anew(RANDOM, *_PLAIN))


def _in_export() -> Outcome:
    """When all is trained and validated."""
    from trainer import run as program

    def spoil(transformer: Any, *_: Any, **__: Any) -> None:
        next(iter(adapter.tensors(transformer).values())).view(-1)[0] = float("nan")

    real = program.export.export

    def export(transformer: Any, *given: Any, **options: Any) -> None:
        spoil(transformer)
        real(transformer, *given, **options)

    with patched(program.export, "export", export):
        return _nothing_bad_is_kept(lambda: _anew(RANDOM, *_PLAIN))


_SAMPLES = ("validation.every=1000",)
_AUTO = functools.partial(_anew, I2L, "init.i2l.strength=auto", *_PLAIN)
_PICTURE = "pictures/"
ROWS: list[tuple[str, Callable[[], Outcome], int, str]] = [
    ("in latents", functools.partial(_during, qwen_image, "encode_pictures", lambda: _anew(cached=False)), BAD_INPUT,
     _PICTURE),
    ("in prompt embeddings",
     functools.partial(_during, qwen_image.PromptEncoder, "__call__", lambda: _anew(cached=False)), BAD_INPUT,
     "NaN or infinity in \""),
    ("in i2L's embeddings of pictures", _in_embeddings, BAD_INPUT, _PICTURE),
    ("in i2L's predictions", _in_predictions, BAD_INPUT, "i2l/Qwen-Image-i2L-Style.safetensors"),
    ("in the losses of strengths that i2L tries",
     functools.partial(_during, objective.Trials, "__call__", _AUTO, lambda loss: float("nan")), BAD_INPUT,
     "strength"),
    ("in a seed",
     functools.partial(_during, gaussian, "initialize", lambda: _anew(RANDOM, "init.method=gaussian", *_PLAIN),
                       lambda seed: _seed(False)(seed)),
     BAD_INPUT, "transformer_blocks.0.attn.to_q contains NaN or infinity"),
    ("in a frozen seed",
     functools.partial(_during, gaussian, "initialize", lambda: _anew(RANDOM, "init.method=gaussian", *_PLAIN),
                       lambda seed: _seed(True)(seed)),
     BAD_INPUT, "transformer_blocks.0.attn.to_q contains NaN or infinity"),
    ("in a LoRA to start from", _in_a_file, BAD_INPUT, "bad.safetensors: "),
    ("in the forward pass of a step",
     functools.partial(_in_step_2, lambda loss: Loss(loss.value * float("nan"), loss.batch)), FAILED, _PICTURE),
    ("in the gradients of a step", functools.partial(_in_step_2, _gradient), FAILED, _PICTURE),
    ("in the weights after a step", _in_weights, FAILED, "NaN"),
    ("in samples",
     functools.partial(_during, qwen_image.Sampler, "latents",
                       lambda: _anew(RANDOM, *_SAMPLES)), FINISHED, "is NaN and left out; use bf16, not fp16"),
    ("in a validation", functools.partial(_during, validation, "weighted_errors", _anew), FAILED,
     "validation after step 0: val_loss = nan"),
    ("in what is exported", _in_export, BAD_INPUT, "NaN or infinity"),
]  # fmt: skip

FAULTS = [
    Fault(KIND, what, do, code, says, "the steps since the last checkpoint" if "step" in what else "nothing")
    for what, do, code, says in ROWS
]  # fmt: skip
