"""The initializer: pictures -> encoders -> experts -> one LoRA."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from initializers.i2l import encoders
from initializers.i2l.layout import FILES, Geometry
from initializers.i2l.predictions import Predictions, dtype_for, predict_pictures, timed
from initializers.i2l.recognise import (
    ORDER,
    check_fit,
    combination_problems,
    encoder_problems,
    fingerprint,
    place,
    recognise,
)
from trainer import qwen_image
from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.files import sample
from trainer.hub import sources
from trainer.hub.sources import Need
from trainer.lowrank import LowRank, ranks_for_energy, scale

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
MAX_TRIALS = 8  # pictures on which strengths are tried


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.i2l]`"""

    experts: tuple[str, ...] = ()
    """"style", "coarse", "fine" (only with coarse), "bias" (with coarse and fine), or files in these layouts. Default:
    coarse, fine and bias where `weights` has all three, else style."""
    expert_weights: dict[str, float] = field(default_factory=dict)
    """Of the experts by kind, such as bias = 0.5; 1 for those not named."""
    weights: str = "DiffSynth-Studio/Qwen-Image-i2L"
    """Folder or id, as `[model] base`, of the experts that are given by name: Qwen-Image-i2L-Style.safetensors, ..."""
    encoders: str = "DiffSynth-Studio/General-Image-Encoders"
    """Folder or id, as `[model] base`, that holds SigLIP2-G384/model.safetensors and DINOv3-7B/model.safetensors."""
    pictures: int | tuple[str, ...] = 0
    """How many of the training pictures are looked at, spread evenly over them, or which, by file name. 0: all."""
    strength: float | Literal["auto"] = 1.0
    """The seed is multiplied by this: 1 is what the experts predict, 0 is `random`. "auto" compares 0, 0.25, 0.5, 0.75,
    1 and 1.25 by the stable loss of training pictures, each with the seed that the other pictures give."""
    mode: Literal["seed", "merge"] = "seed"
    """seed: truncated to the adapter's rank, the prediction is where the adapter starts. merge: the whole prediction is
    held on the frozen base, and a fresh adapter is trained on top; the saved LoRA holds both."""
    energy: float | None = None
    """Instead of `[adapter] rank`: the smallest rank at which the seed keeps this share of its energy, such as 0.95."""
    rank_per_module: bool = False
    """With `energy`: a rank for each module, the smallest that keeps the share there."""

    def problems(self) -> list[str]:
        found = []
        if len(set(self.experts)) < len(self.experts):
            found.append("experts must not name an expert twice")
        if self.strength != "auto" and not (self.strength >= 0 and math.isfinite(self.strength)):
            found.append('strength must be at least 0, or "auto"')
        for name, value in self.expert_weights.items():
            if name not in ORDER:
                found.append(f'expert_weights: "{name}" is none of {", ".join(ORDER)}')
            elif not math.isfinite(value):
                found.append(f"expert_weights: {name} must be a finite number")
        if isinstance(self.pictures, int) and self.pictures < 0:
            found.append("pictures must not be negative")
        if self.energy is not None and not 0 < self.energy <= 1:
            found.append("energy must be above 0 and at most 1")
        if self.energy is not None and self.mode == "merge":
            found.append('energy has no effect with mode = "merge": the prediction is held whole')
        if self.rank_per_module and self.energy is None:
            found.append("rank_per_module has no effect without energy")
        return found


def check(config: Config) -> list[str]:
    """What can be told before any model loads; nothing is downloaded. Empty if all is well."""
    found = list(config.problems())
    kinds: list[str] = []
    geometries: dict[str, Geometry] = {}
    for name in _experts(config):
        try:
            folder, file = place(config.weights, name)
            if wrong := sources.check(Need(folder, (file,))):
                found += [f"experts: {why}" for why in wrong]
            elif (path := sources.cached(folder, file)) is not None:
                source = recognise(name, path)
                kinds.append(source.kind)
                if source.geometry is not None:
                    geometries[name] = source.geometry
            else:
                kinds.append(name)  # to be downloaded, and looked at then
        except ValueError as error:
            found.append(f"experts: {error}")
    if not found:
        found += [f"experts: {problem}" for problem in combination_problems(kinds)]
    found += [f"expert_weights: {kind} is not among the experts" for kind in config.expert_weights if kind not in kinds]
    if any(kind != "bias" for kind in kinds):
        wrong = [f"encoders: {problem}" for problem in sources.check(encoders.need(config.encoders))]
        found += wrong or encoder_problems(config.encoders, geometries)
    return found


def needs(config: Config, base: str) -> list[Need]:
    """The experts; the encoders, if one of them looks at pictures; the text encoder of `base`, if one reads its states.

    ValueError as `recognise`."""
    places = [place(config.weights, name) for name in _experts(config)]
    kinds = {name if name in FILES else recognise(name, Path(name).expanduser()).kind for name in _experts(config)}
    found = [Need(source, (file,)) for source, file in places]
    if kinds != {"bias"}:
        found.append(encoders.need(config.encoders))
    if kinds & encoders.RESOLUTIONS.keys():
        found.append(qwen_image.need(base, ("text_encoder", "tokenizer")))
    return found


def identity(config: Config) -> list[str]:
    """Hashes of samples of the experts' and encoders' files, of those that are on this machine."""
    paths = [sources.cached(*place(config.weights, name)) for name in _experts(config)]
    return [*(sample(path) for path in paths if path), *encoders.identity(config.encoders)]


