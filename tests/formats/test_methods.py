"""LoHa and LoKr files give the dW that their program means, by a dense float64 reference and by PEFT's own layers."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from initializers import warm_start
from tests.formats.test_layouts import Blocks, write
from tests.helpers import FINISHED, run
from tests.test_adapter import tiny
from trainer import lycoris
from trainer.files import write_json
from trainer.formats import FormatError, read_lora
from trainer.formats.lora import open_lora
from trainer.lowrank import LowRank, energy

TO_Q, TO_K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
Parts = dict[str, Tensor]


def parts(seed: int = 0, **shapes: tuple[int, ...]) -> Parts:
    random = torch.Generator().manual_seed(seed)
    return {part: torch.randn(shape, generator=random) for part, shape in shapes.items()}


LOHA = parts(hada_w1_a=(30, 3), hada_w1_b=(3, 20), hada_w2_a=(30, 2), hada_w2_b=(2, 20))
LARGE_LOHA = parts(hada_w1_a=(30, 5), hada_w1_b=(5, 20), hada_w2_a=(30, 5), hada_w2_b=(5, 20))
WHOLE = parts(lokr_w1=(5, 4), lokr_w2=(6, 5))
WHOLE_64 = parts(lokr_w1=(4, 4), lokr_w2=(16, 16))
KINDS: dict[str, tuple[Parts, float | None, float]] = {  # parts, alpha, and the scale that it means
    "LoHa": (LOHA, None, 1.0),
    "LoHa with alpha": (LOHA, 6.0, 2.0),
    "LoHa of more than full rank": (LARGE_LOHA, 1.0, 0.2),
    "LoHa, tall": (parts(hada_w1_a=(50, 4), hada_w1_b=(4, 7), hada_w2_a=(50, 4), hada_w2_b=(4, 7)), 4.0, 1.0),
    "LoKr of whole matrices": (WHOLE, 9999999999.0, 1.0),
    "LoKr of whole matrices, without alpha": (WHOLE, None, 1.0),
    "LoKr, w2 a product": (parts(lokr_w1=(5, 4), lokr_w2_a=(6, 2), lokr_w2_b=(2, 5)), 1.0, 0.5),
    "LoKr, w1 a product": (parts(lokr_w1_a=(5, 3), lokr_w1_b=(3, 4), lokr_w2=(6, 5)), 1.0, 1 / 3),
    "LoKr, both products": (
        parts(lokr_w1_a=(5, 2), lokr_w1_b=(2, 4), lokr_w2_a=(6, 2), lokr_w2_b=(2, 5)),
        -3.0,
        -1.5,
    ),
    "LoKr, product wider than its result": (parts(lokr_w1=(5, 4), lokr_w2_a=(6, 9), lokr_w2_b=(9, 5)), 9.0, 1.0),
    "LoKr that changes nothing": ({**WHOLE, "lokr_w2": torch.zeros(6, 5)}, 4.0, 1.0),
}
SPELLINGS = {
    "LyCORIS, SimpleTuner": ("lycoris_" + TO_Q.replace(".", "_"), ""),
    "musubi-tuner": ("lora_unet_" + TO_Q.replace(".", "_"), ""),
    "ai-toolkit": ("diffusion_model." + TO_Q, ""),
    "OneTrainer": ("transformer." + TO_Q, ""),
    "a raw state dict of PEFT": (TO_Q, ".default"),
}


def dense(kind: Parts, scale: float = 1.0) -> Tensor:
    """By the formulas alone."""
    x = {part: tensor.double() for part, tensor in kind.items()}
    if "hada_w1_a" in x:
        return scale * (x["hada_w1_a"] @ x["hada_w1_b"]) * (x["hada_w2_a"] @ x["hada_w2_b"])
    first, second = (x[w] if w in x else x[f"{w}_a"] @ x[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
    return scale * torch.kron(first, second)


def product(x: LowRank) -> Tensor:
    return x.b.double() @ x.a.double()


def file(path: Path, kind: Parts, alpha: float | None = None, stem: str = TO_Q, ending: str = "") -> Path:
    content = {f"{stem}.{part}{ending}": tensor for part, tensor in kind.items()}
    return write(path, content if alpha is None else {**content, f"{stem}.alpha": torch.tensor(alpha)})


@pytest.mark.parametrize("kind", KINDS)
def test_dw_is_that_of_the_formula(kind: str, tmp_path: Path) -> None:
    own, alpha, scale = KINDS[kind]
    path, expected = file(tmp_path / "x.safetensors", own, alpha), dense(own, scale)
    factors = read_lora(path)[0].factors[TO_Q]
    assert factors.a.dtype == factors.b.dtype == torch.float32
    assert (product(factors) - expected).norm() <= 1e-6 * expected.norm()
    opened = open_lora(path)
    assert opened.method == kind[:4]
    in_features, out_features, rank = opened.sizes()[TO_Q]
    assert (out_features, in_features) == expected.shape
    assert len(factors.a) <= rank <= min(expected.shape)
    if "nothing" not in kind:
        assert torch.linalg.matrix_rank(expected) == rank


def test_a_module_alone_is_read_as_with_all_others(tmp_path: Path) -> None:
    own, alpha, _ = KINDS["LoKr, w2 a product"]
    path = file(tmp_path / "x.safetensors", own, alpha)
    expected, found = read_lora(path)[0].factors[TO_Q], open_lora(path).module(TO_Q)
    assert torch.equal(found.a, expected.a) and torch.equal(found.b, expected.b)
    assert open_lora(path).not_finite() == []
    broken = file(tmp_path / "y.safetensors", {**own, "lokr_w1": own["lokr_w1"] * torch.nan}, alpha)
    assert open_lora(broken).not_finite() == [TO_Q]
    with pytest.raises(FormatError, match="contains NaN"):
        open_lora(broken).module(TO_Q)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["LoHa with alpha", "LoKr, w2 a product"])
def test_every_program_s_spelling_is_read(spelling: str, kind: str, tmp_path: Path) -> None:
    own, alpha, scale = KINDS[kind]
    expected = dense(own, scale)
    found = read_lora(file(tmp_path / "x.safetensors", own, alpha, *SPELLINGS[spelling]))[0].factors
    assert found.keys() == {TO_Q}
    assert (product(found[TO_Q]) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 4, 100])
def test_a_truncated_read_is_the_svd_of_dw(kind: str, limit: int, tmp_path: Path) -> None:
    own, alpha, scale = KINDS[kind]
    whole = dense(own, scale)
    weights, _ = read_lora(file(tmp_path / "x.safetensors", own, alpha), limit)
    factors, lost = weights.factors[TO_Q], weights.lost[TO_Q]
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    assert len(factors.a) == min(limit, int((s > 1e-9 * s[0]).sum()))
    assert (product(factors) - (u[:, :limit] * s[:limit]) @ vh[:limit]).norm() <= 1e-6 * whole.norm()
    assert lost == pytest.approx(float(s[limit:].square().sum()), rel=1e-6, abs=1e-9 * energy(factors))
    assert torch.all(factors.a.norm(dim=1).diff() <= 1e-5)  # largest first


class _Largest(TorchDispatchMode):
    """The numbers in the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return found


