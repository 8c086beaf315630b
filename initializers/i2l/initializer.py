"""The initializer i2l: pictures -> encoders -> experts -> one LoRA."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from initializers.i2l import encoders
from initializers.i2l.expert import factor_shapes, read_geometry
from initializers.i2l.layout import FILES, PUBLISHED, Geometry, published_bytes
from initializers.i2l.predictions import Predictions, dtype_for, predict_pictures, timed
from initializers.i2l.recognise import (
    ORDER,
    ExpertFile,
    check_fit,
    combination_problems,
    encoder_problems,
    expert_location,
    file_hashes,
    recognise,
)
from trainer import qwen_image
from trainer.adapter import AdapterWeights, InitContext, RunFacts, Seed, Stage, Work
from trainer.config import first_few
from trainer.data.pictures import grey_pictures, open_picture
from trainer.errors import UserError
from trainer.files import content_hash, read_header
from trainer.hardware import memory
from trainer.hub import sources
from trainer.hub.sources import Need
from trainer.lowrank import LowRank, ranks_for_energy, scale
from trainer.validation import NUM_SIGMAS

FILE_KEYS = ("experts", "weights", "encoders")
STRENGTHS = (0.0, 0.5, 1.25)  # that "auto" tries
STRENGTH_STEP = 0.05  # to which it rounds
AUTO_NEEDS_TWO = 'strength = "auto" needs at least two pictures: each is tried with the seed of the others'
MAX_TRIALS = 4  # pictures on which strengths are compared


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[init.i2l]`"""

    experts: tuple[str, ...] = ()
    """Experts whose predictions are added up: "style", "coarse", "fine" (only with coarse), "bias" (with coarse and
    fine), or files in these layouts. Default: coarse, fine and bias if `weights` has all three, else style. Choose
    ["style"] to learn a style without the content of the pictures."""
    expert_weights: dict[str, float] = field(default_factory=dict)
    """Factors for single experts, by kind, such as bias = 0.5; 1 for those not named. Set one to weaken or strengthen
    an expert among the others."""
    weights: str = "DiffSynth-Studio/Qwen-Image-i2L"
    """Folder or id, as `[model] base`, of the experts that are given by name: Qwen-Image-i2L-Style.safetensors, ..."""
    encoders: str = "DiffSynth-Studio/General-Image-Encoders"
    """Folder or id, as `[model] base`, of the image encoders: SigLIP2-G384/model.safetensors and
    DINOv3-7B/model.safetensors. They must be those that the experts were trained with."""
    pictures: int | tuple[str, ...] = 0
    """Training pictures that the experts read: a number of them, spread evenly over all; file names; or 0 for all. Set
    it if some pictures are more typical than others, or if encoding all takes too long."""
    strength: float | Literal["auto"] = 1.0
    """Factor of the seed: 1 is what the experts predict, 0 is the start of `random`. "auto" tries 0, 0.5 and 1.25 on
    training pictures, each with the seed that the other pictures give, and takes the minimum of the parabola through
    the losses, at most 1.25. Lower it if the first samples copy the training pictures."""
    mode: Literal["seed", "merge"] = "seed"
    """What is done with the prediction. "seed": it is truncated to the adapter's rank and trained further. "merge": all
    of it stays on the base, frozen, and a new adapter is trained on top; the saved LoRA holds both, at the sum of their
    ranks. Take merge if truncation would lose much energy."""
    energy: float | None = None
    """Share of the seed's energy that is kept, such as 0.95: the smallest rank that keeps it replaces `[adapter] rank`.
    Energy is the sum of the squared singular values."""
    rank_per_module: bool = False
    """Whether `energy` chooses a rank for each module instead of one for all. This takes fewer parameters, but some
    programs read only LoRAs that have one rank."""

    def problems(self) -> list[str]:
        found = []
        if len(set(self.experts)) < len(self.experts):
            found.append("experts must not name an expert twice")
        if self.strength != "auto" and not (self.strength >= 0 and math.isfinite(self.strength)):
            found.append('strength must be at least 0, or "auto"')
        for name, value in self.expert_weights.items():
            if name not in ORDER:
                found.append(f'expert_weights: "{name}" is not one of {", ".join(ORDER)}')
            elif not math.isfinite(value):
                found.append(f"expert_weights: {name} must be a finite number")
        if isinstance(self.pictures, int) and self.pictures < 0:
            found.append("pictures must not be negative")
        elif not isinstance(self.pictures, int) and len(set(self.pictures)) < len(self.pictures):
            found.append("pictures must not name a picture twice")
        if self.energy is not None and not 0 < self.energy <= 1:
            found.append("energy must be above 0 and at most 1")
        if self.energy is not None and self.mode == "merge":
            found.append('energy has no effect with mode = "merge", which keeps the whole prediction')
        if self.rank_per_module and self.energy is None:
            found.append("rank_per_module has no effect without energy")
        return found


