"""An evaluation of LoRAs on the tiny base, against plain references."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor

import initializers
from tests.helpers import BAD_INPUT, FINISHED
from trainer import flow, measure, qwen_image, validation
from trainer.adapter import AdapterWeights
from trainer.config import ConfigError
from trainer.data.dataset import load_picture
from trainer.errors import UserError
from trainer.evaluate import blind, measures, plan, report, run
from trainer.evaluate.__main__ import main
from trainer.evaluate.names import distinct
from trainer.formats import write_lora
from trainer.lowrank import LowRank
from trainer.studio import Studio

CPU = torch.device("cpu")
IN_A_SPACE = ("likeness", "diversity", "frechet", "kernel")
MODULES = tuple(f"transformer_blocks.{i}.attn.{name}" for i in (0, 1) for name in ("to_q", "to_out.0"))


def lora(path: Path, seed: int, width: int = 64, metadata: dict[str, str] | None = None) -> Path:
    random = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=random)

    write_lora(
        path, AdapterWeights({name: LowRank(factor(4, width), factor(width, 4)) for name in MODULES}), metadata or {}
    )
    return path


def embed(pictures: Sequence[Image.Image], device: Any) -> dict[str, Tensor]:
    """Image encoders: colours, and the brightness of four stripes."""
    pixels = [torch.from_numpy(np.array(picture)).float() + 1 for picture in pictures]
    stripes = torch.stack([p.unflatten(0, (4, -1)).mean((1, 2, 3)) for p in pixels])
    return {"Colours": torch.stack([p.mean((0, 1)) for p in pixels]), "Stripes": stripes}


@pytest.fixture
def request_(run_toml: Path, tmp_path: Path) -> plan.Request:
    first, second = lora(tmp_path / "first.safetensors", 1), lora(tmp_path / "second.safetensors", 2)
    loras = (str(first), f"{first}:1.0", f"{second}:0.5")
    unrelated = 'validation.unrelated_prompts=["a small creature", "a hat"]'
    return plan.Request(
        config=run_toml, loras=loras, overrides=(unrelated,), output=tmp_path / "found", seeds=2, sigmas=(0.5, 0.9)
    )


def test_an_evaluation_is_what_plain_references_say(
    request_: plan.Request, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identical LoRAs get identical rows; a merged transformer has the same stable losses."""
    evaluation = replace(plan.prepare(replace(request_, blind=True), initializers), embed=embed)
    settings = replace(evaluation.config.validation, text_image_model=str(tiny_base))  # which is here, and is not read
    evaluation = replace(evaluation, config=replace(evaluation.config, validation=settings))
    asked = list[str]()

    def cosines(source: str, pictures: Sequence[Image.Image], texts: Sequence[str], device: Any) -> Tensor:
        asked.extend(texts)
        return torch.tensor([float(np.asarray(picture, np.float32).mean()) for picture in pictures])

    monkeypatch.setattr(run, "text_image_cosines", cosines)
    monkeypatch.setattr(plan, "text_image_need", lambda _: qwen_image.need(str(tiny_base)))
    written = run.execute(evaluation, quiet=True)
    output = evaluation.output
    assert json.loads((output / "evaluation.json").read_text()) == json.loads(json.dumps(written))
    names = [one["name"] for one in written["loras"]]
    assert names == ["base", "first", "first (2)", "second:0.5"]
    found = {measure["name"]: measure for measure in written["measures"]}
    assert {*found} == {
        "val_loss", "psnr 0.5", "psnr 0.9", "ssim 0.5", "ssim 0.9", "drift", "fidelity",
        *(f"{what} colours" for what in IN_A_SPACE), *(f"{what} stripes" for what in IN_A_SPACE),
    }  # fmt: skip
    for name, one in found.items():
        values = one["values"]
        assert values["first"] == values["first (2)"], name
        assert values["first"] != values["second:0.5"] and values["first"] != values["base"], name
    assert written["errors"]["first"] == written["errors"]["first (2)"]
    assert found["drift"]["values"]["base"]["value"] == 0 < found["drift"]["values"]["first"]["value"]

    items = _items(evaluation, tiny_base)
    for name, seed, strength in (("base", 0, 0.0), ("first", 1, 1.0), ("second:0.5", 2, 0.5)):
        merged = _merged(tiny_base, request_, seed, strength)
        expected = validation.stable_errors(merged, items, CPU, torch.float32)
        torch.testing.assert_close(torch.tensor(written["errors"][name]), expected, rtol=1e-3, atol=0)
        assert found["val_loss"]["values"][name]["value"] == pytest.approx(float(expected.mean()), rel=1e-3)
    base, own = (torch.tensor(written["errors"][name]).mean(1) for name in ("base", "first"))
    against = found["val_loss"]["against_base"]["first"]
    assert against["value"] == pytest.approx(float((own - base).mean()), rel=1e-4)
    assert against["error"] == pytest.approx(float((own - base).std()) / 2**0.5, rel=1e-4)

    _likeness_is_a_plain_mean(evaluation, written, found)
    assert asked == [*evaluation.prompts] * 2 * 4
    for one in written["loras"]:
        bright = [np.asarray(Image.open(output / file), np.float32).mean() for file in one["samples"]]
        assert found["fidelity"]["values"][one["name"]]["value"] == pytest.approx(float(np.mean(bright)))
    assert (
        len([*(output / "samples").rglob("*.png")]) == 4 * 2 and len([*(output / "redrawn").iterdir()]) == 2 + 2 * 4 * 2
    )
    pairs = json.loads((output / "key.json").read_text())["pairs"]
    assert len(pairs) == 3 * 2 and "base" not in {pair["left"] for pair in pairs.values()}, "three LoRAs, two samples"
    page = (output / "evaluation.html").read_text()
    assert "±" in page and 'class="best"' in page and "biased upwards" in page
    table = report.table(written).splitlines()
    assert table[0].split() == ["base", "first", "first", "(2)", "second:0.5", "training", "pictures"]
    assert len(table) == 1 + len(found) and len([line for line in table if "*" in line]) > 5


