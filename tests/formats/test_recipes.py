"""Configurations of other trainers, written as their own examples are, and what each program makes of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.formats.test_trainers import LOADERS, assert_same, deltas, lines_in, made_for, modules, weights, written
from trainer.adapter import TARGETS, AdapterWeights
from trainer.formats import read_lora, write_lora
from trainer.formats.__main__ import main
from trainer.formats.check import judge, verdict_text
from trainer.formats.layouts import OUTER_MODULES
from trainer.formats.read_config import Recipe, RecipeError, read_recipe
from trainer.formats.rules import TRAINERS
from trainer.formats.write_config import REPLACE
from trainer.lowrank import LowRank

FULL_SIZE = {
    f"transformer_blocks.{block}.{kind}": size
    for block in range(60)
    for kind, size in {
        **dict.fromkeys(TARGETS["attention"], (3072, 3072)),
        **{f"{stream}_mlp.net.0.proj": (3072, 12288) for stream in ("img", "txt")},
        **{f"{stream}_mlp.net.2": (12288, 3072) for stream in ("img", "txt")},
        **{f"{stream}_mod.1": (3072, 18432) for stream in ("img", "txt")},
    }.items()
} | {"img_in": (64, 3072), "proj_out": (3072, 64)}


def recipe(trainer: str, folder: Path, name: str, text: str) -> Recipe:
    (folder / name).write_text(text)
    return read_recipe(folder / name, trainer)


def refusal(trainer: str, folder: Path, name: str, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(trainer, folder, name, text)
    assert name in str(caught.value)
    return str(caught.value)


# --- SimpleTuner ------------------------------------------------------------------------------------------


def simpletuner(**changes: Any) -> str:
    values = {
        "model_type": "lora",
        "model_family": "qwen_image",
        "model_flavour": "v1.0",
        "lora_type": "standard",
        "lora_rank": 6,
        "lora_alpha": 6,
        "lora_dropout": 0,
        "base_model_precision": "int8-quanto",
        "peft_lora_target_modules": json.dumps(TARGETS["i2l"]),
    }
    return json.dumps({**values, **changes})


def test_simpletuner_4_7_0_takes_alpha_from_the_file(tmp_path: Path) -> None:
    """A recipe's other alpha is not obeyed, and older versions are told of."""
    wanted = recipe("simpletuner", tmp_path, "config.json", simpletuner(lora_alpha=12))
    done = made_for("simpletuner", tmp_path / "made", recipe=wanted)
    assert done.verdict.equal and set(done.verdict.scales.values()) == {1.0}
    assert_same(deltas(read_lora(done.file)[0]), deltas(weights()))
    said = verdict_text(done.verdict)
    assert "lora_alpha = 12 is ignored from 4.7.0 on" in said and "set lora_alpha = 6" in said
    assert "a version before 4.7.0 (2026-08-10) does not start from this file: it arrives at 2 times" in said
    equal = recipe("simpletuner", tmp_path, "config.json", simpletuner())
    assert "4.7.0" not in verdict_text(judge(done.file, "simpletuner", modules(), equal))


def test_simpletuner_takes_the_rank_from_the_file(tmp_path: Path) -> None:
    """Before 4.7.0 it raised at another one than the configuration's."""
    wanted = recipe("simpletuner", tmp_path, "config.json", simpletuner(lora_rank=4, lora_alpha=4))
    verdict = judge(written(tmp_path, "transformer"), "simpletuner", modules(), wanted)
    assert verdict.equal and any("before 4.7.0" in note and "another rank" in note for note in verdict.notes)


def test_simpletuner_must_not_be_given_alpha_or_several_ranks(tmp_path: Path) -> None:
    path = written(tmp_path, "transformer")
    state = load_file(path)
    stems = {key.rsplit(".lora_", 1)[0] for key in state}
    save_file({**state, **{f"{stem}.alpha": torch.tensor(6.0) for stem in stems}}, tmp_path / "alpha.safetensors")
    wanted = recipe("simpletuner", tmp_path, "config.json", simpletuner())
    (error,) = judge(tmp_path / "alpha.safetensors", "simpletuner", modules(), wanted).errors
    assert "24 keys .alpha" in error
    mixed = weights().factors | {name: x for name, x in weights(2).factors.items() if "to_q" in name}
    (error,) = judge(written(tmp_path, "transformer", AdapterWeights(mixed)), "simpletuner", modules(), wanted).errors
    assert "ranks 2 to 6" in error