def check(config: Config) -> list[str]:
    """All problems that can be found before any model loads; nothing is downloaded. Empty if there are none."""
    found = list(config.problems())
    kinds: list[str] = []
    geometries: dict[str, Geometry] = {}
    for name in _expert_names(config):
        try:
            folder, file = expert_location(config.weights, name)
            if wrong := sources.check(Need(folder, (file,))):
                found += [f"experts: {why}" for why in wrong]
            elif (path := sources.cached(folder, file)) is not None:
                expert_file = recognise(name, path)
                kinds.append(expert_file.kind)
                if expert_file.geometry is not None:
                    geometries[name] = expert_file.geometry
            else:
                kinds.append(name)  # it will be downloaded, and recognised then
        except ValueError as error:
            found.append(f"experts: {error}")
    if not found:
        found += [f"experts: {problem}" for problem in combination_problems(kinds)]
    found += [f"expert_weights: {kind} is not among the experts" for kind in config.expert_weights if kind not in kinds]
    if any(kind != "bias" for kind in kinds):
        wrong = [f"encoders: {problem}" for problem in sources.check(encoders.need(config.encoders))]
        found += wrong or encoder_problems(config.encoders, geometries)
    return found


def check_run(config: Config, facts: RunFacts) -> list[str]:
    """What is wrong with the settings in a run of which the pictures and the adapter are known."""
    found = []
    if config.mode == "merge" and facts.adapter.use_dora:
        found.append('mode = "merge" with [adapter] use_dora: what is saved could hold only one of them; choose one')
    kind = facts.adapter.kind
    if config.mode == "merge" and kind != "lora":
        found.append(
            f'mode = "merge" with [adapter] kind = "{kind}": what is saved could hold only one of them; use "seed"'
        )
    if config.energy is not None and kind == "lokr":
        found.append('energy chooses the rank of a truncation, and [adapter] kind = "lokr" has none: leave it out')
    try:
        chosen = _choose_pictures(facts.images, config.pictures)
    except ValueError as error:
        return [*found, str(error)]
    if config.strength == "auto" and not facts.can_try:
        found.append('strength = "auto" cannot be tried under FSDP, where no process has the whole base; give a number')
    elif config.strength == "auto" and len(chosen) < 2:
        found.append(f"{AUTO_NEEDS_TWO}; give a number")
    return found


def needs(config: Config, base: str) -> list[Need]:
    """The files of the experts; of the image encoders, unless Bias is alone; and of the text encoder of `base`
    (Qwen-VL), if an expert reads its hidden states. ValueError as `recognise`."""
    names = _expert_names(config)
    kinds = {name if name in FILES else recognise(name, Path(name).expanduser()).kind for name in names}
    found = [Need(source, (file,)) for source, file in (expert_location(config.weights, name) for name in names)]
    if kinds != {"bias"}:
        found.append(encoders.need(config.encoders))
    if kinds & encoders.RESOLUTIONS.keys():
        found.append(qwen_image.need(base, ("text_encoder", "tokenizer")))
    return found


def work(config: Config, model: qwen_image.ModelConfig, facts: RunFacts) -> Work:
    """What it reads and computes, by the sizes of the files on this machine, else of the published ones.

    A model in bf16 takes as many FLOP for a token as it has bytes.
    """
    kinds, read, numbers = list[str](), 0.0, 0
    pictures = len(_choose_pictures(facts.images, config.pictures))
    for name in _expert_names(config):
        path = sources.cached(*expert_location(config.weights, name))
        kinds.append(name if name in FILES else recognise(name, Path(name).expanduser()).kind)
        read += path.stat().st_size if path else published_bytes(kinds[-1])
        numbers += _predicted(kinds[-1], path, pictures)
    found = Work(read, numbers=numbers, stays=config.mode == "merge")
    predicting = [kind for kind in kinds if kind != "bias"]
    if not predicting:
        return found
    paths = [sources.cached(config.encoders, file) for file in encoders.ENCODER_FILES]
    sizes = [path.stat().st_size if path else size for path, size in zip(paths, encoders.PUBLISHED_BYTES, strict=True)]
    tokens = sum(encoders.TEXT_TOKENS[kind] for kind in predicting if kind in encoders.TEXT_TOKENS)
    text = qwen_image.text_encoder_bytes(model.base)
    on_gpu = qwen_image.text_encoder_bytes(model.base, model.text_encoder_quantization)
    reading = [("Qwen-VL", on_gpu, tokens * text)] if tokens else []
    names = ("SigLIP2", "DINOv3")
    reading += [(name, size, size * n) for name, size, n in zip(names, sizes, encoders.TOKENS, strict=True)]
    return replace(
        found,
        num_bytes=read + sum(sizes),
        passes=(len(STRENGTHS) * NUM_SIGMAS if config.strength == "auto" else 0)
        + (NUM_SIGMAS * len(facts.images) if facts.diagnose else 0),
        stages=tuple(
            Stage(f"encoding pictures by {name}", memory.with_activations(size), 0.0, "on the CPU", pictures * flop)
            for name, size, flop in reading
        ),
    )


