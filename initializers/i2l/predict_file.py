"""`python -m initializers.i2l predict`: pictures in, a LoRA file out, without training."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from initializers.i2l.initializer import Config, check, initialize, needs
from initializers.i2l.predictions import picture_digests
from trainer import config, qwen_image
from trainer.adapter import AdapterConfig, AdapterWeights, InitContext, linears, target_modules
from trainer.data.pictures import SUFFIXES, pictures_in
from trainer.export.result import origin
from trainer.files import DTYPES
from trainer.formats import write_lora
from trainer.formats.check import verdict_text
from trainer.formats.convert import Target, hand_off
from trainer.formats.read_config import Recipe, RecipeError, rank_problem, read_recipe
from trainer.hardware import parallel
from trainer.hardware.threads import parallel_map
from trainer.hub import sources
from trainer.lowrank import LowRank, energy, energy_kept, truncate


@dataclass(frozen=True)
class Request:
    """What is predicted from, and in which form it is written."""

    config: Config
    base: str
    pictures: tuple[Path, ...]
    rank: int
    """The rank of the LoRA that is written."""
    recipe: Recipe | None
    """The configuration of the trainer that the LoRA is written for, if one was given."""


def predict_file(options: argparse.Namespace) -> None:
    """Write the LoRA that the experts predict from all pictures of a folder, truncated to a rank.

    ConfigError lists everything that is wrong with the arguments.
    """
    request = check_arguments(options)
    start = time.perf_counter()
    sources.fetch(needs(request.config, request.base))
    weights, report = predict(request.pictures, request.base, request.config)
    write = _write_for_trainer if options.trainer else _write_file
    write(request, options, weights, report)
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["seconds"].items())
    print(f"{time.perf_counter() - start:.1f} s ({stages})")


def check_arguments(options: argparse.Namespace) -> Request:
    """The arguments as a request. ConfigError lists everything that is wrong with them; nothing is loaded."""
    problems: list[str] = []
    own, base = _read_config(options.config, problems)
    if own is not None and options.strength is not None:
        own = replace(own, strength=options.strength)
    elif own is not None and own.strength == "auto":
        print('strength = "auto" compares losses in a training run; here the strength is 1, unless --strength is given')
        own = replace(own, strength=1.0)
    if own is not None:
        problems += check(own)
        if own.strength == 0:
            problems.append("--strength 0 leaves nothing to write")
    pictures = _pictures(options.images, problems)
    recipe = _recipe(options, problems)
    rank = options.rank if recipe is None else recipe.rank
    if rank is None and not options.recipe:
        problems.append("--rank is needed; or --for TRAINER --recipe FILE, to take it from there")
    elif options.rank is not None and options.rank < 1:
        problems.append("--rank must be at least 1")
    elif problem := rank_problem(recipe, options.rank):
        problems.append(problem)
    if options.trainer and options.output.exists():
        problems.append(f"--output: {options.output} exists already; choose another name")
    if problems or own is None or base is None:
        raise config.ConfigError(problems)
    return Request(own, base, pictures, rank, recipe)


def _read_config(path: Path, problems: list[str]) -> tuple[Config | None, str | None]:
    """`[init.i2l]`, and `[model] base`, of a run's TOML; its other tables do not matter here."""
    try:
        table = config.load_table(path, (), problems)
    except config.ConfigError as error:
        problems += error.problems
        return None, None
    init = table.get("init", {})
    own = config.parse(Config, init.get("i2l", {}) if isinstance(init, dict) else {}, "init.i2l", problems)
    model = config.parse(qwen_image.ModelConfig, table.get("model", {}), "model", problems)
    return own, None if model is None else model.base


def _pictures(folder: Path, problems: list[str]) -> tuple[Path, ...]:
    """All pictures of a folder, in the order of their names."""
    if not folder.is_dir():
        problems.append(f"--images {folder}: there is no such folder")
        return ()
    found = pictures_in(folder)
    if not found:
        problems.append(f"--images {folder}: no picture in it ({', '.join(sorted(SUFFIXES))})")
    return tuple(found)


def _recipe(options: argparse.Namespace, problems: list[str]) -> Recipe | None:
    """The trainer's configuration that is given as --recipe."""
    if options.recipe and not options.trainer:
        problems.append("--recipe: --for TRAINER is needed too, to say which trainer's configuration it is")
    elif options.recipe:
        try:
            return read_recipe(options.recipe, options.trainer)
        except RecipeError as error:
            problems.append(f"--recipe: {error}")
    return None


def _print(message: str) -> None:
    print(message, flush=True)


def predict(
    pictures: Sequence[Path],
    base: str,
    options: Config,
    *,
    cache: Path | None = None,
    text_encoder: qwen_image.TextEncoder | None = None,
    log: Callable[[str], None] = _print,
) -> tuple[AdapterWeights, dict[str, Any]]:
    """The LoRA that the experts predict from pictures, of all ranks, for the modules that i2L covers, and what the
    initializer reports of it. "auto" counts as strength 1. ValueError as `initialize`."""
    options = replace(options, mode="merge", energy=None, rank_per_module=False)  # in the seed: nothing is truncated
    context = InitContext(
        images=tuple(pictures),
        modules=target_modules(qwen_image.transformer_on_meta(base), AdapterConfig()),
        rank=1,
        seed=0,
        device=parallel.one_device(),
        base=base,
        log=log,
        cache=cache,
        text_encoder=text_encoder,
    )
    seed = initialize(context, replace(options, strength=1.0) if options.strength == "auto" else options)
    return seed.frozen or seed.weights, seed.report


def _write_for_trainer(
    request: Request, options: argparse.Namespace, weights: AdapterWeights, report: dict[str, Any]
) -> None:
    """A folder with the LoRA as the trainer reads it."""
    target = Target(
        trainer=options.trainer,
        modules=linears(qwen_image.transformer_on_meta(request.base)),
        base=request.base,
        recipe=request.recipe,
        rank=options.rank,
        dtype=options.dtype,
    )
    metadata = origin(request.base, report, None, picture_digests(request.pictures), 0)
    done = hand_off(weights, target, options.output, metadata)
    print("\n".join([f"{done.file}", *(f"  {line}" for line in done.lines), verdict_text(done.verdict)]))


def _write_file(request: Request, options: argparse.Namespace, weights: AdapterWeights, report: dict[str, Any]) -> None:
    """A LoRA file, truncated to the rank."""
    whole, factors = weights.factors, dict[str, LowRank]()
    shares, energies = dict[str, float](), dict[str, float]()

    def fit(module: str) -> tuple[LowRank, float, float]:
        factors = whole[module]  # read once: it is computed then
        return *truncate(factors, request.rank), energy(factors)

    modules = tqdm(whole, desc="truncating", unit="module", leave=False, disable=None)
    for module, result in zip(whole, parallel_map(fit, modules), strict=True):
        factors[module], shares[module], energies[module] = result
    kept = energy_kept(shares, energies)
    metadata = origin(request.base, report, kept["total"], picture_digests(request.pictures), 0)
    write_lora(options.output, AdapterWeights(factors), metadata, DTYPES[options.dtype])
    ranks = f"rank {min(request.rank, report['incoming_rank'])} of {report['incoming_rank']}"
    print(f"{options.output}: {len(factors)} modules, {ranks}, from {len(request.pictures)} pictures")
    print(f"truncation kept {kept['total']:.1%} of the energy (at least {kept['min']:.1%} in each module)")
