"""The expert against plain float64 matrix products on the published names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from initializers.i2l.expert import (
    Expert,
    Factors,
    factor_shapes,
    load_expert,
    mean_over_pictures,
    predict,
    read_geometry,
    save_expert,
)
from initializers.i2l.layout import Geometry, Residual, expert_layout
from initializers.i2l.predictions import Predictions
from trainer.files import LayoutError, read_header
from trainer.lowrank import LowRank

WIDTH = 5632  # true embedding width: the longest sum in the forward pass
STYLE = Geometry(num_blocks=2, hidden_size=8, embedding_size=WIDTH, compress=6)
COARSE = Geometry(
    num_blocks=2,
    hidden_size=8,
    embedding_size=WIDTH,
    compress=6,
    residual=Residual(num_tokens=71, compress=5, width=3584),
)
FINE = Geometry(
    num_blocks=2,
    hidden_size=8,
    embedding_size=WIDTH,
    compress=6,
    residual=Residual(num_tokens=1376, compress=2, width=20),
)
GEOMETRIES = pytest.mark.parametrize("geometry", [STYLE, COARSE, FINE], ids=["style", "coarse", "fine"])

# Written from the published description, not from our layout: (name, in_features, out_features) / hidden size.
REFERENCE_GROUPS = {
    0: [("attn.to_q", 1, 1), ("attn.to_k", 1, 1), ("attn.to_v", 1, 1), ("attn.to_out.0", 1, 1)],
    1: [("img_mlp.net.2", 4, 1), ("img_mod.1", 1, 6)],
    2: [("attn.add_q_proj", 1, 1), ("attn.add_k_proj", 1, 1), ("attn.add_v_proj", 1, 1), ("attn.to_add_out", 1, 1)],
    3: [("txt_mlp.net.2", 4, 1), ("txt_mod.1", 1, 6)],
}
Array = NDArray[np.float64]


def predict_all(path: Path, embeddings: Tensor, residual: Tensor | None = None) -> dict[str, Factors]:
    """All of it, in the shapes that were announced."""
    found = dict(predict(path, embeddings, residual))
    announced = factor_shapes(read_geometry(path), len(embeddings))
    assert list(found) == list(announced)
    assert all(tuple(tuple(x.shape) for x in pair) == announced[name] for name, pair in found.items())
    return found


def merged(factors: dict[str, Factors]) -> dict[str, LowRank]:
    """The mean over all pictures, of every module."""
    return {name: LowRank(*mean_over_pictures(pair)) for name, pair in factors.items()}


def random_expert(geometry: Geometry, seed: int = 0) -> Expert:
    """Every weight random, also those that are zero at the start of training."""
    expert = Expert(geometry, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in expert.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return expert


def random_inputs(geometry: Geometry, count: int, seed: int = 1) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, geometry.embedding_size, generator=generator)
    if geometry.residual is None:
        return embeddings, None
    return embeddings, torch.randn(count, geometry.residual.num_tokens, geometry.residual.width, generator=generator)


def reference(
    weights: dict[str, Tensor], num_blocks: int, hidden: int, x: Tensor, residual: Tensor | None, rank: int = 4
) -> dict[str, tuple[Array, Array]]:
    """One picture: module -> (a, b), from tensors by name and matrix products."""
    w = {name: tensor.detach().double().numpy() for name, tensor in weights.items()}
    vector = x.double().numpy()
    found = {}
    for group, names in REFERENCE_GROUPS.items():
        for i in range(num_blocks):
            block = f"blocks.{group * num_blocks + i}"
            shift: Array | float = 0.0
            if residual is not None:
                rows = [w[f"{block}.proj_residual.proj_in.weight"] @ state for state in residual.double().numpy()]
                shift = w[f"{block}.proj_residual.proj_out.weight"] @ np.concatenate(rows)
            for j, (name, inward, outward) in enumerate(names):
                layer = f"{block}.layers.{j}"
                a, b = (
                    w[f"{layer}.proj_{f}.proj_out.weight"] @ (w[f"{layer}.proj_{f}.proj_in.weight"] @ vector + shift)
                    for f in "ab"
                )
                key = f"transformer_blocks.{i}.{name}"
                found[key] = (a.reshape(rank, inward * hidden), b.reshape(outward * hidden, rank))
    return found


def reference_delta(results: list[dict[str, tuple[Array, Array]]]) -> dict[str, Array]:
    """The mean over pictures of b @ a."""
    return {key: np.mean([result[key][1] @ result[key][0] for result in results], axis=0) for key in results[0]}


def close(value: Tensor, expected: Array) -> bool:
    return bool(np.abs(value.detach().double().numpy() - expected).max() <= 1e-5 * np.abs(expected).max())


@GEOMETRIES
def test_forward(geometry: Geometry) -> None:
    expert = random_expert(geometry)
    embeddings, residual = random_inputs(geometry, 3)
    result = expert(embeddings, residual)
    assert len(result) == 24
    for picture in range(3):
        expected = reference(
            dict(expert.state_dict()), 2, 8, embeddings[picture], None if residual is None else residual[picture]
        )
        assert expected.keys() == result.keys()
        for module, (a, b) in result.items():
            assert a[picture].shape == expected[module][0].shape and b[picture].shape == expected[module][1].shape
            assert close(a[picture], expected[module][0]) and close(b[picture], expected[module][1])


@GEOMETRIES
def test_batch_is_one_by_one(geometry: Geometry) -> None:
    expert = random_expert(geometry)
    embeddings, residual = random_inputs(geometry, 3)
    together = expert(embeddings, residual)
    for picture in range(3):
        part = slice(picture, picture + 1)
        alone = expert(embeddings[part], None if residual is None else residual[part])
        for module, pair in together.items():
            for batched, single in zip(pair, alone[module], strict=True):
                torch.testing.assert_close(batched[part], single, rtol=1e-5, atol=1e-5)


@GEOMETRIES
def test_streaming_is_the_module_and_the_reference(geometry: Geometry, tmp_path: Path) -> None:
    expert = random_expert(geometry)
    save_expert(expert, tmp_path / "expert.safetensors")
    embeddings, residual = random_inputs(geometry, 3)
    predicted = predict_all(tmp_path / "expert.safetensors", embeddings, residual)
    streamed = merged(predicted)
    with torch.no_grad():
        module = merged(expert(embeddings, residual))
    expected = reference_delta(
        [
            reference(dict(expert.state_dict()), 2, 8, embeddings[i], None if residual is None else residual[i])
            for i in range(3)
        ]
    )
    assert list(streamed) == list(module) and streamed.keys() == expected.keys()
    for name, pair in streamed.items():
        assert pair.a.shape[0] == pair.b.shape[1] == 12
        for ours, theirs in zip(pair, module[name], strict=True):
            assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())
        assert close(pair.b.double() @ pair.a.double(), expected[name])


def test_streaming_computes_in_fp32_from_half_precision(tmp_path: Path) -> None:
    expert = random_expert(STYLE)
    save_expert(expert, tmp_path / "expert.safetensors", torch.bfloat16)
    embeddings, _ = random_inputs(STYLE, 2)
    predicted = predict_all(tmp_path / "expert.safetensors", embeddings.bfloat16())
    streamed = merged(predicted)
    rounded = {name: weight.bfloat16() for name, weight in expert.state_dict().items()}
    expected = reference_delta([reference(rounded, 2, 8, x.bfloat16().float(), None) for x in embeddings])
    for name, pair in streamed.items():
        assert pair.a.dtype == torch.float32
        assert close(pair.b.double() @ pair.a.double(), expected[name])


@GEOMETRIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_of_a_weight_make_the_whole(
    geometry: Geometry, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "expert.safetensors"
    save_expert(random_expert(geometry), path, dtype)
    embeddings, residual = random_inputs(geometry, 2)
    monkeypatch.setattr("initializers.i2l.expert.PIECE", 40_000)  # one row to all of them
    streamed = predict_all(path, embeddings, residual)
    exact = load_expert(path).double()(embeddings.double(), None if residual is None else residual.double())
    for name, pair in exact.items():
        for piecewise, whole in zip(streamed[name], pair, strict=True):
            assert float((piecewise - whole).norm()) <= 5e-6 * float(whole.norm())  # sums of 5632 in fp32


def test_some_pictures_combined_are_as_if_the_others_were_not_there() -> None:
    expert = random_expert(STYLE)
    embeddings, _ = random_inputs(STYLE, 3)
    alone = merged(expert(embeddings[[2, 0]]))
    some = Predictions({"style": expert(embeddings)}, {}, None).combine({}, [2, 0])
    assert list(some) == list(alone)
    for name, pair in alone.items():
        torch.testing.assert_close(some[name].a, pair.a)
        torch.testing.assert_close(some[name].b, pair.b)


def test_the_mean_of_each_sample_s_pictures() -> None:
    """A batch of samples, each with its own pictures, as in training."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 7, generator=random), torch.randn(2, 3, 5, 4, generator=random)
    joined_a, joined_b = mean_over_pictures((a, b))
    assert joined_a.shape == (2, 12, 7) and joined_b.shape == (2, 5, 12)
    torch.testing.assert_close(joined_b @ joined_a, (b @ a).mean(1))
    assert torch.equal(joined_b[1, :, 4:8], b[1, 1]) and torch.equal(joined_a[1, 4:8], a[1, 1] / 3)