@pytest.mark.parametrize("ending", ["", "_a"])
def test_a_lokr_of_full_size_is_truncated_without_dw(ending: str) -> None:
    """A layer of 3072 -> 12288 with factor 16."""
    second = {"lokr_w2": (768, 192)} if not ending else {"lokr_w2_a": (768, 16), "lokr_w2_b": (16, 192)}
    with _Largest() as largest:
        factors, lost = lycoris.factors(parts(lokr_w1=(16, 16), **second), 1.0, 32)
    assert (factors.a.shape, factors.b.shape) == ((32, 3072), (12288, 32))
    assert lost > 0
    assert largest.numbers <= 768 * 768 < 3072 * 12288 / 60


PEFT: dict[str, LoHaConfig | LoKrConfig] = {
    "LoHa": LoHaConfig(r=3, alpha=5, init_weights=False),
    "LoHa, patterns": LoHaConfig(
        r=3, alpha=5, rank_pattern={"to_k": 2}, alpha_pattern={"attn.to_k": 7}, init_weights=False
    ),
    "LoKr of whole matrices": LoKrConfig(r=8, alpha=3, init_weights=False),
    "LoKr, w2 a product": LoKrConfig(r=2, alpha=3, init_weights=False),
    "LoKr, both products": LoKrConfig(r=2, alpha=3, decompose_both=True, init_weights=False),
    "LoKr, factor": LoKrConfig(r=2, alpha=3, decompose_factor=2, init_weights=False),
    "LoKr, patterns": LoKrConfig(
        r=8, alpha=3, rank_pattern={"to_k": 2}, alpha_pattern={"^.*to_q": 1}, init_weights=False
    ),
}


