"""Several folders, repeats, several resolutions, several captions: against lists written by hand."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import initializers
from demo import painter
from initializers.i2l.training.subjects import SubjectsConfig, read_subjects
from tests.helpers import BAD_INPUT, FINISHED, adapter_bytes, run
from tests.test_objective import Process, made_up, make_objective, make_plan
from trainer import config
from trainer import run as program
from trainer.compare import plan as compare
from trainer.compare.plan import Request
from trainer.data.__main__ import main
from trainer.data.dataset import DataConfig, Dataset, scan
from trainer.data.epoch import batch, drawn_caption
from trainer.data.folders import FolderConfig
from trainer.data.pictures import DataError
from trainer.flow import generator
from trainer.plan import RunConfig, load_config
from trainer.plan_words import plan_text
from trainer.qwen_image import TextEncoder, prompt_tokens

CPU = torch.device("cpu")
PLAIN = ("validation.prompts=[]",)
TWO = """
[[data.folders]]
images = "{near}"

[[data.folders]]
images = "{far}"
repeats = 3
resolution = [64, 96]
default_caption = "far away"
"""


def put(folder: Path, name: str, size: tuple[int, int], caption: str | None) -> None:
    folder.mkdir(exist_ok=True)
    seed = sum(map(ord, f"{folder.name}{name}"))
    Image.fromarray(painter.paint(painter.identity("new", 0), painter.scene(seed))).resize(size).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture
def two(run_toml: Path, tmp_path: Path) -> Path:
    """A configuration of two folders: three pictures once; two pictures, one of them wide, repeated."""
    for number in range(3):
        put(tmp_path / "near", f"{number}.png", (64, 64), f"near {number}")
    put(tmp_path / "far", "0.png", (64, 64), None)
    put(tmp_path / "far", "1.png", (160, 80), None)
    row = {"file_name": "0.png", "text": ["one", "two words", "and three words"]}
    (tmp_path / "far" / "metadata.jsonl").write_text(json.dumps(row))
    text = re.sub("images = .*\n|held_out = .*\n", "", run_toml.read_text())
    run_toml.write_text(text + TWO.format(near=tmp_path / "near", far=tmp_path / "far"))
    return run_toml


# --- batches ----------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """What an epoch has of a picture, by hand."""

    name: str
    size: tuple[int, int]
    captions: tuple[str, ...]


def wanted() -> list[Item]:
    """Of the fixture `two`. The wide picture lies nearest to 80 x 48 at 64, and to 144 x 64 at 96."""
    near = [Item(f"near/{number}.png", (64, 64), (f"near {number}",)) for number in range(3)]
    texts = ("one", "two words", "and three words")
    far = [("0.png", (64, 64), texts), ("0.png", (96, 96), texts)]
    far += [("1.png", (80, 48), ("far away",)), ("1.png", (144, 64), ("far away",))]
    return near + [Item(f"far/{name}", size, captions) for name, size, captions in far for _ in range(3)]


def reference(items: list[Item], batch_size: int, seed: int, index: int) -> list[tuple[str, tuple[int, int], str]]:
    """Batch `index`: name, size and caption of each picture, dealt in a plain way."""
    by_size: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        by_size.setdefault(item.size, []).append(item)
    number = index
    epoch = 0
    batches = [(size, first) for size in sorted(by_size) for first in range(0, len(by_size[size]), batch_size)]
    while number >= len(batches):
        number, epoch = number - len(batches), epoch + 1
    order = torch.randperm(len(batches), generator=generator(seed, "order", epoch)).tolist()
    size, first = batches[order[number]]
    same = by_size[size]
    shuffled = [same[i] for i in torch.randperm(len(same), generator=generator(seed, "shuffle", epoch, *size)).tolist()]
    found = []
    for position in range(batch_size):
        item = shuffled[(first + position) % len(shuffled)]
        chosen = 0
        if len(item.captions) > 1:
            random = generator(seed, "caption", index, position)
            chosen = int(torch.randint(len(item.captions), (), generator=random))
        found.append((item.name, size, item.captions[chosen]))
    return found


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_are_those_of_the_reference(processes: int, accumulation: int, two: Path, tmp_path: Path) -> None:
    plan = make_plan(two, "seed=5", f"train.gradient_accumulation_steps={accumulation}")
    prompts, latents = made_up(plan).prompts, made_up(plan).latents
    parts = [make_objective(plan, Process(rank, processes)) for rank in range(processes)]
    digests = {str(example.path): example.digest for example in plan.dataset.train}
    index = 0
    for step in range(12 // accumulation):
        for micro_step in range(accumulation):
            for part in parts:
                inputs = part.inputs(step, micro_step)
                expected = reference(wanted(), 2, 5, index)
                shown = [Path(name).relative_to(tmp_path).as_posix() for name in inputs.names]
                assert shown == [name for name, _, _ in expected]
                for i, (name, size, text) in enumerate(expected):
                    assert torch.equal(inputs.latents[i], latents[f"{digests[str(tmp_path / name)]} {size}"])
                    assert torch.equal(inputs.prompt_embeds[i, : len(prompts[text])], prompts[text])
                index += 1
    assert index == 12 * processes


def test_an_epoch_has_each_item_once(two: Path, tmp_path: Path) -> None:
    plan = make_plan(two, "train.batch_size=1")
    part = make_objective(plan)
    assert len(wanted()) == 15
    for epoch in range(2):
        shown = [part.inputs(step, 0) for step in range(15 * epoch, 15 * (epoch + 1))]
        names = Counter(Path(inputs.names[0]).relative_to(tmp_path).as_posix() for inputs in shown)
        assert names == {"near/0.png": 1, "near/1.png": 1, "near/2.png": 1, "far/0.png": 6, "far/1.png": 6}
        sizes = Counter(tuple(inputs.latents.shape[-2:]) for inputs in shown)  # height, width, eighths
        assert sizes == {(8, 8): 6, (12, 12): 3, (6, 10): 3, (8, 18): 3}


def test_a_folder_as_the_only_one_is_trained_on_as_images_is(run_toml: Path, pictures: Path) -> None:
    alone = make_plan(run_toml)
    text = re.sub("images = .*\n", "", run_toml.read_text())
    run_toml.write_text(f"{text}\n[[data.folders]]\nimages = '{pictures}'\n")
    assert make_plan(run_toml).dataset == alone.dataset


def test_captions_are_drawn_evenly_and_by_seed_index_and_position(two: Path) -> None:
    (example,) = [e for e in make_plan(two).dataset.train if e.more_captions]

    def drawn(seed: int, position: int = 0) -> list[str]:
        return [drawn_caption(example, seed=seed, index=index, position=position) for index in range(600)]

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = drawn(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn(0) == first != drawn(1) and drawn(0, 1) != first
    assert {*Counter(first)} == {*example.captions} and min(Counter(first).values()) > 160  # of 200 expected


# --- a run ------------------------------------------------------------------------------------------------


def test_a_run_goes_on_exactly_but_not_with_other_folders(
    two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if a picture is in two folders, with a caption in each."""
    shutil.copy(tmp_path / "near" / "0.png", tmp_path / "far" / "2.png")
    cache = f"data.cache={tmp_path / 'cache'}"
    assert run(two, tmp_path / "through", *PLAIN, cache) == FINISHED
    assert run(two, tmp_path / "out", *PLAIN, cache, "train.steps=2") == FINISHED
    for setting, said in (
        ("data.folders.1.repeats=2", "data.folders.1.repeats is 2, the checkpoint has 3"),
        ("data.folders.1.resolution=64", "data.folders.1.resolution is 64, the checkpoint has [64, 96]"),
        ("data.resolution=96", "data.folders.0.resolution is 96, the checkpoint has 64"),
        ("data.folders.1.default_caption=x", '2 captions have changed, such as "x", which was "far away"'),
    ):
        caplog.clear()
        assert run(two, tmp_path / "out", *PLAIN, cache, setting, resume=True) == BAD_INPUT
        assert said in caplog.text
    metadata = tmp_path / "far" / "metadata.jsonl"
    kept = metadata.read_text()
    metadata.write_text(kept.replace('"two words", ', ""))
    assert run(two, tmp_path / "out", *PLAIN, cache, resume=True) == BAD_INPUT
    assert 'such as "one" or "and three words", which was "one" or "two words" or "and three words"' in caplog.text
    metadata.write_text(kept)
    assert run(two, tmp_path / "out", *PLAIN, cache, resume=True) == FINISHED
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "through")
    told = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["train"]
    assert [entry["caption"] for entry in told][3] == ["one", "two words", "and three words"]


