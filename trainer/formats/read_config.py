"""Read rank, alpha and targets from the configuration of another trainer, so that nothing is typed twice."""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli
import yaml

from trainer.adapter import TARGETS
from trainer.errors import UserError
from trainer.formats.layouts import OUTER_MODULES
from trainer.formats.rules import TRAINERS, by_suffix, in_blocks
from trainer.formats.scripts import Word, commands, options

_REAL = [*(f"transformer_blocks.{block}.{kind}" for block in range(60) for kind in TARGETS["all"]), *OUTER_MODULES]
"""Qwen-Image's Linear layers."""


class RecipeError(UserError):
    """A configuration that cannot be read, or that is not of a LoRA on Qwen-Image. The text names the file."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a configuration says of the adapter."""

    rank: int
    alpha: float
    trains: Callable[[str], bool]
    """Whether a Linear layer, by its name in the transformer, gets an adapter."""
    min_parameters: int = 0
    """Layers with fewer weights and biases get none."""
    notes: list[str] = field(default_factory=list)
    """What is likely to go wrong with it."""

    def targets(self, modules: Mapping[str, tuple[int, int]]) -> list[str]:
        """Those of the layers (in_features, out_features) that get an adapter."""
        large = (name for name, (inside, out) in modules.items() if inside * out + out >= self.min_parameters)
        return [name for name in large if self.trains(name)]


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
    reader, what = _READERS[trainer]
    try:
        recipe = reader(text, path)
    except KeyError as error:
        raise RecipeError(f"{path}: there is no {error.args[0]} in it. Give {what}") from error
    except (json.JSONDecodeError, tomli.TOMLDecodeError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path}: no configuration of {TRAINERS[trainer].title} ({error}). Give {what}") from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    if recipe.rank < 1 or not recipe.alpha > 0:
        raise RecipeError(f"{path}: rank {recipe.rank} and alpha {recipe.alpha:g} must be above 0")
    return recipe


