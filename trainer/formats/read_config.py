"""Read rank, alpha and targets from the configuration of another trainer, so that nothing is typed twice."""

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli
import yaml

from trainer.adapter import TARGETS
from trainer.errors import UserError
from trainer.formats.rules import TRAINERS, by_suffix, in_blocks


class RecipeError(UserError):
    """A configuration that cannot be read, or that is not of a LoRA on Qwen-Image. The text names the file."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a configuration says of the adapter."""

    rank: int
    alpha: float
    trains: Callable[[str], bool]
    """Whether a Linear layer, by its name in the transformer, gets an adapter."""
    notes: list[str] = field(default_factory=list)
    """What is likely to go wrong with it."""

    def targets(self, modules: Iterable[str]) -> list[str]:
        return [name for name in modules if self.trains(name)]


def rank_problem(recipe: Recipe | None, rank: int | None) -> str | None:
    """Why `--rank` and a recipe cannot both be heeded."""
    if recipe is None or rank in (None, recipe.rank):
        return None
    return f"--rank {rank} contradicts the recipe, which has rank {recipe.rank}: leave one out"


def default_recipe(trainer: str, rank: int) -> Recipe:
    """At this rank, and with that trainer's defaults otherwise."""
    found = TRAINERS[trainer]
    alpha = float(rank if found.default_alpha is None else found.default_alpha)
    return Recipe(rank=rank, alpha=alpha, trains=found.default_targets)