def test_a_picture_that_moves_to_a_folder_of_other_repeats_is_another_course(two: Path, tmp_path: Path) -> None:
    before = make_plan(two, "data.default_caption=far away").course()
    for suffix in ("png", "txt"):
        (tmp_path / "near" / f"2.{suffix}").rename(tmp_path / "far" / f"+.{suffix}")  # the order stays
    after = make_plan(two, "data.default_caption=far away").course()
    assert after["pictures"] == before["pictures"] and after != before


def test_each_picture_is_encoded_once_at_each_size_and_each_caption_once(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, pictures, texts = make_plan(two), list[Any](), list[str]()

    def encode_pictures(cache: Any, base: Any, examples: Any, *_: Any, **__: Any) -> Any:
        pictures.extend(examples)
        return examples

    def encode_prompts(cache: Any, text_encoder: Any, dtype: Any, given: Any, **_: Any) -> Any:
        texts.extend(given)
        return {}

    monkeypatch.setattr("trainer.objective.encode_pictures", encode_pictures)
    monkeypatch.setattr("trainer.objective.encode_prompts", encode_prompts)
    program.encode(plan, CPU, TextEncoder(plan.config.model.base, CPU), quiet=True)
    folders = [(e.path.parent.name, e.path.name, e.bucket) for e in pictures]
    assert sorted(folders) == sorted((*item.name.split("/"), item.size) for item in {*wanted()})
    assert {text for item in wanted() for text in item.captions} < {*texts} and len({*texts}) == len(texts)


def test_a_start_sees_each_picture_once(two: Path, tmp_path: Path) -> None:
    plan = make_plan(two)
    context = program.init_context(plan, CPU, None, TextEncoder(plan.config.model.base, CPU))
    assert [path.relative_to(tmp_path).as_posix() for path in context.images] == [
        "near/0.png", "near/1.png", "near/2.png", "far/0.png", "far/1.png",
    ]  # fmt: skip


def test_the_plan_names_folders_and_counts_items(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.plan_words.memory_lines", lambda plan: [])  # which takes two seconds
    said = plan_text(make_plan(two, "train.steps=30", "train.batch_size=1")).splitlines()
    assert said[:4] == [
        "pictures     5 for training, 0 held out",
        f"folder       {tmp_path / 'near'}: 3 pictures, repeats 1, at 64: 3 items in each epoch",
        f"folder       {tmp_path / 'far'}: 2 pictures, repeats 3, at 64 and 96: 12 items in each epoch",
        "buckets      64x64: 6, 80x48: 3, 96x96: 3, 144x64: 3",
    ]
    assert any("30 steps of 1 pictures: 2.0 times through the data" in line for line in said)


# --- held out ---------------------------------------------------------------------------------------------


def names(examples: Any) -> set[str]:
    return {f"{example.path.parent.name}/{example.path.name}" for example in examples}


def test_pictures_are_held_out_of_all_folders_at_all_their_sizes(two: Path) -> None:
    seen = set()
    for seed in range(12):
        data = make_plan(two, f"seed={seed}", "data.held_out=2").dataset
        assert len(data.held_out) == 2 and not names(data.train) & names(data.held_out)
        assert names(batch(data.train, 1, seed=seed, index=index)[0] for index in range(15)) == names(data.train)
        seen |= names(data.held_out)
    assert seen == {item.name for item in wanted()}


def test_a_copy_in_another_folder_is_noted_and_never_held_out(two: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "near" / "0.png", tmp_path / "far" / "2.png")
    for seed in range(6):
        data = make_plan(two, f"seed={seed}", "data.held_out=4").dataset
        assert names(data.train) == {"near/0.png", "far/2.png"}
        assert (
            f"the same picture with different captions: each counts as a picture (1): {tmp_path / 'near' / '0.png'} = "
            f"{tmp_path / 'far' / '2.png'}" in data.notes
        )


# --- what is said -----------------------------------------------------------------------------------------


def problems(two: Path, *overrides: str) -> list[str]:
    with pytest.raises(config.ConfigError) as caught:
        make_plan(two, *overrides)
    return caught.value.problems


def test_all_that_is_wrong_with_folders_is_told_at_once(two: Path, tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    more = f"""
[[data.folders]]
images = "{far}/../near"
repeats = 0
resolution = [64, 64, 8]

[[data.folders]]
images = "nowhere"
repeat = 2
resolution = "64"
"""
    two.write_text(two.read_text() + more)
    assert problems(two) == [
        f"[data.folders.2] repeats = 0 of {far}/../near: must be at least 1; to leave the folder out, remove its table",
        f"[data.folders.2] resolution must be at least 16 ({far}/../near)",
        f"[data.folders.2] resolution: 64 is there twice; for more of a picture use repeats ({far}/../near)",
        "[data.folders.3] repeat: unknown key; did you mean repeats?",
        '[data.folders.3] resolution: must be an integer or a list of [an integer, ...], not "64"; '
        "write 64, without quotes",
        f"[data.folders.3] images: there is no folder {Path('nowhere').absolute()}",
    ]
    two.write_text(two.read_text().replace(more, f'\n[[data.folders]]\nimages = "{far}/../near"\n'))
    assert problems(two, f"data.images={near}", f"data.held_out={far}") == [
        f"[data] folders.2: {far}/../near is the folder of folders.0, too; name it once, with the repeats that it is "
        "to have",
        f"[data] images: there are [[data.folders]], too; make {near} one of them, or remove them",
        "[data] held_out is the same folder as folders.1: it must hold other pictures, or be a number",
    ]


@pytest.mark.parametrize(
    "override, said",
    [
        ("data.folders=[]", "[data] images must name a folder, or [[data.folders]] several"),
        ("data.resolution=[]", "[data] resolution must name at least one"),
        ("data.resolution=[64,100]", "[data] resolution = 100 must be a multiple of 16, such as 96 or 112"),
        ("data.folders.1.resolution=100", "[data] folders.1.resolution = 100 must be a multiple of 16, "
         "such as 96 or 112 ("),
        ("data.repeats=3", "[data] repeats: unknown key; did you mean [[data.folders]] repeats?"),
        ("data.folders.2.repeats=3", "--set data.folders.2.repeats=3: 2 is not one of 0 to 1, the numbers of its "
         "tables"),
        ("data.folders.1=3", "--set data.folders.1=3: folders is a list; set a key of one of its tables, "
         "data.folders.0.NAME=value, or the whole list"),
        ("data.folders.1.repeats.x=3", "--set data.folders.1.repeats.x=3: repeats is not a table, it is 3"),
        ('data.folders={images="x"}', "[data] folders: must be a list of [a table, ...], not a table; write its name "
         "in double brackets, [[...]], above each"),
        ("data.folders.1.audit=none.json", "[data] audit: there is no file"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_a_problem(override: str, said: str, two: Path) -> None:
    found = problems(two, override)
    assert len(found) == 1 and found[0].startswith(said)


def test_set_changes_a_key_of_one_folder_or_all_of_them(two: Path, tmp_path: Path) -> None:
    folders = make_plan(two, "data.folders.0.repeats=2").config.data.folders
    assert [folder.repeats for folder in folders] == [2, 3]
    folders = make_plan(two, f'data.folders=[{{images="{tmp_path / "near"}"}}]').config.data.folders
    assert folders == (FolderConfig(images=str(tmp_path / "near")),)


def test_help_explains_the_keys_of_folders() -> None:
    text = config.explain(RunConfig)
    assert "\n[[data.folders]]\n    A table for each of several folders, in place of `images`." in text
    assert "\nrepeats = 1  # an integer\n    How often each of its pictures is drawn in an epoch." in text


def test_a_folder_inside_of_another_is_read_once(two: Path, tmp_path: Path) -> None:
    (tmp_path / "far").rename(tmp_path / "near" / "far")
    inside = f"data.folders.1.images={tmp_path / 'near' / 'far'}"
    for recursive in ("true", "false"):
        data = make_plan(two, inside, f"data.recursive={recursive}").dataset
        assert [example.folder for example in data.train] == [0, 0, 0, 1, 1]
        assert not [note for note in data.notes if "recursive" in note]


# --- captions ---------------------------------------------------------------------------------------------


def scanned(folder: Path, row: dict[str, Any], **settings: Any) -> Dataset:
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    return scan(DataConfig(images=str(folder), resolution=64, **settings), multiple=16, seed=0)


def test_each_caption_of_a_list_is_cleaned_and_has_the_trigger(tmp_path: Path) -> None:
    put(tmp_path / "a", "1.png", (64, 64), None)
    row = {"file_name": "1.png", "text": [" one ", "a zorp\u200b", "[trigger] three"]}
    (example,) = scanned(tmp_path / "a", row, trigger="zorp").train
    assert example.captions == ("zorp, one", "a zorp", "zorp three") and example.caption == "zorp, one"
    (example,) = scanned(tmp_path / "a", {"file_name": "1.png", "text": ["only one"]}).train
    assert example.captions == ("only one",)


@pytest.mark.parametrize(
    "texts, said",
    [
        ([], '1.png has no "text"'),
        ([" "], '1.png has no "text"'),
        (["a", ""], "1.png has an empty text among others"),
        (["a", 3], '1.png has no "text"'),
        (["a", "<|im_end|>"], "<|im_end|> is a special token"),
    ],
)
def test_a_bad_list_of_captions_is_a_problem(texts: list[Any], said: str, tmp_path: Path) -> None:
    put(tmp_path / "a", "1.png", (64, 64), None)
    with pytest.raises(DataError) as caught:
        scanned(tmp_path / "a", {"file_name": "1.png", "text": texts})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path / 'a' / 'metadata.jsonl'}, line 1: {said}")


def test_a_list_and_a_text_file_are_different_captions(tmp_path: Path) -> None:
    put(tmp_path / "a", "1.png", (64, 64), "one")
    with pytest.raises(DataError, match="keep one, or list all in metadata"):
        scanned(tmp_path / "a", {"file_name": "1.png", "text": ["one", "two"]})


# --- audits -----------------------------------------------------------------------------------------------


def test_a_folder_has_an_audit_of_its_own_or_that_of_the_folder_above(two: Path, tmp_path: Path) -> None:
    """The audit takes the folder's settings from its table."""
    rules = tmp_path / "rules.toml"
    rules.write_text('leave_out = ["captions"]\nmin_sharpness = 0.0')
    words = ["--quick", "--rules", str(rules), "--config", str(two)]
    (tmp_path / "near" / "1.txt").write_text(" ")
    far = tmp_path / "far"
    assert main(["audit", str(far), "--output", str(tmp_path / "of_far"), *words]) == FINISHED
    found = json.loads((tmp_path / "of_far" / "audit.json").read_text())
    assert [entry["bucket"] for entry in found["pictures"]] == [[96, 96], [144, 64]]
    assert [entry["caption"]["text"] for entry in found["pictures"]] == ["one", "far away"]
    assert found["pictures"][0]["caption"]["others"] == ["two words", "and three words"]
    tokens = prompt_tokens(load_config(two, [], initializers)[0].model.base, ["one", "and three words"])
    assert found["pictures"][0]["caption"]["tokens"] == tokens["and three words"] > tokens["one"]
    assert "two words" in (tmp_path / "of_far" / "audit.html").read_text()

    own = f"data.folders.1.audit={tmp_path / 'of_far' / 'audit.json'}"
    assert len(problems(two, own)) == 1  # the empty caption
    assert main(["audit", str(tmp_path / "near"), "--output", str(tmp_path / "of_near"), *words]) == FINISHED
    both = (own, f"data.folders.0.audit={tmp_path / 'of_near' / 'audit.json'}")
    plan = make_plan(two, *both)
    assert names(plan.dataset.train) == {"near/0.png", "near/2.png", "far/0.png", "far/1.png"}
    (wrong,) = problems(two, f"data.audit={tmp_path / 'of_near' / 'audit.json'}")
    assert f"of other pictures, those of {tmp_path / 'near'}: none of {far} is in it" in wrong

    apart = tmp_path / "above"
    apart.mkdir()
    for folder in ("near", "far"):
        (tmp_path / folder).rename(apart / folder)
    moved = [f"data.folders.{number}.images={apart / name}" for number, name in enumerate(("near", "far"))]
    words += ["--set", "data.recursive=true"]
    assert main(["audit", str(apart), "--output", str(tmp_path / "of_both"), *words]) == FINISHED
    plan = make_plan(two, *moved, f"data.audit={tmp_path / 'of_both' / 'audit.json'}", "data.default_caption=far away")
    assert names(plan.dataset.train) == {"near/0.png", "near/2.png", "far/0.png"}  # far/1.png has no caption of its own


# --- elsewhere --------------------------------------------------------------------------------------------


def test_folders_are_one_subject_of_a_comparison(two: Path, tmp_path: Path) -> None:
    settings, start = load_config(two, ["data.held_out=1"], initializers)
    asked, found = Request(initializers=("random", "gaussian")), list[str]()
    (subject,) = compare._subjects(settings, start, asked, found)
    assert subject.name == "near+far" and len(subject.plan.dataset.train) == 4 and not found
    assert not compare._subjects(settings, start, replace(asked, subjects=tmp_path), found)
    assert found == ["--subjects: each subject is one folder; take [[data.folders]] out, and set [data] images"]


def test_a_hypernetwork_reads_one_caption_of_a_picture(two: Path, tmp_path: Path) -> None:
    (tmp_path / "far" / "1.txt").write_text("far away")
    found: list[str] = []
    read_subjects(SubjectsConfig(images=str(tmp_path / "far"), resolution=64), square=False, problems=found)
    (problem,) = [problem for problem in found if "several captions" in problem]
    assert problem.startswith(f"[data] images: {tmp_path / 'far' / '0.png'} has several captions")


def test_captions_elsewhere_are_each_folder_s_own(two: Path, tmp_path: Path) -> None:
    for name in ("near", "far"):
        (tmp_path / f"{name}_captions").mkdir()
        (tmp_path / f"{name}_captions" / "0.txt").write_text(f"other words for {name}")
    own = [f'data.folders.{i}.captions="{tmp_path / name}_captions"' for i, name in enumerate(("near", "far"))]
    data = load_config(two, own, initializers)[0].data
    found = {f"{e.path.parent.name}/{e.path.name}": e.caption for e in scan(data, multiple=16, seed=0).train}
    assert found["near/0.png"] == "other words for near" and found["far/0.png"] == "other words for far"
    assert found["near/1.png"] == "near 1"
    (problem,) = problems(two, f'data.captions="{tmp_path / "near_captions"}"')
    assert "the captions of each folder are named in its own table" in problem