def _predicted(kind: str, path: Path | None, pictures: int) -> int:
    """How many numbers an expert predicts; of Bias those in its file, if that is on this machine."""
    if kind == "bias":
        return sum(map(math.prod, read_header(path).shapes.values())) if path else 0
    shapes = factor_shapes(read_geometry(path) if path else PUBLISHED[kind].geometry, pictures)
    return sum(math.prod(shape) for pair in shapes.values() for shape in pair)


def identity(config: Config) -> list[str]:
    """Hashes of the experts' and encoders' files, as far as they are on this machine."""
    paths = [sources.cached(*expert_location(config.weights, name)) for name in _expert_names(config)]
    return [*(content_hash(path) for path in paths if path), *encoders.identity(config.encoders)]


def embed_needs(config: Config) -> list[Need]:
    """The files that `embed` loads."""
    return [encoders.need(config.encoders)]


def embed(pictures: Sequence[Image.Image], config: Config, device: torch.device) -> dict[str, Tensor]:
    """Embeddings of RGB pictures: encoder -> N D in fp32. Empty if the encoders are not on this machine."""
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
    """The LoRA that the experts predict from `context.images`: effective factors in fp32, of all ranks.

    Rank 4 for each picture and expert, in the order style, coarse, fine, `a` divided by the number of pictures; then
    Bias as it is. ValueError if the experts do not fit one another, the encoders or the model.
    """
    chosen = _choose_pictures(context.images, config.pictures)
    paths = [context.images[i] for i in chosen]
    seconds: dict[str, float] = {}
    with timed(seconds, "locate"):
        experts = _locate(context, config)
    predictions = predict_pictures(context, config.encoders, experts, paths, seconds)
    strength, tried = config.strength, dict[str, Any]()
    if strength == "auto":
        with timed(seconds, "strength"):
            strength, tried = _choose_strength(context, config, predictions, chosen)
    with timed(seconds, "merge"):
        factors: Mapping[str, LowRank] = {}
        if strength:
            factors = predictions.combine(config.expert_weights, range(len(paths)), strength)
        ranks = predictions.ranks(len(paths))
    report: dict[str, Any] = {
        "method": "i2l",
        "mode": config.mode,
        "experts": [{"expert": one.kind, "file": str(one.path), **file_hashes(one)} for one in experts],
        "expert_weights": config.expert_weights,
        "pictures": [path.name for path in paths],
        "strength": strength,
        "modules": len(ranks),
        "incoming_rank": max(ranks.values()),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "first_seconds": predictions.first_seconds,
    }
    seed = _seed(context, config, factors, report | ({"tried": tried} if tried else {}))
    return replace(seed, others=_others(context, config, predictions, chosen)) if context.diagnose else seed


def grey(context: InitContext, config: Config) -> AdapterWeights:
    """What the experts predict from grey pictures, as many and as large as those that `initialize` reads, of all ranks;
    at strength 1 if that is "auto"."""
    sizes = [open_picture(context.images[i]).size for i in _choose_pictures(context.images, config.pictures)]
    strength = 1.0 if config.strength == "auto" else config.strength
    config = replace(config, pictures=0, strength=strength, mode="merge", energy=None, rank_per_module=False)
    with TemporaryDirectory(prefix="grey-") as folder:
        images = grey_pictures(Path(folder), sizes)
        seed = initialize(replace(context, images=images, diagnose=False), config)
        return AdapterWeights({}) if seed.frozen is None else seed.frozen


def _others(
    context: InitContext, config: Config, predictions: Predictions, chosen: Sequence[int]
) -> dict[int, torch.Tensor]:
    """`Seed.others`, at strength 1, where there is a base to try seeds on and another picture."""
    found: dict[int, torch.Tensor] = {}
    if context.try_seed is None:
        return found
    pictures = range(len(context.images))
    for index in tqdm(pictures, "i2L, each picture by the others", unit="picture", leave=False, disable=None):
        if others := [place for place, number in enumerate(chosen) if number != index]:
            weights = AdapterWeights(dict(predictions.combine(config.expert_weights, others)))
            found[index] = context.try_seed(weights, index, range(NUM_SIGMAS))
    return found


