"""The cache: nothing computed twice, nothing stale, nothing damaged or half written believed."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import FINISHED, metrics, run
from trainer import qwen_image
from trainer.data import cache
from trainer.data.cache import Cache, key
from trainer.data.dataset import DataConfig, scan
from trainer.data.encode import encode_pictures, encode_prompts
from trainer.files import write_tensors


class Computer:
    """Number p -> a tensor of p, and a record of what was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, positions: list[int]) -> list[Tensor]:
        self.asked.append(positions)
        return [torch.full((2, 3), float(position)) for position in positions]


def get(folder: Path, keys: list[str], computer: Callable[[list[int]], list[Tensor]], **options: int) -> list[float]:
    tensors = Cache(folder).get(keys, computer, what="compute", quiet=True, **options)
    assert all(tensor.shape == (2, 3) for tensor in tensors)
    return [float(tensor[0, 0]) for tensor in tensors]


def test_what_is_known_is_not_computed_again(tmp_path: Path) -> None:
    computer = Computer()
    assert get(tmp_path, ["a", "b", "c"], computer) == [0, 1, 2]
    assert get(tmp_path, ["c", "d", "a"], computer) == [2, 1, 0]
    assert get(tmp_path, ["d", "b"], computer) == [1, 1]
    assert computer.asked == [[0], [1], [2], [1]]


def test_batches_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 3)
    computer = Computer()
    assert get(tmp_path, list("abcdefg"), computer, batch_size=2) == [0, 1, 2, 3, 4, 5, 6]
    assert computer.asked == [[0, 1], [2, 3], [4, 5], [6]]
    assert len([*tmp_path.iterdir()]) == 2
    assert get(tmp_path, list("gfedcba"), computer) == [6, 5, 4, 3, 2, 1, 0]
    assert len(computer.asked) == 4


def test_slow_work_is_written_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_SHARDS", 0.0)
    files: list[int] = []

    def compute(positions: list[int]) -> list[Tensor]:
        files.append(len([*tmp_path.iterdir()]))
        return Computer()(positions)

    get(tmp_path, ["a", "b", "c"], compute)
    assert files == [0, 1, 2]