def test_alpha_in_our_own_metadata_is_not_read_by_others(tmp_path: Path) -> None:
    """A file that was made for an old SimpleTuner with another alpha is too weak for the new one, and for diffusers."""
    path = written(tmp_path, "transformer", alpha=12.0)
    wanted = recipe("simpletuner", tmp_path, "config.json", simpletuner(lora_alpha=12))
    for trainer, own in (("simpletuner", wanted), ("diffusers", None)):
        verdict = judge(path, trainer, modules(), own)
        assert not verdict.equal and set(verdict.scales.values()) == {0.5}


@pytest.mark.parametrize("precision", ["nf4-bnb", "int8-quanto", "int2-quanto", "no_change"])
def test_simpletuner_loads_nothing_on_bitsandbytes(precision: str, tmp_path: Path) -> None:
    text = simpletuner(base_model_precision=precision)
    if precision == "nf4-bnb":
        assert "int8-quanto" in refusal("simpletuner", tmp_path, "config.json", text)
    else:
        assert recipe("simpletuner", tmp_path, "config.json", text).rank == 6
    made = made_for("simpletuner", tmp_path / "made")
    assert "not part of the model and are ignored" in (made.folder / "README.md").read_text()


@pytest.mark.parametrize("key", ["model_type", "slider_lora_target", "controlnet"])
def test_simpletuner_trainings_that_no_lora_starts(key: str, tmp_path: Path) -> None:
    said = refusal(
        "simpletuner", tmp_path, "config.json", simpletuner(**{key: "full" if key == "model_type" else True})
    )
    assert f"{key} is " in said


# --- ai-toolkit -------------------------------------------------------------------------------------------


def ai_toolkit(**network_kwargs: Any) -> str:
    network = {"type": "lora", "linear": 6, "linear_alpha": 6, "network_kwargs": network_kwargs}
    process = {
        "type": "sd_trainer",
        "network": network,
        "model": {"name_or_path": "Qwen/Qwen-Image", "arch": "qwen_image"},
    }
    return yaml.safe_dump({"job": "extension", "config": {"name": "x", "process": [process]}})


@pytest.mark.parametrize(
    ("network_kwargs", "count"),
    [
        ({}, 840),
        ({"full_if_contains": ["img_mod"]}, 780),
        ({"full_if_contains": ["attn$$to_q"]}, 780),
        ({"parameter_threshold": 3072 * 3072 + 3072}, 840),
        ({"parameter_threshold": 3072 * 3072 + 3073}, 360),  # what is left is not in attention
        ({"only_if_contains": ["attn$$to_q", "attn.to_k"]}, 120),
        ({"only_if_contains": ["transformer$$transformer_blocks$$0$$"]}, 14),
        ({"ignore_if_contains": ["attn$$to_q", "img_mlp"]}, 720),  # only the spelling with dots is ignored
    ],
)
def test_ai_toolkit_s_ways_to_leave_modules_out(network_kwargs: dict[str, Any], count: int, tmp_path: Path) -> None:
    found = recipe("ai-toolkit", tmp_path, "job.yaml", ai_toolkit(**network_kwargs))
    assert len(found.targets(FULL_SIZE)) == count


def test_what_ai_toolkit_trains_whole_does_not_start_from_the_file(tmp_path: Path) -> None:
    found = recipe("ai-toolkit", tmp_path, "job.yaml", ai_toolkit(full_if_contains=["img_mod"]))
    verdict = judge(written(tmp_path, "diffusion_model"), "ai-toolkit", modules(), found)
    assert not verdict.equal and {name.split(".", 2)[2] for name in verdict.ignored} == {"img_mod.1"}
    assert any("60 modules are trained whole" in note for note in verdict.notes)


def test_ai_toolkit_s_slider_is_refused(tmp_path: Path) -> None:
    text = ai_toolkit().replace("type: sd_trainer", "type: concept_slider")
    assert "slider" in refusal("ai-toolkit", tmp_path, "job.yaml", text)


# --- musubi-tuner -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["attn"], 28),  # as a whole name it matches nothing
        ([".*attn.*"], 12),
        (["transformer_blocks"], 28),
        ([r"transformer_blocks\.0\..*"], 14),
    ],
)
def test_musubi_s_patterns_match_whole_names(patterns: list[str], count: int, tmp_path: Path) -> None:
    """Since 2026-02-15; where it makes a difference, that is told."""
    args = json.dumps([f"exclude_patterns={patterns}"])
    text = f'network_module = "networks.lora_qwen_image"\nnetwork_dim = 6\nnetwork_alpha = 6\nnetwork_args = {args}\n'
    found = recipe("musubi-tuner", tmp_path, "my.toml", text)
    assert len(found.targets(modules())) == count
    assert any("before 2026-02-15" in note for note in found.notes) == (patterns == ["transformer_blocks"])


