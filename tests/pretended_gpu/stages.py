"""The stages of a run, by the functions of the program that they begin and end with."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from initializers.i2l import encoders, predictions
from tests.pretended_gpu.device import Account
from trainer import loop, measure, objective, qwen_image, run
from trainer.export import result as export

STAGES: list[tuple[Any, str, str]] = [
    (qwen_image, "encode_pictures", "encoding pictures"),
    (qwen_image.PromptEncoder, "__init__", "encoding captions"),
    (qwen_image.PromptEncoder, "__call__", "encoding captions"),
    (encoders, "qwen_vl_residuals", "encoding pictures by Qwen-VL"),
    (encoders, "load_siglip", "encoding pictures by SigLIP2"),
    (encoders, "embed_siglip", "encoding pictures by SigLIP2"),
    (encoders, "load_dinov3", "encoding pictures by DINOv3"),
    (encoders, "embed_dinov3", "encoding pictures by DINOv3"),
    (predictions, "_predict", "experts"),
    (qwen_image, "load_transformer", "loading the base"),
    (objective.Trials, "__call__", "trying strengths"),
    (run, "install", "seeding"),
    (loop._Training, "update", "training"),
    (measure.Passes, "errors", "stable losses"),
    (qwen_image.Sampler, "latents", "drawing samples"),
    (qwen_image, "decode_latents", "decoding samples"),
    (loop._Training, "save", "saving"),
    (export, "export", "export"),
]
"""Where, name, stage: called as `memory.estimate` calls it, where that knows it. What a stage calls that has a stage of
its own counts for that."""


@contextlib.contextmanager
def marked(account: Account) -> Iterator[None]:
    def within(stage: str, function: Any) -> Any:
        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with account.inside(stage):
                return function(*args, **kwargs)

        return inside

    with contextlib.ExitStack() as stack:
        for where, name, stage in STAGES:
            stack.enter_context(mock.patch.object(where, name, within(stage, getattr(where, name))))
        yield