def read_recipe(path: Path, trainer: str) -> Recipe:
    """RecipeError if the file is not one of this trainer's, for a LoRA on Qwen-Image."""
    if trainer not in _READERS:
        raise RecipeError(f"{TRAINERS[trainer].title} does not train: --recipe has no effect")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from error
    try:
        recipe = _READERS[trainer](text, path)
    except (ValueError, SyntaxError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: no configuration of {TRAINERS[trainer].title} for Qwen-Image: {error}") from error
    if recipe.rank < 1 or not recipe.alpha > 0:
        raise RecipeError(f"{path}: rank {recipe.rank} and alpha {recipe.alpha:g} must be above 0")
    return recipe


def _musubi(text: str, path: Path) -> Recipe:
    """Arguments of qwen_image_train_network.py, or their TOML, in which tables only group."""
    if path.suffix == ".toml":
        values: dict[str, Any] = {}
        for name, value in tomli.loads(text).items():
            values.update(value if isinstance(value, dict) else {name: value})
    else:
        values = _arguments(text, several=("network_args",))
    module = values.get("network_module")
    if module != "networks.lora_qwen_image":
        raise ValueError(f"network_module is {module}, not networks.lora_qwen_image")
    rank = int(values.get("network_dim") or TRAINERS["musubi-tuner"].default_rank)
    alpha = float(values.get("network_alpha", 1)) or float(rank)
    patterns: dict[str, list[str]] = {}
    for item in values.get("network_args") or []:
        name, _, value = item.partition("=")
        if name.strip() in ("exclude_patterns", "include_patterns"):
            patterns[name.strip()] = ast.literal_eval(value)
    # the default exclusion means the modulation layers, but is matched with dots in the names, and meets none
    excluded = [re.compile(p) for p in [*patterns.get("exclude_patterns", []), r".*(_mod_).*"]]
    included = [re.compile(p) for p in patterns.get("include_patterns", [])]

    def trains(name: str) -> bool:
        out = any(p.match(name) for p in excluded) and not any(p.match(name) for p in included)
        return in_blocks(name) and not out

    return Recipe(rank=rank, alpha=alpha, trains=trains)


def _ai_toolkit(text: str, path: Path) -> Recipe:
    found = (yaml.safe_load(text) if path.suffix != ".json" else json.loads(text))["config"]["process"]
    networks = [p["network"] for p in found if str(p.get("model", {}).get("arch", "")).startswith("qwen_image")]
    if not networks:
        raise ValueError("no process whose model.arch is qwen_image")
    network = networks[0]
    if str(network.get("type", "lora")).lower() != "lora":
        raise ValueError(f"network.type is {network['type']}, not lora")
    rank = int(network.get("rank") or network.get("linear") or TRAINERS["ai-toolkit"].default_rank)
    options = network.get("network_kwargs") or {}
    only, ignored = options.get("only_if_contains"), options.get("ignore_if_contains") or []
    outer = network.get("transformer_only") is False

    def trains(name: str) -> bool:
        full = f"transformer.{name}"
        wanted = only is None or any(part in full for part in only)
        return (outer or in_blocks(name)) and wanted and not any(part in full for part in ignored)

    alpha = network.get("linear_alpha", network.get("alpha"))
    notes = []
    if alpha is not None and float(alpha) != rank:
        notes.append(f"linear_alpha = {alpha} has no effect: for Qwen-Image ai-toolkit takes the rank")
    return Recipe(rank=rank, alpha=float(rank), trains=trains, notes=notes)


def _simpletuner(text: str, path: Path) -> Recipe:
    values = {str(name).lstrip("-"): value for name, value in json.loads(text).items()}
    if values.get("model_family") != "qwen_image":
        raise ValueError(f"model_family is {values.get('model_family')}, not qwen_image")
    if values.get("lora_type", "standard") != "standard":
        raise ValueError(f"lora_type is {values['lora_type']}, not standard")
    rank = int(values.get("lora_rank") or TRAINERS["simpletuner"].default_rank)
    targets: Any = values.get("peft_lora_target_modules")
    if isinstance(targets, str) and targets not in ("", "None"):
        file = path.parent / targets  # if the path is absolute, that
        if targets.endswith(".json") and not file.is_file():
            file = path.with_name(file.name)  # the folder was moved
        targets = json.loads(file.read_text(encoding="utf-8") if targets.endswith(".json") else targets)
    notes = []
    if float(values.get("lora_dropout", 0.1)):
        notes.append("lora_dropout is 0.1 unless it is set to 0")
    return Recipe(
        rank=rank,
        alpha=float(values.get("lora_alpha") or rank),
        trains=by_suffix(targets if isinstance(targets, list) and targets else TARGETS["diffusers"]),
        notes=notes,
    )


def _diffusion_pipe(text: str, path: Path) -> Recipe:
    values = tomli.loads(text)
    if values["model"]["type"] != "qwen_image":
        raise ValueError(f"[model] type is {values['model']['type']}, not qwen_image")
    adapter = values["adapter"]
    if adapter["type"] != "lora":
        raise ValueError(f"[adapter] type is {adapter['type']}, not lora")
    if "alpha" in adapter:
        raise ValueError("[adapter] alpha: diffusion-pipe raises at this key, it always takes the rank")
    rank, notes = int(adapter["rank"]), []
    if adapter.get("dtype", values["model"].get("dtype")) != "float32":
        notes.append("[adapter] dtype is not 'float32': the seed is rounded")
    return Recipe(rank=rank, alpha=float(rank), trains=in_blocks, notes=notes)


def _onetrainer(text: str, path: Path) -> Recipe:
    values = json.loads(text)
    wanted = {"training_method": "LORA", "model_type": "QWEN", "peft_type": "LORA", "lora_decompose": False}
    for name, value in wanted.items():
        if values.get(name, value if name in ("peft_type", "lora_decompose") else None) != value:
            raise ValueError(f"{name} is {values.get(name)}, not {value}")
    text_filter = values.get("layer_filter", values.get("lora_layers", "")) or ""
    parts, notes = [part.strip() for part in text_filter.split(",")], []
    if values.get("layer_filter_regex", values.get("lora_layers_regex", False)):

        def matches(part: str, name: str) -> bool:
            return re.search(part, name) is not None
    else:

        def matches(part: str, name: str) -> bool:
            return part in name

    if "layer_filter" not in values and values.get("layer_filter_preset", "full") != "full":
        notes.append("layer_filter_preset alone selects nothing: without layer_filter all Linear layers are trained")
    if (values.get("text_encoder") or {}).get("train", True):
        notes.append("text_encoder.train is on unless it is set to false: the text encoder gets a LoRA too")
    return Recipe(
        rank=int(values.get("lora_rank", TRAINERS["onetrainer"].default_rank)),
        alpha=float(values.get("lora_alpha", 1.0)),
        trains=lambda name: any(matches(part, name) for part in parts),
        notes=notes,
    )


def _diffsynth(text: str, path: Path) -> Recipe:
    values = _arguments(text, wanted="lora_base_model")
    if values.get("lora_base_model") != "dit":
        raise ValueError(f"--lora_base_model is {values.get('lora_base_model')}, not dit")
    targets = values.get("lora_target_modules", "q,k,v,o,ffn.0,ffn.2").split(",")
    notes = []
    if any(part != part.strip() for part in targets):
        notes.append("--lora_target_modules: DiffSynth does not strip blanks, so names with one match nothing")
    if len(targets) == 1:
        notes.append(
            "--lora_target_modules with a single name is taken as a pattern for the whole name: nothing matches"
        )
    rank = int(values.get("lora_rank", TRAINERS["diffsynth"].default_rank))
    single = re.compile(targets[0])
    trains = by_suffix(targets) if len(targets) > 1 else lambda name: single.fullmatch(name) is not None
    return Recipe(rank=rank, alpha=float(rank), trains=trains, notes=notes)


def _diffusers(text: str, path: Path) -> Recipe:
    values = _arguments(text, wanted="pretrained_model_name_or_path")
    if "pretrained_model_name_or_path" not in values:
        raise ValueError("there is no --pretrained_model_name_or_path")
    rank, alpha = (int(values.get(name, 4)) for name in ("rank", "lora_alpha"))
    layers = [part.strip() for part in values["lora_layers"].split(",")] if values.get("lora_layers") else None
    notes = []
    if alpha != rank:
        notes.append(f"--lora_alpha is {alpha}: warm_start allows for it, other ways to load scale by {alpha}/{rank}")
    return Recipe(rank=rank, alpha=float(alpha), trains=by_suffix(layers or TARGETS["diffusers"]), notes=notes)


def _arguments(text: str, several: tuple[str, ...] = (), wanted: str | None = None) -> dict[str, Any]:
    """`--name value` and `--name=value` of a command in a script; of the one with the argument `wanted`, if there are
    more."""
    lines = re.sub(r"[\\^`]\s*\n", " ", text)
    for line in lines.splitlines():
        if line.lstrip().startswith(("#", "REM", "::")) or "--" not in line:
            continue
        words, values, name = shlex.split(line), dict[str, Any](), ""
        for word in words:
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                values[name] = [] if name in several else value if equals else ""
                if equals and name in several:
                    values[name].append(value)
            elif name in several:
                values[name].append(word)
            elif name and values[name] == "":
                values[name] = word
        if wanted is None or wanted in values:
            return values
    return {}


_READERS: Mapping[str, Callable[[str, Path], Recipe]] = {
    "musubi-tuner": _musubi,
    "ai-toolkit": _ai_toolkit,
    "simpletuner": _simpletuner,
    "diffusion-pipe": _diffusion_pipe,
    "onetrainer": _onetrainer,
    "diffsynth": _diffsynth,
    "diffusers": _diffusers,
}