def _pattern(text: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{key}: {text!r} is not a regular expression ({error})") from error


def _others(values: Mapping[str, Any], wanted: Mapping[str, Any], defaults: Sequence[str] = ()) -> list[str]:
    """Each key whose value is not the wanted one; those in `defaults` may be absent."""
    return [
        f"{name} is {values.get(name)}, not {json.dumps(value) if isinstance(value, bool) else value}"
        for name, value in wanted.items()
        if values.get(name, value if name in defaults else None) != value
    ]


def _refuse(problems: Sequence[str]) -> None:
    """ValueError with all of them, if there are any."""
    if problems:
        raise ValueError("\n  ".join(["", *problems]) if len(problems) > 1 else problems[0])


_MUSUBI_MODULES = ("networks.lora_qwen_image", "musubi_tuner.networks.lora_qwen_image")


def _musubi(text: str, path: Path) -> Recipe:
    """Arguments of qwen_image_train_network.py, or the TOML of its --config_file, in which tables only group."""
    values: dict[str, Any] = {}
    if path.suffix == ".toml":
        values = _musubi_toml(text)
    else:
        found = options(commands(text, path.suffix), "network_module", several=("network_args",))
        if "config_file" in found:
            file = path.parent / _text(found, "config_file")
            values = _musubi_toml((file if file.suffix else file.with_suffix(".toml")).read_text(encoding="utf-8-sig"))
        for name in ("network_module", "network_dim", "network_alpha"):
            if name in found:
                values[name] = _text(found, name)
        if "network_args" in found:
            values["network_args"] = [_known(word, "network_args") for word in found["network_args"]]
    if values["network_module"] not in _MUSUBI_MODULES:
        raise ValueError(f"network_module is {values['network_module']}, not {_MUSUBI_MODULES[0]}")
    rank = int(values.get("network_dim") or TRAINERS["musubi-tuner"].default_rank)
    alpha = float(values.get("network_alpha", 1)) or float(rank)
    notes = [
        f"{name} is not in it: musubi-tuner then takes {default}"
        for name, default in (("network_dim", 4), ("network_alpha", 1))
        if name not in values
    ]
    return Recipe(rank=rank, alpha=alpha, trains=_musubi_targets(values.get("network_args") or [], notes), notes=notes)


def _musubi_toml(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in tomli.loads(text).items():
        values.update(value if isinstance(value, dict) else {name: value})
    return values


def _musubi_targets(network_args: Sequence[str], notes: list[str]) -> Callable[[str], bool]:
    """By the patterns, which are matched with the whole name since 2026-02-15, and with its beginning before."""
    patterns: dict[str, list[str]] = {"exclude_patterns": [], "include_patterns": []}
    for item in network_args:
        name, _, value = item.partition("=")
        if name.strip() in patterns:
            try:
                patterns[name.strip()] = [str(text) for text in ast.literal_eval(value.strip())]
            except (ValueError, SyntaxError, TypeError) as error:
                raise ValueError(f"network_args: {item!r} is not a list of texts") from error
    # the default exclusion means the modulation layers, but is matched with dots in the names, and meets none
    excluded = [_pattern(text, "exclude_patterns") for text in [*patterns["exclude_patterns"], r".*(_mod_).*"]]
    included = [_pattern(text, "include_patterns") for text in patterns["include_patterns"]]

    def by(match: Callable[[re.Pattern[str], str], object]) -> Callable[[str], bool]:
        def trains(name: str) -> bool:
            out = any(match(p, name) for p in excluded) and not any(match(p, name) for p in included)
            return in_blocks(name) and not out

        return trains

    now, before = by(re.Pattern.fullmatch), by(re.Pattern.match)
    if others := [name for name in _REAL if now(name) != before(name)]:
        notes.append(
            f"a version before 2026-02-15 matches patterns with the beginning of a name, so that {len(others)} modules "
            f"differ, as {others[0]}: end the patterns in .*"
        )
    return now


def _ai_toolkit(text: str, path: Path) -> Recipe:
    found = (yaml.safe_load(text) if path.suffix != ".json" else json.loads(text))["config"]["process"]
    processes = [p for p in found if str(p.get("model", {}).get("arch", "")).startswith("qwen_image")]
    if not processes:
        raise ValueError("no process has a model.arch of qwen_image")
    network = processes[0]["network"]
    if "slider" in processes[0] or "slider" in str(processes[0].get("type", "")):
        raise ValueError("it trains a slider, which starts from nothing by design")
    if str(network.get("type", "lora")).lower() != "lora":
        raise ValueError(f"network.type is {network['type']}, not lora")
    rank = int(network.get("rank") or network.get("linear") or TRAINERS["ai-toolkit"].default_rank)
    alpha = network.get("linear_alpha", network.get("alpha"))
    notes = []
    if alpha is not None and float(alpha) != rank:
        notes.append(f"linear_alpha = {alpha} has no effect: for Qwen-Image ai-toolkit takes the rank")
    least = int((network.get("network_kwargs") or {}).get("parameter_threshold") or 0)
    trains = _ai_toolkit_targets(network, notes)
    return Recipe(rank=rank, alpha=float(rank), trains=trains, min_parameters=least, notes=notes)


def _ai_toolkit_targets(network: Mapping[str, Any], notes: list[str]) -> Callable[[str], bool]:
    """Words are looked for in `transformer.` and the name, and those of `only_if_contains` with `$$` for dots, too."""
    own = network.get("network_kwargs") or {}
    only, ignored, full = (own.get(name) for name in ("only_if_contains", "ignore_if_contains", "full_if_contains"))
    outer = network.get("transformer_only") is False

    def within(words: Sequence[str] | None, *names: str) -> bool:
        return any(word in name for word in words or () for name in names)

    def trains(name: str) -> bool:
        dotted = f"transformer.{name}"
        written = dotted.replace(".", "$$")
        wanted = only is None or within(only, dotted, written)
        whole = within(full, dotted, written)
        return (outer or in_blocks(name)) and wanted and not (within(ignored, dotted) or whole)

    if trained_whole := sum(within(full, f"transformer.{name}") for name in _REAL):
        notes.append(f"full_if_contains: {trained_whole} modules are trained whole, without a LoRA to start")
    return trains


_NO_SEED = ("bnb",)
"""Parts of the names of precisions with which SimpleTuner finds none of the file's layers, and says nothing of it."""


def _simpletuner(text: str, path: Path) -> Recipe:
    values = {str(name).lstrip("-"): value for name, value in json.loads(text).items()}
    wanted: dict[str, Any] = {"model_type": "lora", "lora_type": "standard", "controlnet": False}
    wanted["slider_lora_target"] = False
    problems = [*_others(values, {"model_family": "qwen_image"}), *_others(values, wanted, defaults=[*wanted])]
    precision = str(values.get("base_model_precision", ""))
    if any(part in precision for part in _NO_SEED):
        problems.append(
            f"base_model_precision is {precision}: SimpleTuner then ignores every weight of the file, and names no "
            'missing key; set "base_model_precision": "int8-quanto"'
        )
    _refuse(problems)
    rank = int(values.get("lora_rank") or TRAINERS["simpletuner"].default_rank)
    targets: Any = values.get("peft_lora_target_modules")
    if isinstance(targets, str) and targets not in ("", "None"):
        file = path.parent / targets  # if the path is absolute, that
        if targets.endswith(".json") and not file.is_file():
            file = path.with_name(file.name)  # the folder was moved
        if targets.endswith(".json") and not file.is_file():
            raise ValueError(f"peft_lora_target_modules: there is no file {targets}")
        targets = json.loads(file.read_text(encoding="utf-8") if targets.endswith(".json") else targets)
    notes, alpha = [], float(values.get("lora_alpha") or rank)
    if alpha != rank:
        notes.append(
            f"lora_alpha = {alpha:g} is ignored from 4.7.0 on: alpha then is the file's, which is its rank. A version "
            f"before multiplies by {alpha:g}/{rank}: set lora_alpha = {rank}"
        )
    if float(values.get("lora_dropout", 0.1)):
        notes.append("lora_dropout is 0.1 unless it is set to 0")
    return Recipe(
        rank=rank,
        alpha=alpha,
        trains=by_suffix(targets if isinstance(targets, list) and targets else TARGETS["diffusers"]),
        notes=notes,
    )


def _diffusion_pipe(text: str, path: Path) -> Recipe:
    values = tomli.loads(text)
    model, adapter = values["model"], values.get("adapter", {})
    problems = [f"[model] {problem}" for problem in _others(model, {"type": "qwen_image"})]
    if not adapter:
        problems.append("there is no [adapter]: it trains the whole model")
    problems += [f"[adapter] {problem}" for problem in _others(adapter, {"type": "lora"}) if adapter]
    if "alpha" in adapter:
        problems.append("[adapter] alpha: diffusion-pipe raises at this key, it always takes the rank")
    _refuse(problems)
    rank, notes, left_out = int(adapter["rank"]), [], adapter.get("exclude_modules") or []
    if adapter.get("dtype", model.get("dtype")) != "float32":
        notes.append("[adapter] dtype is not 'float32': the seed is rounded")
    if left_out:
        notes.append("[adapter] exclude_modules has no effect in a version before 2026-08-09: all modules are trained")
    whole = _pattern(left_out, "[adapter] exclude_modules") if isinstance(left_out, str) else None
    excluded = by_suffix([] if whole else left_out)  # PEFT's rule for its exclude_modules

    def trains(name: str) -> bool:
        return in_blocks(name) and not (whole.fullmatch(name) if whole else excluded(name))

    return Recipe(rank=rank, alpha=float(rank), trains=trains, notes=notes)


def _onetrainer(text: str, path: Path) -> Recipe:
    values = json.loads(text)
    wanted = {"training_method": "LORA", "model_type": "QWEN", "peft_type": "LORA", "lora_decompose": False}
    problems = _others(values, wanted, defaults=("peft_type", "lora_decompose"))
    if (values.get("text_encoder") or {}).get("train", True):
        problems.append(
            "text_encoder.train is on, as it is where it is absent: the text encoder gets a LoRA, too, which is not in "
            'the file, and OneTrainer raises; set "text_encoder": {"train": false}'
        )
    _refuse(problems)
    notes = []
    if "layer_filter" not in values and values.get("layer_filter_preset", "full") != "full":
        notes.append("layer_filter_preset alone selects nothing: without layer_filter all Linear layers are trained")
    return Recipe(
        rank=int(values.get("lora_rank", TRAINERS["onetrainer"].default_rank)),
        alpha=float(values.get("lora_alpha", 1.0)),
        trains=_onetrainer_filter(values),
        notes=notes,
    )


def _onetrainer_filter(values: Mapping[str, Any]) -> Callable[[str], bool]:
    """ValueError if a part of the filter is the first to match no layer: OneTrainer raises then."""
    parts = [part.strip() for part in (values.get("layer_filter", values.get("lora_layers", "")) or "").split(",")]
    regex = values.get("layer_filter_regex", values.get("lora_layers_regex", False))
    found = [_pattern(part if regex else re.escape(part), "layer_filter") for part in parts]
    first = {next((i for i, pattern in enumerate(found) if pattern.search(name)), -1) for name in _REAL}
    if idle := [part for i, part in enumerate(parts) if i not in first]:
        raise ValueError(
            f"layer_filter: {idle[0]!r} is the first part to match no layer of Qwen-Image, at which OneTrainer raises"
        )
    return lambda name: any(pattern.search(name) for pattern in found)


def _diffsynth(text: str, path: Path) -> Recipe:
    values = options(commands(text, path.suffix), "lora_base_model")
    if (base := _text(values, "lora_base_model")) != "dit":
        raise ValueError(f"--lora_base_model is {base}, not dit")
    targets = _text(values, "lora_target_modules", "q,k,v,o,ffn.0,ffn.2").split(",")
    notes = []
    if any(part != part.strip() for part in targets):
        notes.append("--lora_target_modules: DiffSynth does not strip blanks, so names with one match nothing")
    rank = int(_text(values, "lora_rank", str(TRAINERS["diffsynth"].default_rank)))
    if targets == [""]:  # it then takes the Linear layers of the blocks, if no side is shorter than 512
        return Recipe(rank=rank, alpha=float(rank), trains=in_blocks, notes=notes)
    if len(targets) == 1:
        notes.append(
            "--lora_target_modules with a single name is taken as a pattern for the whole name: nothing matches"
        )
        single = _pattern(targets[0], "--lora_target_modules")
        return Recipe(rank=rank, alpha=float(rank), trains=lambda name: single.fullmatch(name) is not None, notes=notes)
    return Recipe(rank=rank, alpha=float(rank), trains=by_suffix(targets), notes=notes)


def _diffusers(text: str, path: Path) -> Recipe:
    values = options(commands(text, path.suffix), "pretrained_model_name_or_path")
    rank, alpha = (int(_text(values, name, "4")) for name in ("rank", "lora_alpha"))
    layers = [part.strip() for part in _text(values, "lora_layers", "").split(",") if part.strip()]
    notes = []
    if alpha != rank:
        notes.append(f"--lora_alpha is {alpha}: warm_start allows for it, other ways to load scale by {alpha}/{rank}")
    return Recipe(rank=rank, alpha=float(alpha), trains=by_suffix(layers or TARGETS["diffusers"]), notes=notes)


def _text(values: Mapping[str, Sequence[Word]], name: str, default: str | None = None) -> str:
    """The value of an option. ValueError if it has none, or one that the script does not tell."""
    if name not in values and default is not None:
        return default
    if not values.get(name):
        raise ValueError(f"--{name} has no value")
    return _known(values[name][0], name)


def _known(word: Word, name: str) -> str:
    if word.unknown:
        raise ValueError(f"--{name} has {word.unknown}, which is not in the file: write its value out")
    return word.text


_READERS: Mapping[str, tuple[Callable[[str, Path], Recipe], str]] = {
    "musubi-tuner": (
        _musubi,
        "the script that calls qwen_image_train_network.py with --network_module, or the TOML of its --config_file",
    ),
    "ai-toolkit": (_ai_toolkit, "the YAML or JSON of a job, as in config/examples, with network and model"),
    "simpletuner": (_simpletuner, "the config.json of a training, not the one of its data"),
    "diffusion-pipe": (_diffusion_pipe, "the TOML of train.py --config, with [model] and [adapter], not the data's"),
    "onetrainer": (_onetrainer, "a preset or a saved configuration in JSON, not the concepts' or samples'"),
    "diffsynth": (_diffsynth, "the script that calls examples/qwen_image/model_training/train.py"),
    "diffusers": (_diffusers, "the script that calls train_dreambooth_lora_qwen_image.py"),
}
"""How each trainer's configuration is read, and which file of it that is."""
