"""From pictures to a seed: order, scale and rank of what the experts predict, against float64 matrix products."""

import json
import math
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from demo import text_encoder
from initializers.i2l import Config, check, encoders, initialize, initializer, predictions
from initializers.i2l.__main__ import main
from initializers.i2l.expert import save_expert
from initializers.i2l.layout import Geometry, Residual, module_shapes
from tests.helpers import FINISHED, run
from tests.initializers.i2l.test_expert import random_expert, reference, reference_delta
from trainer.adapter import AdapterWeights, InitContext
from trainer.formats import read_lora
from trainer.lowrank import LowRank, relative_difference, truncate

HIDDEN = text_encoder.HIDDEN_SIZE
STYLE = Geometry(num_blocks=2, hidden_size=8, embedding_size=24, compress=5)
COARSE = Geometry(
    num_blocks=2,
    hidden_size=8,
    embedding_size=24,
    compress=6,
    residual=Residual(num_tokens=71, compress=3, width=HIDDEN),
)
FINE = Geometry(
    num_blocks=2,
    hidden_size=8,
    embedding_size=24,
    compress=6,
    residual=Residual(num_tokens=1376, compress=2, width=HIDDEN),
)
NUM_PICTURES = 3
BIAS_RANK = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random miniatures of everything that is published, and three pictures."""
    root = tmp_path_factory.mktemp("world")
    for seed, (name, geometry) in enumerate({"Style": STYLE, "Coarse": COARSE, "Fine": FINE}.items()):
        save_expert(random_expert(geometry, seed), root / "i2l" / f"Qwen-Image-i2L-{name}.safetensors")
    random = torch.Generator().manual_seed(9)
    bias = {}
    for module, (in_features, out_features) in module_shapes(STYLE).items():
        bias[f"{module}.lora_A.default.weight"] = torch.randn(BIAS_RANK, in_features, generator=random)
        bias[f"{module}.lora_B.default.weight"] = torch.randn(out_features, BIAS_RANK, generator=random)
    save_file(bias, root / "i2l" / initializer.FILES["bias"])
    torch.manual_seed(0)
    size: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    siglip = SiglipVisionModel(SiglipVisionConfig(hidden_size=16, intermediate_size=24, **size))
    dinov3 = DINOv3ViTModel(DINOv3ViTConfig(hidden_size=8, intermediate_size=24, **size))
    encoders.save_siglip(siglip, root / "encoders" / encoders.SIGLIP_FOLDER)
    encoders.save_dinov3(dinov3, root / "encoders" / encoders.DINOV3_FOLDER)
    text_encoder.save(root / "base")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(NUM_PICTURES):
        noise = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((70 + index, 60), Image.Resampling.BICUBIC).save(
            root / "pictures" / f"{index}.png"
        )
    return root


def config(world: Path, *experts: str, strength: float = 1.0) -> Config:
    return Config(experts=experts, weights=str(world / "i2l"), encoders=str(world / "encoders"), strength=strength)


def context(world: Path, modules: dict[str, tuple[int, int]] | None = None) -> InitContext:
    """With a cache that the tests share, so that pictures are encoded once; what it does has tests of its own."""
    return InitContext(
        images=tuple(sorted((world / "pictures").iterdir())),
        modules=module_shapes(STYLE) if modules is None else modules,
        rank=4,
        seed=0,
        device=torch.device("cpu"),
        base=str(world / "base"),
        log=lambda message: None,
        cache=world / "cache",
    )


def deltas(world: Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Expert -> module -> dW, the mean over pictures, from the encoders' outputs."""
    pictures = [Image.open(path).convert("RGB") for path in sorted((world / "pictures").iterdir())]
    x = encoders.encode_pictures(pictures, world / "encoders")
    found = {}
    for seed, (name, geometry, resolution) in enumerate(
        [("style", STYLE, 0), ("coarse", COARSE, 224), ("fine", FINE, 1024)]
    ):
        weights = dict(random_expert(geometry, seed).state_dict())
        residual = encoders.qwen_vl_residual(pictures, str(world / "base"), resolution) if resolution else [None] * 3
        found[name] = reference_delta([reference(weights, 2, 8, x[i], residual[i]) for i in range(NUM_PICTURES)])
    bias = {}
    random = torch.Generator().manual_seed(9)
    for module, (in_features, out_features) in module_shapes(STYLE).items():
        a = torch.randn(BIAS_RANK, in_features, generator=random)
        bias[module] = (torch.randn(out_features, BIAS_RANK, generator=random).double() @ a.double()).numpy()
    return {**found, "bias": bias}


