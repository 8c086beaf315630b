"""The painter, and what the shipped models can do."""

import hashlib
import json
import logging
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

import initializers
import train as program
from demo import (
    base,
    build,
    caption_model,
    captions,
    creatures,
    diagnosis,
    experts,
    measure,
    painter,
    strengths,
    vae,
    vision,
)
from demo.text_encoder import templates
from initializers.i2l.expert import read_geometry
from initializers.i2l.layout import FILES, module_shapes
from trainer import plan
from trainer.diagnosis import Diagnosis, PictureDiagnosis
from trainer.diagnosis import read as read_diagnosis
from trainer.formats import check_lora

DEMO = Path("demo")


def test_a_picture_is_a_function_of_creature_and_scene() -> None:
    who, where = painter.identity("new", 7), painter.scene(3)
    first = painter.paint(who, where)
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, painter.paint(painter.identity("new", 7), painter.scene(3)))
    assert not np.array_equal(first, painter.paint(painter.identity("new", 8), where))
    assert not np.array_equal(first, painter.paint(who, painter.scene(4)))


def test_tiers_hold_different_creatures_and_show_what_they_say() -> None:
    shown = {tier: [painter.identity(tier, i) for i in range(300)] for tier in painter.TIERS}
    everyone = [who for creatures in shown.values() for who in creatures]
    assert len(set(everyone)) == len(everyone) == 1500
    assert {who.headgear for who in shown["pretrain"]} == set(painter.HEADGEAR)
    assert {who.pattern for who in shown["pretrain"]} == set(painter.PATTERNS)
    for tier in ("hyper", "new"):
        assert {who.headgear for who in shown[tier]} == set(painter.HEADGEAR) - {"horns"}
        assert {who.pattern for who in shown[tier]} == set(painter.PATTERNS) - {"spots"}
    assert all(who.headgear == "horns" for who in shown["trait"])
    assert sum(who.pattern == "spots" for who in shown["trait"]) == 150
    known = (painter.SHAPES, painter.PATTERNS, painter.HEADGEAR)
    for who in shown["foreign"]:
        assert all(
            value not in names for value, names in zip((who.shape, who.pattern, who.headgear), known, strict=True)
        )
    with pytest.raises(ValueError, match="index"):
        painter.identity("new", painter.TIER_SEEDS)


def test_the_first_thirty_scenes_are_all_different_and_captions_name_them() -> None:
    scenes = [painter.scene(i) for i in range(30)]
    places = {(s.background, s.place, s.size) for s in scenes}
    assert places == set(product(painter.BACKGROUNDS, painter.PLACES, painter.SIZES))
    assert len({painter.caption(s) for s in scenes}) == 30
    where, who = scenes[0], painter.identity("new", 0)
    plain, full = painter.caption(where, name="zorp"), painter.caption(where, who)
    assert plain.startswith("zorp, a ") and painter.PLACES[where.place] in plain
    assert who.colour in full and who.shape in full and who.colour not in plain


def test_every_word_of_captions_and_templates_is_one_token() -> None:
    tokenizer = QwenImagePipeline.from_pretrained(
        DEMO / "model", transformer=None, vae=None, text_encoder=None
    ).tokenizer
    plain, edit = templates()
    assert len(tokenizer(plain.split("{}")[0]).input_ids) == 34
    assert len(tokenizer(edit.split("<|vision_start|>")[0]).input_ids) == 64
    for index in range(200):
        text = painter.caption(painter.scene(index), painter.identity("pretrain", index), "zorp")
        assert len(tokenizer(text).input_ids) == len(text.replace(",", " ,").split())


