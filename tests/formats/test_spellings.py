"""LoRA files as people have them: one LoRA under every spelling of its keys, and files that are something else."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.test_layouts import NAMES, weights
from trainer.files import write_json
from trainer.formats import OUTER_MODULES, FormatError, read_lora
from trainer.formats.asked import parse_strength
from trainer.lowrank import LowRank

A, B = "lora_A.weight", "lora_B.weight"
DOWN, UP = "lora_down.weight", "lora_up.weight"
FACTORS = {**weights().factors, **{name: weights().factors[NAMES[0]] for name in OUTER_MODULES}}


def underscores(name: str) -> str:
    return name.replace(".", "_")


def inside(wrapper: str) -> Callable[[str], str]:
    """A wrapper around each block."""
    return lambda name: re.sub(r"(transformer_blocks\.\d+\.)", rf"\1{wrapper}.", name)


SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "a raw state dict of diffusers": (str, "lora_A.default_0.weight", "lora_B.default_0.weight"),
    "a named adapter": (str, "lora_A.my_char.weight", "lora_B.my_char.weight"),
    "a named adapter, down and up": (str, "lora_down.my_char.weight", "lora_up.my_char.weight"),
    "a named adapter, old diffusers": ("transformer.{}".format, "lora.down.x.weight", "lora.up.x.weight"),
    "older diffusers": ("unet.{}".format, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "no .weight": ("transformer.{}".format, "lora_A", "lora_B"),
    "SimpleTuner": ("transformer.base_model.model.{}".format, "lora.down.weight", "lora.up.weight"),
    "transformer.base_model.model": ("transformer.base_model.model.{}".format, A, B),
    "a whole checkpoint": ("model.diffusion_model.{}".format, A, B),
    "model": ("model.{}".format, A, B),
    "DDP": ("module.{}".format, A, B),
    "DDP of diffusers": ("module.transformer.{}".format, A, "lora_B.weight"),
    "unet": ("unet.{}".format, DOWN, UP),
    "unet of PEFT": ("unet.base_model.model.{}".format, A, B),
    "compiled": ("_orig_mod.{}".format, "lora_A.default.weight", "lora_B.default.weight"),
    "compiled in diffusers": ("transformer._orig_mod.{}".format, A, B),
    "compiled, then DDP": ("module._orig_mod.transformer.{}".format, A, B),
    "compiled blocks": (inside("_orig_mod"), A, B),
    "FSDP": (inside("_fsdp_wrapped_module"), A, B),
    "FSDP with checkpointing": (inside("_fsdp_wrapped_module._checkpoint_wrapped_module"), A, B),
    "DiffSynth-Studio": ("pipe.dit.{}".format, "lora_A.default.weight", "lora_B.default.weight"),
    "DiffSynth-Studio, without the adapter's name": ("pipe.dit.{}".format, A, B),
    "kohya": (lambda name: f"lora_unet_{underscores(name)}", DOWN, UP),
    "kohya with a dot": (lambda name: f"lora_unet__{underscores(name)}", DOWN, UP),
    "kohya, compiled": (lambda name: f"lora_unet__orig_mod_{underscores(name)}", DOWN, UP),
    "kohya, DDP": (lambda name: f"lora_unet_module_{underscores(name)}", DOWN, UP),
    "kohya, compiled blocks": (lambda name: f"lora_unet_{underscores(inside('_orig_mod')(name))}", DOWN, UP),
    "kohya with A and B": (lambda name: f"lora_unet_{underscores(name)}", A, B),
    "kohya of diffusers": (lambda name: f"lora_transformer_{underscores(name)}", DOWN, UP),
    "LyCORIS": (lambda name: f"lycoris_{underscores(name)}", DOWN, UP),
    "ai-toolkit inside": (lambda name: f"transformer$${name.replace('.', '$$')}", DOWN, UP),
}


def write(path: Path, content: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in content.items()}, path)
    return path


def spelled(name: Callable[[str], str], a: str, b: str) -> dict[str, Tensor]:
    return {
        f"{name(module)}.{half}": tensor
        for module, factors in FACTORS.items()
        for half, tensor in ((a, factors.a), (b, factors.b))
    }


def assert_same(found: dict[str, LowRank], scale: float = 1.0) -> None:
    assert found.keys() == FACTORS.keys()
    for name, (a, b) in FACTORS.items():
        assert torch.equal(found[name].a, a) and torch.equal(found[name].b, b * scale), name


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_as_the_same_lora(spelling: str, tmp_path: Path) -> None:
    content = spelled(*SPELLINGS[spelling])
    assert len(content) == 2 * len(FACTORS)
    path = write(tmp_path / "lora.safetensors", content)
    assert_same(dict(read_lora(path)[0].factors))
    alphas = {f"{SPELLINGS[spelling][0](name)}.alpha": torch.tensor(6.0) for name in FACTORS}
    assert_same(dict(read_lora(write(path, {**content, **alphas}))[0].factors), scale=2.0)  # at rank 3


HALVES = (
    ("lora_A", "lora_B"),
    (A, B),
    ("lora_A.default.weight", "lora_B.default.weight"),
    (DOWN, UP),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
"""As ComfyUI takes them; also below, with an underscore before `lora.down`."""


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "pipe.dit.", "lora_unet_", "lycoris_"])
def test_every_half_that_comfyui_takes_is_read_under_every_prefix(prefix: str, tmp_path: Path) -> None:
    def name(module: str) -> str:
        return prefix + (underscores(module) if prefix.endswith("_") else module)

    for a, b in HALVES:
        assert_same(dict(read_lora(write(tmp_path / "lora.safetensors", spelled(name, a, b)))[0].factors))
    content = {key.replace(".lora.", "_lora."): x for key, x in spelled(name, *HALVES[4]).items()}
    assert len(content) == 2 * len(FACTORS)
    assert_same(dict(read_lora(write(tmp_path / "lora.safetensors", content))[0].factors))


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.transformer.", "module.base_model.model."])
@pytest.mark.parametrize("adapter", ["", ".default", ".my_char"])
def test_a_file_of_peft_has_its_alpha_beside_it_under_any_name(prefix: str, adapter: str, tmp_path: Path) -> None:
    content = spelled((prefix + "{}").format, f"lora_A{adapter}.weight", f"lora_B{adapter}.weight")
    path = write(tmp_path / "my_char.safetensors", content)
    with pytest.raises(FormatError, match=r"adapter_config\.json is missing beside it, and with it alpha"):
        read_lora(path)
    write_json(tmp_path / "adapter_config.json", {"r": 3, "lora_alpha": 6})
    assert_same(dict(read_lora(path)[0].factors), scale=2.0)


def test_a_pattern_of_peft_is_of_the_names_that_peft_saw(tmp_path: Path) -> None:
    content = spelled("base_model.model.transformer.{}".format, A, B)
    name = "transformer_blocks.11.attn.to_q"
    for pattern in (name, f"transformer.{name}", "^transformer.transformer_blocks.11.attn.to_q", r".*\.11\.attn\.to_q"):
        config = {"r": 3, "lora_alpha": 3, "alpha_pattern": {"to_nothing": 12, pattern: 6, "attn.to_q": 3}}
        write_json(tmp_path / "adapter_config.json", config)
        factors = read_lora(write(tmp_path / "lora.safetensors", content))[0].factors
        assert torch.equal(factors[name].b, FACTORS[name].b * 2), pattern
        assert torch.equal(factors["transformer_blocks.0.attn.to_q"].b, FACTORS["transformer_blocks.0.attn.to_q"].b)
    write_json(tmp_path / "adapter_config.json", {"r": 3, "lora_alpha": 3, "alpha_pattern": {"(": 6}})
    with pytest.raises(FormatError, match="alpha_pattern: missing"):
        read_lora(tmp_path)


LORA = spelled("transformer.{}".format, A, B)
SOME = torch.ones(2, 2)
OTHER_FILES: dict[str, tuple[dict[str, Tensor], str]] = {
    "two adapters": (
        {**spelled(str, "lora_A.x.weight", "lora_B.x.weight"), **spelled(str, "lora_A.y.weight", "lora_B.y.weight")},
        "it holds 2 adapters (x, y): write a file of the one that you want, with the keys that have its name",
    ),
    "a named adapter and one without a name": (
        {**spelled(str, "lora_A.x.weight", "lora_B.x.weight"), **spelled(str, A, B)},
        "it holds 2 adapters (one without a name, x)",
    ),
    "an optimizer": (
        {"0.exp_avg": SOME, "0.exp_avg_sq": SOME, "0.step": torch.tensor(3.0)},
        "this is the state of an optimizer, as 0.exp_avg shows; take the file of the LoRA itself",
    ),
    "an optimizer in 8 bits": ({"3.state1": SOME, "3.absmax1": SOME}, "this is the state of an optimizer"),
    "an optimizer beside": (
        {**LORA, "optimizer.state.0.exp_avg": SOME},
        "beside the transformer's LoRA it holds the state of an optimizer (1, as optimizer.state.0.exp_avg)",
    ),
    "a hypernetwork": (
        {"blocks.0.layers.0.proj_a.proj_in.weight": SOME},
        "this is an i2L hypernetwork, which predicts LoRAs, as blocks.0.layers.0.proj_a.proj_in.weight shows; start "
        "with --init i2l",
    ),
    "a transformer": (
        {"transformer_blocks.0.attn.to_q.weight": SOME, "transformer_blocks.0.attn.to_q.bias": SOME},
        "this is a whole transformer of Qwen-Image, not a LoRA, as transformer_blocks.0.attn.to_q.bias shows: to train "
        "on top of it, name the folder of its pipeline as [model] base",
    ),
    "a transformer of ComfyUI": (
        {"model.diffusion_model.img_in.weight": SOME},
        "this is a whole transformer of Qwen-Image",
    ),
    "another model": ({"decoder.conv_in.weight": SOME}, "this is a whole model, not a LoRA, as decoder.conv_in.weight"),
    "a ControlNet": (
        {"controlnet_blocks.0.weight": SOME, "transformer_blocks.0.attn.to_q.weight": SOME},
        "this is a ControlNet, as controlnet_blocks.0.weight shows; it steers a model while pictures are drawn",
    ),
    "an IP-Adapter": ({"image_proj.proj.weight": SOME, "ip_adapter.1.to_k_ip.weight": SOME}, "this is an IP-Adapter"),
    "an embedding": ({"emb_params": SOME}, "this is an embedding (textual inversion), as emb_params shows; it belongs"),
    "an embedding of diffusers": ({"<my-char>": SOME}, "this is an embedding (textual inversion), as <my-char> shows"),
    "a text encoder's LoRA": (
        {"text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight": SOME},
        "this is a LoRA for a text encoder, as text_encoder.model.layers.0.self_attn.q_proj shows; only the "
        "transformer is trained here, so choose one without it",
    ),
    "a LoRA of SDXL with its text encoders": (
        {f"{name}.lora_down.weight": SOME for name in ("lora_te1_text_model_q", "lora_unet_down_blocks_1_attn_to_q")},
        "Qwen-Image has no such modules: lora_unet_down_blocks_1_attn_to_q. It looks like a LoRA for Stable Diffusion",
    ),
    "a LoRA of Wan": (
        {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": SOME},
        "Qwen-Image has no such modules: diffusion_model.blocks.0.self_attn.q. It looks like a LoRA for Wan",
    ),
    "a LoRA of a ControlNet": (
        {"controlnet.transformer_blocks.0.attn.to_q.lora_A.weight": SOME},
        "Qwen-Image has no such modules: controlnet.transformer_blocks.0.attn.to_q. It looks like a LoRA for a Control",
    ),
    "a bias beside": (
        {**LORA, "transformer.transformer_blocks.0.attn.to_q.lora_B.bias": SOME},
        "these tensors are not part of a plain LoRA: transformer.transformer_blocks.0.attn.to_q.lora_B.bias",
    ),
    "nothing": ({}, "this is not a LoRA: it is empty"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_named_with_what_to_do(kind: str, tmp_path: Path) -> None:
    content, said = OTHER_FILES[kind]
    path = write(tmp_path / "lora.safetensors", content)
    with pytest.raises(FormatError) as caught:
        read_lora(path)
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("finished", [True, False])
def test_a_checkpoint_of_ours_is_told_from_its_result(finished: bool, tmp_path: Path) -> None:
    """Its keys are those of a LoRA at scale 1, which it need not be."""
    run = tmp_path / "out"
    step = run / "checkpoints" / "step-00000100"
    for name in ("trainable", "optimizer"):
        write(step / f"{name}.safetensors", spelled(str, "lora_A.default.weight", "lora_B.default.weight"))
    write_json(run / "run.json", {})
    if finished:
        (run / "adapter").mkdir()
    wanted = f"take {run / 'adapter'}" if finished else f"the run in {run} is not finished: go on with --resume"
    for path in (step, step / "trainable.safetensors", step / "optimizer.safetensors", step.parent):
        with pytest.raises(FormatError) as caught:
            read_lora(path)
        text = str(caught.value)
        assert text.startswith(f"{path}: this is a checkpoint, from which a run is resumed") and "alpha" in text
        assert wanted in text
    with pytest.raises(FormatError) as caught:
        read_lora(run)
    assert str(caught.value).startswith(f"{run}: this is the folder of a run: {wanted}")


def test_a_checkpoint_that_was_moved_is_told_too(tmp_path: Path) -> None:
    write(tmp_path / "trainable.safetensors", spelled(str, A, B))
    with pytest.raises(FormatError, match=r"take the folder adapter/ of its run, and if there is none, finish the run"):
        read_lora(tmp_path)


def test_pickles_and_folders_of_models_are_named(tmp_path: Path) -> None:
    for suffix in (".ckpt", ".pt", ".pth", ".bin"):
        path = tmp_path / "pickles" / f"lora{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        with pytest.raises(FormatError, match=r"this is a pickle, .* only \.safetensors files are read: load it by"):
            read_lora(path)
    with pytest.raises(FormatError, match=r"no \.safetensors file in it, only lora\.bin, .*: this is a pickle"):
        read_lora(path.parent)
    (tmp_path / "lora.gguf").write_bytes(b"")
    with pytest.raises(FormatError, match=r"only \.safetensors files are read; convert it"):
        read_lora(tmp_path / "lora.gguf")
    write_json(tmp_path / "model" / "model_index.json", {})
    with pytest.raises(FormatError, match=r"the folder of a whole model, not of a LoRA: it can be \[model\] base"):
        read_lora(tmp_path / "model")


STRENGTHS = {
    "a.safetensors": ("a.safetensors", 1.0),
    "a.safetensors:0.8": ("a.safetensors", 0.8),
    "folder/a.safetensors:-1e-1": ("folder/a.safetensors", -0.1),
    r"C:\loras\a.safetensors": (r"C:\loras\a.safetensors", 1.0),
    r"C:\loras\a.safetensors:2": (r"C:\loras\a.safetensors", 2.0),
    "C:/loras/a.safetensors": ("C:/loras/a.safetensors", 1.0),
    "C:a.safetensors": ("C:a.safetensors", 1.0),
    "a:b/c.safetensors": ("a:b/c.safetensors", 1.0),
    "a:b/c.safetensors:0": ("a:b/c.safetensors", 0.0),
}


@pytest.mark.parametrize("text", STRENGTHS)
def test_a_strength_stands_after_the_last_colon_that_is_not_the_paths(text: str) -> None:
    path, strength = STRENGTHS[text]
    assert parse_strength(text) == (Path(path), strength)


def test_a_file_that_is_there_may_have_a_colon_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("v1:2").touch()
    assert parse_strength("v1:2") == (Path("v1:2"), 1.0)
    assert parse_strength("v1:2:3") == (Path("v1:2"), 3.0)


@pytest.mark.parametrize(
    "text", ["a.safetensors:", "a.safetensors:nan", "a:inf", "a.safetensors:strong", ":0.5", "a.safetensors:0,5"]
)
def test_a_strength_that_is_no_finite_number_is_named(text: str) -> None:
    with pytest.raises(FormatError, match=re.escape(text)):
        parse_strength(text)