@pytest.fixture(scope="module")
def expected(world: Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    return deltas(world)


@pytest.mark.parametrize(
    ("experts", "strength", "rank"),
    [
        (("style",), 1.0, 12),
        (("style",), 0.5, 12),
        (("coarse", "fine"), 1.0, 24),
        (("bias", "fine", "coarse", "style"), 1.0, 36 + BIAS_RANK),
        (("coarse", "fine", "bias"), 2.0, 24 + BIAS_RANK),
    ],
)
def test_the_seed_is_the_sum_of_the_experts(
    world: Path,
    expected: dict[str, dict[str, NDArray[np.float64]]],
    experts: tuple[str, ...],
    strength: float,
    rank: int,
) -> None:
    options = config(world, *experts, strength=strength)
    assert check(options) == []
    seed = initialize(context(world), options)
    assert len(seed.weights.factors) == 24
    for module, pair in seed.weights.factors.items():
        assert pair.a.dtype == pair.b.dtype == torch.float32
        assert pair.a.shape[0] == pair.b.shape[1] == rank
        delta = strength * sum(expected[name][module] for name in experts)
        difference = np.abs((pair.b.double() @ pair.a.double()).numpy() - delta).max()
        assert difference <= 2e-4 * np.abs(delta).max()  # the text encoder's batches differ by as much
    report = seed.report
    assert (
        report["pictures"] == ["0.png", "1.png", "2.png"]
        and report["incoming_rank"] == rank
        and report["modules"] == 24
    )
    assert [entry["expert"] for entry in report["experts"]] == sorted(experts, key=list(initializer.FILES).index)
    assert all(len(entry["md5"]) == len(entry["layout_md5"]) == 32 for entry in report["experts"])
    assert all(math.isfinite(value) for value in report["seconds"].values())


def test_ranks_come_in_the_published_order(world: Path) -> None:
    """Style picture by picture, Coarse, Fine, then Bias; a divided by the number of pictures, Bias not."""
    seed = initialize(context(world), config(world, "bias", "fine", "coarse", "style"))
    pictures = [Image.open(path).convert("RGB") for path in sorted((world / "pictures").iterdir())]
    x = encoders.encode_pictures(pictures, world / "encoders")
    single = reference(dict(random_expert(STYLE, 0).state_dict()), 2, 8, x[1], None)
    for module, pair in seed.weights.factors.items():
        a, b = single[module]
        np.testing.assert_allclose(pair.a[4:8].numpy(), a / 3, rtol=1e-3, atol=1e-4 * np.abs(a).max())
        np.testing.assert_allclose(pair.b[:, 4:8].numpy(), b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    coarse = initialize(context(world), config(world, "coarse")).weights.factors
    for module, pair in seed.weights.factors.items():
        torch.testing.assert_close(pair.a[12:24], coarse[module].a)
    random = torch.Generator().manual_seed(9)
    for module, (in_features, out_features) in module_shapes(STYLE).items():
        pair = seed.weights.factors[module]
        assert torch.equal(pair.a[36:], torch.randn(BIAS_RANK, in_features, generator=random))
        assert torch.equal(pair.b[:, 36:], torch.randn(out_features, BIAS_RANK, generator=random))


def test_experts_by_path(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine.safetensors"
    save_expert(random_expert(STYLE, 0), other)
    by_path = initialize(context(world), config(world, str(other), str(world / "i2l" / initializer.FILES["bias"])))
    by_name = initialize(context(world), config(world, "style", "bias"))
    for module, pair in by_path.weights.factors.items():
        assert torch.equal(pair.a, by_name.weights.factors[module].a)


def test_the_recommended_experts_are_the_default_where_all_are_there(world: Path, tmp_path: Path) -> None:
    seed = initialize(context(world), config(world))
    assert [entry["expert"] for entry in seed.report["experts"]] == ["coarse", "fine", "bias"]
    (tmp_path / initializer.FILES["style"]).write_bytes((world / "i2l" / initializer.FILES["style"]).read_bytes())
    seed = initialize(context(world), Config(weights=str(tmp_path), encoders=str(world / "encoders")))
    assert [entry["expert"] for entry in seed.report["experts"]] == ["style"]


def test_weights_of_the_experts(world: Path, expected: dict[str, dict[str, NDArray[np.float64]]]) -> None:
    options = replace(config(world, "style", "coarse", "bias"), expert_weights={"coarse": 0.5, "bias": -2.0})
    for module, pair in initialize(context(world), options).weights.factors.items():
        delta = expected["style"][module] + 0.5 * expected["coarse"][module] - 2 * expected["bias"][module]
        assert np.abs((pair.b.double() @ pair.a.double()).numpy() - delta).max() <= 2e-4 * np.abs(delta).max()


def test_pictures_are_limited_or_named(world: Path) -> None:
    images = context(world).images
    whole = initialize(context(world), config(world, "style"))
    for wanted, names in ((2, ["0.png", "1.png"]), (("2.png",), ["2.png"]), (9, ["0.png", "1.png", "2.png"])):
        seed = initialize(context(world), replace(config(world, "style"), pictures=wanted))
        assert seed.report["pictures"] == names and seed.report["incoming_rank"] == 4 * len(names)
        chosen = tuple(path for path in images if path.name in names)
        alone = initialize(replace(context(world), images=chosen), config(world, "style"))
        for module, pair in seed.weights.factors.items():
            torch.testing.assert_close(pair.a, alone.weights.factors[module].a)
    assert len(whole.weights.factors) == 24
    with pytest.raises(ValueError, match=r"pictures: 7\.png: not among"):
        initialize(context(world), replace(config(world, "style"), pictures=("7.png",)))


def test_what_was_predicted_is_kept_and_nothing_stale_is_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = replace(context(world), cache=tmp_path / "cache")
    first = initialize(kept, config(world, "style", "coarse", "bias"))
    assert len([*(tmp_path / "cache" / "i2l").glob("*.safetensors")]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "encode_pictures", lambda *_: pytest.fail("encoded again"))
        patch.setattr(encoders, "qwen_vl_residuals", lambda *_: pytest.fail("looked again"))
        second = initialize(kept, replace(config(world, "style", "coarse", "bias"), strength=0.5))
    for module, pair in second.weights.factors.items():
        assert torch.equal(pair.a, first.weights.factors[module].a)
        assert torch.equal(pair.b, first.weights.factors[module].b * 0.5)
    fewer = initialize(replace(kept, images=kept.images[:2]), config(world, "style"))
    assert fewer.report["incoming_rank"] == 8
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        cut = file.read_bytes()[:100]  # predicted again
        file.unlink()  # not in place: `first` is mapped from it
        file.write_bytes(cut)
    again = initialize(kept, config(world, "style", "coarse", "bias"))
    for module, pair in again.weights.factors.items():
        torch.testing.assert_close(pair.a, first.weights.factors[module].a)


def test_what_was_computed_before_still_knows_its_seconds(world: Path, tmp_path: Path) -> None:
    kept = replace(context(world), cache=tmp_path / "cache")
    first = initialize(kept, config(world, "style", "coarse", "bias")).report
    assert first["first_seconds"].keys() == {"style", "coarse", "encoders", "qwen_vl"}
    for stage, seconds in first["first_seconds"].items():
        assert 0 < seconds <= first["seconds"][stage] + 1e-3
    second = initialize(kept, config(world, "style", "coarse", "bias")).report
    assert second["first_seconds"] == first["first_seconds"] and "encoders" not in second["seconds"]
    fewer = initialize(kept, config(world, "style")).report["first_seconds"]
    assert fewer == {stage: first["first_seconds"][stage] for stage in ("style", "encoders")}

    more = replace(kept, images=kept.images[:2])  # encoded before, along with another
    found = initialize(more, config(world, "style")).report["first_seconds"]
    assert found["encoders"] is None and found["style"] > 0
    shutil.rmtree(tmp_path / "cache" / "i2l" / "seconds")  # as if it came from an older version
    assert set(initialize(kept, config(world, "style")).report["first_seconds"].values()) == {None}
    assert initialize(replace(kept, cache=None), config(world, "bias")).report["first_seconds"] == {}


def test_only_what_is_new_is_encoded(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[str, int, int]] = []  # at how many pictures, by which encoders, at which resolution
    encode, read = encoders.encode_pictures, encoders.qwen_vl_residuals

    def encode_counted(pictures: Sequence[Image.Image], *rest: Any) -> torch.Tensor:
        looked.append(("embeddings", 0, len(pictures)))
        return encode(pictures, *rest)

    def read_counted(pictures: Mapping[int, Sequence[Image.Image]], *rest: Any) -> dict[int, torch.Tensor]:
        looked.extend(("hidden states", resolution, len(group)) for resolution, group in pictures.items())
        return read(pictures, *rest)

    monkeypatch.setattr(encoders, "encode_pictures", encode_counted)
    monkeypatch.setattr(encoders, "qwen_vl_residuals", read_counted)
    pictures = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, source in zip(pictures, sorted((world / "pictures").iterdir()), strict=True):
        picture.write_bytes(source.read_bytes())
    kept = replace(context(world), cache=tmp_path / "cache", images=tuple(pictures[:2]))

    def newly(images: Sequence[Path], *experts: str) -> list[tuple[str, int, int]]:
        looked.clear()
        initialize(replace(kept, images=tuple(images)), config(world, *experts))
        return list(looked)

    assert newly(pictures[:2], "style") == [("embeddings", 0, 2)]
    assert newly(pictures[:2], "style", "coarse") == [("hidden states", 224, 2)]
    assert newly(pictures, "style", "coarse") == [("hidden states", 224, 1), ("embeddings", 0, 1)]
    assert newly(pictures[::-1], "style") == []
    Image.new("RGB", (40, 30), "red").save(pictures[0])
    assert newly(pictures, "style") == [("embeddings", 0, 1)]
    fresh = initialize(replace(kept, cache=None, images=tuple(pictures)), config(world, "style", "coarse"))
    again = initialize(replace(kept, images=tuple(pictures)), config(world, "style", "coarse"))
    for module, pair in again.weights.factors.items():
        torch.testing.assert_close(pair.a, fresh.weights.factors[module].a, rtol=1e-4, atol=1e-5)


def test_the_text_encoder_is_loaded_once_for_captions_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is gone before the next model comes."""
    loaded: list[str] = []
    alive: list[weakref.ref[Any]] = []

    def watch(kind: Any, name: str) -> None:
        original = kind.from_pretrained

        def counted(*arguments: Any, **options: Any) -> Any:
            loaded.append(name)
            assert all(model() is None for model in alive)
            result = original(*arguments, **options)
            alive.append(weakref.ref(result))
            return result

        monkeypatch.setattr(kind, "from_pretrained", counted)

    watch(Qwen2_5_VLForConditionalGeneration, "text encoder")
    watch(QwenImageTransformer2DModel, "transformer")
    for name in ("load_siglip", "load_dinov3"):
        original = getattr(encoders, name)

        def counted(*arguments: Any, original: Any = original, name: str = name) -> Any:
            loaded.append(name)
            assert all(model() is None for model in alive)
            return original(*arguments)

        monkeypatch.setattr(encoders, name, counted)
    settings = ("init.i2l.experts=['coarse']", "init.i2l.pictures=1", "init.i2l.strength=1.0", "init.method=i2l")
    few = ("train.steps=1", "validation.prompts=[]", "train.batch_size=1")
    assert run(Path("configs/creatures.toml"), tmp_path / "out", *settings, *few) == FINISHED
    assert loaded == ["text encoder", "load_siglip", "load_dinov3", "transformer"]


def test_strength_is_chosen_by_what_the_others_seed_does_to_a_picture(world: Path) -> None:
    """The errors stand in for the base's: smallest at 0.7 of the seed that the other pictures give."""
    single = [
        initialize(replace(context(world), images=(path,)), config(world, "style")).weights.factors
        for path in context(world).images
    ]
    module = next(iter(single[0]))
    passes: dict[float, list[int]] = {}

    def errors(weights: AdapterWeights, index: int, sigmas: Sequence[int]) -> Tensor:
        others = [i for i in range(NUM_PICTURES) if i != index]
        mean = sum(single[i][module].b @ single[i][module].a for i in others) / len(others)
        delta = weights.factors[module].b @ weights.factors[module].a if weights.factors else torch.zeros_like(mean)
        passes.setdefault(round(float(delta.norm() / mean.norm()), 2), []).extend(sigmas)
        return torch.full((len(sigmas),), float((delta - 0.7 * mean).norm() / mean.norm()) ** 2) + torch.tensor(sigmas)

    options = replace(config(world, "style"), strength="auto")
    seed = initialize(replace(context(world), try_seed=errors), options)
    assert {strength: sorted(sigmas) for strength, sigmas in passes.items()} == {
        0: [*range(8)], 0.5: [*range(8)], 1.25: [*range(8)],
    }  # fmt: skip
    assert seed.report["strength"] == 0.7
    assert seed.report["tried"]["strengths"] == (0, 0.5, 1.25) and seed.report["tried"]["pictures"] == 3
    assert seed.report["tried"]["losses"] == pytest.approx([3.5 + x**2 for x in (0.7, 0.2, 0.55)], abs=1e-3)
    whole = initialize(context(world), config(world, "style"))
    for name, pair in seed.weights.factors.items():
        torch.testing.assert_close(pair.b, 0.7 * whole.weights.factors[name].b)
    with pytest.raises(ValueError, match="at least two pictures"):
        initialize(replace(context(world), images=context(world).images[:1], try_seed=errors), options)
    with pytest.raises(ValueError, match="give a number"):
        initialize(context(world), options)


def test_a_seed_that_only_harms_is_left_out(world: Path) -> None:
    options = replace(config(world, "style"), strength="auto")
    harmful = replace(context(world), try_seed=lambda weights, *_: torch.tensor(float(len(weights.factors))))
    seed = initialize(harmful, options)
    assert seed.report["strength"] == 0 and seed.weights.factors == {}
    with pytest.raises(ValueError, match="NaN or infinity"):
        initialize(replace(harmful, try_seed=lambda *_: torch.tensor(math.nan)), options)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.25, 0.2, 0.21], 0.8015),  # 0.25 - 0.1453 s + 0.0907 s^2, by divided differences
        ([0.25, 0.2, 0.1], 1.25),  # still falling
        ([0.25, 0.35, 0.6], 0.0),  # a seed that harms
        ([0.25, 0.24, 0.1], 1.25),  # no minimum: the lowest of the three
        ([0.25, 0.4, 0.3], 0.0),
    ],
)
def test_the_minimum_of_a_parabola(losses: list[float], expected: float) -> None:
    assert initializer.lowest((0.0, 0.5, 1.25), losses) == pytest.approx(expected, abs=1e-3)
    inside = [0.1 + 0.3 * (x - 0.4) ** 2 for x in (0.0, 0.5, 1.25)]
    assert initializer.lowest((0.0, 0.5, 1.25), inside) == pytest.approx(0.4)


