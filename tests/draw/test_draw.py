"""`python -m trainer.draw` as its users meet it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from initializers.i2l.predict_file import predict
from tests import tiny
from tests.faults.world import I2L_TABLE, no_model_loads
from tests.helpers import BAD_INPUT, FAILED, FINISHED, run
from trainer import adapter, qwen_image
from trainer.adapter import AdapterWeights
from trainer.draw import __main__ as program
from trainer.draw import run as drawing
from trainer.files import write_json
from trainer.formats import read_lora, write_lora
from trainer.lowrank import LowRank, relative_difference
from trainer.qwen_image import ModelConfig
from trainer.studio import Settings, Studio, Worn
from trainer.validation import GREY

CPU = torch.device("cpu")
Draw = Callable[..., int]


@pytest.fixture
def draw(run_toml: Path, tmp_path: Path) -> Draw:
    """The program with the tiny run's configuration, two steps and one seed, unless told otherwise."""

    def call(*arguments: object, output: Path | None = tmp_path / "drawn", short: bool = True) -> int:
        words = ["--config", str(run_toml), "--quiet", *(["--seeds", "1", "--steps", "2"] if short else [])]
        words += ["--output", str(output)] if output else []
        return program.main([*words, *map(str, arguments)])

    return call


def lora(path: Path, base: Path, seed: int) -> Path:
    modules = [*adapter.linears(qwen_image.transformer_on_meta(str(base))).items()][:6]
    random = torch.Generator().manual_seed(seed)
    factors = {
        name: LowRank(torch.randn(2, columns, generator=random), torch.randn(rows, 2, generator=random) * 0.05)
        for name, (columns, rows) in modules
    }
    write_lora(path, AdapterWeights(factors), {})
    return path