@pytest.mark.parametrize("name", PEFT)
def test_a_folder_of_peft_gives_peft_s_own_delta(name: str, tmp_path: Path) -> None:
    config = PEFT[name]
    config.target_modules = {"to_q", "to_k"}
    model: Any = get_peft_model(Blocks(), config)
    model.save_pretrained(tmp_path)
    factors = read_lora(tmp_path)[0].factors
    assert factors.keys() == {TO_Q, TO_K}
    for module, found in factors.items():
        with torch.no_grad():
            expected = model.base_model.model.get_submodule(module).get_delta_weight("default").double()
        assert expected.norm() > 0
        assert (product(found) - expected).norm() <= 1e-6 * expected.norm(), module
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"adapter_config\.json is missing beside it, and with it alpha"):
        read_lora(tmp_path)


def test_blissful_tuner_divides_alpha_by_the_longer_side_of_a_whole_w2(tmp_path: Path) -> None:
    stem = "lora_unet_" + TO_Q.replace(".", "_")
    content = {f"{stem}.{part}": tensor for part, tensor in WHOLE.items()}
    content |= {f"{stem}.alpha": torch.tensor(3.0), "lokr_factor": torch.tensor(-1)}
    expected = dense(WHOLE, 3 / 6)
    found = read_lora(write(tmp_path / "x.safetensors", content))[0].factors[TO_Q]
    assert (product(found) - expected).norm() <= 1e-6 * expected.norm()


def test_modules_may_differ_in_their_method(tmp_path: Path) -> None:
    content = {f"{TO_Q}.{part}": tensor for part, tensor in LOHA.items()}
    content |= {f"{TO_K}.lora_A.weight": torch.ones(2, 20), f"{TO_K}.lora_B.weight": torch.ones(30, 2)}
    path = write(tmp_path / "x.safetensors", content)
    assert open_lora(path).method == "LoHa and LoRA"
    weights, _ = read_lora(path, 1)
    assert {name: len(x.a) for name, x in weights.factors.items()} == {TO_K: 2, TO_Q: 1}  # a LoRA stays as it is
    assert weights.lost.keys() == {TO_Q}


def test_nan_is_named_in_all_modules_at_once(tmp_path: Path) -> None:
    bad = {**WHOLE, "lokr_w2": torch.full((6, 5), math.nan)}
    content = {f"{name}.{part}": tensor for name in (TO_K, TO_Q) for part, tensor in bad.items()}
    path = write(tmp_path / "x.safetensors", content)
    with pytest.raises(FormatError, match=rf"{TO_K} contains NaN or infinity, {TO_Q} contains NaN"):
        read_lora(path, 2)