@GEOMETRIES
def test_state_dict_has_the_published_names(geometry: Geometry) -> None:
    expert = Expert(geometry, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in expert.state_dict().items()}
    assert shapes == expert_layout(geometry)
    assert all(parameter.is_meta for parameter in expert.parameters())


@GEOMETRIES
def test_start_of_training(geometry: Geometry) -> None:
    expert = Expert(geometry, generator=torch.Generator().manual_seed(3))
    checked = 0
    for name, weight in expert.named_parameters():
        bound = weight.shape[1] ** -0.5
        if name.endswith("proj_b.proj_out.weight"):
            assert not weight.any()
            continue
        if ".proj_a." in name or name.endswith("proj_residual.proj_out.weight"):
            bound *= 0.3
        assert 0.8 * bound < float(weight.detach().abs().max()) <= 1.001 * bound
        checked += 1
    assert checked > 70
    embeddings, residual = random_inputs(geometry, 2)
    assert all(a.any() and not b.any() for a, b in expert(embeddings, residual).values())


def test_weights_depend_on_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (Expert(STYLE, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    third = Expert(STYLE, generator=torch.Generator().manual_seed(4))
    assert torch.equal(before, torch.get_rng_state())
    name = "blocks.0.layers.0.proj_a.proj_in.weight"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.state_dict()[name], third.state_dict()[name])


@GEOMETRIES
def test_every_weight_gets_a_gradient(geometry: Geometry) -> None:
    expert = random_expert(geometry)
    embeddings, residual = random_inputs(geometry, 2)
    embeddings.requires_grad_()
    sum((b @ a).square().mean() for a, b in expert(embeddings, residual).values()).backward()
    assert embeddings.grad is not None and embeddings.grad.any()
    assert all(weight.grad is not None and weight.grad.any() for weight in expert.parameters())


def test_save_and_load(tmp_path: Path) -> None:
    geometry = Geometry(num_blocks=1, hidden_size=8, embedding_size=10, compress=3, rank=2)
    expert = random_expert(geometry)
    save_expert(expert, tmp_path / "expert.safetensors")
    again = load_expert(tmp_path / "expert.safetensors")
    assert again.geometry == geometry
    for (name, weight), (other, loaded) in zip(expert.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(weight, loaded) and loaded.requires_grad


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    expert = random_expert(COARSE)
    embeddings, residual = random_inputs(COARSE, 2)
    with pytest.raises(ValueError, match=r"residual of shape \(2, 71, 3584\), not None"):
        expert(embeddings, None)
    with pytest.raises(ValueError, match="encoders and the expert do not belong together"):
        expert(embeddings[:, 1:], residual)
    with pytest.raises(ValueError, match="takes a residual of shape None"):
        random_expert(STYLE)(embeddings, residual)
    state = expert.state_dict()
    state["blocks.0.layers.1.proj_a.proj_out.weight"][0, 0] = torch.nan
    save_expert(expert, tmp_path / "expert.safetensors")
    with pytest.raises(ValueError, match=r"NaN or infinity in what it predicts for transformer_blocks\.0\.attn\.to_k"):
        predict_all(tmp_path / "expert.safetensors", embeddings, residual)
    with pytest.raises(LayoutError, match="cannot be read"):
        predict_all(tmp_path / "nothing.safetensors", embeddings, residual)
    save_expert(expert, tmp_path / "expert.safetensors", torch.float64)
    with pytest.raises(LayoutError, match="weights in F64; an expert has them in BF16, F16, F32"):
        predict_all(tmp_path / "expert.safetensors", embeddings, residual)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "expert.safetensors"
    save_expert(random_expert(STYLE), path)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr("initializers.i2l.expert.read_header", lambda _: header)
    with pytest.raises(LayoutError, match="cut short while it was read"):
        predict_all(path, random_inputs(STYLE, 1)[0])