def test_a_rank_for_the_energy_that_is_to_be_kept(world: Path) -> None:
    options = replace(config(world, "style", "coarse"), energy=0.9)
    seed = initialize(context(world), options)
    squares = {
        name: torch.linalg.svdvals((pair.b @ pair.a).double()).square() for name, pair in seed.weights.factors.items()
    }
    kept = [sum(float(s[:r].sum()) for s in squares.values()) for r in (seed.rank - 1, seed.rank)]
    assert kept[0] < 0.9 * sum(float(s.sum()) for s in squares.values()) <= kept[1]
    single = initialize(context(world), replace(options, rank_per_module=True))
    assert single.rank is None and single.rank_pattern.keys() == squares.keys()
    for name, rank in single.rank_pattern.items():
        share = squares[name].cumsum(0) / squares[name].sum()
        assert share[rank - 1] >= 0.9 - 1e-9 and (rank == 1 or share[rank - 2] < 0.9)


@pytest.fixture
def own_world(world: Path, tmp_path: Path) -> Path:
    """A copy whose files a test may change."""
    shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "world"


def predicted(world: Path, *experts: str, cache: Path | None, **changes: Any) -> Mapping[str, LowRank]:
    given = replace(context(world), cache=cache, **changes)
    return initialize(given, config(world, *experts)).weights.factors


