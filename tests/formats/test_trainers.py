"""Files for other trainers, loaded by a second statement of each one's rules, written from its documentation alone.

The first is the table in trainer/formats/trainers.py. Where the trainer builds on PEFT or diffusers, theirs is run.
"""

import ast
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
import yaml
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from initializers import warm_start
from tests.export.test_result import pipeline
from tests.test_adapter import layers, tiny
from trainer import adapter
from trainer.adapter import TARGETS, AdapterConfig, AdapterWeights
from trainer.formats import FormatError, read_lora, write_lora
from trainer.formats.__main__ import main
from trainer.formats.check import judge
from trainer.formats.convert import Handoff, Target, hand_off
from trainer.formats.read_config import RecipeError, read_recipe
from trainer.formats.rules import TRAINERS
from trainer.lowrank import LowRank, truncate

RANK = 4
Deltas = dict[str, Tensor]


def modules() -> dict[str, tuple[int, int]]:
    return adapter.linears(tiny())


def weights(rank: int = 6, targets: str = "i2l", decay: float = 0.5) -> AdapterWeights:
    """LoRA weights of rank `rank`, with clearly different singular values."""
    factors = {}
    for number, (name, size) in enumerate(
        adapter.target_modules(tiny(), AdapterConfig(target_modules=targets)).items()
    ):
        random = torch.Generator().manual_seed(number)
        a, b = torch.randn(rank, size[0], generator=random), torch.randn(size[1], rank, generator=random)
        factors[name] = LowRank(a * 0.1, b * 0.1 * decay ** torch.arange(rank))
    return AdapterWeights(factors)


def deltas(found: AdapterWeights, rank: int | None = None) -> Deltas:
    factors = found.factors if rank is None else {n: truncate(x, rank)[0] for n, x in found.factors.items()}
    return {name: b.double() @ a.double() for name, (a, b) in factors.items()}


def assert_same(found: Deltas, expected: Deltas, tolerance: float = 1e-5) -> None:
    nonzero = {name: delta for name, delta in found.items() if float(delta.abs().max())}
    assert nonzero.keys() == expected.keys() and expected
    for name, delta in expected.items():
        assert (nonzero[name].double() - delta).norm() <= tolerance * delta.norm(), name


# --- each trainer's loading, once more -------------------------------------------------------------------


def block_layers() -> list[str]:
    return [name for name in modules() if name.startswith("transformer_blocks.")]


def musubi(folder: Path, file: str | None = None) -> Deltas:
    """Every Linear layer of a block that is not excluded; its scale is network_alpha / network_dim."""
    settings = tomli.loads((folder / "musubi.toml").read_text())
    dim, alpha = settings["network_dim"], settings["network_alpha"] if file is None else 1.0
    state = load_file(settings["network_weights"] if file is None else str(folder / file))
    arguments = dict(item.split("=", 1) for item in settings["network_args"])
    excluded = [re.compile(text) for text in ast.literal_eval(arguments["exclude_patterns"])]
    included = [re.compile(text) for text in ast.literal_eval(arguments.get("include_patterns", "[]"))]
    found = {}
    for name in block_layers():
        if any(p.match(name) for p in excluded) and not any(p.match(name) for p in included):
            continue
        key = "lora_unet_" + name.replace(".", "_")
        down, up = state.pop(f"{key}.lora_down.weight"), state.pop(f"{key}.lora_up.weight")
        assert state.pop(f"{key}.alpha").ndim == 0  # into a buffer that nobody reads
        assert down.shape[0] == up.shape[1] == dim, "size mismatch"
        found[name] = up.double() @ down.double() * (alpha / dim)
    assert not state, "unexpected keys"
    return found


def ai_toolkit(folder: Path) -> Deltas:
    process = yaml.safe_load((folder / "ai_toolkit.yaml").read_text())["config"]["process"][0]
    network = process["network"]
    assert process["model"]["arch"] == "qwen_image"
    state = {}
    for key, tensor in load_file(network["pretrained_lora_path"]).items():
        key = (
            key.replace("diffusion_model.", "transformer.").replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        )
        state["$$".join(key.rsplit(".", 2)[0].split(".")) + "." + ".".join(key.rsplit(".", 2)[1:])] = tensor
    found, rank = {}, network["linear"]
    for name in block_layers():
        full = f"transformer.{name}"
        if not any(part in full for part in network["network_kwargs"]["only_if_contains"]):
            continue
        stem = full.replace(".", "$$")
        down, up = state.pop(f"{stem}.lora_down.weight"), state.pop(f"{stem}.lora_up.weight")
        down_net, up_net = torch.zeros(rank, down.shape[1]), torch.zeros(up.shape[0], rank)
        keep = min(rank, len(down))
        down_net[:keep], up_net[:, :keep] = down[:keep], up[:, :keep]
        assert ((down_net != 0).any(1) | (up_net != 0).any(0)).all(), "dead ranks"
        found[name] = up_net.double() @ down_net.double()
    assert not state
    return found