def _items(evaluation: plan.Evaluation, base: Path) -> list[validation.Item]:
    """The held-out pictures, encoded without a cache."""
    encoder = qwen_image.PromptEncoder(qwen_image.TextEncoder(str(base), CPU), torch.float32)
    vae, examples = qwen_image.load_vae(str(base), CPU), evaluation.dataset.held_out
    latents = [qwen_image.encode_pictures(vae, [load_picture(example)])[0] for example in examples]
    prompts = [encoder([example.caption])[0] for example in examples]
    return [
        validation.Item(example.name, example.digest, *own)
        for example, *own in zip(examples, latents, prompts, strict=True)
    ]


def _merged(base: Path, request_: plan.Request, seed: int, strength: float) -> QwenImageTransformer2DModel:
    """The base with dW added to its weights."""
    model = QwenImageTransformer2DModel.from_pretrained(base / "transformer").eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in MODULES:
            a, b = (0.3 * torch.randn(shape, generator=random) for shape in ((4, 64), (64, 4)))
            model.get_submodule(name).weight.add_(strength * b @ a)
    return model


def _likeness_is_a_plain_mean(evaluation: plan.Evaluation, written: dict[str, Any], found: dict[str, Any]) -> None:
    real = embed([load_picture(example) for example in evaluation.dataset.held_out], CPU)["Stripes"]
    for one in written["loras"]:
        drawn = embed([Image.open(evaluation.output / file) for file in one["samples"]], CPU)["Stripes"]
        cosines = [float(torch.cosine_similarity(x, y, dim=0)) for x in drawn for y in real]
        value = found["likeness stripes"]["values"][one["name"]]
        assert value["value"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6) and value["count"] == 2
        differ = 1 - float(torch.cosine_similarity(drawn[0], drawn[1], dim=0))
        assert found["diversity stripes"]["values"][one["name"]]["value"] == pytest.approx(differ, abs=1e-6)


def test_a_perfect_velocity_redraws_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """From noise that lies on the straight way to it, whatever the number of steps; a poor one does not."""
    random, asked = flow.generator("item"), list[tuple[float, Tensor]]()
    item = validation.Item("x", "digest", torch.randn(16, 1, 4, 4, generator=random), torch.zeros(3, 8))

    def velocity(transformer: Any, noisy: Tensor, sigmas: Tensor, prompt: Tensor, mask: None) -> Tensor:
        asked.append((float(sigmas), noisy))
        return (noisy - item.latents) / sigmas * transformer.factor

    monkeypatch.setattr(measures.qwen_image, "predict_velocity", velocity)
    for steps in (1, 4):
        found = measures.redraw(SimpleNamespace(factor=1.0), item, 0.8, steps, CPU, torch.float32)  # type: ignore[arg-type]
        assert found.shape == (1, 16, 1, 4, 4) and torch.allclose(found[0], item.latents, atol=1e-5)
    assert [sigma for sigma, _ in asked[1:]] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert torch.equal(asked[0][1], asked[1][1]), "always the same noise"
    poor = measures.redraw(SimpleNamespace(factor=0.5), item, 0.8, 4, CPU, torch.float32)  # type: ignore[arg-type]
    assert float((poor[0] - item.latents).square().mean()) > 0.01