def changed(file: Path) -> None:
    """The same tensors by name and shape, with other values."""
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"rank": "4"})


@pytest.mark.parametrize(
    ("file", "expert"),
    [
        ("i2l/Qwen-Image-i2L-Style.safetensors", "style"),
        ("i2l/Qwen-Image-i2L-Coarse.safetensors", "coarse"),
        ("encoders/SigLIP2-G384/model.safetensors", "style"),
        ("encoders/DINOv3-7B/model.safetensors", "style"),
        ("base/text_encoder/model.safetensors", "coarse"),
    ],
)
def test_what_another_file_predicted_is_not_read(file: str, expert: str, own_world: Path, tmp_path: Path) -> None:
    """Of another content under the same name; the prediction is the one that nothing kept could spoil."""
    before = predicted(own_world, expert, cache=tmp_path / "kept")
    changed(own_world / file)
    after, fresh = (predicted(own_world, expert, cache=cache) for cache in (tmp_path / "kept", None))
    for module, pair in after.items():
        torch.testing.assert_close(pair.b @ pair.a, fresh[module].b @ fresh[module].a, rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(pair.a, before[module].a, rtol=1e-3) for module, pair in after.items())


def test_kept_embeddings_are_of_the_encoders_that_are_there_now(own_world: Path, tmp_path: Path) -> None:
    """Also for an expert that never predicted before: it reads embeddings, which others may have left."""
    predicted(own_world, "style", cache=tmp_path / "kept")
    changed(own_world / "encoders/DINOv3-7B/model.safetensors")
    predicted(own_world, "style", cache=tmp_path / "kept")
    save_expert(random_expert(STYLE, 7), own_world / "i2l/Qwen-Image-i2L-Style.safetensors")
    after, fresh = (predicted(own_world, "style", cache=cache) for cache in (tmp_path / "kept", None))
    for module, pair in after.items():
        torch.testing.assert_close(pair.a, fresh[module].a, rtol=1e-3, atol=1e-4)