def through_peft(state: dict[str, Tensor], *, rank: int, alpha: float, targets: Any) -> tuple[Deltas, Any]:
    model = tiny()
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
    inject_adapter_in_model(config, model)
    result = set_peft_model_state_dict(model, state)
    with torch.no_grad():
        return {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}, result


def simpletuner(folder: Path) -> Deltas:
    """As 4.7.0 does it, which takes rank and alpha from the file; an older one would take the configuration's."""
    settings = json.loads((folder / "config.json").read_text())
    assert settings["lora_dropout"] == 0 and settings["lora_alpha"] == settings["lora_rank"]
    with safe_open(settings["init_lora"], framework="pt") as file:
        assert "global_step" not in file.metadata()
    state = {k.removeprefix("transformer."): v for k, v in load_file(settings["init_lora"]).items()}
    targets = json.loads(Path(settings["peft_lora_target_modules"]).read_text())
    (rank,) = {min(tensor.shape) for tensor in state.values()}
    assert rank == settings["lora_rank"] and not any(key.endswith(".alpha") for key in state)
    found, result = through_peft(state, rank=rank, alpha=rank, targets=targets)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    return found


def diffusion_pipe(folder: Path) -> Deltas:
    settings = tomli.loads((folder / "diffusion_pipe.toml").read_text())
    assert settings["adapter"].keys() == {"type", "rank", "dtype", "init_from_existing"}
    (file,) = Path(settings["adapter"]["init_from_existing"]).glob("*.safetensors")
    state = {}
    for key, tensor in load_file(file).items():
        key = re.sub(r"^(transformer|diffusion_model)\.", "", key)
        assert re.fullmatch(r"transformer_blocks\..*\.lora_[AB]\.weight", key), "RuntimeError"
        state[key] = tensor
    rank = settings["adapter"]["rank"]
    found, result = through_peft(state, rank=rank, alpha=rank, targets=list(TARGETS["all"]))
    assert not result.unexpected_keys
    return found


def onetrainer(folder: Path) -> Deltas:
    """As old versions do it: no conversion, every selected module complete, no module besides."""
    settings = json.loads((folder / "onetrainer.json").read_text())
    state = load_file(settings["lora_model_name"])
    parts = [part.strip() for part in settings["layer_filter"].split(",")]
    for part in parts:
        assert any(
            part in name and not any(other in name for other in parts[: parts.index(part)]) for name in modules()
        )
    found = {}
    for name in modules():
        if any(part in name for part in parts):
            stem = f"transformer.{name}"
            down, up = state.pop(f"{stem}.lora_down.weight"), state.pop(f"{stem}.lora_up.weight")
            assert down.shape[0] == settings["lora_rank"]
            found[name] = up.double() @ down.double() * (float(state.pop(f"{stem}.alpha")) / settings["lora_rank"])
    assert not state, "a module too many raises"
    return found


