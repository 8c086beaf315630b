"""A run's page: what is on it, and that nothing which is missing, damaged or hostile keeps it from being made."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers import BAD_INPUT, FINISHED
from trainer import config, page
from trainer.page import charts, pictures, words, write
from trainer.page.__main__ import main
from trainer.page.left import number, read
from trainer.page.table import half_learned
from trainer.plan import RunConfig
from trainer.validation import Sample, save_samples

HOSTILE = "<script>alert('x')</script>"
SIGMAS = 8
NONE = "\N{EN DASH}"  # in a cell
VOID = ("meta", "link", "img", "input", "br", "wbr")


class _Page(HTMLParser):
    """Tags in their order, and the text of the page."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.source = (folder / "run.html").read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == [], "tags that are not closed"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items()]


def painted(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def errors(step: int, part: str, picture: str, what: str, level: float) -> dict[str, Any]:
    return {"step": step, "part": part, "picture": picture, "what": what, "errors": [level] * SIGMAS}


STEPS = (0, 20, 40, 60)
VAL = dict(zip(STEPS, (0.30, 0.24, 0.20, 0.22), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run's folder, by hand."""
    run, images = tmp_path / "my_run", tmp_path / "images"
    run.mkdir()
    images.mkdir()
    data: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
    for index in range(5):
        path = images / f"{index}.png"
        painted(index).save(path)
        entry = {"picture": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        data["held_out" if index == 4 else "train"].append({**entry, "caption": f"zorp number {index}"})
    table: dict[str, Any] = {"output": str(run), "model": {"base": "me/base"}, "data": {"images": str(images)}}
    table |= {"train": {"steps": 60, "learning_rate": 0.002}}
    made = config.parse(RunConfig, table, "", [])
    init = {"method": "i2l", "experts": [{"expert": "coarse"}, {"expert": "fine"}], "strength": 0.75, "seconds": 3.2}
    init |= {"pictures": ["0.png"], "adapter": {"rank": 8, "rank_pattern": {}}, "frozen": None}
    applied = {"seeded": 45, "padded": 2, "random": 3, "dropped": {"a.b": 0.1}, "largest_error": 4e-14}
    init |= {"applied": {**applied, "energy_kept": {"total": 0.913, "min": 0.5}}}
    report = {"status": "finished", "config": config.to_dict(made), "init_options": {"mode": "seed"}, "init": init}
    (run / "run.json").write_text(json.dumps({**report, "data": data, "versions": {"torch": "9.9"}}))
    shown: list[dict[str, Any]] = [
        {"step": s, "loss": 0.3 + 0.1 * (s % 2), "lr": 0.002, "grad_norm": 1} for s in range(1, 61)
    ]
    for step, loss in VAL.items():
        measured = {"drift": step / 100, "likeness siglip2": 0.5 + step / 200, "likeness dinov3": 0.4}
        shown.append({"step": step, "val_loss": loss, "train_stable_loss": loss - 0.01, **measured})
    lines(run / "metrics.jsonl", shown)
    found = []
    for part, entries in data.items():
        for place, entry in enumerate(entries):
            name = entry["picture"]
            found += [errors(step, part, name, "adapter", VAL[step] + place / 100) for step in STEPS]
            found += [errors(0, part, name, "base", 0.4), errors(0, part, name, "no caption", 0.44)]
    lines(run / "pictures.jsonl", [*found, errors(0, "train", "3.png", "others' seed", 0.5)])
    text = "the best step is 40 of 60. Overfitting since step 40: what came after made it worse."
    (run / "choice.json").write_text(json.dumps({"step": 40, "last": 60, "verdict": "overfitting", "text": text}))
    doubt = {"picture": "2.png", "score": 5.25, "reasons": ["its caption helps little"]}
    (run / "diagnosis.json").write_text(json.dumps({"pictures": [doubt, {"picture": "1.png", "score": 1}]}))
    for step in STEPS:
        save_samples(run / "samples", step, [Sample(f"a prompt {row}", row, painted(step + row)) for row in range(2)])
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_model.safetensors").touch()
    return run


def changed(path: Path, **values: Any) -> None:
    """Other values in a JSON file's table."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def made(folder: Path) -> _Page:
    page.write_page(folder)
    return _Page(folder)


def test_the_page_tells_all_of_a_run(folder: Path) -> None:
    found = made(folder)
    for said in (
        "my_run",
        "overfitting finished, step 60 of 60",
        "The best step is 40 of 60. Overfitting since step 40: what came after made it worse.",
        "Held-out loss: base without LoRA 0.4000, step 0 0.3000, step 40 (chosen) 0.2000, step 60 0.2200.",
        "4 training pictures, 1 held out",
        "The learning rate is 0.002 at each step.",
        "The adapter starts from what i2l's coarse and fine predicted from 1 training pictures at strength 0.75.",
        "45 of 48 layers hold the seed; the other 3 start at random and change nothing yet.",
        "2 of them were filled up",
        "1 layers (a.b)",
        "truncation to the rank kept 91.3 % of its energy, at least 50.0 % in each layer".capitalize(),
        "the largest relative error is 4e-14",
        "2.png training its caption helps little zorp number 2",
        'QwenImagePipeline.from_pretrained("me/base")',
        f'PeftModel.from_pretrained(transformer, "{folder}/adapter")',
        "ComfyUI: put",
    ):
        assert said in found.text, said
    titles = ["Stable loss", "Training loss", "Likeness", "Drift"]
    titles += ["Likeness (siglip2) against drift", "Likeness (dinov3) against drift"]
    assert [str(svg["aria-label"]) for svg in found.all("svg", role="img") if "class" not in svg] == titles
    assert found.text.count("chosen: 40") == 4
    assert "running" not in found.source.split("<script>")[0].split("</style>")[1]


def test_it_is_one_file_that_fetches_nothing(folder: Path) -> None:
    found = made(folder)
    assert not {"iframe", "object", "embed"} & {tag for tag, _ in found.tags}
    for _, attrs in found.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert name not in attrs or str(attrs[name]).startswith("data:"), attrs
        assert not any(name.startswith("on") for name in attrs)
    assert "http://" not in found.source and "https://" not in found.source and "url(" not in found.source
    assert "@import" not in found.source and "fetch(" not in found.source


def test_the_slider_moves_all_prompts_and_begins_at_the_chosen_step(folder: Path) -> None:
    found = made(folder)
    (slider,) = found.all("input", type="range")
    assert slider["data-steps"] == "0 20 40 60" and slider["value"] == "2" and slider["data-chosen"] == "40"
    samples = [img for img in found.all("img") if "prompt" in str(img["alt"])]
    assert [img["alt"] for img in samples if "hidden" not in img] == ["a prompt 0, step 40", "a prompt 1, step 40"]
    assert len(samples) == 8 and all(str(img["src"]).startswith("data:image/png") for img in samples)
    changed(folder / "run.json", status="running")
    found = made(folder)
    (slider,) = found.all("input", type="range")
    assert slider["value"] == "3", "the newest while it runs"
    assert found.all("input", id="reload") and "data-running" in found.all("html")[0]


def rows(found: _Page) -> list[list[str]]:
    """The cells of the table of pictures."""
    table = found.source.split('<table id="pictures">')[1].split("</table>")[0].split("<tbody>")[1]
    return [["".join(_texts(cell)).strip() for cell in row.split("<td")[1:]] for row in table.split("<tr>")[1:]]


def _texts(cell: str) -> Iterator[str]:
    for part in ("<x" + cell).split("<"):
        yield part.partition(">")[2]


def test_the_table_has_the_errors_of_each_picture(folder: Path) -> None:
    found = made(folder)
    table = rows(found)
    assert [row[1].split("zorp")[0] for row in table] == ["2.png", "1.png", "0.png", "3.png", "4.png"]
    names = ["base", "step 0", "step 40 (chosen)", "step 60", "change", "half learned", "caption helps", "others' seed"]
    headers = found.source.split("<thead>")[1].split("</thead>")[0]
    shown = [text for text in _texts(headers.replace("&#39;", "'")) if text.strip()]
    assert shown == ["picture", "part", "by sigma", *names, "score"]
    first = ["0.4000", "0.3200", "0.2200", "0.2400", "-31.2 %", "step 20", "+10.0 %", NONE, "5.2"]
    assert table[0][4:] == first
    assert table[3][4:] == ["0.4000", "0.3300", "0.2300", "0.2500", "-30.3 %", "step 20", "+10.0 %", "+25.0 %", NONE]
    assert table[4][2] == "held out" and table[4][-1] == NONE
    assert found.source.count('<svg class="profile"') == 5
    values = [attrs["data-value"] for attrs in found.all("td") if "data-value" in attrs]
    assert "" in values and "0.4" in values, "what it is sorted by"


def test_only_settings_that_differ_come_first(folder: Path) -> None:
    page.write_page(folder)
    own, everything = words.settings(read(folder))
    run = folder.parent
    assert own == [
        ("output", [str(folder)], []),
        ("model.base", ["me/base"], []),
        ("data.images", [str(run / "images")], ['""']),
        ("train.steps", ["60"], ["1000"]),
        ("train.learning_rate", ["0.002"], ["0.0003"]),
        ("init.i2l.mode", ["seed"], []),
    ]
    assert {key for key, _ in everything} > {"adapter.rank", "train.optimizer", "validation.every"}


def test_defaults_are_those_of_an_empty_configuration(tmp_path: Path) -> None:
    """Those of a section that is not there by default are known, too."""
    problems: list[str] = []
    table = {"output": "x", "model": {"base": "me/base"}, "data": {"images": str(tmp_path)}}
    parsed = config.parse(RunConfig, {**table, "prior": {"method": "prediction"}}, "", problems)
    given = dict(words._flat(config.to_dict(parsed)))
    known = words.defaults(RunConfig)
    assert problems == [] and len(given) > 60
    assert {key for key, value in given.items() if key not in known or known[key] != value} == {
        "output", "model.base", "data.images", "prior.method",
    }  # fmt: skip
    assert known["prior"] is None


# --- what is missing, damaged or hostile ------------------------------------------------------------------


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    found = made(tmp_path)
    assert "not known how it ended" in found.text and "There is no exported adapter yet" in found.text
    assert not found.all("svg") and not found.all("img")


FILES = ("run.json", "metrics.jsonl", "pictures.jsonl", "choice.json", "diagnosis.json", "samples", "../images")


@pytest.mark.parametrize("name", FILES)
def test_whatever_is_missing_is_left_out(folder: Path, name: str) -> None:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = made(folder)
    gone = {
        "run.json": "The start",
        "metrics.jsonl": "Curves",
        "pictures.jsonl": "Each picture",
        "choice.json": "(chosen)",
        "diagnosis.json": "Pictures to look at",
        "samples": "a prompt 0",
        "../images": "Real pictures",
    }
    for key, text in gone.items():
        if key != name and (name, key) != ("run.json", "../images"):
            assert text in found.text, text
    assert gone[name] not in found.text


def test_files_may_be_half_written_or_of_another_form(folder: Path) -> None:
    shutil.rmtree(folder.parent / "images")
    shutil.rmtree(folder / "samples")
    for path in [*folder.glob("*.json*")]:
        data = path.read_bytes()
        for other in (data[: len(data) // 2], b"[]", b"\xff\xfe\x00", b'{"pictures": 3, "step": "x"}\n[1]\n'):
            path.write_bytes(other)
            page.write_page(folder)
        path.write_bytes(data)
    values = itertools.cycle([None, "x", [], {}, True, [None], [["a"]], {"a": None}, float("nan"), 10**400, -1])
    report = json.loads((folder / "run.json").read_text())
    for section in ("", "config", "data", "init"):
        table = report[section] if section else report
        for key, value in table.items():
            table[key] = next(values)
            (folder / "run.json").write_text(json.dumps(report))
            page.write_page(folder)
            table[key] = value
    odd = [errors(0, "train", "0.png", "adapter", float("nan")), {"step": 0, "errors": 5}]
    lines(folder / "pictures.jsonl", [*odd, errors(10**400, "train", "0.png", "adapter", 0.1)])
    assert "Each picture" not in made(folder).text


def test_only_step_0_is_validated(folder: Path) -> None:
    measured = {"val_loss": 0.3, "train_stable_loss": 0.3, "drift": 0, "likeness x": 1}
    lines(folder / "metrics.jsonl", [{"step": 0, **measured}])
    lines(folder / "pictures.jsonl", [errors(0, "train", "0.png", "adapter", 0.3)])
    (folder / "choice.json").write_text(json.dumps({"step": 0, "last": 0, "val_loss": 0.3, "verdict": "", "text": ""}))
    for path in folder.glob("samples/step-0000[1-9]*"):
        path.unlink()
    found = made(folder)
    assert "The best step so far is 0." in found.text and "step 0 (chosen)" in found.text
    assert found.all("input", type="range")[0]["data-steps"] == "0"
    assert [row[4:] for row in rows(found)] == [["0.3000"]], "no change yet"


def test_damaged_and_foreign_samples_are_left_out(folder: Path) -> None:
    path = folder / "samples" / "step-000040-1.png"
    path.write_bytes(path.read_bytes()[:60])
    found = made(folder)
    assert [str(img["alt"]) for img in found.all("img") if "step 40" in str(img["alt"])] == ["a prompt 0, step 40"]
    assert len([attrs for attrs in found.all("div") if attrs.get("class") == "none"]) == 1
    (folder / "samples" / "step-one-two.png").touch()
    assert not made(folder).all("input", type="range")


def test_without_held_out_pictures(folder: Path) -> None:
    (folder / "choice.json").unlink()
    data = json.loads((folder / "run.json").read_text())["data"]
    changed(folder / "run.json", data={**data, "held_out": []})
    found = made(folder)
    assert "No picture is held out, so that no step is known to be the best one." in found.text


def test_texts_are_escaped(folder: Path) -> None:
    report = json.loads((folder / "run.json").read_text())
    report["data"]["train"][0] |= {"caption": [HOSTILE, HOSTILE]}
    report["data"]["train"].append({"picture": HOSTILE, "sha256": "", "caption": HOSTILE})
    report["config"]["data"]["trigger"] = report["config"]["model"]["base"] = HOSTILE
    report["config"]["validation"]["prompts"] = [HOSTILE, HOSTILE]
    report["init"] |= {"method": HOSTILE, "experts": [{"expert": HOSTILE}]}
    report |= {"ended_by": HOSTILE, "status": HOSTILE, "init_options": {HOSTILE: HOSTILE}, "versions": {"a": HOSTILE}}
    (folder / "run.json").write_text(json.dumps(report))
    entry = {"picture": HOSTILE, "reasons": [HOSTILE], HOSTILE: 3}
    (folder / "diagnosis.json").write_text(json.dumps({"pictures": [entry]}))
    changed(folder / "choice.json", text=HOSTILE, verdict=HOSTILE)
    with (folder / "pictures.jsonl").open("a") as file:
        file.write(json.dumps(errors(0, "train", HOSTILE, "adapter", 0.1)) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, f"likeness {HOSTILE}": 0.1}) + "\n")
    save_samples(folder / "samples", 60, [Sample('"><script>alert(1)</script>', 7, painted(1))])
    found = made(folder)
    assert found.text.count(HOSTILE) > 15
    assert len(found.all("script")) == 1 and found.source.count("alert(") == found.source.count("alert(&#39;x") + (
        found.source.count("alert(1)&lt;")
    )


def test_a_page_is_whole_or_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page.write_page(folder)
    before = (folder / "run.html").read_bytes()
    page.write_page(folder)
    assert (folder / "run.html").read_bytes() == before, "a function of the files"
    changed(folder / "choice.json", text="something else")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        page.write_page(folder)
    assert (folder / "run.html").read_bytes() == before and not [*folder.glob(".*partial")]


# --- pictures ---------------------------------------------------------------------------------------------


def test_the_page_stays_small(folder: Path) -> None:
    shutil.rmtree(folder / "samples")
    save_samples(folder / "samples", 0, [Sample("a prompt", 0, painted(1, (900, 600)))])
    first = folder / "samples" / "step-000000-0.png"
    for step in range(20, 600, 20):
        shutil.copy(first, first.with_name(f"step-{step:06d}-0.png"))
    found = made(folder)
    samples = [img for img in found.all("img") if "prompt" in str(img["alt"])]
    steps = [int(step) for step in str(found.all("input", type="range")[0]["data-steps"]).split()]
    assert len(samples) == len(steps) == 12 and {0, 40, 580} <= {*steps} and steps == sorted({*steps})
    assert {(img["width"], img["height"]) for img in samples} == {("512", "341")}
    assert all(str(img["src"]).startswith("data:image/jpeg") for img in samples)
    assert len(found.source) < 1e6


def test_many_samples_are_smaller() -> None:
    assert [max(side for count, side in pictures.SIDES.items() if n <= count) for n in (12, 48, 49, 121)] == [
        512, 512, 384, 256,
    ]  # fmt: skip


@pytest.mark.parametrize("wanted", [None, 0, 5, 61, 99, 1000])
def test_steps_are_spread(wanted: int | None) -> None:
    steps = [*range(100)]
    found = pictures.spread(steps, 12, wanted)
    assert len({*found}) == 12 and found == sorted(found) and (found[0], found[-1]) == (0, 99)
    assert wanted not in steps or wanted in found
    assert pictures.spread([1, 2], 12, None) == [1, 2]


def test_real_pictures_are_those_that_were_trained_on(folder: Path) -> None:
    images = folder.parent / "images"
    painted(99).save(images / "0.png")  # changed since
    (images / "below").mkdir()
    (images / "1.png").rename(images / "below" / "1.png")
    names = [str(img["alt"]) for img in made(folder).all("img") if str(img["alt"]).endswith(".png")]
    assert sorted({*names}) == ["2.png", "3.png", "4.png"] and names.count("3.png") == 2, "and in the table"
    report = json.loads((folder / "run.json").read_text())
    report["config"]["data"] |= {"images": "", "recursive": True, "folders": [{"images": str(images)}]}
    (folder / "run.json").write_text(json.dumps(report))
    names = [str(img["alt"]) for img in made(folder).all("img") if str(img["alt"]).endswith(".png")]
    assert sorted({*names}) == ["1.png", "2.png", "3.png", "4.png"]


# --- charts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1398, 0.1420), (-3, 12345), (1e-6, 3e-4), (7, 7), (0, 0)])
def test_points_and_ticks_lie_on_the_same_line(low: float, high: float) -> None:
    chart = charts.curves("x", {"a": [(0, low), (200, high)]})
    assert chart is not None and 2 <= len(chart.y_ticks) <= 6
    first, last = (dot.y for dot in chart.lines[0].dots)
    for tick in chart.y_ticks:
        assert charts.TOP <= tick.y <= charts.BOTTOM
        if high > low:
            share = (float(tick.text) - low) / (high - low)
            assert tick.y == pytest.approx(first + share * (last - first), abs=0.2)
    assert [tick.text for tick in chart.x_ticks] == ["0", "50", "100", "150", "200"]
    assert [tick.x for tick in chart.x_ticks] == pytest.approx(np.linspace(charts.LEFT, charts.RIGHT, 5), abs=0.1)


def test_the_marker_is_at_the_chosen_step() -> None:
    chart = charts.curves("x", {"a": [(0, 1), (40, 2), (200, 3)], "none": []}, marked=40)
    assert chart is not None and [line.name for line in chart.lines] == ["a"]
    (dot,) = [dot for dot in chart.lines[0].dots if dot.kind == "chosen"]
    assert chart.marker == dot.x == pytest.approx(charts.LEFT + (charts.RIGHT - charts.LEFT) / 5, abs=0.1)
    assert charts.curves("x", {"a": []}) is None


@pytest.mark.parametrize("window", [1, 3, 10])
def test_smoothing_is_a_mean_of_the_last_ones(window: int) -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = [y for _, y in charts.smoothed([*enumerate(values.tolist())], window)]
    expected = [values[max(0, i + 1 - window) : i + 1].mean() for i in range(50)]
    assert found == pytest.approx(expected)


def test_a_beaten_step_is_hollow() -> None:
    points = [(0, 0.1, 0.5), (20, 0.2, 0.7), (40, 0.3, 0.6), (60, 0.4, 0.7), (80, 0.5, 0.9)]
    chart = charts.trade("x", points, ("drift", "likeness"), 20)
    kinds = [dot.kind for dot in chart.lines[0].dots]
    assert kinds == ["", "chosen", "beaten", "beaten", ""]
    assert {label.text for label in chart.labels} == {"0", "20", "40", "60", "80"}
    xs, ys = zip(*((dot.x, dot.y) for dot in chart.lines[0].dots), strict=True)
    assert [*xs] == sorted(xs) and max(ys) == ys[0] and min(ys) == ys[4], "up is more"


def test_half_learned() -> None:
    assert half_learned({0: 1.0, 10: 0.8, 20: 0.5, 30: 0.0, 40: 0.4}) == 20
    assert half_learned({0: 1.0, 10: 0.995}) is None and half_learned({0: 1.0, 10: 2.0}) is None
    assert half_learned({}) is None


def test_what_is_a_number() -> None:
    assert [number(value) for value in (1, 0.5, True, "1", None, float("inf"), float("nan"), 10**400)] == [
        1, 0.5, None, None, None, None, None, None,
    ]  # fmt: skip


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_makes_the_page_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == FINISHED
    assert capsys.readouterr().out.strip() == str(folder / "run.html") and (folder / "run.html").exists()
    assert main([str(folder / "no such")]) == BAD_INPUT and not (folder / "no such").exists()