def embed(pictures: Sequence[Image.Image], config: Config, device: torch.device) -> dict[str, Tensor]:
    """What each encoder says of RGB pictures, N D in fp32; empty if they are not on this machine."""
    sizes = encoders.embedding_sizes(config.encoders)
    if sizes is None:
        return {}
    dtype = dtype_for(device)
    if encoders.are_small_squares([picture.size for picture in pictures]):
        both = encoders.encode_squares(encoders.stacked(pictures), config.encoders, device, dtype)
    else:
        both = encoders.encode_pictures(pictures, config.encoders, device, dtype)
    return dict(zip(("SigLIP2", "DINOv3"), both.cpu().split(sizes, dim=1), strict=True))


def initialize(context: InitContext, config: Config) -> Seed:
    """The LoRA that the experts predict from `context.images`: all ranks, effective, fp32. ValueError if it cannot be.

    Rank 4 for each picture and expert in the order style, coarse, fine, with `a` divided by the number of pictures;
    then Bias as it is.
    """
    indices = _choose_pictures(context.images, config.pictures)
    pictures = [context.images[i] for i in indices]
    seconds: dict[str, float] = {}
    with timed(seconds, "locate"):
        found = [recognise(name, sources.locate(*place(config.weights, name))) for name in _experts(config)]
        if problems := [*config.problems(), *combination_problems([source.kind for source in found])]:
            raise ValueError("; ".join(problems))
        found.sort(key=lambda source: ORDER.index(source.kind))
        check_fit(found, context)
    if "coarse" in (kinds := [source.kind for source in found]) and "fine" not in kinds:
        context.log("i2L: coarse without fine, with few pictures, drags their content into every picture")

    predictions = predict_pictures(context, config.encoders, found, pictures, seconds)
    strength, tried = config.strength, None
    if strength == "auto":
        with timed(seconds, "strength"):
            strength, tried = _choose_strength(context, config, predictions, indices)
    with timed(seconds, "merge"):
        factors: Mapping[str, LowRank] = {}
        if strength:
            factors = predictions.combine(config.expert_weights, range(len(pictures)), strength)
        ranks = predictions.ranks(len(pictures))
    report: dict[str, Any] = {
        "method": "i2l",
        "mode": config.mode,
        "experts": [{"expert": source.kind, "file": str(source.path), **fingerprint(source)} for source in found],
        "expert_weights": config.expert_weights,
        "pictures": [path.name for path in pictures],
        "strength": strength,
        "modules": len(ranks),
        "incoming_rank": max(ranks.values()),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
    }
    if tried is not None:
        report["tried"] = tried
    weights = AdapterWeights(factors)
    if config.mode == "merge":
        return Seed(AdapterWeights({}), report, frozen=AdapterWeights(dict(factors)) if factors else None)
    if config.energy is None or not factors:
        return Seed(weights, report)
    trained = ((name, factors[name]) for name in factors if name in context.modules)
    uniform, pattern = ranks_for_energy(trained, config.energy)
    if not config.rank_per_module:
        context.log(f"i2L: rank {uniform} keeps {config.energy:.0%} of the energy")
        return Seed(weights, report, rank=uniform)
    context.log(
        f"i2L: ranks {min(pattern.values())} to {max(pattern.values())} keep {config.energy:.0%} of the energy of each "
        f"module, {sum(pattern.values()) / len(pattern):.1f} on average"
    )
    return Seed(weights, report, rank_pattern=pattern)


def _experts(config: Config) -> tuple[str, ...]:
    """Those that were asked for; else the recommended ones where they can be had, else style."""
    if config.experts:
        return config.experts
    best = ORDER[1:]
    return ORDER[:1] if sources.missing(Need(config.weights, tuple(FILES[name] for name in best))) else best


def _choose_pictures(images: Sequence[Path], wanted: int | tuple[str, ...]) -> list[int]:
    """Positions in `images`. ValueError if a named picture is not among them."""
    if not images:
        raise ValueError("i2L needs at least one picture")
    if isinstance(wanted, int):
        return _spread(len(images), wanted or len(images))
    names = [path.name for path in images]
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"[init.i2l] pictures: {', '.join(missing)}: not among the training pictures")
    return [names.index(name) for name in wanted]


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of 0 .. count - 1, evenly."""
    chosen = min(count, limit)
    return [index * count // chosen for index in range(chosen)]


def _choose_strength(
    context: InitContext, config: Config, predictions: Predictions, indices: Sequence[int]
) -> tuple[float, dict[str, Any]]:
    """The strength at which the others' seed helps a picture most, and the mean losses of all candidates.

    The seed that is tried on a picture never saw it: else it would be praised for copying. Not truncated.
    """
    if context.try_seed is None:
        raise ValueError('strength = "auto" needs the base and captions; give a number here')
    if len(indices) < 2:
        raise ValueError('strength = "auto" needs at least two pictures: each is tried with the seed of the others')
    places = _spread(len(indices), MAX_TRIALS)
    losses = torch.zeros(len(places), len(STRENGTHS))
    for row, index in enumerate(tqdm(places, "i2L strength", unit="picture", leave=False, disable=None)):
        others = [other for other in range(len(indices)) if other != index]
        whole = dict(predictions.combine(config.expert_weights, others))
        for column, strength in enumerate(STRENGTHS):
            seed = {module: scale(x, strength) for module, x in whole.items()} if strength else {}
            losses[row, column] = context.try_seed(AdapterWeights(seed), indices[index])
    means = losses.mean(0)
    best = STRENGTHS[int(means.argmin())]
    shown = ", ".join(f"{strength:g}: {float(loss):.4f}" for strength, loss in zip(STRENGTHS, means, strict=True))
    context.log(f"i2L: strength {best:g} is best for pictures that the seed has not seen ({shown})")
    return best, {"strengths": STRENGTHS, "losses": means.tolist(), "pictures": len(places)}