def arguments(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    words = shlex.split(" ".join(lines).replace("\\ ", " "))
    pairs = zip(words, [*words[1:], "--"], strict=True)
    return {word[2:]: "" if value.startswith("--") else value for word, value in pairs if word.startswith("--")}


def diffsynth(folder: Path) -> Deltas:
    """As old versions do it: bare keys alone."""
    settings = arguments((folder / "diffsynth.sh").read_text())
    assert settings["lora_base_model"] == "dit"
    state = {k.replace(".default.", "."): v for k, v in load_file(settings["lora_checkpoint"]).items()}
    rank, targets = int(settings["lora_rank"]), settings["lora_target_modules"].split(",")
    found, result = through_peft(state, rank=rank, alpha=rank, targets=targets)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    return found


def diffusers(folder: Path) -> Deltas:
    """The script's own steps up to the optimizer, with the line that is to be put into it."""
    settings = arguments((folder / "diffusers.sh").read_text())
    (file,) = folder.glob("*.safetensors")
    transformer = tiny()
    transformer.requires_grad_(False)
    transformer_lora_config = LoraConfig(
        r=int(settings["rank"]),
        lora_alpha=int(float(settings["lora_alpha"])),
        init_lora_weights="gaussian",
        target_modules=[layer.strip() for layer in settings["lora_layers"].split(",")],
    )
    transformer.add_adapter(transformer_lora_config)
    assert warm_start(transformer, init=str(file))["dropped"] == {}
    with torch.no_grad():
        return {name: layer.get_delta_weight("default") for name, layer in layers(transformer).items()}


def diffusers_pipeline(file: Path) -> Deltas:
    pipe = pipeline()
    pipe.load_lora_weights(str(file))
    with torch.no_grad():
        return {n: layer.get_delta_weight(next(iter(layer.lora_A))) for n, layer in layers(pipe.transformer).items()}


def comfyui(folder: Path) -> Deltas:
    (file,) = folder.glob("*.safetensors")
    state, found = load_file(file), {}
    for name in modules():
        stem = f"diffusion_model.{name}"
        if f"{stem}.lora_A.weight" in state:
            down, up = state.pop(f"{stem}.lora_A.weight"), state.pop(f"{stem}.lora_B.weight")
            found[name] = up.double() @ down.double()
    assert not state, "lora key not loaded"
    return found


LOADERS: dict[str, Callable[[Path], Deltas]] = {
    "musubi-tuner": musubi,
    "ai-toolkit": ai_toolkit,
    "simpletuner": simpletuner,
    "diffusion-pipe": diffusion_pipe,
    "onetrainer": onetrainer,
    "diffsynth": diffsynth,
    "diffusers": diffusers,
    "comfyui": comfyui,
}


def made_for(trainer: str, folder: Path, found: AdapterWeights | None = None, **options: Any) -> Handoff:
    given = weights() if found is None else found
    return hand_off(given, Target(trainer=trainer, modules=modules(), **options), folder, {"note": "x"})


def test_every_trainer_is_tested() -> None:
    assert LOADERS.keys() == TRAINERS.keys()


@pytest.mark.parametrize("trainer", LOADERS)
def test_a_file_made_for_a_trainer_is_the_seed_there(trainer: str, tmp_path: Path) -> None:
    done = made_for(trainer, tmp_path / "made", rank=RANK)
    assert_same(LOADERS[trainer](tmp_path / "made"), deltas(weights(), RANK))
    assert done.verdict.equal and len(done.verdict.loaded) == 24 and set(done.verdict.scales.values()) == {1.0}
    text = (tmp_path / "made" / "README.md").read_text()
    assert "At step 0" in text and TRAINERS[trainer].rules_for(True).source in text
    assert "% of the energy is lost" in text  # from rank 6 to 4


def test_musubi_has_a_second_file_for_its_default_alpha(tmp_path: Path) -> None:
    made_for("musubi-tuner", tmp_path / "made", rank=RANK)
    assert_same(musubi(tmp_path / "made", "made-alpha1.safetensors"), deltas(weights(), RANK))
    # without a recipe the default of 1 is assumed: that file is right, the other would arrive at a fourth
    assert judge(tmp_path / "made" / "made-alpha1.safetensors", "musubi-tuner", modules()).equal
    verdict = judge(tmp_path / "made" / "made.safetensors", "musubi-tuner", modules())
    assert not verdict.equal and set(verdict.scales.values()) == {0.25}


@pytest.mark.parametrize("trainer", sorted(LOADERS.keys() - {"comfyui"}))
def test_a_smaller_lora_has_no_dead_ranks(trainer: str, tmp_path: Path) -> None:
    done = made_for(trainer, tmp_path / "made", weights(2), rank=RANK)
    assert_same(LOADERS[trainer](tmp_path / "made"), deltas(weights(2)))
    assert done.verdict.dead == {}


RECIPES: dict[str, tuple[str, str]] = {
    "musubi-tuner": (
        "my.toml",
        'network_module = "networks.lora_qwen_image"\n[network]\nnetwork_dim = 3\nnetwork_alpha = 6\n'
        "network_args = [\"exclude_patterns=['.*mlp.*']\"]\n",
    ),
    "ai-toolkit": (
        "my.yaml",
        "config:\n  process:\n    - network: {type: lora, linear: 3, linear_alpha: 3, network_kwargs: "
        "{ignore_if_contains: [mlp]}}\n      model: {arch: qwen_image}\n",
    ),
    "simpletuner": (
        "config.json",
        '{"--model_family": "qwen_image", "lora_rank": "3", "lora_alpha": 6, "lora_dropout": 0}',
    ),
    "diffusion-pipe": ("my.toml", "[model]\ntype = 'qwen_image'\n[adapter]\ntype = 'lora'\nrank = 3\n"),
    "onetrainer": (
        "my.json",
        '{"training_method": "LORA", "model_type": "QWEN", "lora_rank": 3, "lora_alpha": 6, '
        '"layer_filter": "attn,img_mlp,txt_mlp", "text_encoder": {"train": false}}',
    ),
    "diffsynth": (
        "my.sh",
        "# a run\naccelerate launch train.py \\\n  --lora_base_model dit --lora_rank=3 \\\n"
        '  --lora_target_modules "to_q,to_k"\n',
    ),
    "diffusers": (
        "my.sh",
        "accelerate launch x.py --pretrained_model_name_or_path Qwen/Qwen-Image --rank 3 --lora_alpha 6 "
        '--lora_layers "to_q, to_v"',
    ),
}
SELECTED = {
    "musubi-tuner": 20,
    "ai-toolkit": 20,
    "simpletuner": 8,
    "diffusion-pipe": 28,
    "onetrainer": 24,
    "diffsynth": 4,
    "diffusers": 4,
}


def lines_in(folder: Path) -> Path:
    """The configuration that was written beside a file."""
    others = ("README.md", "targets.json")
    (path,) = (p for p in folder.iterdir() if p.suffix != ".safetensors" and p.name not in others)
    return path


def recipe_of(trainer: str, folder: Path) -> Path:
    name, text = RECIPES[trainer]
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("trainer", RECIPES)
def test_rank_alpha_and_targets_come_from_the_recipe(trainer: str, tmp_path: Path) -> None:
    recipe = read_recipe(recipe_of(trainer, tmp_path), trainer)
    fixed = trainer in ("ai-toolkit", "diffusion-pipe", "diffsynth")  # whose alpha is the rank
    assert (recipe.rank, recipe.alpha) == (3, 3 if fixed else 6)
    trained = recipe.targets(modules())
    assert len(trained) == SELECTED[trainer]
    done = made_for(trainer, tmp_path / "made", recipe=recipe)
    assert done.verdict.equal
    # what arrives is the seed at rank 3, of the modules that are trained
    expected = {name: delta for name, delta in deltas(weights(), 3).items() if name in trained}
    assert_same({name: x.b.double() @ x.a.double() for name, x in done.verdict.loaded.items()}, expected)
    said = "\n".join(done.lines)
    assert ("dropped" in said) == (len(expected) < 24)
    covered = trainer == "onetrainer"
    assert ("filled with rows that change nothing" in said) == covered
    assert read_lora(done.file)[0].factors.keys() == (set(trained) if covered else expected.keys())
    assert any("lora_alpha = 6 is ignored" in note for note in recipe.notes) == (trainer == "simpletuner")
    if trainer == "musubi-tuner":  # its scale here is 6 / 3, whatever the file says
        for name, x in load_pairs(done.file).items():
            delta = 2 * x.b.double() @ x.a.double()
            assert (delta - expected[name]).norm() <= 1e-5 * expected[name].norm()


def load_pairs(file: Path) -> dict[str, LowRank]:
    """The factors as they lie in the file."""
    state, found = load_file(file), {}
    for name in modules():
        for stem in (name, f"transformer.{name}", "lora_unet_" + name.replace(".", "_")):
            for a, b in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
                if f"{stem}.{a}.weight" in state:
                    found[name] = LowRank(state[f"{stem}.{a}.weight"], state[f"{stem}.{b}.weight"])
    assert found
    return found


def test_musubi_s_recipe_may_be_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(
        "accelerate launch qwen_image_train_network.py --network_module networks.lora_qwen_image \\\n"
        "  --network_dim=8 --network_args \"exclude_patterns=['.*attn.*']\" \"include_patterns=['.*to_q']\" --seed 1\n"
    )
    recipe = read_recipe(tmp_path / "run.sh", "musubi-tuner")
    assert (recipe.rank, recipe.alpha) == (8, 1)  # its default, not the rank
    assert len(recipe.targets(modules())) == 28 - 16 + 2


def test_the_energy_that_is_left_stands_in_the_file(tmp_path: Path) -> None:
    origin = {"warm_start": json.dumps({"initializer": "i2l", "energy_kept": 0.5})}
    done = hand_off(weights(), Target(trainer="comfyui", modules=modules(), rank=2), tmp_path / "x", origin)
    found = json.loads(read_lora(done.file)[1]["warm_start"])
    squares = {n: torch.linalg.svdvals(d).square() for n, d in deltas(weights()).items()}
    share = float(sum(s[:2].sum() for s in squares.values()) / sum(s.sum() for s in squares.values()))
    assert found == {"initializer": "i2l", "energy_kept": pytest.approx(0.5 * share)}


def test_modules_that_are_dropped_are_not_left(tmp_path: Path) -> None:
    """Neither in the file's share of the energy, nor in the count of its modules."""
    recipe = read_recipe(recipe_of("diffusers", tmp_path), "diffusers")
    target = Target(trainer="diffusers", modules=modules(), recipe=recipe)
    done = hand_off(weights(), target, tmp_path / "x", {"warm_start": json.dumps({"initializer": "i2l"})})
    squares = {n: torch.linalg.svdvals(d).square() for n, d in deltas(weights()).items()}
    trained = recipe.targets(modules())
    share = float(sum(squares[n][:3].sum() for n in trained) / sum(s.sum() for s in squares.values()))
    assert json.loads(read_lora(done.file)[1]["warm_start"])["energy_kept"] == pytest.approx(share)
    assert done.lines[0].startswith("4 modules, rank 3") and len(trained) == len(load_pairs(done.file)) == 4


def told(lines: list[str], before: str, after: str = "%") -> float:
    """The share that stands after a word."""
    (line,) = (line for line in lines if before in line)
    return float(line.split(before)[1].split(after)[0]) / 100


def test_the_shares_that_are_told_are_those_of_the_file(tmp_path: Path) -> None:
    done = made_for("diffusers", tmp_path / "made", rank=2, dtype="bf16")
    whole, best, found = deltas(weights()), deltas(weights(), 2), deltas(read_lora(done.file)[0])
    total = sum(float(delta.square().sum()) for delta in whole.values())
    lost = sum(float((whole[name] - delta).square().sum()) for name, delta in best.items()) / total
    assert told(done.lines, "truncated to the rank: ") == pytest.approx(lost, abs=1e-4)
    rounding = max(float((found[name] - delta).norm() / delta.norm()) for name, delta in best.items())
    assert told(done.lines, "differs by at most ") == pytest.approx(rounding, abs=6e-4)


def test_rows_that_are_filled_in_are_each_module_s_own(tmp_path: Path) -> None:
    """In modules that the LoRA lacks, and in those whose rank it does not fill."""
    few = {name: x for name, x in weights(2).factors.items() if name.endswith(("to_q", "to_k"))}
    recipe = read_recipe(recipe_of("onetrainer", tmp_path), "onetrainer")
    done = made_for("onetrainer", tmp_path / "made", AdapterWeights(few), recipe=recipe)
    rows = [x.a[2:] if name in few else x.a for name, x in load_pairs(done.file).items()]
    assert len(rows) == SELECTED["onetrainer"] > len(few)
    assert len({str(row.flatten()[:8].tolist()) for row in rows}) == len(rows)


def test_rounding_is_told(tmp_path: Path) -> None:
    done = made_for("comfyui", tmp_path / "made", dtype="bf16")
    assert any("rounded to bf16" in line for line in done.lines)
    assert {x.dtype for x in load_file(done.file).values()} == {torch.bfloat16}
    assert_same({n: x.b.double() @ x.a.double() for n, x in done.verdict.loaded.items()}, deltas(weights()), 0.02)


@pytest.mark.parametrize("trainer", RECIPES)
def test_the_lines_that_are_written_are_a_recipe(trainer: str, tmp_path: Path) -> None:
    made_for(trainer, tmp_path / "made", rank=RANK)
    recipe = read_recipe(lines_in(tmp_path / "made"), trainer)
    assert (recipe.rank, recipe.alpha) == (RANK, RANK)
    selected = set(recipe.targets(modules()))
    everything = trainer == "diffusion-pipe"
    assert selected == (set(block_layers()) if everything else set(weights().factors))


@pytest.mark.parametrize(
    ("trainer", "name", "text", "said"),
    [
        (
            "musubi-tuner",
            "a.toml",
            "network_module = 'networks.lora'",
            r"networks\.lora, not networks\.lora_qwen_image",
        ),
        ("musubi-tuner", "a.toml", "network_dim = ", "no configuration of musubi-tuner"),
        ("ai-toolkit", "a.yaml", "config: {process: [{network: {}, model: {arch: flux}}]}", "model.arch of qwen_image"),
        ("ai-toolkit", "a.yaml", "config: {process: [{network: {type: lokr}, model: {arch: qwen_image}}]}", "lokr"),
        ("ai-toolkit", "a.yaml", "config: [", "no configuration of ai-toolkit"),
        ("simpletuner", "a.json", '{"model_family": "flux"}', "flux"),
        ("simpletuner", "a.json", '{"model_family": "qwen_image", "lora_type": "lycoris"}', "lycoris"),
        ("simpletuner", "a.json", "{", "no configuration of SimpleTuner"),
        ("diffusion-pipe", "a.toml", "[model]\ntype='flux'", "flux, not qwen_image"),
        ("diffusion-pipe", "a.toml", "[model]\ntype='qwen_image'\n[adapter]\ntype='lora'\nrank=3\nalpha=3", "alpha"),
        ("diffusion-pipe", "a.toml", "[model]\ntype='qwen_image'\n[adapter]\ntype='lora'\nrank=0", "above 0"),
        ("onetrainer", "a.json", '{"training_method": "LORA", "model_type": "FLUX_DEV_1"}', "FLUX_DEV_1"),
        ("onetrainer", "a.json", '{"training_method": "LORA", "model_type": "QWEN", "peft_type": "LOHA"}', "LOHA"),
        ("diffsynth", "a.sh", "train.py --lora_base_model vae", "vae, not dit"),
        ("diffusers", "a.sh", "train.py --rank 4", "pretrained_model_name_or_path"),
        ("comfyui", "a.json", "{}", "does not train"),
    ],
)
def test_recipes_of_others_are_refused(trainer: str, name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_recipe(tmp_path / name, trainer)
    with pytest.raises(RecipeError):
        read_recipe(tmp_path / "absent.toml", trainer)


NOTED = {
    "ai-toolkit": ("linear_alpha has", RECIPES["ai-toolkit"][1].replace("linear_alpha: 3", "linear_alpha: 1")),
    "simpletuner": ("lora_dropout", '{"model_family": "qwen_image"}'),
    "diffusion-pipe": ("float32", RECIPES["diffusion-pipe"][1]),
    "onetrainer": (
        "layer_filter_preset alone",
        '{"training_method": "LORA", "model_type": "QWEN", "layer_filter_preset": "attn-mlp", '
        '"text_encoder": {"train": false}}',
    ),
    "diffsynth": ("single name", "train.py --lora_base_model dit --lora_target_modules to_q"),
    "diffusers": ("--lora_alpha is 4", "x.py --pretrained_model_name_or_path x --rank 16"),
}


@pytest.mark.parametrize("trainer", NOTED)
def test_what_a_recipe_is_likely_to_get_wrong_is_noted(trainer: str, tmp_path: Path) -> None:
    said, text = NOTED[trainer]
    path = tmp_path / RECIPES[trainer][0]
    path.write_text(text)
    assert said.split()[0] in " ".join(read_recipe(path, trainer).notes)


# --- check ------------------------------------------------------------------------------------------------


def written(folder: Path, layout: str, found: AdapterWeights | None = None, alpha: float | None = None) -> Path:
    path = folder / f"{layout}.safetensors"
    write_lora(path, weights() if found is None else found, {}, layout=layout, alpha=alpha)
    return path


@pytest.mark.parametrize(
    ("trainer", "layout", "loads"),
    [
        ("musubi-tuner", "kohya", True),
        ("musubi-tuner", "diffusion_model", False),
        ("ai-toolkit", "diffusion_model", True),
        ("ai-toolkit", "transformer", True),
        ("ai-toolkit", "bare.default", False),
        ("ai-toolkit", "kohya", False),
        ("simpletuner", "transformer", True),
        ("simpletuner", "diffusion_model", False),
        ("diffusion-pipe", "bare", True),
        ("diffusion-pipe", "bare.default", False),
        ("diffusion-pipe", "kohya", False),
        ("onetrainer", "onetrainer", True),
        ("onetrainer", "diffusion_model", True),
        ("diffsynth", "bare.default", True),
        ("diffsynth", "transformer", False),
        ("diffsynth", "kohya", False),
        ("comfyui", "kohya", True),
        ("comfyui", "onetrainer", True),
        ("diffusers", "bare.default", True),
        ("diffusers", "bare", False),
        ("diffusers", "onetrainer", False),
    ],
)
def test_keys_that_a_trainer_does_not_know_are_found(trainer: str, layout: str, loads: bool, tmp_path: Path) -> None:
    recipe = None
    if trainer in RECIPES and trainer != "diffusers":
        made_for(trainer, tmp_path / "made", rank=6)
        recipe = read_recipe(lines_in(tmp_path / "made"), trainer)
    verdict = judge(written(tmp_path, layout), trainer, modules(), recipe)
    assert verdict.equal == loads and (len(verdict.loaded) == 24) == loads
    if not loads:
        assert len(verdict.ignored) == 24 and (verdict.difference == 1 or verdict.errors)
        assert layout in verdict.layouts


def test_diffusers_loads_what_check_says(tmp_path: Path) -> None:
    for layout in ("diffusion_model", "transformer", "kohya", "bare.default"):
        path = written(tmp_path, layout)
        assert judge(path, "diffusers", modules()).equal
        assert_same(diffusers_pipeline(path), deltas(weights()))
    scaled = written(tmp_path, "kohya", alpha=2.0)
    assert judge(scaled, "diffusers", modules()).equal
    assert_same(diffusers_pipeline(scaled), deltas(weights()))


def test_an_alpha_that_is_lost_is_found(tmp_path: Path) -> None:
    """ai-toolkit drops .alpha: this file would arrive three times too strong."""
    path = tmp_path / "x.safetensors"
    state = load_file(written(tmp_path, "diffusion_model"))
    names = {key.rsplit(".lora_", 1)[0] for key in state}
    save_file({**state, **{f"{name}.alpha": torch.tensor(2.0) for name in names}}, path)
    recipe = read_recipe(made_for("ai-toolkit", tmp_path / "made").file.with_name("ai_toolkit.yaml"), "ai-toolkit")
    verdict = judge(path, "ai-toolkit", modules(), recipe)
    assert not verdict.equal and {round(value, 6) for value in verdict.scales.values()} == {3.0}
    assert verdict.difference == pytest.approx(2.0)
    errors = judge(path, "diffusion-pipe", modules()).errors
    assert len(errors) == 1 and ".alpha" in errors[0]
    assert judge(path, "comfyui", modules()).equal


def test_dead_ranks_and_cut_rows_are_found(tmp_path: Path) -> None:
    path = written(tmp_path, "diffusion_model")
    bigger = RECIPES["ai-toolkit"][1].replace("linear: 3", "linear: 8").replace("ignore_if_contains: [mlp]", "")
    (tmp_path / "my.yaml").write_text(bigger)
    verdict = judge(path, "ai-toolkit", modules(), read_recipe(tmp_path / "my.yaml", "ai-toolkit"))
    assert set(verdict.dead.values()) == {2} and len(verdict.dead) == 24 and verdict.equal
    (tmp_path / "my.yaml").write_text(bigger.replace("linear: 8", "linear: 3"))
    verdict = judge(path, "ai-toolkit", modules(), read_recipe(tmp_path / "my.yaml", "ai-toolkit"))
    assert not verdict.equal and 0 < verdict.difference < 0.5
    verdict = judge(path, "diffsynth", modules(), read_recipe(recipe_of("diffsynth", tmp_path), "diffsynth"))
    assert any("another rank" in error for error in verdict.errors)


def test_strict_trainers_name_what_is_missing_and_what_is_too_much(tmp_path: Path) -> None:
    recipe = read_recipe(recipe_of("onetrainer", tmp_path), "onetrainer")
    errors = "\n".join(judge(written(tmp_path, "onetrainer"), "onetrainer", modules(), recipe).errors)
    assert "4 modules are trained and not in the file" in errors and "net.0.proj" in errors
    assert "4 modules are in the file and not trained" in errors and "mod.1" in errors
    assert "another rank" in errors


def test_a_file_for_another_size_of_model_is_found(tmp_path: Path) -> None:
    sizes = {name: (2 * a, b) for name, (a, b) in modules().items()}
    errors = judge(written(tmp_path, "diffusion_model"), "comfyui", sizes).errors
    assert errors and "another base" in errors[0]
    errors = judge(written(tmp_path, "diffusion_model"), "comfyui", {"proj_out": (1, 1)}).errors
    assert errors and "the model has no" in errors[0]


# --- the command ------------------------------------------------------------------------------------------


def test_convert_and_check_agree(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, base = tmp_path / "source", ["--base", str(tiny_base)]
    from trainer.qwen_image import transformer_on_meta

    sizes = adapter.target_modules(transformer_on_meta(str(tiny_base)), AdapterConfig())
    found = AdapterWeights({n: LowRank(torch.randn(5, i), torch.randn(o, 5)) for n, (i, o) in sizes.items()})
    write_lora(source / "adapter_model.safetensors", found, {"trained_by": "me"}, layout="peft")
    assert main(["check", str(source), "--for", "ai-toolkit", *base]) == 1
    out = capsys.readouterr().out
    assert "layout       peft" in out and "key not known" in out and "does not start from this file" in out
    assert main(["convert", str(source), str(tmp_path / "zorp"), "--for", "ai-toolkit", *base]) == 0
    out = capsys.readouterr().out
    assert "24 modules, rank 5" in out and "ai-toolkit starts from this file" in out
    recipe = ["--recipe", str(tmp_path / "zorp" / "ai_toolkit.yaml")]
    file = tmp_path / "zorp" / "zorp.safetensors"
    assert main(["check", str(file), "--for", "ai-toolkit", *recipe, *base]) == 0
    assert read_lora(file)[1]["trained_by"] == "me"
    assert main(["convert", str(file), str(tmp_path / "x.safetensors"), "--layout", "kohya"]) == 0
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "peft"), "--layout", "peft"]) == 0
    assert_same(deltas(read_lora(tmp_path / "peft")[0]), deltas(found))