def pictures_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def told(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return {**picture.info, "settings": json.loads(picture.info["settings"])}


def test_loras_and_strengths_side_by_side(draw: Draw, tiny_base: Path, tmp_path: Path) -> None:
    first, second = lora(tmp_path / "a.safetensors", tiny_base, 0), lora(tmp_path / "b.safetensors", tiny_base, 1)
    prompts = ["a creature in a meadow", "a creature at night"]
    done = draw(
        "--prompts", *prompts, "--lora", first, f"{second}:0.5", "--each", "--strengths", 0.5, 1, "--with-base",
        "--first-seed", 4,
    )  # fmt: skip
    assert done == FINISHED
    folder = tmp_path / "drawn"
    singles = sorted(path for path in folder.glob("*.png") if path.name != "sheet.png")
    assert len(singles) == 2 * 5
    loras = [[(one["name"], one["strength"]) for one in told(path)["settings"]["loras"]] for path in singles]
    assert loras == 2 * [[], [("a", 0.5)], [("a", 1.0)], [("b", 0.25)], [("b", 0.5)]]
    assert {told(path)["prompt"] for path in singles} == {*prompts} and told(singles[0])["seed"] == "4"
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 5 * 100 and sheet.height > 2 * 100
    studio = Studio(ModelConfig(base=str(tiny_base), dtype="fp32"), CPU, tmp_path / "cache", quiet=True)
    settings = Settings(size=(64, 64), num_inference_steps=2, true_cfg_scale=1.0)
    with studio.wearing([Worn("b", read_lora(second)[0], 0.25)]):
        expected = studio.pictures(studio.latents(prompts[:1], [4], settings))[0]
    with Image.open(singles[3]) as found:
        assert found.tobytes() == expected.tobytes()


@pytest.fixture
def i2l(run_toml: Path, tmp_path: Path) -> None:
    """The configuration names experts and image encoders, and starts at random."""
    tiny.make_i2l(tmp_path / "i2l", tmp_path / "encoders")
    table = I2L_TABLE.replace('method = "i2l"', 'method = "random"')
    table = table.replace('"i2l"\n', f'"{tmp_path / "i2l"}"\n').replace('"encoders"', f'"{tmp_path / "encoders"}"')
    run_toml.write_text(run_toml.read_text() + table)


@pytest.mark.usefixtures("i2l")
def test_a_lora_from_pictures(draw: Draw, run_toml: Path, pictures: Path, tmp_path: Path) -> None:
    keep, shown = tmp_path / "kept.safetensors", [pictures / "0.png", pictures / "1.png"]
    assert draw("--prompts", "a creature", "--pictures", *shown, "--keep", keep, "--negative", GREY) == FINISHED
    single = next(path for path in (tmp_path / "drawn").glob("01*.png"))
    settings = told(single)["settings"]
    assert [*settings["loras"][0]["pictures"]] == ["0.png", "1.png"] and settings["true_cfg_scale"] == 4.0
    assert [*settings["negative"][0]["pictures"]] == ["grey-0.png", "grey-1.png"]
    config, start = program.load_config(run_toml, ["init.method=i2l"], program.initializers)
    expected, _ = predict(shown, config.model.base, start.options, log=lambda _: None)
    kept = read_lora(keep)[0]
    assert {*kept.factors} == {*expected.factors}
    assert all(relative_difference(kept.factors[name], expected.factors[name]) < 1e-6 for name in kept.factors)
    assert {len(factors.a) for factors in kept.factors.values()} == {2 * 4 + 2}  # Style of two pictures, and Bias


def test_the_steps_of_a_run(draw: Draw, run_toml: Path, tmp_path: Path) -> None:
    """The last step is drawn as with the exported adapter, and step 0, where b is zero, as with the base."""
    assert run(run_toml, tmp_path / "out", "checkpoint.keep=9", "checkpoint.every=2") == FINISHED
    assert draw("--run", tmp_path / "out", "--with-base", "--prompts", "a creature", "--at", 2, 4) == FINISHED
    assert (
        draw("--lora", tmp_path / "out" / "adapter", "--prompts", "a creature", output=tmp_path / "other") == FINISHED
    )
    base, second, fourth = (Image.open(path) for path in sorted((tmp_path / "drawn").glob("01*.png")))
    exported = Image.open(next(path for path in (tmp_path / "other").glob("01*.png")))
    assert fourth.tobytes() == exported.tobytes() != second.tobytes() != base.tobytes()
    assert told(Path(str(fourth.filename)))["settings"]["checkpoint"].endswith("step-00000004")  # type: ignore[attr-defined]


def test_views_are_asked_for_in_two_languages_and_compared(
    draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw("--prompts", "a creature", "--views", "front", "back") == FINISHED
    texts = {told(path)["prompt"] for path in (tmp_path / "drawn").glob("01*.png")}
    assert texts == {"a creature, front view, 正面视图", "a creature, back view, seen from behind, 背面视图"}
    assert "was not measured" in capsys.readouterr().out  # the configuration names no image encoders


def test_the_library_says_which_lora_and_why(
    draw: Draw, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "library").mkdir()
    file = lora(tmp_path / "library" / "milo.safetensors", tiny_base, 0)
    file.with_name("README.md").write_text("---\ninstance_prompt: milo\n---\n")
    assert draw("--library", file.parent, "--prompts", "milo at night", "a tree") == FINISHED
    out = capsys.readouterr().out
    assert '"milo at night": milo ("milo" is in the prompt)' in out and '"a tree": none (' in out
    loras = [told(path)["settings"]["loras"] for path in sorted((tmp_path / "drawn").glob("0*.png"))]
    assert [len(own) for own in loras] == [1, 0]


def test_a_stopped_request_goes_on_and_another_one_is_refused(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("--prompts", "a creature", "--seeds", 3, "--steps", 2)
    assert draw(*words, output=tmp_path / "whole", short=False) == FINISHED
    real, count = Studio.pictures, 0

    def pictures(self: Studio, latents: torch.Tensor) -> list[Image.Image]:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return real(self, latents)

    with monkeypatch.context() as patch:
        patch.setattr(Studio, "pictures", pictures)
        assert draw(*words, short=False) == FAILED
    assert len(pictures_of(tmp_path / "drawn")) == 1 and "give the same command again" in caplog.text
    assert draw("--prompts", "another") == BAD_INPUT
    assert "holds other things already" in caplog.text
    before = (tmp_path / "drawn" / "01-seed0-00-base.png").stat().st_mtime_ns
    assert draw(*words, short=False) == FINISHED
    assert (tmp_path / "drawn" / "01-seed0-00-base.png").stat().st_mtime_ns == before
    assert pictures_of(tmp_path / "drawn") == pictures_of(tmp_path / "whole")
    assert draw(*words, short=False) == BAD_INPUT  # it is done


def test_views_need_whole_encoders(
    draw: Draw, run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "no-encoders").mkdir()
    run_toml.write_text(f'{run_toml.read_text()}\n[init.i2l]\nencoders = "{tmp_path / "no-encoders"}"\n')
    with no_model_loads():
        assert draw("--prompts", "a creature", "--views", "front", "back") == BAD_INPUT
    assert "[init.i2l] encoders: " in caplog.text and "SigLIP2-G384" in caplog.text


@pytest.mark.usefixtures("i2l")
def test_a_stopped_request_with_a_kept_lora_goes_on_by_the_same_experts(
    draw: Draw, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("--prompts", "a creature", "--pictures", pictures / "0.png", "--keep", tmp_path / "kept.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(Studio, "pictures", Mock(side_effect=KeyboardInterrupt))
        assert draw(*words) == FAILED
    assert (tmp_path / "kept.safetensors").is_file()
    assert draw(*words, "--set", "init.i2l.strength=0.5") == BAD_INPUT
    assert "holds other things already" in caplog.text
    assert draw(*words) == FINISHED
    assert draw(*words, output=tmp_path / "other") == BAD_INPUT
    assert "kept.safetensors: it is there already" in caplog.text


def test_numbered_folders(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert draw("--prompts", "a creature", output=None) == FINISHED
    (tmp_path / drawing.FOLDERS / "002" / "sheet.png").unlink()  # as if it had been stopped
    assert draw("--prompts", "a creature", output=None) == FINISHED
    assert sorted(path.name for path in (tmp_path / drawing.FOLDERS).iterdir()) == ["001", "002"]


def test_all_that_is_wrong_is_told_before_a_model_loads(
    draw: Draw, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small, cut = tmp_path / "small.safetensors", tmp_path / "cut.png"
    factors = {"transformer_blocks.0.attn.to_q": LowRank(torch.ones(1, 3), torch.ones(3, 1))}
    write_lora(small, AdapterWeights(factors), {})
    Image.new("RGB", (64, 64), "red").save(cut)
    cut.write_bytes(cut.read_bytes()[:60])
    with no_model_loads():
        done = draw(
            "--lora", small, f"{small}:much", tmp_path / "none.safetensors", "--pictures", cut, tmp_path / "no.png",
            "--library", tmp_path / "nowhere", "--run", tmp_path, "--at", 3, "--strengths", "nan", "--seeds", 0,
            "--size", "33x32", "--guidance", 0.5, "--views", "inside", "--keep", "file.bin", "--negative", GREY,
        )  # fmt: skip
    assert done == BAD_INPUT
    for text in (
        "made for another model",
        '"much" after the colon is no finite number',
        "none.safetensors: there is no such file",
        "cut.png",
        "no.png",
        "nowhere: there is no such folder",
        "is not the folder of a run",
        "--strengths nan: not a finite number",
        "--seeds must be at least 1",
        "--size 33x32",
        "--guidance must be at least 1",
        "--views inside: not known",
        "--keep file.bin: the file's name must end in .safetensors",
        "--library chooses the LoRA",
    ):
        assert text in caplog.text, text
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at", "2"], "--at has no effect without --run"),
        (["--strengths", "0.5"], "--strengths has no effect without a LoRA"),
        (["--each"], "--each needs several LoRAs"),
        (["--keep", "a.safetensors"], "--keep has no effect without --pictures"),
        (["--negative", "x.safetensors", "--guidance", "1"], "--negative has no effect with --guidance 1"),
        (["--set", "train.setps=3"], "setps"),
    ],
)
def test_options_without_effect(draw: Draw, caplog: pytest.LogCaptureFixture, words: list[str], message: str) -> None:
    assert draw("--prompts", "a creature", *words) == BAD_INPUT
    assert message in caplog.text


def test_a_run_without_its_checkpoints(
    draw: Draw, run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_json(tmp_path / "out" / "run.json", {})
    assert draw("--run", tmp_path / "out", "--prompts", "a creature") == BAD_INPUT
    assert "it has no checkpoint" in caplog.text
    shutil.rmtree(tmp_path / "out")
    assert run(run_toml, tmp_path / "out", "train.steps=2") == FINISHED
    write_json(tmp_path / "out" / "run.json", {"init": {"adapter": {}, "frozen": None, "sources": {}}})
    with no_model_loads():
        assert draw("--run", tmp_path / "out", "--prompts", "a creature") == BAD_INPUT
    assert "run.json cannot be read (there is no config)" in caplog.text