def test_what_was_predicted_from_other_pictures_is_not_read(world: Path, tmp_path: Path) -> None:
    images, cache = context(world).images, tmp_path / "kept"
    for chosen in (images[:2], images[1:], images[:2][::-1]):
        kept, fresh = (predicted(world, "style", cache=at, images=tuple(chosen)) for at in (cache, None))
        for module, pair in kept.items():
            torch.testing.assert_close(pair.a, fresh[module].a, rtol=1e-4, atol=1e-5)


def test_kept_hidden_states_are_of_the_resolution_that_is_asked_for(world: Path, tmp_path: Path) -> None:
    kept, paths = replace(context(world), cache=tmp_path / "kept"), context(world).images
    digests = predictions.picture_digests(paths)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    for size in (224, 112, 224):
        found = predictions._residuals(kept, [size], paths, digests)
        alone = encoders.qwen_vl_residual(pictures, str(world / "base"), size)
        torch.testing.assert_close(found[size], alone, rtol=1e-3, atol=1e-4)


def test_ranks_are_in_the_published_order_whatever_was_predicted_before(world: Path, tmp_path: Path) -> None:
    coarse = predicted(world, "coarse", cache=tmp_path / "kept")
    style = predicted(world, "style", cache=None)
    for module, pair in predicted(world, "coarse", "style", cache=tmp_path / "kept").items():
        torch.testing.assert_close(pair.a, torch.cat([style[module].a, coarse[module].a]), rtol=1e-3, atol=1e-4)


