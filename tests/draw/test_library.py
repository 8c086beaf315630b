"""The LoRA that fits a prompt: by its trigger, else by its captions, or none."""

import json
from pathlib import Path

import pytest
import torch

from demo import painter
from trainer import adapter, qwen_image
from trainer.adapter import AdapterWeights
from trainer.draw.library import PLAIN, Book, choose, library_lines, open_library
from trainer.formats import write_lora
from trainer.lowrank import LowRank
from trainer.qwen_image import ModelConfig
from trainer.studio import Studio

NAME = "transformer_blocks.0.attn.to_q"
FIRST = (100, 400, 500, 600)  # of ten creatures each; nothing was chosen by the last three
UNRELATED = (
    "a city street at night with neon signs",
    "a bowl of ramen on a wooden table",
    "an old lighthouse in a storm",
    "a portrait of a woman reading a letter",
    "a red bicycle leaning on a wall",
)


def lora(path: Path, metadata: dict[str, str] | None = None) -> Path:
    write_lora(path, AdapterWeights({NAME: LowRank(torch.ones(1, 128), torch.ones(128, 1))}), metadata or {})
    return path


@pytest.fixture(scope="module")
def modules() -> dict[str, tuple[int, int]]:
    return adapter.linears(qwen_image.transformer_on_meta("demo/model"))


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    model = ModelConfig(base="demo/model", dtype="fp32")
    return Studio(model, torch.device("cpu"), tmp_path_factory.mktemp("cache"), quiet=True)


@pytest.fixture(scope="module", params=FIRST)
def creatures(request: pytest.FixtureRequest) -> range:
    return range(request.param, request.param + 10)


@pytest.fixture(scope="module")
def library(
    creatures: range, tmp_path_factory: pytest.TempPathFactory, modules: dict[str, tuple[int, int]]
) -> list[Book]:
    """Ten creatures, each with six captions that say what it looks like, and a trigger."""
    folder = tmp_path_factory.mktemp("library")
    for index in creatures:
        who, name = painter.identity("new", index), trigger(index)
        file = lora(folder / f"{index}.safetensors", {"modelspec.trigger_phrase": name})
        captions = [painter.caption(painter.scene(number), who, name) for number in range(6)]
        file.with_suffix(".txt").write_text("\n".join(captions))
    books, problems = open_library(folder, modules)
    assert len(books) == 10 and not problems
    assert all(len(book.captions) == 6 and not book.captions[0].startswith(book.trigger) for book in books)
    return books


def trigger(index: int) -> str:
    return f"qq{index}x"


def described(index: int) -> str:
    """The creature in other words and another order than in its captions, in a scene that they do not have."""
    who, where = painter.identity("new", index), painter.scene(20 + index % 10)
    parts = [painter._NUMBER_WORDS[who.num_eyes]]
    parts += [] if who.pattern == "plain" else [f"{who.pattern_colour} {who.pattern}"]
    parts += [] if who.headgear == "nothing" else [f"{who.headgear_colour} {who.headgear}"]
    place = painter.BACKGROUNDS[where.background]
    return f"{place}, a {who.colour} {who.shape} creature with {' and '.join(parts)}"


def test_a_trigger_in_the_prompt_chooses_its_lora(creatures: range, library: list[Book], studio: Studio) -> None:
    prompts = [f"a portrait of {trigger(index).upper()} at night" for index in creatures]
    found = choose(prompts, library, studio.encode)
    assert [[book.name for book in choice.books] for choice in found] == [[str(index)] for index in creatures]
    assert [choice.prompt for choice in found] == prompts


def test_two_triggers_choose_two(creatures: range, library: list[Book], studio: Studio) -> None:
    first, second = creatures[0], creatures[5]
    found = choose([f"{trigger(first)} and {trigger(second)} in the snow"], library, studio.encode)[0]
    assert [book.name for book in found.books] == [str(first), str(second)] and "are in the prompt" in found.why


def test_a_prompt_that_describes_finds_the_nearest_captions(
    creatures: range, library: list[Book], studio: Studio
) -> None:
    found = choose([described(index) for index in creatures], library, studio.encode)
    right = [bool(c.books) and c.books[0].name == str(i) for i, c in zip(creatures, found, strict=True)]
    assert sum(right) >= 9, library_lines(found)
    first = found[right.index(True)]
    assert first.prompt == f"{first.books[0].trigger}, {described(creatures[right.index(True)])}"


def test_none_is_chosen_where_nothing_is_near(library: list[Book], studio: Studio) -> None:
    assert not {*UNRELATED} & {*PLAIN}
    found = choose(UNRELATED, library, studio.encode)
    assert [choice.books for choice in found] == [()] * 5, library_lines(found)
    assert "none (none is near: " in library_lines(found)[0]


def test_a_run_s_folder_a_card_and_kohya_s_metadata_tell_triggers_and_captions(
    tmp_path: Path, modules: dict[str, tuple[int, int]]
) -> None:
    result, report = tmp_path / "run" / "adapter", {"config": {"data": {"trigger": "zorp"}}}
    lora(result / "pytorch_lora_weights.safetensors")
    lora(result / "adapter_model.safetensors")
    lora(tmp_path / "run" / "checkpoints" / "step-1" / "trainable.safetensors")
    report["data"] = {"train": [{"caption": "zorp, at night"}, {"caption": ["zorp, in the snow", "snow"]}]}  # type: ignore[dict-item]
    (tmp_path / "run" / "run.json").write_text(json.dumps(report))
    tags = {"10_milo": {"green hat": 3, "smiling": 1}}
    lora(tmp_path / "kohya.safetensors", {"ss_tag_frequency": json.dumps(tags)})
    lora(tmp_path / "card" / "x.safetensors")
    (tmp_path / "card" / "README.md").write_text("---\ninstance_prompt: kiki\n---\n# kiki\n")
    lora(tmp_path / "silent.safetensors", {"ss_tag_frequency": "no json"})
    books, problems = open_library(tmp_path, modules)
    assert not problems
    found = {book.name: (book.trigger, book.captions) for book in books}
    assert found == {
        "run": ("zorp", ("at night", "in the snow", "snow")),
        "kohya": ("", ("green hat", "smiling")),
        "x": ("kiki", ()),
        "silent": ("", ()),
    }


def test_what_is_wrong_with_a_library_is_told(tmp_path: Path, modules: dict[str, tuple[int, int]]) -> None:
    assert "no such folder" in open_library(tmp_path / "none", modules)[1][0]
    assert "no LoRA is in it" in open_library(tmp_path, modules)[1][0]
    write_lora(
        tmp_path / "small.safetensors", AdapterWeights({NAME: LowRank(torch.ones(1, 64), torch.ones(128, 1))}), {}
    )
    lora(tmp_path / "good.safetensors")
    books, problems = open_library(tmp_path, modules)
    assert [book.name for book in books] == ["good"] and "made for another model" in problems[0]