SCRIPTS = {
    "array.sh": """#!/usr/bin/env bash
set -euo pipefail
cd "$HOME/musubi-tuner"
RANK=8
ALPHA=${ALPHA:-4}
python src/musubi_tuner/qwen_image_cache_latents.py --dataset_config data.toml --vae "$VAE"
python src/musubi_tuner/qwen_image_cache_text_encoder_outputs.py --dataset_config data.toml --batch_size 16
args=(
  --dit "$DIT"          # from the environment, and not needed
  --network_module networks.lora_qwen_image
  --network_dim "$RANK"
)
args+=(--network_args "exclude_patterns=['.*attn.*']" 'include_patterns=[".*to_q"]')
accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 \\
  src/musubi_tuner/qwen_image_train_network.py "${args[@]}" \\
  --network_alpha=$ALPHA --seed 1 2>&1 | tee log.txt
""",
    "lines.sh": """accelerate launch src/musubi_tuner/qwen_image_train_network.py \\
  --network_module=musubi_tuner.networks.lora_qwen_image --network_dim 8 \\
  --network_alpha 4 --network_args exclude_patterns="['.*attn.*']" include_patterns="['.*to_q']"
""",
    "windows.bat": r"""@echo off
rem --network_module networks.lora_qwen_image --network_dim 64
set RANK=8
set "OUT=C:\my loras\"
python src\musubi_tuner\qwen_image_cache_latents.py --vae C:\models\vae.safetensors
accelerate launch src\musubi_tuner\qwen_image_train_network.py --dit C:\models\qwen\ ^
  --network_module networks.lora_qwen_image --network_dim %RANK% --network_alpha 4 ^
  --network_args "exclude_patterns=['.*attn.*']" "include_patterns=['.*to_q']" --output_dir C:\out\
pause
""",
    "windows.ps1": r"""# train
accelerate launch src\musubi_tuner\qwen_image_train_network.py `
  --network_module networks.lora_qwen_image --network_dim 8 --network_alpha 4 `
  --network_args "exclude_patterns=['.*attn.*']" "include_patterns=['.*to_q']" --output_dir C:\out\
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_musubi_s_scripts_are_read_as_a_shell_reads_them(name: str, tmp_path: Path) -> None:
    found = recipe("musubi-tuner", tmp_path, name, SCRIPTS[name])
    assert (found.rank, found.alpha, found.notes) == (8, 4, [])
    assert len(found.targets(modules())) == 28 - 16 + 2


MODULE = "python qwen_image_train_network.py --network_module networks.lora_qwen_image"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.sh", f"{MODULE} --network_dim $1\n", "--network_dim has $1, which is not in the file"),
        ("a.sh", f"for R in 4 8; do\n  {MODULE} --network_dim $R\ndone\n", "--network_dim has $R"),
        ("a.sh", f'R=4\nif [ -n "$BIG" ]; then R=64; fi\n{MODULE} --network_dim $R\n', "--network_dim has $R"),
        ("a.sh", f'R=4\n[ -n "$BIG" ] && R=64\n{MODULE} --network_dim $R\n', "--network_dim has $R"),
        ("a.sh", f"{MODULE} --network_dim $(cat rank.txt)\n", "--network_dim has $(cat rank.txt)"),
        ("a.sh", f"{MODULE} --seed 1 $MORE --network_dim 8\n", "what $MORE is"),
        ("a.sh", f"{MODULE} --network_dim 4\n{MODULE} --network_dim 8\n", "2 commands in it have --network_module"),
        ("a.sh", f"{MODULE} --network_dim '4\n", "line 1: a quote that begins here never ends"),
        ("a.sh", "python qwen_image_cache_latents.py --vae x\n", "there is no command with --network_module in it"),
        ("a.sh", f"{MODULE} --network_dim\n", "--network_dim has no value"),
        (
            "a.sh",
            f"{MODULE} --network_args \"exclude_patterns=['(']\"\n",
            "exclude_patterns: '(' is not a regular expr",
        ),
        ("a.sh", f"{MODULE} --network_args exclude_patterns=x\n", "is not a list of texts"),
        ("a.bat", f'{MODULE} --output_dir "C:\\out\\" --network_dim 4\n', "without a backslash at its end"),
        ("a.bat", f"{MODULE} --network_dim %1\n", "--network_dim has %1"),
        ("a.toml", "[network]\nnetwork_dim = 4\n", "there is no network_module in it"),
        ("a.toml", "network_module = 'networks.lora_wan'\n", "networks.lora_wan, not networks.lora_qwen_image"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    found = refusal("musubi-tuner", tmp_path, name, text)
    assert said in found
    assert ("Give the script that calls qwen_image_train_network.py" in found) == ("there is no" in said)


def test_musubi_s_defaults_are_named_where_a_script_leaves_them(tmp_path: Path) -> None:
    found = recipe("musubi-tuner", tmp_path, "a.sh", f"{MODULE}\n")
    assert (found.rank, found.alpha) == (4, 1) and "network_dim is not in it" in found.notes[0]


def test_musubi_s_script_may_name_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        "network_module = 'networks.lora_qwen_image'\nnetwork_dim = 8\nnetwork_alpha = 8\n"
    )
    text = f"{MODULE} --config_file my.toml --network_dim 16\n"
    found = recipe("musubi-tuner", tmp_path, "a.sh", text)
    assert (found.rank, found.alpha) == (16, 8)


# --- diffusion-pipe ---------------------------------------------------------------------------------------


def diffusion_pipe(line: str) -> str:
    own = "[model]\ntype = 'qwen_image'\ndtype = 'bfloat16'\n[adapter]\ntype = 'lora'\nrank = 6\ndtype = 'float32'\n"
    return f"{own}{line}\n"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("", 28),
        ("exclude_modules = ['img_mod.1', 'txt_mod.1']", 24),
        ("exclude_modules = ['transformer_blocks.0.attn.to_q']", 27),
        ("exclude_modules = ['mod']", 28),  # PEFT's rule: whole parts of a name
        (r"exclude_modules = '.*(img|txt)_mlp.*'", 20),
    ],
)
def test_diffusion_pipe_s_exclude_modules(line: str, count: int, tmp_path: Path) -> None:
    """Since 2026-08-09. A module of the file that is not trained raises there: the file that is made leaves it out."""
    found = recipe("diffusion-pipe", tmp_path, "my.toml", diffusion_pipe(line))
    assert len(found.targets(modules())) == count
    assert any("2026-08-09" in note for note in found.notes) == bool(line)
    without = 24 - sum(name not in found.targets(modules()) for name in weights().factors)
    verdict = judge(written(tmp_path, "diffusion_model"), "diffusion-pipe", modules(), found)
    assert any("not trained" in error for error in verdict.errors) == (without < 24)
    done = made_for("diffusion-pipe", tmp_path / "made", recipe=found)
    assert done.verdict.errors == [] and len(read_lora(done.file)[0].factors) == without
    said = "\n".join(done.lines)
    assert ("dropped, because they are not trained" in said and "of the energy" in said) == (without < 24)


# --- OneTrainer -------------------------------------------------------------------------------------------


def onetrainer(**changes: Any) -> str:
    values = {"__version": 11, "training_method": "LORA", "model_type": "QWEN", "lora_rank": 6, "lora_alpha": 6.0}
    own = {"layer_filter": "attn,img_mlp.net.2,txt_mlp.net.2,img_mod,txt_mod", "text_encoder": {"train": False}}
    return json.dumps({**values, **own, **changes})


@pytest.mark.parametrize("text_encoder", [{"train": True}, {}, None])
def test_onetrainer_s_text_encoder_must_not_be_trained(text_encoder: Any, tmp_path: Path) -> None:
    """Where the configuration does not say, it is."""
    said = refusal("onetrainer", tmp_path, "preset.json", onetrainer(text_encoder=text_encoder))
    assert '"text_encoder": {"train": false}' in said
    assert recipe("onetrainer", tmp_path, "preset.json", onetrainer()).rank == 6


def test_onetrainer_s_filter_is_checked(tmp_path: Path) -> None:
    said = refusal("onetrainer", tmp_path, "a.json", onetrainer(layer_filter="attn,to_q"))
    assert "'to_q' is the first part to match no layer" in said
    said = refusal("onetrainer", tmp_path, "a.json", onetrainer(layer_filter="attn,(", layer_filter_regex=True))
    assert "layer_filter: '(' is not a regular expression" in said
    found = recipe("onetrainer", tmp_path, "a.json", onetrainer(layer_filter=r"\.to_[qk]$", layer_filter_regex=True))
    assert len(found.targets(modules())) == 4


# --- DiffSynth-Studio, diffusers --------------------------------------------------------------------------

DIFFSYNTH = "accelerate launch examples/qwen_image/model_training/train.py --lora_base_model dit --lora_rank 6"


@pytest.mark.parametrize(
    ("targets", "count"), [('""', 28), ("''", 28), ("to_q,to_k", 4), ('"to_q, to_k"', 2), ("to_q", 0), ("'.*to_q'", 2)]
)
def test_diffsynth_s_targets(targets: str, count: int, tmp_path: Path) -> None:
    """Nothing named means all of the blocks' types; one name is a pattern for whole names."""
    text = f"{DIFFSYNTH} --lora_target_modules {targets} --use_gradient_checkpointing\n"
    assert len(recipe("diffsynth", tmp_path, "train.sh", text).targets(modules())) == count


def test_diffsynth_of_two_generations(tmp_path: Path) -> None:
    """It reads .alpha since 2026-03."""
    found = recipe(
        "diffsynth", tmp_path, "train.sh", f'{DIFFSYNTH} --lora_target_modules "{",".join(TARGETS["i2l"])}"\n'
    )
    state = load_file(written(tmp_path, "bare"))
    stems = {key.rsplit(".lora_", 1)[0] for key in state}
    save_file({**state, **{f"{stem}.alpha": torch.tensor(3.0) for stem in stems}}, tmp_path / "alpha.safetensors")
    verdict = judge(tmp_path / "alpha.safetensors", "diffsynth", modules(), found)
    assert verdict.equal and any("before 2026-03" in note and "2 times" in note for note in verdict.notes)


@pytest.mark.parametrize(
    ("trainer", "name", "text", "said"),
    [
        ("diffsynth", "a.sh", f"{DIFFSYNTH} --lora_target_modules '('", "--lora_target_modules: '(' is not a regular"),
        ("diffusion-pipe", "a.toml", diffusion_pipe("exclude_modules = '('"), "exclude_modules: '(' is not a regular"),
        ("diffusion-pipe", "a.toml", "resolutions = [1024]\n", "there is no model in it. Give the TOML of train.py"),
        ("diffusion-pipe", "a.toml", "[model]\ntype = 'qwen_image'\n", "there is no [adapter]: it trains"),
        ("ai-toolkit", "a.yaml", "job: extension\n", "there is no config in it. Give the YAML or JSON of a job"),
        ("ai-toolkit", "a.yaml", "config: {process: [{model: {arch: qwen_image}}]}", "there is no network in it"),
        ("simpletuner", "a.json", "[]", "Give the config.json of a training"),
        ("onetrainer", "a.json", '[{"name": "concept"}]', "not the concepts' or samples'"),
        ("diffsynth", "a.sh", "python train.py --lr 1", "there is no command with --lora_base_model in it"),
        ("diffusers", "a.sh", "x.py --pretrained_model_name_or_path x --rank $RANK", "--rank has $RANK"),
    ],
)
def test_other_files_are_told_from_the_one_that_is_meant(
    trainer: str, name: str, text: str, said: str, tmp_path: Path
) -> None:
    assert said in refusal(trainer, tmp_path, name, text)


# --- what is written --------------------------------------------------------------------------------------


def with_outer() -> AdapterWeights:
    outer = {
        name: LowRank(torch.randn(6, modules()[name][0]), torch.randn(modules()[name][1], 6)) for name in OUTER_MODULES
    }
    return AdapterWeights({**weights().factors, **outer})


@pytest.mark.parametrize("trainer", LOADERS)
def test_layers_outside_of_the_blocks_arrive_where_they_can_be_trained(trainer: str, tmp_path: Path) -> None:
    done = made_for(trainer, tmp_path / "made", with_outer())
    everywhere = trainer not in ("musubi-tuner", "diffusion-pipe")
    assert TRAINERS[trainer].covers("proj_out") == everywhere
    assert done.verdict.errors == [] and done.verdict.ignored == {}
    assert len(done.verdict.loaded) == len(read_lora(done.file)[0].factors) == (30 if everywhere else 24)
    assert any("dropped, because they are not trained: 6 modules" in line for line in done.lines) != everywhere


@pytest.mark.parametrize("trainer", sorted(LOADERS.keys() - {"comfyui"}))
def test_a_configuration_is_whole_and_marks_what_is_to_be_filled_in(trainer: str, tmp_path: Path) -> None:
    made_for(trainer, tmp_path / "made")
    file = lines_in(tmp_path / "made")
    text = file.read_text()
    parsed: Any = {
        ".toml": lambda: tomli.loads(text),
        ".yaml": lambda: yaml.safe_load(text),
        ".json": lambda: json.loads(text),
        ".sh": lambda: re.findall(r"^  --(\w+)", text, re.MULTILINE),
    }[file.suffix]()
    needed = {
        "musubi-tuner": {"dit", "vae", "text_encoder", "dataset_config", "output_dir", "network_weights"},
        "ai-toolkit": {"job", "config", "meta"},
        "simpletuner": {"model_flavour", "data_backend_config", "output_dir", "max_train_steps", "init_lora"},
        "diffusion-pipe": {"output_dir", "dataset", "epochs", "model", "adapter", "optimizer"},
        "onetrainer": {"__version", "base_model_name", "concept_file_name", "workspace_dir", "lora_model_name"},
        "diffsynth": {"dataset_base_path", "model_id_with_origin_paths", "output_path", "lora_checkpoint"},
        "diffusers": {"pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir"},
    }[trainer]
    assert needed <= set(parsed)
    assert REPLACE in text and "init_lora_step" not in text and "global_step" not in text


@pytest.mark.parametrize(
    ("base", "flavour"), [("Qwen/Qwen-Image", "v1.0"), ("Qwen/Qwen-Image-2512", "v2.0"), ("/models/mine", "v1.0")]
)
def test_simpletuner_s_flavour_is_that_of_the_base(base: str, flavour: str, tmp_path: Path) -> None:
    made_for("simpletuner", tmp_path / "made", base=base)
    values = json.loads(lines_in(tmp_path / "made").read_text())
    assert values["model_flavour"] == flavour
    assert values.get("pretrained_model_name_or_path", base) == base
    assert ("pretrained_model_name_or_path" in values) == base.startswith("/")


def test_a_step_in_the_metadata_is_not_handed_on(tiny_base: Path, tmp_path: Path) -> None:
    from trainer import adapter, qwen_image

    sizes = adapter.target_modules(qwen_image.transformer_on_meta(str(tiny_base)), adapter.AdapterConfig())
    found = AdapterWeights({n: LowRank(torch.randn(2, i), torch.randn(o, 2)) for n, (i, o) in sizes.items()})
    write_lora(tmp_path / "x.safetensors", found, {"global_step": "800", "note": "y"}, layout="transformer")
    words = ["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "made"), "--for", "simpletuner"]
    assert main([*words, "--base", str(tiny_base)]) == 0
    metadata = read_lora(tmp_path / "made" / "made.safetensors")[1]
    assert "global_step" not in metadata and metadata["note"] == "y"


HALVES = {
    "lora_A.weight": "lora_B.weight",
    "lora_A.default.weight": "lora_B.default.weight",
    "lora_down.weight": "lora_up.weight",
    "lora.down.weight": "lora.up.weight",
}


@pytest.mark.parametrize("trainer", ["comfyui", "onetrainer"])
@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
@pytest.mark.parametrize("down", HALVES)
def test_no_false_alarm_at_any_half_name(trainer: str, prefix: str, down: str, tmp_path: Path) -> None:
    state = {}
    for name, x in weights().factors.items():
        state[f"{prefix}{name}.{down}"], state[f"{prefix}{name}.{HALVES[down]}"] = x.a, x.b.contiguous()
        state[f"{prefix}{name}.alpha"] = torch.tensor(6.0)
    save_file(state, tmp_path / "x.safetensors")
    own = recipe("onetrainer", tmp_path, "preset.json", onetrainer()) if trainer == "onetrainer" else None
    verdict = judge(tmp_path / "x.safetensors", trainer, modules(), own)
    assert verdict.equal and len(verdict.loaded) == 24


def test_what_is_known_of_trainers_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainers"]) == 0
    said = capsys.readouterr().out
    for trainer in TRAINERS.values():
        assert trainer.title in said and trainer.read in said
    assert "4.7.0" in said and "lora_unet_" in said
    page = (Path(__file__).parents[2] / "docs" / "other_trainers.md").read_text(encoding="utf-8")
    for trainer in TRAINERS.values():
        assert f"| {trainer.title} | {trainer.read} |" in page
