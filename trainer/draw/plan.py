"""What is to be drawn, checked before any model loads."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint
from trainer.adapter import AdapterConfig, AdapterWeights
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError
from trainer.data.captions import CaptionError, clean
from trainer.data.pictures import SUFFIXES, DataError, open_picture, pictures_in
from trainer.draw.library import Book, check_library, open_library
from trainer.draw.views import VIEWS
from trainer.errors import UserError
from trainer.folder import RUN_FILE
from trainer.formats.asked import Asked, read_asked
from trainer.hub.sources import Need
from trainer.plan import RunConfig, Start
from trainer.qwen_image import TextEncoder
from trainer.run import saved_adapter, saved_report
from trainer.studio import Settings, look_at
from trainer.validation import GREY

PUBLISHED_GUIDANCE = 4.0
"""With a LoRA in the negative branch, as i2L's authors draw."""


@dataclass(frozen=True)
class Predictor:
    """i2L, handed in, since it lies on a floor above."""

    problems: Sequence[str]
    """What is wrong with its configuration."""
    needs: Sequence[Need]
    settings: Mapping[str, Any]
    """Its configuration, as JSON: another one predicts another LoRA."""
    predict: Callable[[Sequence[Path], Path, TextEncoder], tuple[AdapterWeights, dict[str, Any]]]
    """Pictures, the folder of the cache, and the base's text encoder to the LoRA of all ranks, and a report."""


@dataclass(frozen=True)
class RunSteps:
    """Steps of a run that are drawn."""

    run: Path
    paths: Mapping[int, Path]
    """Their checkpoints."""
    settings: AdapterConfig
    """The run's adapter."""
    report: Mapping[str, Any]
    """What run.json says of its start."""


@dataclass(frozen=True, kw_only=True)
class DrawPlan:
    """What is drawn, in which no problem was found."""

    config: RunConfig
    device: torch.device
    prompts: tuple[str, ...]
    views: tuple[str, ...]
    """("",) if none is asked for."""
    seeds: tuple[int, ...]
    settings: Settings
    loras: tuple[Asked, ...]
    each: bool
    """Each LoRA by itself, instead of all together."""
    with_base: bool
    """Also without any LoRA."""
    strengths: tuple[float, ...]
    pictures: tuple[Path, ...]
    """What i2L predicts a LoRA from."""
    negative: Asked | str | None
    """`GREY`, or a LoRA, for the negative branch of guidance."""
    grey_sizes: tuple[tuple[int, int], ...]
    """Widths and heights of the grey pictures."""
    steps: RunSteps | None
    library: tuple[Book, ...]
    keep: Path | None

    @property
    def uses_i2l(self) -> bool:
        return bool(self.pictures) or self.negative == GREY


def prepare(
    options: argparse.Namespace, run: RunConfig, start: Start, predictor: Predictor, device: torch.device
) -> DrawPlan:
    """The arguments of the command line as a plan. ConfigError lists everything that is wrong with them."""
    problems = list[str]()
    modules, multiple = look_at(run.model, device, problems)
    prompts = _prompts(options, run, problems)
    loras = read_asked("--lora", options.lora, modules, problems)
    pictures = _pictures(options.pictures, problems)
    negative: Asked | str | None = GREY if options.negative == GREY else None
    if options.negative and negative is None:
        negative = next(iter(read_asked("--negative", [options.negative], modules, problems)), None)
    shown = pictures or (_pictures([Path(run.data.images)], problems) if negative == GREY and run.data.images else ())
    if negative == GREY and not shown:
        problems.append("--negative grey: --pictures or [data] images must say how many pictures, and of which sizes")
    if pictures or negative == GREY:
        problems += predictor.problems
    if len(options.views) > 1:
        problems += start.embed_problems()
    library = _library(options, modules, problems)
    steps = _steps(options, problems)
    problems += _contradictions(options)
    problems += _numbers(options, multiple)
    if problems:
        raise ConfigError(problems)
    scale = run.validation.true_cfg_scale if options.guidance is None else options.guidance
    if negative is not None and options.guidance is None and scale == 1:
        scale = PUBLISHED_GUIDANCE
    side = max([run.data.resolution] if isinstance(run.data.resolution, int) else run.data.resolution)
    first = run.validation.seed if options.first_seed is None else options.first_seed
    return DrawPlan(
        config=run,
        device=device,
        prompts=prompts,
        views=tuple(options.views) or ("",),
        seeds=tuple(range(first, first + options.seeds)),
        settings=Settings(
            size=options.size or (side, side),
            num_inference_steps=options.steps or run.validation.num_inference_steps,
            true_cfg_scale=scale,
        ),
        loras=tuple(loras),
        each=options.each,
        with_base=options.with_base,
        strengths=tuple(options.strengths) or (1.0,),
        pictures=pictures,
        negative=negative,
        grey_sizes=_sizes(shown) if negative == GREY else (),
        steps=steps,
        library=library,
        keep=options.keep,
    )