DAMAGED: dict[str, tuple[Parts, str]] = {
    "half of a product": (parts(lokr_w1=(5, 4), lokr_w2_a=(6, 2)), "has lokr_w2_a where lokr_w2, or lokr_w2_a and"),
    "whole and product": ({**WHOLE, **parts(lokr_w1_a=(5, 2))}, "has lokr_w1 and lokr_w1_a where"),
    "no second": (parts(lokr_w1=(5, 4)), "has nothing where lokr_w2, or"),
    "LoHa, no second": (parts(hada_w1_a=(5, 2), hada_w1_b=(2, 4)), "has nothing where hada_w2_a and hada_w2_b must be"),
    "ranks": (parts(lokr_w1=(5, 4), lokr_w2_a=(6, 2), lokr_w2_b=(3, 5)), "has rank 2 in lokr_w2_a and 3 in lokr_w2_b"),
    "sizes": ({**LOHA, "hada_w2_a": torch.ones(31, 2)}, "has products of sizes 20 -> 30 and 20 -> 31"),
    "a convolution": (parts(lokr_w1=(5, 4), lokr_w2=(6, 5, 3, 3)), r"lokr_w2 of shape \(6, 5, 3, 3\): two dimensions"),
    "empty": (parts(lokr_w1=(5, 0), lokr_w2=(6, 5)), r"lokr_w1 of shape \(5, 0\)"),
    "two methods": ({**WHOLE, **LOHA}, "is both LoHa and LoKr"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_modules_are_named(damage: str, tmp_path: Path) -> None:
    own, said = DAMAGED[damage]
    with pytest.raises(FormatError, match=f"{TO_Q} .*{said}"):
        open_lora(file(tmp_path / "x.safetensors", own))


@pytest.mark.parametrize(
    ("ending", "method"),
    [
        ("lora_magnitude_vector", "DoRA, whose magnitudes no low-rank change can express"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("dora_scale", "DoRA"),
        ("magnitude", "DoRA"),
        ("lora_mid.weight", "a Tucker decomposition"),
        ("hada_t1", "a Tucker decomposition"),
        ("lokr_t2", "a Tucker decomposition"),
        ("diff", "a file of full-rank differences"),
        ("diff_b", "a file of full-rank differences"),
        ("set_weight", "a file of full-rank differences"),
        ("oft_blocks", "OFT or BOFT"),
        ("oft_R.weight", "OFT or BOFT"),
        ("boft_R", "BOFT"),
        ("a1.weight", "GLoRA"),
        ("glora_A", "GLoRA"),
        ("on_input", r"\(IA\)\^3"),
        ("ia3_l", r"\(IA\)\^3"),
        ("w_norm", "a file with trained norms"),
        ("vera_lambda_b", "VeRA"),
        ("lora_E", "AdaLoRA"),
        ("lambda_layer", "T-LoRA"),
        ("hra_u", "HRA"),
        ("gralora_A", "GraLoRA"),
    ],
)
@pytest.mark.parametrize("stem", ["diffusion_model." + TO_Q, "lycoris_" + TO_Q.replace(".", "_")])
def test_other_methods_are_named_with_what_to_do(ending: str, method: str, stem: str, tmp_path: Path) -> None:
    """Beside the factors of a LoRA, too: nothing is read in part."""
    content = {f"{stem}.lora_down.weight": torch.ones(2, 20), f"{stem}.lora_up.weight": torch.ones(30, 2)}
    for kept in (content, {}):
        path = write(tmp_path / "x.safetensors", {**kept, f"{stem}.{ending}": torch.ones(2)})
        with pytest.raises(FormatError, match=f"this is {method}.*, as .*{ending} shows; only LoRA, LoHa and LoKr are"):
            read_lora(path)


def test_other_methods_of_peft_are_named_by_its_configuration(tmp_path: Path) -> None:
    content = {f"base_model.model.{TO_Q}.lily_A": torch.ones(2, 20)}
    write(tmp_path / "adapter_model.safetensors", content)
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LILY", "r": 2})
    with pytest.raises(FormatError, match="this is LILY of PEFT; only LoRA, LoHa and LoKr are read: apply it to the"):
        read_lora(tmp_path)


LORA = {f"transformer.{TO_Q}.lora_A.weight": torch.ones(2, 20), f"transformer.{TO_Q}.lora_B.weight": torch.ones(30, 2)}


@pytest.mark.parametrize(
    "stem",
    [
        "text_encoder.model.layers.0.self_attn.q_proj",
        "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj",
        "lora_te_model_layers_0_self_attn_q_proj",
        "lora_te1_layers_0_mlp_up_proj",
    ],
)
@pytest.mark.parametrize("own", ["lora_down.weight", "hada_w1_a", "dora_scale"])
def test_a_text_encoder_s_part_is_left_out_and_named(stem: str, own: str, tmp_path: Path) -> None:
    beside = {f"{stem}.{own}": torch.ones(500, 1000, dtype=torch.bfloat16), f"{stem}.alpha": torch.tensor(1.0)}
    opened = open_lora(write(tmp_path / "x.safetensors", {**LORA, **beside}))
    assert opened.modules.keys() == {TO_Q}
    assert len(opened.read()[0].factors[TO_Q].a) == 2
    (note,) = opened.notes
    assert note.startswith(f"a LoRA for the text encoder is left out (2 tensors, 1.0 MB, as {stem}.")


def test_bundled_embeddings_are_left_out_and_named(tmp_path: Path) -> None:
    beside = {"bundle_emb.my_char.qwen": torch.ones(4, 3584), "lora_te_x.lora_up.weight": torch.ones(2)}
    opened = open_lora(write(tmp_path / "x.safetensors", {**LORA, **beside}))
    assert opened.modules.keys() == {TO_Q}
    assert sorted(note.split(" is left out (1 tensor, ")[0] for note in opened.notes) == [
        "a LoRA for the text encoder",
        "an embedding (textual inversion)",
    ]


FAMILY = {
    "ai-toolkit": ({"ss_base_model_version": "qwen_image_edit_plus"}, "Qwen-Image-Edit-2509"),
    "musubi-tuner": ({"modelspec.architecture": "Qwen-Image-Edit-2511/lora"}, "Qwen-Image-Edit-2511"),
    "the base's file": ({"ss_sd_model_name": "qwen_image_2512_bf16.safetensors"}, "Qwen-Image-2512"),
    "Edit": ({"modelspec.architecture": "qwen-image-edit"}, "Qwen-Image-Edit"),
    "Layered": ({"ss_base_model_version": "qwen_image_layered"}, "Qwen-Image-Layered"),
    "ours": ({"modelspec.architecture": "qwen-image/lora"}, None),
    "a folder's name": ({"ss_sd_model_name": "/qwen-image-edit/Qwen-Image"}, None),
    "not said": ({"ss_output_name": "qwen_image_edit_test"}, None),
}


@pytest.mark.parametrize("program", FAMILY)
def test_a_lora_for_another_model_of_the_family_is_told(program: str, tmp_path: Path) -> None:
    metadata, member = FAMILY[program]
    notes = open_lora(write(tmp_path / "x.safetensors", LORA, metadata)).notes
    ((key, value),) = metadata.items()
    expected = f"it was made for {member} ({key} says {value}): the modules are the same, how well it fits another"
    assert [note[: len(expected)] for note in notes] == ([expected] if member else [])


def test_peft_and_a_model_card_tell_the_base_too(tmp_path: Path) -> None:
    content = {f"base_model.model.{key.removeprefix('transformer.')}": tensor for key, tensor in LORA.items()}
    path = write(tmp_path / "adapter_model.safetensors", content)
    config = {"r": 2, "lora_alpha": 2, "base_model_name_or_path": "Qwen/Qwen-Image-Edit-2509"}
    write_json(tmp_path / "adapter_config.json", config)
    assert "Qwen-Image-Edit-2509 (base_model_name_or_path says Qwen/" in open_lora(path).notes[0]
    write_json(tmp_path / "adapter_config.json", {**config, "base_model_name_or_path": None})
    card = tmp_path / "README.md"
    for text in ('---\nbase_model: "Qwen/Qwen-Image-2512"\n---\n', "---\nbase_model:\n- Qwen/Qwen-Image-2512\n---\n"):
        card.write_text(text)
        assert "Qwen-Image-2512 (README.md beside it says" in open_lora(path).notes[0]
    for text in ("", "---\n[", "---\nbase_model: Qwen/Qwen-Image\n---\n", "---\n- 1\n---\nqwen-image-2512"):
        card.write_text(text)
        assert open_lora(path).notes == []


def test_a_lora_of_qwen_image_2_1_is_of_another_model(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", LORA, {"ss_base_model_version": "qwen_image_2.1"})
    with pytest.raises(FormatError, match=r"it was made for Qwen-Image-2\.1, a model of another architecture \(ss_"):
        open_lora(path)
    for name in ("diffusion_model.transformer_blocks.0.img_mlp.gate_layer", "transformer.txt_in.in_layer"):
        content = {**LORA, f"{name}.lora_A.weight": torch.ones(2, 20), f"{name}.lora_B.weight": torch.ones(30, 2)}
        with pytest.raises(FormatError, match=r"It looks like a LoRA for Qwen-Image-2\.1, a model of another arch"):
            open_lora(write(tmp_path / "x.safetensors", content))


def lokr_of_the_miniature(path: Path) -> dict[str, Tensor]:
    """On its two blocks of width 64; returns dW by module."""
    random, found, content = torch.Generator().manual_seed(1), dict[str, Tensor](), dict[str, Tensor]()
    for name in (f"transformer_blocks.{block}.attn.{kind}" for block in (0, 1) for kind in ("to_q", "add_v_proj")):
        own = {"lokr_w1": torch.randn(4, 4, generator=random), "lokr_w2": torch.randn(16, 16, generator=random) * 0.01}
        found[name] = dense(own)
        content |= {f"diffusion_model.{name}.{part}": tensor for part, tensor in own.items()}
    write(path, content, {"ss_base_model_version": "qwen_image_edit"})
    return found


def share(whole: dict[str, Tensor], rank: int) -> tuple[float, float]:
    """Of the energy that this rank keeps: of all together, and the least."""
    squares = [torch.linalg.svdvals(x).square() for x in whole.values()]
    left = [float(s[:rank].sum()) for s in squares]
    return sum(left) / float(sum(s.sum() for s in squares)), min(
        x / float(s.sum()) for x, s in zip(left, squares, strict=True)
    )


def test_a_run_starts_from_the_best_of_a_lokr(run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    whole = lokr_of_the_miniature(tmp_path / "x.safetensors")
    settings = ("train.learning_rate=1e-12", "train.weight_decay=0.0", "train.steps=1", "validation.prompts=[]")
    assert run(run_toml, tmp_path / "out", f"init.method={tmp_path / 'x.safetensors'}", *settings) == FINISHED
    assert "it was made for Qwen-Image-Edit (ss_base_model_version says qwen_image_edit)" in caplog.text
    report = json.loads((tmp_path / "out" / "run.json").read_text())["init"]
    total, least = share(whole, 4)
    assert total < 0.9
    assert (report["kind"], report["ranks"], len(report["notes"])) == ("LoKr", [4], 1)
    for kept in (report["energy_kept"], report["applied"]["energy_kept"]):
        assert (kept["total"], kept["min"]) == (pytest.approx(total), pytest.approx(least))
    assert report["applied"]["seeded"] == 4
    assert f"is a LoKr: reading kept {100 * total:.1f} % of its energy" in caplog.text
    assert f"truncation kept {100 * total:.1f} % of the energy" in caplog.text
    exported = read_lora(tmp_path / "out" / "adapter")[0].factors
    for name, x in whole.items():
        u, s, vh = torch.linalg.svd(x)
        best = (u[:, :4] * s[:4]) @ vh[:4]
        assert (product(exported[name]) - best).norm() <= 1e-5 * best.norm()


def test_warm_start_takes_a_lokr_and_says_what_it_was_made_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.safetensors"
    whole = {TO_Q: dense(WHOLE_64)}
    write(path, {f"{TO_Q}.{part}": x for part, x in WHOLE_64.items()}, {"ss_base_model_version": "qwen_image_edit"})
    report = warm_start(tiny(), init=str(path), rank=2, strength=0.5)
    assert report["energy_kept"]["total"] == pytest.approx(share(whole, 2)[0])
    assert report["init"]["kind"] == "LoKr"
    assert "it was made for Qwen-Image-Edit" in caplog.text


def test_modules_of_a_smaller_rank_are_truncated_further(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {f"{name}.{part}": x for name in (TO_Q, TO_K) for part, x in WHOLE_64.items()})
    model: Any = tiny()
    model.add_adapter(LoraConfig(r=5, rank_pattern={"to_k": 2}, target_modules=["attn.to_q", "attn.to_k"]))
    kept = warm_start(model, init=str(path))["energy_kept"]
    five, two = (share({TO_Q: dense(WHOLE_64)}, rank)[0] for rank in (5, 2))
    assert (kept["total"], kept["min"]) == (pytest.approx((five + two) / 2), pytest.approx(two))