def test_all_that_is_wrong_is_told_at_once(
    request_: plan.Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any model loads: a LoRA of another size, a strength that is no number, no file, no pictures."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    other = lora(tmp_path / "other.safetensors", 3, width=32)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "mine.txt").write_text("x")
    wrong = replace(
        request_,
        loras=(str(other), f"{request_.loras[0]}:strong", str(tmp_path / "none.safetensors")),
        overrides=("data.held_out=0", "model.dtype=fp16"),
        seeds=0,
        sigmas=(0.5, 1.5),
    )
    with pytest.raises(ConfigError) as error:
        plan.prepare(wrong, initializers)
    told = error.value.problems
    for expected in (
        "other.safetensors was made for another model",
        '"strong" after the colon is no finite number',
        "none.safetensors: there is no such file",
        "no picture is held out",
        "--seeds must be at least 1",
        '[model] dtype: "fp16" needs a CUDA GPU',
        "--sigmas must be above 0 and at most 1, not 1.5",
        "found is there already",
    ):
        assert sum(expected in problem for problem in told) == 1, expected
    assert len(told) == 8
    (tmp_path / "empty").mkdir()
    empty = replace(request_, overrides=(f"data.images={tmp_path / 'empty'}",))
    with pytest.raises(ConfigError, match="no picture"):
        plan.prepare(empty, initializers)


def test_a_lora_that_was_made_from_held_out_pictures_is_named(request_: plan.Request, tmp_path: Path) -> None:
    held_out = plan.prepare(request_, initializers).dataset.held_out
    made = lora(
        tmp_path / "made.safetensors", 5, metadata={"warm_start": json.dumps({"pictures": [held_out[1].digest]})}
    )
    notes = plan.prepare(replace(request_, loras=(request_.loras[0], str(made))), initializers).notes
    (found,) = (note for note in notes if "held-out" in note)
    assert found.startswith(f"made was made from 1 of 2 held-out pictures, as its file says ({held_out[1].name})")


def test_a_strength_that_is_too_large_is_told(request_: plan.Request) -> None:
    evaluation = plan.prepare(replace(request_, loras=(f"{request_.loras[0]}:1e38",)), initializers)
    with pytest.raises(UserError, match="NaN or infinite"):
        run.execute(evaluation, quiet=True)
    assert not (evaluation.output / "evaluation.html").exists()


class Stops:
    """Stands for Ctrl-C: raises after so many calls of a function, `left`, and counts those that were let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, places: dict[str, tuple[object, str]]):
        self.calls, self.left = dict.fromkeys(places, 0), dict[str, int]()
        for place, (owner, name) in places.items():
            monkeypatch.setattr(owner, name, self._counted(place, getattr(owner, name)))

    def _counted(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if place in self.left:
                self.left[place] -= 1
                if self.left[place] < 0:
                    self.left.clear()  # once: another one would end pytest
                    raise KeyboardInterrupt
            self.calls[place] += 1
            return function(*arguments, **named)

        return counted


def test_an_evaluation_that_was_stopped_goes_on_to_the_same_bytes(
    request_: plan.Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in work is repeated, and nothing else."""
    prompts = 'validation.prompts=["a creature", "a hat"]'
    request_ = replace(request_, blind=True, overrides=(*request_.overrides, prompts, "train.batch_size=3"))

    def evaluate(output: Path) -> None:
        run.execute(replace(plan.prepare(replace(request_, output=output), initializers), embed=embed), quiet=True)

    places: dict[str, tuple[object, str]] = {
        "errors": (measure.Passes, "errors"),
        "drift": (measure.Drift, "__call__"),
        "redrawn": (measures, "redraw"),
        "drawn": (Studio, "latents"),
        "sample": (measures, "write_sample"),
        "original": (measures, "write_png"),
        "embedded": (run, "_embedded"),
        "page": (report, "write_page"),
        "blind": (blind, "write_page"),
        "end": (run, "write_json"),
    }
    stops = Stops(monkeypatch, places)
    evaluate(tmp_path / "whole")
    usual = dict(stops.calls)
    assert usual["redrawn"] == 4 * 2 * 2 and usual["drawn"] == 4 * 2 and usual["sample"] == 4 * 4

    stops.calls, output = dict.fromkeys(places, 0), tmp_path / "stopped"
    for place, after in (
        ("errors", 0), ("redrawn", 1), ("drawn", 1), ("errors", 0), ("drift", 0), ("redrawn", 2), ("sample", 1),
        ("original", 9), ("embedded", 0), ("page", 0), ("blind", 0), ("end", 0),
    ):  # fmt: skip
        stops.left = {place: after}
        with pytest.raises(KeyboardInterrupt):
            evaluate(output)
        assert "measures" not in json.loads((output / "evaluation.json").read_text()), place
    (output / "redrawn" / ".0.png.1.partial").write_bytes(b"a killed process leaves this")
    loaded = list[str]()
    monkeypatch.setattr(qwen_image, "load_transformer", lambda *_: loaded.append("base"))
    stops.left = {}
    evaluate(output)
    files = {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    whole = tmp_path / "whole"
    assert files == {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert not loaded, "all that needs the base was there"
    repeated = {"errors": 1, "sample": 1, "drawn": 1, "original": 0, "redrawn": 0}
    assert {place: stops.calls[place] - usual[place] for place in repeated} == repeated


def test_a_folder_of_another_evaluation_that_was_stopped_is_refused(
    request_: plan.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = Stops(monkeypatch, {"redrawn": (measures, "redraw")})
    stops.left = {"redrawn": 1}
    with pytest.raises(KeyboardInterrupt):
        run.execute(plan.prepare(request_, initializers), quiet=True)
    before = {path: path.read_bytes() for path in request_.output.rglob("*") if path.is_file()}  # type: ignore[union-attr]
    for other, told in (
        (replace(request_, seeds=3), "differs in seeds, loras"),
        (replace(request_, loras=(f"{request_.loras[0]}:0.9", *request_.loras[1:])), "differs in loras"),
        (replace(request_, overrides=(*request_.overrides, "validation.seed=5")), "differs in config"),
    ):
        with pytest.raises(UserError, match=told):
            run.execute(plan.prepare(other, initializers), quiet=True)
    lora(Path(request_.loras[0]), 9)  # another file of the same name
    with pytest.raises(UserError, match="differs in loras"):
        run.execute(plan.prepare(request_, initializers), quiet=True)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_image_encoders_that_are_named_are_needed(request_: plan.Request, tmp_path: Path) -> None:
    """They are checked with all else, and fetched; without the table [init.i2l] there are none."""
    assert plan.prepare(request_, initializers).embed is None
    named = replace(request_, overrides=('init.i2l.encoders="demo/encoders"',))
    evaluation = plan.prepare(named, initializers)
    assert evaluation.embed is not None and "demo/encoders" in [need.source for need in evaluation.needs]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError) as error:
        plan.prepare(replace(request_, seeds=0, overrides=(f'init.i2l.encoders="{empty}"',)), initializers)
    wanted = [f"[init.i2l] encoders: {empty} has no {name}/model.safetensors" for name in ("SigLIP2-G384", "DINOv3-7B")]
    assert {*wanted} < {*error.value.problems} and len(error.value.problems) == 3


def test_the_command(request_: plan.Request, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(request_.config), "--lora", request_.loras[0], "--seeds", "1", "--sigmas", "0.5"]
    assert main([*arguments, "--quiet", "--blind", "--set", "validation.prompts=[]"]) == FINISHED
    out, found = capsys.readouterr().out, tmp_path / "out" / "evaluation"
    assert "val_loss (lower is better)" in out and "captions of held-out pictures" in out and "text_image_model" in out
    assert {path.name for path in found.iterdir()} == {
        "evaluation.json", "evaluation.html", "blind.html", "key.json", "samples", "redrawn",
    }  # fmt: skip
    pairs = json.loads((found / "key.json").read_text())["pairs"]
    assert {side for pair in pairs.values() for side in (pair["left"], pair["right"])} == {"base", "first"}
    assert main([*arguments, "--quiet"]) == BAD_INPUT, "it is there already"
    with pytest.raises(SystemExit):
        main(["--config", str(request_.config)])


def test_names_tell_files_apart() -> None:
    assert distinct([Path("a/x.safetensors"), Path("b/y.safetensors")]) == ["x", "y"]
    assert distinct([Path("a/adapter"), Path("b/adapter")]) == ["a/adapter", "b/adapter"]
    assert distinct([Path("a/x.v1"), Path("a/x.v2")]) == ["x.v1", "x.v2"]
    same = [Path("x.safetensors")] * 3
    assert distinct(same, ["", ":0.5", ""]) == ["x", "x:0.5", "x (2)"]