def test_the_text_encoder_is_gone_before_the_image_encoders_come(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no expert reads its hidden states: it may still be loaded, from the captions."""
    order: list[str] = []
    encode = encoders.encode_pictures
    monkeypatch.setattr(encoders, "encode_pictures", lambda *given: order.append("encoded") or encode(*given))
    loaded = SimpleNamespace(unload=lambda: order.append("unloaded"))
    predicted(world, "style", cache=None, text_encoder=loaded)
    assert order == ["unloaded", "encoded"]


def test_a_picture_that_encoders_cannot_read_is_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = torch.ones(NUM_PICTURES, STYLE.embedding_size)
    embeddings[1, 3] = torch.nan
    monkeypatch.setattr(encoders, "encode_pictures", lambda *_: embeddings)
    with pytest.raises(ValueError, match=r"1\.png: NaN or infinity in its image embeddings"):
        predicted(world, "style", cache=None)


def test_strength_is_tried_on_the_pictures_that_were_chosen(world: Path) -> None:
    """By their places among all training pictures, whose captions and latents the trial uses."""
    single = [predicted(world, "style", cache=world / "cache", images=(path,)) for path in context(world).images]
    module = next(iter(single[0]))
    tried: list[tuple[int, Tensor, list[int]]] = []

    def errors(weights: AdapterWeights, index: int, sigmas: Sequence[int]) -> Tensor:
        if weights.factors:
            pair = weights.factors[module]
            tried.append((index, pair.b @ pair.a, [*sigmas]))
        return torch.zeros(len(sigmas))

    options = replace(config(world, "style"), strength="auto", pictures=("2.png", "1.png"))
    options = replace(options, expert_weights={"style": 3.0})
    initialize(replace(context(world), try_seed=errors), options)
    assert [(index, sigmas) for index, _, sigmas in tried] == [(2, [0, 2, 4, 6])] * 2 + [(1, [1, 3, 5, 7])] * 2
    for (index, found, _), strength in zip(tried, (0.5, 1.25) * 2, strict=True):
        other = single[{2: 1, 1: 2}[index]][module]
        torch.testing.assert_close(found, 3 * strength * (other.b @ other.a), rtol=1e-4, atol=1e-5)


def test_each_picture_is_tried_with_the_seed_of_the_others(world: Path) -> None:
    """For a diagnosis, at strength 1 whatever the strength of the start, by all sigmas."""
    options = replace(config(world), strength=0.5, pictures=2)
    asked: list[tuple[AdapterWeights, int, list[int]]] = []

    def errors(weights: AdapterWeights, index: int, sigmas: Sequence[int]) -> Tensor:
        asked.append((weights, index, [*sigmas]))
        return torch.full((len(sigmas),), float(index))

    given = context(world)
    assert (
        initialize(replace(given, try_seed=errors), options).others
        == {}
        == initialize(replace(given, diagnose=True), options).others
    )
    found = initialize(replace(given, try_seed=errors, diagnose=True), options).others
    assert [*found] == [*range(len(given.images))] and all(float(v[0]) == n for n, v in found.items())
    assert [sigmas for *_, sigmas in asked] == [[*range(8)]] * len(given.images)
    chosen = [0, len(given.images) // 2]  # the two that the experts read
    for weights, index, _ in asked:
        others = tuple(given.images[number] for number in chosen if number != index)
        alone = initialize(replace(given, images=others), replace(options, strength=1.0)).weights
        for name, factors in alone.factors.items():
            # of the whole dW: single values near 0 differ by the rounding of one picture beside another
            assert relative_difference(weights.factors[name], factors) < 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_merge_keeps_the_whole_prediction_at_its_strength(world: Path, strength: float) -> None:
    whole = initialize(context(world), config(world, "style")).weights.factors
    options = replace(config(world, "style", strength=strength), mode="merge")
    seed = initialize(context(world), options)
    assert not seed.weights.factors and seed.rank is None and seed.rank_pattern == {}
    assert (seed.frozen is None) == (strength == 0)
    if seed.frozen is not None:
        assert seed.frozen.factors.keys() == whole.keys()
        for module, pair in seed.frozen.factors.items():
            torch.testing.assert_close(pair.b @ pair.a, strength * (whole[module].b @ whole[module].a))


def test_the_rank_for_an_energy_is_that_of_the_modules_that_are_trained(world: Path) -> None:
    few = {name: size for name, size in module_shapes(STYLE).items() if name.endswith("attn.to_q")}
    options = replace(config(world, "style", "coarse"), energy=0.9)
    seed = initialize(context(world, few), options)
    squares = [torch.linalg.svdvals((x.b @ x.a).double()).square() for x in map(seed.weights.factors.get, few) if x]
    whole = float(sum(s.sum() for s in squares))
    ranks = [rank for rank in range(1, 30) if float(sum(s[:rank].sum() for s in squares)) >= 0.9 * whole]
    assert len(squares) == 2 and seed.rank == ranks[0]
    single = initialize(context(world, few), replace(options, rank_per_module=True))
    assert single.rank_pattern.keys() == few.keys()


def test_a_number_of_pictures_is_spread_over_all() -> None:
    images = [Path(f"{number}.png") for number in range(10)]
    chosen = initializer._choose_pictures
    assert chosen(images, 4) == [0, 2, 5, 7] and chosen(images, 1) == [0]
    assert chosen(images, 0) == chosen(images, 10) == chosen(images, 99) == list(range(10))


def test_the_identity_tells_experts_and_encoders_apart(own_world: Path) -> None:
    options = config(own_world, "style", "coarse")
    seen = [initializer.identity(options)]
    for file in ("i2l/Qwen-Image-i2L-Coarse", "encoders/SigLIP2-G384/model", "encoders/DINOv3-7B/model"):
        assert initializer.identity(options) == seen[-1]
        changed(own_world / f"{file}.safetensors")
        seen.append(initializer.identity(options))
    changed(own_world / "i2l/Qwen-Image-i2L-Fine.safetensors")  # which is not used
    assert initializer.identity(options) == seen[-1]
    assert len({*map(str, seen)}) == 4


def test_problems_of_the_configuration() -> None:
    assert Config().problems() == []
    for options, start in [
        ({"experts": ("style", "style")}, "experts must not name an expert twice"),
        *(({"strength": strength}, "strength must be at least 0") for strength in (-1.0, math.nan, math.inf)),
        ({"expert_weights": {"coars": 1.0}}, 'expert_weights: "coars"'),
        ({"expert_weights": {"coarse": math.nan}}, "expert_weights: coarse must be"),
        ({"pictures": -1}, "pictures must"),
        ({"energy": 0.0}, "energy must"),
        ({"energy": 1.5}, "energy must"),
        ({"energy": 0.9, "mode": "merge"}, "energy has no effect"),
        ({"rank_per_module": True}, "rank_per_module has no effect"),
    ]:
        assert [problem.startswith(start) for problem in Config(**options).problems()] == [True], options


def test_problems_found_before_any_model_loads(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    sketchy = Config(experts=("style", "stile", "fine"), weights=str(tmp_path / "empty"), encoders="no/where")
    text = "\n".join(check(sketchy))
    assert f"experts: {tmp_path / 'empty'} has no Qwen-Image-i2L-Style.safetensors" in text
    assert 'experts: "stile" is neither an expert (style, coarse, fine, bias) nor a file' in text
    assert check(config(world, "fine")) == ['experts: fine works only together with coarse: add "coarse"']
    text = "\n".join(check(Config(experts=("style",), encoders="no/where", weights=str(world / "i2l"))))
    assert "hf download no/where SigLIP2-G384/model.safetensors" in text and "HF_HUB_OFFLINE" in text
    text = "\n".join(check(Config(experts=("style",), encoders=str(tmp_path / "nothing"), weights=str(world / "i2l"))))
    assert f"encoders: there is no folder {tmp_path / 'nothing'}" in text
    assert check(Config(experts=("bias",), weights=str(world / "i2l"), encoders="no/where")) == []


def test_damaged_and_mistaken_files_are_found_first(world: Path, tmp_path: Path) -> None:
    whole = (world / "i2l" / initializer.FILES["style"]).read_bytes()
    (tmp_path / initializer.FILES["style"]).write_bytes(whole[:-10])
    (tmp_path / initializer.FILES["coarse"]).write_bytes(whole)
    (tmp_path / initializer.FILES["fine"]).write_bytes((world / "i2l" / initializer.FILES["bias"]).read_bytes())
    options = Config(experts=("style", "coarse", "fine"), weights=str(tmp_path), encoders=str(world / "encoders"))
    first, second, third = check(options)
    assert "not downloaded to its end" in first
    assert 'expected the expert "coarse", found the Style layout' in second
    assert "not an i2L expert" in third


def test_encoders_of_another_size_are_found_first(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_expert(random_expert(Geometry(num_blocks=2, hidden_size=8, embedding_size=20, compress=5)), other)
    (problem,) = check(config(world, str(other)))
    assert "embeddings of 24 numbers" in problem and problem.endswith("takes 20")


def test_an_expert_for_another_model_is_refused(world: Path) -> None:
    wide = {module: (2 * i, 2 * o) for module, (i, o) in module_shapes(STYLE).items()}
    with pytest.raises(ValueError, match=r"attn\.\w+ is 8 -> 8 in the expert and 16 -> 16 in"):
        initialize(context(world, wide), config(world, "style"))
    deep = module_shapes(Geometry(num_blocks=3, hidden_size=8))
    with pytest.raises(ValueError, match=r"made for a model of 2 blocks, but .* has 3"):
        initialize(context(world, deep), config(world, "style"))
    with pytest.raises(ValueError, match="predicts none of the modules"):
        initialize(context(world, {"blocks.0.q": (8, 8)}), config(world, "style"))
    few = {"transformer_blocks.0.attn.to_q": (8, 8)}
    assert (
        len(initialize(context(world, few), config(world, "style")).weights.factors) == 24
    )  # the adapter drops the rest


def test_what_is_needed_depends_on_the_experts(world: Path) -> None:
    def needed(*experts: str) -> list[str]:
        needs = initializer.needs(Config(experts=experts, weights="no/where", encoders="other/place"), "some/model")
        return [need.source for need in needs]

    assert needed("style") == ["no/where", "other/place"] and needed("bias") == ["no/where"]
    assert needed("coarse", "bias") == ["no/where", "no/where", "other/place", "some/model"]
    assert needed(str(world / "i2l" / initializer.FILES["style"])) == [str(world / "i2l"), "other/place"]


def small_base(world: Path) -> None:
    """The shapes of a transformer, without weights, where the predict command looks for them."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        transformer: Any = QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=HIDDEN,
            axes_dims_rope=(2, 2, 4),
        )
    transformer.save_config(world / "base" / "transformer")
    (world / "base" / "vae").mkdir(exist_ok=True)