def _locate(context: InitContext, config: Config) -> list[ExpertFile]:
    """The experts' files, in the order of their ranks. ValueError if they do not fit one another or the model."""
    names = _expert_names(config)
    found = [recognise(name, sources.locate(*expert_location(config.weights, name))) for name in names]
    kinds = [one.kind for one in found]
    if problems := [*config.problems(), *combination_problems(kinds)]:
        raise UserError("; ".join(problems))
    found.sort(key=lambda one: ORDER.index(one.kind))
    check_fit(found, context)
    if "coarse" in kinds and "fine" not in kinds:
        context.log('i2L: "coarse" is meant to be used with "fine": alone, it repeats the content of few pictures')
    return found


def _seed(context: InitContext, config: Config, factors: Mapping[str, LowRank], report: dict[str, Any]) -> Seed:
    """The seed of a LoRA, as `mode` and `energy` want it. factors: empty at strength 0."""
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
        f"module; their mean is {sum(pattern.values()) / len(pattern):.1f}"
    )
    return Seed(weights, report, rank_pattern=pattern)


def _expert_names(config: Config) -> tuple[str, ...]:
    """The configured experts; else the recommended ones if all can be had, else style."""
    if config.experts:
        return config.experts
    recommended = ORDER[1:]
    files = tuple(FILES[name] for name in recommended)
    return ORDER[:1] if sources.missing(Need(config.weights, files)) else recommended


def _choose_pictures(images: Sequence[Path], wanted: int | tuple[str, ...]) -> list[int]:
    """Positions in `images` of the pictures that the experts read. ValueError if a named one is not among them."""
    if not images:
        raise UserError("i2L needs at least one picture")
    if isinstance(wanted, int):
        return _spread(len(images), wanted or len(images))
    names = [path.name for path in images]
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f"pictures: {first_few(missing)}: not among the training pictures")
    return [names.index(name) for name in wanted]


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers 0 .. count - 1, spread evenly."""
    chosen = min(count, limit)
    return [index * count // chosen for index in range(chosen)]


def _choose_strength(
    context: InitContext, config: Config, predictions: Predictions, indices: Sequence[int]
) -> tuple[float, dict[str, Any]]:
    """The strength with the lowest loss, by a parabola through those tried, and what was tried, for the report.

    The loss on a picture is computed with the seed that the other pictures give, since a seed that has seen the picture
    would gain by copying it. Seeds are not truncated. The few pictures share the sigmas of the stable loss among them:
    each sigma, with its noise, is computed once for each strength.
    """
    if context.try_seed is None:
        raise UserError('strength = "auto" needs the base and captions, as in train.py; here give a number')
    if len(indices) < 2:
        raise UserError(AUTO_NEEDS_TWO)
    tried = _spread(len(indices), MAX_TRIALS)
    errors = torch.zeros(len(STRENGTHS), NUM_SIGMAS)
    with tqdm(total=len(tried) * len(STRENGTHS), desc="i2L strength", unit="trial", leave=False, disable=None) as bar:
        for place, index in enumerate(tried):
            sigmas = range(place, NUM_SIGMAS, len(tried))
            others = [other for other in range(len(indices)) if other != index]
            whole = dict(predictions.combine(config.expert_weights, others))
            for row, strength in enumerate(STRENGTHS):
                seed = {module: scale(x, strength) for module, x in whole.items()} if strength else {}
                errors[row, sigmas] = context.try_seed(AdapterWeights(seed), indices[index], sigmas)
                bar.update()
    losses = errors.mean(1)
    if not bool(losses.isfinite().all()):
        raise UserError(
            'strength = "auto": a loss that was tried is NaN or infinity; give a number, or use bf16 rather than fp16'
        )
    best = round(STRENGTH_STEP * round(lowest(STRENGTHS, losses.tolist()) / STRENGTH_STEP), 2)
    shown = ", ".join(f"{strength:g}: {float(loss):.4f}" for strength, loss in zip(STRENGTHS, losses, strict=True))
    context.log(f"i2L: strength {best:g}, by a parabola through the losses on pictures the seed has not seen ({shown})")
    return best, {"strengths": STRENGTHS, "losses": losses.tolist(), "pictures": len(tried)}


def lowest(strengths: Sequence[float], losses: Sequence[float]) -> float:
    """Where the parabola nearest to these losses is lowest, within the strengths; if it has no minimum, the strength
    with the lowest loss."""
    square, slope, _ = np.polyfit(strengths, losses, 2)
    if square <= 0:
        return strengths[int(np.argmin(losses))]
    return float(np.clip(-slope / (2 * square), min(strengths), max(strengths)))