def test_a_scale_that_only_metadata_tells_is_not_counted_twice(tmp_path: Path) -> None:
    source = written(tmp_path, "transformer", alpha=2.0)  # as made for a SimpleTuner with lora_alpha 2 and rank 6
    assert_same(deltas(read_lora(source)[0]), deltas(weights()))
    for number, layout in enumerate(("kohya", "bare", "transformer")):
        target = tmp_path / f"{number}.safetensors"
        assert main(["convert", str(source), str(target), "--layout", layout]) == 0
        found, metadata = read_lora(target)
        assert_same(deltas(found), deltas(weights()))
        assert metadata.get("ss_network_alpha") == ("6" if layout == "kohya" else None)


@pytest.mark.parametrize(
    ("arguments_", "said"),
    [
        (["convert", "FILE", "FILE", "--for", "comfyui"], "is there already"),
        (["convert", "FILE", "new", "--for", "comfyui", "--rank", "0"], "--rank must be at least 1"),
        (["convert", "FILE", "new", "--layout", "kohya"], "must end in .safetensors"),
        (["convert", "FILE", "x.safetensors", "--layout", "kohya", "--recipe", "x"], "no effect with --layout"),
        (
            ["convert", "FILE", "new", "--for", "simpletuner", "--rank", "7", "--recipe", "RECIPE"],
            "contradicts the recipe",
        ),
        (["convert", "absent.safetensors", "new", "--for", "comfyui"], "no such file"),
        (["check", "FILE", "--for", "comfyui", "--base", "./nowhere"], "no folder"),
        (["check", "FILE", "--for", "comfyui", "--recipe", "RECIPE"], "does not train"),
        (["check", "TRUNCATED", "--for", "comfyui"], "not a whole safetensors file"),
        (["check", "FLUX", "--for", "comfyui"], "looks like a LoRA for Flux"),
        (["check", "SDXL", "--for", "comfyui"], "looks like a LoRA for Stable Diffusion or SDXL"),
        (["check", "NAN", "--for", "comfyui"], "contains NaN"),
    ],
)
def test_bad_input_is_told(
    arguments_: list[str], said: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, "kohya")
    (tmp_path / "truncated.safetensors").write_bytes(file.read_bytes()[:5000])
    keys = {
        "flux": "transformer.single_transformer_blocks.0.attn.to_q",
        "sdxl": "lora_unet_down_blocks_1_attentions_0_proj",
    }
    for name, stem in keys.items():
        state = {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(4, 2)}
        save_file(state, tmp_path / f"{name}.safetensors")
    state = load_file(file)
    next(iter(state.values())).fill_(torch.nan)
    save_file(state, tmp_path / "nan.safetensors")
    places = {"FILE": str(file), "RECIPE": str(recipe_of("simpletuner", tmp_path))}
    places |= {name.upper(): f"{name}.safetensors" for name in ("truncated", "flux", "sdxl", "nan")}
    given = [places.get(word, word) for word in arguments_]
    if "--base" not in given:
        given += ["--base", str(tiny_base)]
    assert main(given) == 2
    assert said in caplog.text
    assert not (tmp_path / "new").exists()


def test_mixed_ranks_become_one(tmp_path: Path) -> None:
    mixed = weights(6).factors | {name: x for name, x in weights(2).factors.items() if "to_q" in name}
    path = written(tmp_path, "bare.default", AdapterWeights(mixed))
    recipe = read_recipe(made_for("diffsynth", tmp_path / "own", rank=6).file.with_name("diffsynth.sh"), "diffsynth")
    assert any("another rank" in error for error in judge(path, "diffsynth", modules(), recipe).errors)
    done = made_for("diffsynth", tmp_path / "made", AdapterWeights(mixed))
    assert done.verdict.equal
    assert_same(diffsynth(tmp_path / "made"), deltas(AdapterWeights(mixed)))


def test_a_type_that_cannot_hold_the_values_is_told(tmp_path: Path) -> None:
    huge = AdapterWeights({n: LowRank(x.a * 1e6, x.b) for n, x in weights().factors.items()})
    with pytest.raises(FormatError, match="cannot hold"):
        write_lora(tmp_path / "x.safetensors", huge, {}, torch.float16)
    assert not (tmp_path / "x.safetensors").exists()