@pytest.fixture(scope="module")
def pipeline() -> QwenImagePipeline:
    loaded = QwenImagePipeline.from_pretrained(DEMO / "model", torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: QwenImagePipeline, prompt: str, seed: int) -> np.ndarray:
    picture = pipeline(
        prompt,
        negative_prompt=" ",
        true_cfg_scale=2.0,
        width=64,
        height=64,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.asarray(picture, dtype=np.float32)


def test_the_pipeline_draws_the_background_the_place_and_the_size_it_is_asked_for(pipeline: QwenImagePipeline) -> None:
    """By colour and position alone: the corners' colour, and where the picture differs from an empty scene."""
    corner = {}
    for background in painter.BACKGROUNDS:
        painted = painter.paint(
            painter.identity("new", 0), painter.Scene(background=background, place="middle", size="small", seed=40)
        )
        corner[background] = painted[26:30, :4].mean((0, 1))
    right, asked = {"background": 0, "place": 0}, 0
    areas: dict[str, list[float]] = {"small": [], "big": []}
    for seed, (background, place) in enumerate(product(painter.BACKGROUNDS, painter.PLACES)):
        size = painter.SIZES[seed % 2]
        where = painter.Scene(background=background, place=place, size=size, seed=0)
        drawn = draw(pipeline, painter.caption(where, painter.identity("new", 1000 + seed)), seed)
        side = drawn[26:30, :4] if place != "left" else drawn[26:30, -4:]
        nearest = min(corner, key=lambda name: float(np.abs(corner[name] - side.mean((0, 1))).sum()))
        sky = side.mean((0, 1))
        band = np.abs(drawn[20:40] - sky).sum(-1) > 120  # the creature's middle, above most horizons
        columns = np.arange(64)[band.mean(0) > 0.5]
        centre = columns.mean() if len(columns) else -1
        seen = "left" if centre < 26 else "right" if centre > 38 else "middle"
        right["background"] += nearest == background
        right["place"] += seen == place
        areas[size].append(float(band.mean()))
        asked += 1
    assert asked == 15
    assert right["background"] >= 13 and right["place"] >= 11, right
    assert np.mean(areas["big"]) > 1.3 * np.mean(areas["small"])


def test_the_manifest_tells_the_truth() -> None:
    manifest = json.loads((DEMO / "manifest.json").read_text())
    folders = ("model", "encoders", "i2l", "captioner")
    shipped = {p.relative_to(DEMO).as_posix() for folder in folders for p in (DEMO / folder).rglob("*.*")}
    assert set(manifest["files"]) == {name for name in shipped if (DEMO / name).is_file()}
    for name, entry in manifest["files"].items():
        data = (DEMO / name).read_bytes()
        assert len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"], name
    assert manifest["total_bytes"] == sum(e["bytes"] for e in manifest["files"].values()) < 32e6
    for kind in ("style", "coarse", "fine"):
        figures = manifest["figures"][kind]
        assert figures["val_loss"] < figures["val_loss_no_lora"] < figures["val_loss_wrong_picture"]


def test_what_a_caption_names_is_read() -> None:
    who, where = painter.identity("new", 5), painter.scene(5)
    right = painter.caption(where, who)
    assert all(captions.named(right, who, where).values())
    other = replace(who, shape="pear" if who.shape != "pear" else "wide", headgear="horns")
    wrong = captions.named(painter.caption(where, other), who, where)
    assert [name for name, is_right in wrong.items() if not is_right] == ["shape", "headgear"]
    elsewhere = next(s for i in range(30) if (s := painter.scene(i)).place != where.place)
    assert not captions.named(painter.caption(elsewhere, who), who, where)["place"]
    assert not any(captions.named("", who, where).values()) or who.headgear == "nothing"


def test_the_shipped_captioner_names_creatures_that_it_has_never_seen(tmp_path: Path) -> None:
    assert captions.measure(tmp_path, 20)["all"] >= captions.BAR


def test_the_shipped_experts_have_the_published_layout_at_this_worlds_size() -> None:
    for kind in ("style", "coarse", "fine"):
        geometry = read_geometry(DEMO / "i2l" / FILES[kind])
        assert (geometry.kind.lower(), geometry.num_blocks, geometry.hidden_size, geometry.rank) == (kind, 4, 128, 4)
    sizes = check_lora(DEMO / "i2l" / FILES["bias"])
    assert {name: (inside, out) for name, (inside, out, _) in sizes.items()} == module_shapes(geometry)


def test_the_shipped_pictures_are_the_painters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "IMAGES", tmp_path)
    build.build_images(tmp_path)
    shipped = sorted((DEMO / "images" / "zorp").iterdir())
    assert len(shipped) == 16
    for file in shipped:
        assert file.read_bytes() == (tmp_path / "zorp" / file.name).read_bytes()


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of demo/, and steps that take seconds: two updates on a few pictures."""
    demo = tmp_path / "demo"
    monkeypatch.setattr(build, "DEMO", demo)
    for name in ("MODEL", "IMAGES", "CAPTIONER"):
        monkeypatch.setattr(build, name, demo / name.lower())
    for name in ("VAE_TRAIN", "BASE_TRAIN", "VISION_TRAIN", "CAPTION_TRAIN"):
        monkeypatch.setattr(build, name, replace(getattr(build, name), steps=2, batch_size=2, warmup_steps=0))
    smaller: dict[Any, dict[str, int]] = {
        build: {"NUM_SUBJECTS": 4, "NUM_DETAIL_SUBJECTS": 4, "NUM_DRAWN": 4},
        vae: {"NUM_BATCHES": 1},
        base: {"NUM_PICTURES": 16, "NUM_HELD_OUT": 8},
        vision: {"NUM_PICTURES": 8, "NUM_HELD_OUT": 8},
        caption_model: {"NUM_PICTURES": 8, "NUM_HELD_OUT": 8},
        measure: {"TRAIN_STEPS": 2, "NUM_INFERENCE_STEPS": 2, "NUM_PROMPTS": 24},
    }
    for module, values in smaller.items():
        for name, number in values.items():
            monkeypatch.setattr(module, name, number)
    shorter = {"steps": 2, "batch_size": 2, "warmup_steps": 0, "held_out_subjects": 2, "num_inference_steps": 2}
    for kind in FILES:
        name = f"i2l_creatures_{kind}.toml"
        text = Path("configs", name).read_text()
        for key, number in shorter.items():
            text, count = re.subn(rf"^{key} = .*$", f"{key} = {number}", text, flags=re.MULTILINE)
            assert count == 1, key
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(build, "CONFIGS", tmp_path)
    return demo


def files_of_manifest(demo: Path) -> dict[str, dict[str, Any]]:
    files = json.loads((demo / "manifest.json").read_text())["files"]
    assert files
    return files


def assert_as_shipped(demo: Path) -> None:
    """The files have the sizes of the shipped ones, and the text encoder is the very same."""
    built, shipped = files_of_manifest(demo), files_of_manifest(DEMO)
    for name in built:
        if name.endswith(".safetensors"):
            assert built[name]["bytes"] == shipped[name]["bytes"], name
    same = [name for name in built if name.startswith(("model/tokenizer", "model/text_encoder"))]
    assert len(same) > 4
    for name in same:
        assert built[name]["sha256"] == shipped[name]["sha256"], name
    QwenImagePipeline.from_pretrained(demo / "model")


@pytest.mark.slow
def test_models_encoders_and_an_expert_can_be_built_anew(small_world: Path, tmp_path: Path) -> None:
    """Every kind of step once; a second call changes nothing."""
    steps = ["text", "vae", "base", "vision", "subjects", "style", "captioner", "images", "measure", "manifest"]
    assert build.main([*steps, "--work", str(tmp_path / "work")]) == 0
    assert_as_shipped(small_world)
    before = files_of_manifest(small_world)
    experts_built = {name for name in before if name.startswith("i2l/")}
    assert experts_built == {f"i2l/{FILES['style']}"} and any(name.startswith("encoders/") for name in before)
    again = ["base", "vision", "subjects", "style", "captioner", "manifest"]
    assert build.main([*again, "--work", str(tmp_path / "work")]) == 0
    assert files_of_manifest(small_world) == before


@pytest.mark.slow
def test_everything_can_be_built_anew(small_world: Path, tmp_path: Path) -> None:
    """All steps, in order; what they make fits together, and a second call changes nothing."""
    assert build.main(["--work", str(tmp_path / "work")]) == 0
    assert_as_shipped(small_world)
    before = files_of_manifest(small_world)
    assert before.keys() == files_of_manifest(DEMO).keys()
    figures = [json.loads((folder / "manifest.json").read_text())["figures"] for folder in (small_world, DEMO)]
    assert figures[0].keys() == figures[1].keys()
    again = ["base", "vision", "subjects", *FILES, "captioner", "drawn", "manifest"]
    assert build.main([*again, "--work", str(tmp_path / "work")]) == 0
    assert files_of_manifest(small_world) == before


@pytest.mark.slow
def test_experts_are_measured_with_right_and_wrong_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two creatures with two pictures each."""
    monkeypatch.setattr(creatures, "NUM_PICTURES", 2)
    monkeypatch.setattr(experts, "NOISE_SEEDS", (0, 1))
    sets = {name: experts.SETS[name] for name in ("Style", "Coarse + Fine + Bias")}
    monkeypatch.setattr(experts, "SETS", sets)
    assert experts.main(["--creatures", "2", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["rows"]) == 2 * (1 + 2 * 2) and len(report["summary"]) == 1 + 2 * 2
    assert [row["creature"] for row in report["strengths"]] == [200, 200, 201, 201]
    loss = {(row["set"], row["pictures"]): row["loss"] for row in report["summary"]}
    for name in sets:
        assert loss[name, "right"] < loss["none", "none"] < loss[name, "wrong"]
    strength = {row["pictures"]: row["strength"] for row in report["strengths"]}
    assert strength["right"] > 0
    text = (tmp_path / "report.md").read_text()
    assert 'strength = "auto"' in text and "| Style |" in text


@pytest.mark.slow
def test_ways_to_choose_a_strength_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two creatures with two pictures each, and runs of two steps."""
    monkeypatch.setattr(creatures, "NUM_PICTURES", 2)
    monkeypatch.setattr(strengths, "NOISE_SEEDS", (0,))
    monkeypatch.setattr(strengths, "RATES", (3e-4,))
    monkeypatch.setattr(strengths, "GRID", (0.0, 1.0))
    monkeypatch.setattr(strengths, "RUN", ("train.steps=2", *strengths.RUN[1:]))
    for index in (300, 301):
        creatures.paint(tmp_path / "subjects", "new", index)
    assert strengths.main([str(tmp_path / "subjects"), "--output", str(tmp_path / "out"), "--train"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["subject"], row["pictures"]) for row in report["rows"]] == [
        ("new/300", "new"), ("new/301", "new"), ("new/300", "wrong"), ("new/301", "wrong"),
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["taken"][strengths.AUTO] == row["auto"]  # what the program itself chooses
        base, seeded = row["held_out"]["0.0"], row["held_out"]["1.0"]
        assert seeded > base if row["pictures"] == "wrong" else seeded < base
        assert (row["auto"] > 0.5) == (row["pictures"] == "new")
    changed = sum(row["taken"][strengths.FULL] != row["auto"] for row in report["rows"][:2])
    assert len(report["runs"]) == 2 * changed and all(len(one["curve"]) == 2 for one in report["runs"])
    assert "| forward passes |" in (tmp_path / "out" / "report.md").read_text()


def test_a_way_chooses_by_the_errors_it_computes() -> None:
    errors = np.zeros((6, len(strengths.TRIED), 8))
    errors += ((np.array(strengths.TRIED) - 0.6) ** 2)[None, :, None]
    assert strengths.Way(strengths.TRIED)(errors) == 0.5
    assert strengths.Way((0.0, 0.5, 1.25), 4, parabola=True)(errors) == 0.6
    errors[1] += 9 * np.array(strengths.TRIED)[:, None]  # the second picture, which is not among the three
    assert strengths.Way(strengths.TRIED)(errors) == 0.0
    assert strengths.Way((0.0, 0.5, 1.25), 3, parabola=True)(errors) == 0.6
    assert strengths.Way(strengths.TRIED).passes(6) == 288 and strengths.Way((0.0, 0.5, 1.25), 4).passes(6) == 24


def test_the_sign_test() -> None:
    assert strengths.paired([-0.01] * 9 + [0.02]) == "-0.70% (+2.00%), 9 lower, 1 higher, p = 0.02"
    assert strengths.paired([0.0, 0.0]).endswith("0 lower, 0 higher, p = 1.00")


def test_the_command_of_the_readme_on_a_shorter_run(tmp_path: Path) -> None:
    arguments = ["--config", "configs/creatures.toml", "--init", "i2l", "--output", str(tmp_path / "out"), "--quiet"]
    assert program.main([*arguments, "--set", "train.steps=2", "--set", "validation.num_inference_steps=2"]) == 0
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["status"] == "finished" and report["init"]["applied"]["seeded"] > 40
    assert (tmp_path / "out" / "contact_sheet.png").exists()
    loaded, _ = plan.load_config(Path("configs/creatures.toml"), [], initializers)
    assert loaded.output == "outputs/creatures"


@pytest.mark.slow
def test_i2l_starts_where_a_random_start_never_arrives(tmp_path: Path) -> None:
    """The claims of docs/results.md on held-out creatures, with two of a tier and one seed."""
    assert creatures.main([str(tmp_path / "subjects"), "--creatures", "2"]) == 0
    arguments = ["--config", "configs/creatures.toml", "--output", str(tmp_path / "out"), "--quiet", "--seeds", "1"]
    arguments += [
        "--compare",
        "random",
        "i2l",
        "--controls",
        "norm-matched",
        "wrong-pictures",
        "--set",
        "train.steps=100",
        "--set",
        "validation.num_inference_steps=2",  # nothing is asked of the samples
    ]
    assert program.main([*arguments, "--subjects", str(tmp_path / "subjects"), "--set", "validation.every=10"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {(row["group"], row["arm"]): row for row in report["summary"]}
    new = rows["new", "i2l"]
    assert new["runs"] == 2 and new["steps"]["value"] <= 1 / 25 and new["best_lower_by"]["value"] > 0.2
    for control in ("norm-matched", "wrong-pictures"):
        assert rows["new", control]["steps"]["value"] > 1 / 2 and rows["new", control]["best_lower_by"]["value"] < 0.05
    assert rows["trait", "i2l"]["best_lower_by"]["value"] > 0.05
    assert rows["foreign", "i2l"]["best_lower_by"]["value"] > -0.03


# --- the diagnosis of pictures ----------------------------------------------------------------------------


def test_folders_to_diagnose_have_the_faults_that_they_say() -> None:
    for number in range(500, 520):
        clean, plain, hard = (diagnosis.Folder.of(number, fault) for fault in diagnosis.FAULTS)
        own = painter.identity("new", number)
        assert clean.shown == clean.said == plain.shown == hard.shown and {*clean.creatures} == {own}
        assert len({(s.background, s.place, s.size) for s in clean.shown}) == 12
        assert (plain.bad_caption, plain.bad_subject) == (hard.bad_caption, hard.bad_subject)
        assert clean.bad_caption is clean.bad_subject is None
        for folder in (plain, hard):
            said = [place for place in range(12) if folder.said[place] != folder.shown[place]]
            others = [place for place in range(12) if folder.creatures[place] != own]
            assert said == [folder.bad_caption] and others == [folder.bad_subject] and said != others
        place, other = said[0], others[0]
        assert plain.said[place].background != plain.shown[place].background
        assert replace(hard.said[place], place=hard.shown[place].place) == hard.shown[place]
        like = hard.creatures[other]
        assert (like.shape, like.colour, like.num_eyes) == (own.shape, own.colour, own.num_eyes)
        assert (like.pattern, like.headgear) != (own.pattern, own.headgear)


def test_a_diagnosis_is_judged_by_the_ranks_of_the_bad_pictures() -> None:
    folder = replace(diagnosis.Folder.of(500, diagnosis.FAULTS[1]), bad_caption=3, bad_subject=9)
    rows = [
        PictureDiagnosis(picture="3.png", score=9.0, reasons=("no better: is the caption right?",)),
        PictureDiagnosis(picture="0.png", score=5.0, reasons=("worse: is it the same subject?",)),
        PictureDiagnosis(picture="9.png", score=1.5),
        PictureDiagnosis(picture="1.png", score=0.0),
    ]
    found = diagnosis.judged(folder, Diagnosis(tuple(rows)))
    assert found == {
        "caption": {"rank": 1, "told": True},
        "subject": {"rank": 3, "told": False},
        "good_doubted": 1,
        "largest_good_score": 5.0,
    }
    report = [
        {
            "creature": 500,
            "fault": fault,
            "start": start,
            **(found if fault != "none" else {**found, "good_doubted": 0}),
        }
        for fault in diagnosis.FAULTS
        for start in diagnosis.STARTS
    ]
    lines = diagnosis.table(report).splitlines()
    assert len(lines) == 8 and len({line.count("|") for line in lines}) == 1
    assert "| 0 of 1 | 1; 3 | 1 of 1, 0 of 1 | 1 of 1 | 5.0 |" in lines[4] and "| 0 of 1 | 5.0 |" in lines[2]


@pytest.mark.slow
def test_a_run_names_the_two_bad_pictures_of_twelve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the command, from i2l: in the log, in diagnosis.json and on the page."""
    caplog.set_level(logging.INFO)
    folder = diagnosis.Folder.of(417, diagnosis.FAULTS[1])
    settings = [f"data.images={folder.paint(tmp_path)}", "data.held_out=0", "train.steps=2", "validation.every=2"]
    settings += ["train.batch_size=2", "validation.num_pictures=1", "init.i2l.strength=1.0"]
    settings += ["validation.prompts=[]", "validation.unrelated_prompts=[]"]
    arguments = ["--config", "configs/creatures.toml", "--output", str(tmp_path / "out"), "--quiet"]
    assert program.main([*arguments, *(word for one in settings for word in ("--set", one))]) == 0
    bad = [f"{folder.bad_caption}.png", f"{folder.bad_subject}.png"]
    found = read_diagnosis(tmp_path / "out")
    assert {one.picture for one in found.pictures[:2]} == {one.picture for one in found.doubtful} == {*bad}
    assert f"look at {bad[0]}: its caption" in caplog.text and f"look at {bad[1]}: the seed of the other" in caplog.text
    assert "is the caption right?" in (tmp_path / "out" / "run.html").read_text()


@pytest.mark.slow
def test_the_two_bad_pictures_of_a_creature_are_named_first_from_i2l(tmp_path: Path) -> None:
    diagnosis.measure_all([416], tmp_path, 3e-4)
    rows = json.loads((tmp_path / "report.json").read_text())
    assert len(rows) == 6 and (tmp_path / "report.md").exists()
    for row in rows:
        if row["start"] == "i2l":
            assert row["good_doubted"] == 0
            assert row["fault"] == "none" or {row["caption"]["rank"], row["subject"]["rank"]} == {1, 2}