def _prompts(options: argparse.Namespace, run: RunConfig, problems: list[str]) -> tuple[str, ...]:
    found = []
    for text in options.prompts or run.validation.prompts:
        try:
            found.append(clean(text)[0])
        except CaptionError as error:
            problems.append(f'--prompts: "{text}" {error}')
    if not found and not options.prompts:
        problems.append("--prompts: what is to be drawn? (the configuration has no [validation] prompts either)")
    return tuple(dict.fromkeys(found))


def _pictures(paths: Sequence[Path], problems: list[str]) -> tuple[Path, ...]:
    """Pictures, and all of those in folders; each is read once, to see whether it can be."""
    found = list[Path]()
    for path in paths:
        inside = pictures_in(path) if path.is_dir() else [path]
        if not inside:
            problems.append(f"{path}: there is no picture in it ({', '.join(SUFFIXES)})")
        found += inside
    for path in found:
        try:
            open_picture(path)
        except DataError as error:
            problems += error.problems
    return tuple(found)


def _sizes(pictures: Sequence[Path]) -> tuple[tuple[int, int], ...]:
    return tuple(open_picture(path).size for path in pictures)


def _library(
    options: argparse.Namespace, modules: dict[str, tuple[int, int]] | None, problems: list[str]
) -> tuple[Book, ...]:
    if options.library is None:
        return ()
    books, wrong = open_library(options.library, modules)
    try:
        if not wrong:
            check_library(books)
    except UserError as error:
        wrong.append(str(error))
    problems += [f"--library {problem}" for problem in wrong]
    return tuple(books)


def _steps(options: argparse.Namespace, problems: list[str]) -> RunSteps | None:
    """Steps of a run that can be drawn: those of its checkpoints."""
    run, file = options.run, None if options.run is None else options.run / RUN_FILE
    if run is None or file is None:
        return None
    if not file.is_file():
        problems.append(f"--run {run}: this is not the folder of a run that has begun ({RUN_FILE} is missing)")
        return None
    there = checkpoint.paths(run / checkpoint.FOLDER)
    if not there:
        problems.append(f"--run {run}: it has no checkpoint")
        return None
    if missing := [step for step in options.at if step not in there]:
        problems.append(
            f"--at {' '.join(map(str, missing))}: no such checkpoint in {run}; it has those of steps "
            f"{', '.join(map(str, there))} (keep more of them with [checkpoint] keep)"
        )
        return None
    try:
        report, settings = saved_report(file), saved_adapter(file)
    except CheckpointError as error:
        problems.append(f"--run {run}: {error}")
        return None
    return RunSteps(run, {step: there[step] for step in options.at or there}, settings, report)


def _contradictions(options: argparse.Namespace) -> list[str]:
    """Options that have no effect, or exclude each other."""
    found, any_lora = [], options.lora or options.pictures or options.library
    if options.library and (options.lora or options.pictures or options.run):
        found.append("--library chooses the LoRA: leave --lora, --pictures and --run out")
    if options.run and (options.lora or options.pictures):
        found.append("--run draws the steps of a run: leave --lora and --pictures out")
    if options.at and not options.run:
        found.append("--at has no effect without --run")
    if options.strengths and not any_lora:
        found.append("--strengths has no effect without a LoRA: --lora, --pictures or --library")
    if options.each and len(options.lora) + bool(options.pictures) < 2:
        found.append("--each needs several LoRAs: name them after --lora")
    if options.keep and not options.pictures:
        found.append("--keep has no effect without --pictures, from which its LoRA is predicted")
    if options.keep and options.keep.suffix != ".safetensors":
        found.append(f"--keep {options.keep}: the file's name must end in .safetensors")
    if options.negative and options.guidance is not None and options.guidance <= 1:
        found.append("--negative has no effect with --guidance 1, which has no negative branch")
    if unknown := [view for view in options.views if view not in VIEWS]:
        found.append(f"--views {' '.join(unknown)}: not known; there are {', '.join(VIEWS)}")
    return found


def _numbers(options: argparse.Namespace, multiple: int) -> list[str]:
    found = []
    if options.seeds < 1:
        found.append("--seeds must be at least 1")
    if options.steps is not None and options.steps < 2:
        found.append("--steps must be at least 2")
    if options.guidance is not None and not 1 <= options.guidance < math.inf:
        found.append("--guidance must be at least 1")
    if bad := [value for value in options.strengths if not math.isfinite(value)]:
        found.append(f"--strengths {' '.join(map(str, bad))}: not a finite number")
    if options.size and any(side < multiple or side % multiple for side in options.size):
        width, height = options.size
        found.append(f"--size {width}x{height}: both must be multiples of {multiple}")
    return found