def test_the_same_key_twice_is_computed_once(tmp_path: Path) -> None:
    computer = Computer()
    assert get(tmp_path, ["a", "b", "a"], computer) == [0, 1, 0]
    assert computer.asked == [[0], [1]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_midway_keeps_what_was_computed(tmp_path: Path, error: type[BaseException]) -> None:
    def failing(positions: list[int]) -> list[Tensor]:
        if 4 in positions:
            raise error("stopped")
        return Computer()(positions)

    with pytest.raises(error, match="stopped"):
        get(tmp_path, list("abcdef"), failing)
    computer = Computer()
    assert get(tmp_path, list("abcdef"), computer) == [0, 1, 2, 3, 4, 5]
    assert computer.asked == [[4], [5]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_an_error_and_is_not_kept(tmp_path: Path, bad: float) -> None:
    with pytest.raises(ValueError, match="encode pictures: NaN or infinity in number 1"):
        Cache(tmp_path).get(
            ["a", "b"], lambda p: [torch.full((2, 3), bad if p == [1] else 0.0)], what="encode pictures", quiet=True
        )
    computer = Computer()
    assert get(tmp_path, ["a", "b"], computer)[1] == 1 and computer.asked == [[1]]  # the good one was kept


@pytest.mark.parametrize("size", [0, 4, 60, -8])
def test_a_truncated_shard_is_computed_again(
    tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SIZE", 1)
    computer = Computer()
    get(tmp_path, ["a", "b"], computer)
    shard = sorted(tmp_path.iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:size])
    with caplog.at_level(logging.WARNING):
        assert get(tmp_path, ["a", "b"], computer) == [0, 1]
    assert len(computer.asked) == 3
    assert f"{shard} is damaged" in caplog.text

    caplog.clear()
    assert get(tmp_path, ["a", "b"], computer) == [0, 1]  # the shard was replaced by a whole one
    assert len(computer.asked) == 3 and "damaged" not in caplog.text


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path / "mine.safetensors", {"x": torch.zeros(1)})
    before = (tmp_path / "mine.safetensors").read_bytes()
    (tmp_path / ".shard.safetensors.77.partial").write_bytes(b"half")
    assert get(tmp_path, ["a"], Computer()) == [0]
    assert (tmp_path / "mine.safetensors").read_bytes() == before


def test_a_key_tells_everything_apart() -> None:
    different = [("a", "b"), ("ab",), ("b", "a"), ("a", ["b"]), ("a", 1), ("a", "1"), ("a", 1.5), ("a", None), ("a",)]
    assert len({key(*parts) for parts in different}) == len(different)
    assert key({"x": 1, "y": 2}) == key({"y": 2, "x": 1})


# --- in a run ---------------------------------------------------------------------------------------------


class Encoders:
    """Counts what is loaded and encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[str] = []
        self.pictures = self.loaded = 0
        load_vae, encode, encoder = qwen_image.load_vae, qwen_image.encode_pictures, qwen_image.PromptEncoder
        record = self

        def counted_vae(*arguments):  # type: ignore[no-untyped-def]
            record.loaded += 1
            return load_vae(*arguments)

        def counted_pictures(vae, pictures):  # type: ignore[no-untyped-def]
            record.pictures += len(pictures)
            return encode(vae, pictures)

        class CountedEncoder(encoder):  # type: ignore[misc, valid-type]
            def __init__(self, *arguments: object) -> None:
                record.loaded += 1
                super().__init__(*arguments)

            def __call__(self, prompts: list[str]) -> list[Tensor]:
                record.prompts += prompts
                return super().__call__(prompts)

        monkeypatch.setattr(qwen_image, "load_vae", counted_vae)
        monkeypatch.setattr(qwen_image, "encode_pictures", counted_pictures)
        monkeypatch.setattr(qwen_image, "PromptEncoder", CountedEncoder)


def test_only_what_changed_is_encoded_again(
    run_toml: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["train.steps=2", "validation.prompts=[]", f"data.cache={tmp_path / 'cache'}"]
    encoders = Encoders(monkeypatch)
    captions = {(pictures / f"{number}.txt").read_text() for number in range(6)}
    assert run(run_toml, tmp_path / "first", *settings) == FINISHED
    assert sorted(encoders.prompts) == sorted({*captions, " "}) and encoders.pictures == 6

    encoders = Encoders(monkeypatch)
    assert run(run_toml, tmp_path / "second", *settings) == FINISHED
    assert (encoders.loaded, encoders.pictures, encoders.prompts) == (0, 0, [])
    assert metrics(tmp_path / "second")[1] == metrics(tmp_path / "first")[1]

    (pictures / "3.txt").write_text("an entirely different creature")
    encoders = Encoders(monkeypatch)
    assert run(run_toml, tmp_path / "third", *settings, "data.held_out=0", "train.batch_size=6") == FINISHED
    assert encoders.prompts == ["an entirely different creature"] and encoders.pictures == 0
    stale = [line["loss"] for line in metrics(tmp_path / "third") if "loss" in line]

    run(run_toml, tmp_path / "fresh", *settings[:2], "data.held_out=0", "train.batch_size=6")
    fresh = [line["loss"] for line in metrics(tmp_path / "fresh") if "loss" in line]
    assert stale == pytest.approx(fresh, rel=1e-5)

    (pictures / "3.png").write_bytes((pictures / "4.png").read_bytes() + b"changed")
    encoders = Encoders(monkeypatch)
    assert run(run_toml, tmp_path / "fourth", *settings, "data.held_out=0") == FINISHED
    assert encoders.prompts == [] and encoders.pictures == 1


def test_a_truncated_shard_does_not_change_a_run(run_toml: Path, tmp_path: Path) -> None:
    settings = ["train.steps=2", "validation.prompts=[]", f"data.cache={tmp_path / 'cache'}"]
    assert run(run_toml, tmp_path / "first", *settings) == FINISHED
    shards = [*(tmp_path / "cache").iterdir()]
    assert len(shards) == 2
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-100])
    assert run(run_toml, tmp_path / "second", *settings) == FINISHED
    assert metrics(tmp_path / "second")[1] == metrics(tmp_path / "first")[1]


def test_another_model_or_precision_is_encoded_anew(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["train.steps=1", "validation.prompts=[]", f"data.cache={tmp_path / 'cache'}"]
    assert run(run_toml, tmp_path / "first", *settings) == FINISHED
    encoders = Encoders(monkeypatch)
    assert run(run_toml, tmp_path / "second", *settings, "model.dtype=bf16") == FINISHED
    assert encoders.prompts != [] and encoders.pictures == 0  # the VAE works in fp32 always
    encoders = Encoders(monkeypatch)
    monkeypatch.setattr(qwen_image, "identity", lambda *_: ["another"])
    assert run(run_toml, tmp_path / "third", *settings) == FINISHED
    assert encoders.prompts != [] and encoders.pictures == 6


def test_the_same_picture_at_another_size_is_encoded_anew(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    examples = scan(DataConfig(images=str(pictures), resolution=64), multiple=16, seed=0).train
    for width, height in ((64, 64), (48, 80), (80, 48), (64, 64)):
        sized = [replace(example, bucket=(width, height)) for example in examples]
        kept, fresh = (
            encode_pictures(Cache(tmp_path / name), str(tiny_base), sized, torch.device("cpu"), quiet=True)
            for name in ("kept", f"{width} {height}")
        )
        assert {latents.shape for latents in kept} == {(16, 1, height // 8, width // 8)}
        assert all(torch.equal(x, y) for x, y in zip(kept, fresh, strict=True))


def test_pictures_of_several_sizes_keep_their_order(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    examples = scan(DataConfig(images=str(pictures), resolution=64), multiple=16, seed=0).train
    mixed = [replace(e, bucket=(48, 80) if i % 2 else (64, 64)) for i, e in enumerate(examples)]
    cpu, base = torch.device("cpu"), str(tiny_base)
    together = encode_pictures(Cache(tmp_path / "together"), base, mixed, cpu, quiet=True)
    for number, (one, latents) in enumerate(zip(mixed, together, strict=True)):
        (alone,) = encode_pictures(Cache(tmp_path / f"{number}"), base, [one], cpu, quiet=True)
        torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-5)


def test_each_prompt_has_its_own_embedding_in_the_precision_asked_for(tiny_base: Path, tmp_path: Path) -> None:
    """Asked for in another order, in another company, in another precision."""
    encoder = qwen_image.TextEncoder(str(tiny_base), torch.device("cpu"))
    texts = ["a small creature at night", "", "a creature", " "]
    found = encode_prompts(Cache(tmp_path), encoder, torch.float32, texts, quiet=True)
    again = encode_prompts(Cache(tmp_path), encoder, torch.float32, [*texts[::-1], "more"], quiet=True)
    half = encode_prompts(Cache(tmp_path), encoder, torch.bfloat16, texts, quiet=True)
    for text in texts:
        (alone,) = qwen_image.PromptEncoder(encoder, torch.float32)([text])
        assert torch.equal(found[text], alone) and torch.equal(again[text], alone)
        assert half[text].dtype == torch.bfloat16 and half[text].shape == alone.shape