def test_predict_command(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The file it writes is the best LoRA of its rank, and is read back as such."""
    small_base(world)
    text = f"""
        [model]
        base = "{world / "base"}"
        [init]
        method = "i2l"
        [init.i2l]
        experts = ["coarse", "style"]
        weights = "{world / "i2l"}"
        encoders = "{world / "encoders"}"
        """
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    arguments = [
        "predict",
        "--config",
        str(tmp_path / "run.toml"),
        "--rank",
        "6",
        "--output",
        str(tmp_path / "x.safetensors"),
    ]
    assert main([*arguments, "--images", str(world / "pictures")]) == 0
    shown = capsys.readouterr().out
    assert "24 modules, rank 6 of 24, from 3 pictures" in shown and "of the energy" in shown
    weights, _ = read_lora(tmp_path / "x.safetensors")
    whole = initialize(context(world), config(world, "style", "coarse")).weights.factors
    assert weights.factors.keys() == whole.keys()
    for module, pair in weights.factors.items():
        dense = whole[module].b.double() @ whole[module].a.double()
        values = torch.linalg.svdvals(dense)
        error = torch.linalg.norm(pair.b.double() @ pair.a.double() - dense)
        assert pair.a.shape[0] == 6
        assert float(error) <= float(values[6:].square().sum().sqrt()) * (1 + 1e-5) + 1e-5 * float(values[0])
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert "modules      24" in capsys.readouterr().out

    (tmp_path / "run.toml").write_text(text.replace("encoders =", "encoder ="), encoding="utf-8")
    assert main([*arguments, "--images", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in caplog.text and "did you mean encoders?" in caplog.text  # all at once


def test_predict_for_a_trainer(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    small_base(world)
    text = f"""
        [model]
        base = "{world / "base"}"
        [init.i2l]
        experts = ["style"]
        weights = "{world / "i2l"}"
        encoders = "{world / "encoders"}"
        strength = "auto"
        """
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    recipe = tmp_path / "config.json"
    recipe.write_text('{"model_family": "qwen_image", "lora_rank": 6, "lora_alpha": 3, "lora_dropout": 0}')
    base = ["predict", "--config", str(tmp_path / "run.toml"), "--images", str(world / "pictures")]
    made = tmp_path / "zorp"
    given = [*base, "--for", "simpletuner", "--recipe", str(recipe), "--output", str(made), "--strength", "0.5"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "8 modules, rank 6, alpha 3" in out and "dropped" in out and "SimpleTuner starts from this file" in out
    whole = initialize(context(world), config(world, "style")).weights.factors
    found, metadata = read_lora(made / "zorp.safetensors")
    assert len(found.factors) == 8 and len(json.loads(metadata["warm_start"])["pictures"]) == 3
    for module, pair in found.factors.items():
        expected = truncate(whole[module], 6)[0]
        delta = 0.5 * expected.b.double() @ expected.a.double()
        assert (pair.b.double() @ pair.a.double() - delta).norm() <= 1e-5 * delta.norm()

    assert main(given) == 2 and "exists already" in caplog.text
    bad = [*base, "--output", str(tmp_path / "x")]
    for extra, said in (
        ([], "--rank is needed"),
        (["--recipe", str(recipe)], "--for TRAINER"),
        (["--for", "simpletuner", "--recipe", str(recipe), "--rank", "4"], "contradicts the recipe"),
        (["--for", "diffsynth", "--recipe", str(recipe)], "there is no command with --lora_base_model in it"),
        (["--rank", "4", "--strength", "0"], "leaves nothing"),
    ):
        caplog.clear()
        assert main([*bad, *extra]) == 2
        assert said in caplog.text
