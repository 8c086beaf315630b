"""Captions by Qwen2.5-VL: what is asked, what becomes of the answers, what is written, and that training reads it."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from tests import helpers
from tests.helpers import BAD_INPUT, FINISHED, files, kill_me, killed
from trainer import config, plan, qwen_image
from trainer.data.__main__ import main
from trainer.data.audit.words import captions_of
from trainer.data.caption import vision_model, written
from trainer.data.caption.answers import CUT, LONG, WHOLE, Answer, Limit, caption_of, shortened
from trainer.data.caption.templates import LANGUAGES, Template, load
from trainer.data.captions import CaptionError
from trainer.data.dataset import DataConfig, contents, scan
from trainer.files import read_json

MODEL, CAPTIONER = Path("demo/model"), Path("demo/captioner")
WORDS = "a small red round creature, in the snow"


def words(texts: Sequence[str]) -> dict[str, int]:
    """A token for each word."""
    return {text: len(text.split()) for text in texts}


def limit(tokens: int, trigger: str = "") -> Limit:
    return Limit(tokens, words, trigger)


class Parrot:
    """In place of the model: the same answer, and what it was asked."""

    asked: list[tuple[int, str, int]] = []  # noqa: RUF012

    def __init__(self, *_: object) -> None:
        Parrot.asked = []

    def __call__(self, pictures: Sequence[Image.Image], instruction: str, max_tokens: int) -> list[Answer]:
        self.asked.append((len(pictures), instruction, max_tokens))
        return [Answer(f"{WORDS} {picture.size[0]}", True) for picture in pictures]


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> type[Parrot]:
    monkeypatch.setattr(vision_model, "Captioner", Parrot)
    monkeypatch.setattr(Parrot, "asked", [])
    return Parrot


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(f"[model]\nbase = '{MODEL.as_posix()}'\ndtype = 'fp32'\n[data]\nimages = 'nowhere'\n")
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five pictures of different widths, one of them in a folder below."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "c.jpg", "d.png", "below/e.png")):
        Image.new("RGB", (64 + number, 64), (40 * number, 90, 120)).save(folder / name)
    return folder


def command(images: Path, toml: Path, *arguments: str, output: str = "captions") -> int:
    return main(["caption", str(images), "--config", str(toml), "--output", str(toml.parent / output), *arguments])


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text(encoding="utf-8") for name in files(folder) if name.endswith(".txt")}


# --- templates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_shipped_templates(language: str) -> None:
    problems: list[str] = []
    template = load(None, language, problems)
    assert template is not None and not problems
    plain = [template.question(detail, pose=False, trigger="") for detail in (1, 2, 3)]
    assert len({*plain}) == 3 and not any("{" in text or "  " in text for text in plain)
    whole = template.question(2, pose=True, trigger="zorp")
    assert template.pose in whole and "zorp" in whole and "zorp" not in plain[1]
    assert list(template.max_tokens) == sorted({*template.max_tokens})


def test_an_unknown_field_is_an_error_that_names_the_known_ones(
    tmp_path: Path, images: Path, toml: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "template.toml"
    file.write_text(
        '[en]\ninstruction = "Say it, {details}. Who: the subject"\nform = ["{who}", "{where}"]\n'
        'fields = { who = "Who", what = "What" }\n[fr]\ninstruction = "Dis-le"\n'
    )
    assert command(images, toml, "--template", str(file), "--pose") == BAD_INPUT
    said = caplog.text
    assert "[en] instruction: unknown field {details}; it may have {detail}, {pose}, {trigger}" in said
    assert "[en] form: unknown field {where}; it may have {who}, {what}" in said
    assert '[en] fields: the label "What" of what is not in the instruction' in said
    assert "fr: unknown key" in said and str(file) in said


def test_a_template_without_the_language_and_one_with_braces(tmp_path: Path) -> None:
    file, problems = tmp_path / "template.toml", list[str]()
    file.write_text('[en]\ninstruction = "Say it"\n')
    assert load(file, "zh", problems) is None
    assert problems == [f"{file}: has no [zh], which --language asks for; it has [en]"]
    file.write_text('[en]\ninstruction = "Say it as {json"\nform = ["no field"]\nmax_tokens = [0, 1, 2]\n')
    problems.clear()
    assert load(file, "en", problems) is None
    told = [problem.removeprefix(f"{file}: [en] ").split()[0] for problem in problems]
    assert told == ["instruction:", "form", "max_tokens"]


CHINESE = """**主体**:一只红色的小动物
风格:插画,明亮。
细节: 雪地,背景有树
肢体:无
避免:无。"""


def test_a_structured_chinese_answer() -> None:
    template = load(None, "zh", [])
    assert template is not None
    text, done = caption_of(Answer(CHINESE, True), template, limit(512))
    assert text == "一只红色的小动物。雪地,背景有树。插画,明亮" and not done
    text, done = caption_of(Answer(CHINESE.replace("避免:无", "避免:水印"), True), template, limit(512))
    assert text.endswith("需避免的缺陷\uff1a水印")
    text, done = caption_of(Answer("一只红色的小动物", True), template, limit(512))
    assert text == "一只红色的小动物" and done == [WHOLE]


def test_a_bilingual_answer() -> None:
    template = load(None, "both", [])
    assert template is not None
    answer = Answer("English: A red creature. It sits.\n\n中文\uff1a一只红色的动物。", True)
    assert caption_of(answer, template, limit(512)) == ("A red creature. It sits. 一只红色的动物。", [])


PLAIN = Template(instruction="Say it")


@pytest.mark.parametrize(
    ("text", "tokens", "shorter"),
    [
        ("One two. Three four. Five six seven.", 9, "One two. Three four. Five six seven."),
        ("One two. Three 4.5 four. Five six seven.", 6, "One two. Three 4.5 four."),
        ("One two three, four five six.", 4, "One two three"),
        ("One two three four", 2, "One two"),
    ],
)
def test_a_long_caption_ends_with_a_sentence(text: str, tokens: int, shorter: str) -> None:
    assert (
        shortened(text, Limit(tokens, lambda some: {t: 100 * (len(t.split()) > tokens) for t in some}, "")) == shorter
    )


def test_what_was_done_to_an_answer_is_told() -> None:
    long = "This is a sentence of some words. " * 30
    text, done = caption_of(Answer(long, True), PLAIN, limit(100))
    assert done == [LONG] and text.endswith("words.") and 93 < len(text.split()) <= 100
    with_trigger = caption_of(Answer(long, True), PLAIN, limit(98, trigger="two words"))[0]
    assert len(f"two words, {with_trigger}".split()) <= 98 and len(with_trigger.split()) == 91
    assert caption_of(Answer("It sits. It looks at the", False), PLAIN, limit(100)) == ("It sits.", [CUT])
    assert caption_of(Answer('"It  sits\n there"', True), PLAIN, limit(100)) == ("It sits there", [])
    for bad in ("", " \n", '""'):
        with pytest.raises(CaptionError, match="no answer"):
            caption_of(Answer(bad, True), PLAIN, limit(100))


def test_tokens_are_counted_by_the_base() -> None:
    sentence = "a small creature in the middle, in the snow. "
    count = partial(qwen_image.prompt_tokens, str(MODEL))
    text, done = caption_of(Answer(sentence * 80, True), PLAIN, Limit(512, count, ""))
    longer = f"{text} {sentence}".strip()
    assert done == [LONG] and count([text])[text] <= 512 < count([longer])[longer]


# --- the model --------------------------------------------------------------------------------------------


def test_a_batch_has_the_answers_of_each_picture_alone() -> None:
    """The plain reference: one conversation at a time, filled up with nothing."""
    device = torch.device("cpu")
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in ((60, 60), (200, 90))]
    captioner = vision_model.Captioner(qwen_image.TextEncoder(str(MODEL), device), torch.float32)
    found = captioner(pictures, "Say what you see", 12)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    for picture, answer in zip(pictures, found, strict=True):
        patches = qwen_image.picture_processor(MODEL / "processor")(images=[picture], return_tensors="pt")
        tokens = int(patches["image_grid_thw"].prod()) // 4
        text = vision_model.conversation("Say what you see").replace("<|image_pad|>", "<|image_pad|>" * tokens)
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(
            input_ids=ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=0,
            **patches,
        )
        assert answer.text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert answer.text
    assert found[0] != found[1]


def test_large_pictures_are_scaled_down() -> None:
    captioner = vision_model.Captioner(qwen_image.TextEncoder(str(MODEL), torch.device("cpu")), torch.float32)
    seen: list[torch.Tensor] = []
    captioner._model.generate = lambda **inputs: (seen.append(inputs["image_grid_thw"]), inputs["input_ids"])[1]
    captioner([Image.new("RGB", (3000, 1500))], "Say it", 4)
    assert 900 * 28**2 < int(seen[0].prod()) * 14**2 <= vision_model.MAX_PIXELS


def test_a_model_without_a_language_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "captioner"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL / "tokenizer" / name).read_bytes())
    (folder / "config.json").write_bytes((MODEL / "text_encoder" / "config.json").read_bytes())
    weights = load_file(MODEL / "text_encoder" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, folder / "model.safetensors"
    )
    need = vision_model.need(qwen_image.ModelConfig(base=str(MODEL)), str(folder))
    assert [problem for problem in need.check() if "no language head" in problem]
    save_file(weights, folder / "model.safetensors")
    assert need.check() == [] and vision_model.need(qwen_image.ModelConfig(base=str(MODEL)), None).check() == []
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}')
    assert "qwen3_vl" in need.check()[0]


# --- the command ------------------------------------------------------------------------------------------


def test_captions_lie_as_the_pictures_do(
    images: Path, toml: Path, parrot: type[Parrot], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(images)
    Image.new("RGB", (70, 64)).save(images / "a.jpg")
    assert command(images, toml, "--set", "data.recursive=true", "--trigger", "zorp", "--batch-size", "2") == FINISHED
    assert texts(toml.parent / "captions") == {
        "a.png.txt": f"{WORDS} 64\n",
        "a.jpg.txt": f"{WORDS} 70\n",
        "b.txt": f"{WORDS} 65\n",
        "c.txt": f"{WORDS} 66\n",
        "d.txt": f"{WORDS} 67\n",
        "below/e.txt": f"{WORDS} 68\n",
    }
    assert [count for count, _, _ in parrot.asked] == [2, 2, 2] and '"zorp"' in parrot.asked[0][1]
    assert files(images) == before | {"a.jpg"}
    said = capsys.readouterr().out
    assert "6 captions in" in said and "0 of them were there already" in said and "peak memory" in said
    found = scan(
        DataConfig(images=str(images), captions=str(toml.parent / "captions"), recursive=True, resolution=64),
        multiple=16,
        seed=0,
    )
    assert {e.path.name: e.caption for e in found.train}["e.png"] == f"{WORDS} 68"


def test_detail_and_pose_are_asked_for(images: Path, toml: Path, parrot: type[Parrot]) -> None:
    shipped = load(None, "en", [])
    assert shipped is not None
    assert command(images, toml, "--detail", "1", output="one") == FINISHED
    assert {row[1:] for row in parrot.asked} == {(shipped.question(1, pose=False, trigger=""), shipped.max_tokens[0])}
    assert command(images, toml, "--detail", "3", "--pose", output="three") == FINISHED
    assert {row[1:] for row in parrot.asked} == {(shipped.question(3, pose=True, trigger=""), shipped.max_tokens[2])}


def test_rows_of_metadata(images: Path, toml: Path, parrot: type[Parrot]) -> None:
    arguments = ("--format", "jsonl", "--set", "data.recursive=true")
    assert command(images, toml, *arguments) == FINISHED
    output = toml.parent / "captions"
    rows = [json.loads(line) for line in (output / "metadata.jsonl").read_text().splitlines()]
    assert rows == [
        {"file_name": name, "text": f"{WORDS} {64 + n}"} for n, name in enumerate(("a.png", "b.png", "c.jpg", "d.png"))
    ]
    (output / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "by hand"}) + "\n")
    assert command(images, toml, *arguments) == FINISHED
    rows = [json.loads(line) for line in (output / "metadata.jsonl").read_text().splitlines()]
    assert rows[0]["text"] == "by hand" and len(rows) == 4
    config = DataConfig(images=str(images), captions=str(output), recursive=True, resolution=64)
    found = {e.path.name: e.caption for e in scan(config, multiple=16, seed=0).train}
    assert found["a.png"] == "by hand" and found["e.png"] == f"{WORDS} 68" and len(found) == 5


def test_a_killed_command_goes_on_where_it_was(
    images: Path, toml: Path, parrot: type[Parrot], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed between the record of its second batch and the captions of it."""
    output, real = toml.parent / "captions", written.write_text

    def work() -> None:
        def second(path: Path, text: str) -> None:
            if path.name == "c.txt":
                kill_me()
            real(path, text)

        monkeypatch.setattr(written, "write_text", second)
        command(images, toml, "--batch-size", "2")

    assert killed(work)
    assert texts(output) == {"a.txt": f"{WORDS} 64\n", "b.txt": f"{WORDS} 65\n"}
    (output / "a.txt").write_text("by hand\n")
    assert command(images, toml, "--batch-size", "2") == FINISHED
    assert parrot.asked == []
    whole = {f"{name}.txt": f"{WORDS} {64 + number}\n" for number, name in enumerate("abcd")}
    assert texts(output) == {**whole, "a.txt": "by hand\n"}
    Image.new("RGB", (90, 64)).save(images / "b.png")
    assert command(images, toml, "--batch-size", "2") == FINISHED
    assert [count for count, _, _ in parrot.asked] == [1]
    assert texts(output)["b.txt"] == f"{WORDS} 90\n" and texts(output)["a.txt"] == "by hand\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--detail", "3"), "question"),
        (("--trigger", "zorp"), 'trigger "" -> "zorp"'),
        (("--format", "jsonl"), 'format "txt" -> "jsonl"'),
        (("--set", "model.dtype=bf16"), "model"),
    ],
)
def test_captions_made_in_another_way_are_not_mixed(
    images: Path,
    toml: Path,
    parrot: type[Parrot],
    caplog: pytest.LogCaptureFixture,
    arguments: tuple[str, str],
    said: str,
) -> None:
    assert command(images, toml) == FINISHED
    before = texts(toml.parent / "captions")
    assert command(images, toml, *arguments) == BAD_INPUT
    assert "made in another way" in caplog.text and said in caplog.text
    assert texts(toml.parent / "captions") == before


def test_captions_of_another_origin_are_not_overwritten(
    images: Path, toml: Path, parrot: type[Parrot], caplog: pytest.LogCaptureFixture
) -> None:
    output = toml.parent / "captions"
    output.mkdir()
    (output / "a.txt").write_text("mine")
    assert command(images, toml) == BAD_INPUT
    assert "of another origin (a.txt)" in caplog.text and texts(output) == {"a.txt": "mine"}


def test_an_empty_answer_is_told_and_asked_again(
    images: Path, toml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mute(Parrot):
        def __call__(self, pictures: Sequence[Image.Image], instruction: str, max_tokens: int) -> list[Answer]:
            answers = super().__call__(pictures, instruction, max_tokens)
            return [Answer("", True) if p.size[0] == 65 else a for p, a in zip(pictures, answers, strict=True)]

    monkeypatch.setattr(vision_model, "Captioner", Mute)
    assert command(images, toml) == FINISHED
    said = capsys.readouterr().out
    assert "without a caption: the model gave no answer" in said and "(1): b.png" in said and "3 captions in" in said
    assert "b.txt" not in texts(toml.parent / "captions")
    monkeypatch.setattr(vision_model, "Captioner", Parrot)
    assert command(images, toml) == FINISHED
    assert [count for count, _, _ in Parrot.asked] == [1] and len(texts(toml.parent / "captions")) == 4


def test_all_that_is_wrong_is_told_before_a_model_loads(
    images: Path, toml: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen_image.TextEncoder, "model", lambda *_: pytest.fail("a model was loaded"))
    (images / "bad.png").write_bytes(b"no picture")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:60])
    Image.new("RGB", (900, 2)).save(images / "line.png")
    toml.write_text("[model]\nbase = 'demo/model'\ndtyp = 'fp32'\n")
    arguments = ["--template", "no.toml", "--batch-size", "0", "--captioner", "demo/images"]
    assert (
        main(["caption", str(images), "--config", str(toml), "--output", str(images / "here"), *arguments]) == BAD_INPUT
    )
    assert "dtyp: unknown key" in caplog.text and "no.toml" in caplog.text and "--batch-size" in caplog.text
    toml.write_text("[model]\nbase = 'demo/model'\n")
    caplog.clear()
    assert (
        main(["caption", str(images), "--config", str(toml), "--output", str(images / "here"), *arguments]) == BAD_INPUT
    )
    for said in ("no.toml", "--batch-size", "config.json", "lies in the folder", "bad.png", "cut.png", "too unequal"):
        assert said in caplog.text, said
    assert not (images / "here").exists()


# --- read by training -------------------------------------------------------------------------------------


def test_captions_elsewhere_count_instead_of_those_beside_the_pictures(images: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, text in (("a", "here"), ("b", "here"), ("c", "here")):
        (images / f"{name}.txt").write_text(text)
    (images / "b.txt").write_bytes(b"au caf\xe9")  # what does not count need not be right
    (images / "metadata.jsonl").write_text(
        '{"file_name": "d.png", "text": "row"}\n{"file_name": "a.png", "text": "row"}'
    )
    for name in ("a", "b", "d"):
        (elsewhere / f"{name}.txt").write_text("there")
    config = DataConfig(images=str(images), captions=str(elsewhere), resolution=64)
    found = scan(config, multiple=16, seed=0)
    assert {e.path.name: e.caption for e in found.train} == {
        "a.png": "there",
        "b.png": "there",
        "c.jpg": "here",
        "d.png": "there",
    }
    notes = "\n".join(found.notes)
    assert "captions has others (2): a.txt, b.txt" in notes and "beside the picture counts (1): c.jpg" in notes
    audited = captions_of(images, contents(images, config), config, [])
    assert {path.name: caption.text for path, caption in audited.items()}["a.png"] == "there"
    (elsewhere / "a.txt").write_bytes(b"au caf\xe9")
    with pytest.raises(plan.DataError, match=r"a\.txt: is not UTF-8"):
        scan(config, multiple=16, seed=0)
    assert DataConfig(images=str(images), captions=str(tmp_path / "no")).problems() == [
        f"captions: there is no folder {tmp_path / 'no'}"
    ]


def test_a_run_is_trained_on_the_captions(
    run_toml: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pictures without captions to an adapter, by the miniature captioner."""
    for path in pictures.glob("*.txt"):
        path.unlink()
    arguments = ("--captioner", str(CAPTIONER), "--template", "demo/captioner.toml")
    assert command(pictures, run_toml, *arguments, "--trigger", "zorp") == FINISHED
    made = texts(tmp_path / "captions")
    assert len(made) == 6 and all(" creature with " in text for text in made.values())
    encoded: list[str] = []
    real: Callable[..., Any] = qwen_image.PromptEncoder.__call__

    def encode(self: qwen_image.PromptEncoder, prompts: Sequence[str]) -> Any:
        encoded.extend(prompts)
        return real(self, prompts)

    monkeypatch.setattr(qwen_image.PromptEncoder, "__call__", encode)
    settings = (f"data.captions={tmp_path / 'captions'}", "data.trigger=zorp", "train.steps=2")
    assert helpers.run(run_toml, tmp_path / "out", *settings) == FINISHED
    assert {f"zorp, {text.strip()}" for text in made.values()} <= {*encoded}
    assert read_json(tmp_path / "out" / "run.json")["status"] == "finished"


def test_the_keys_of_the_templates_are_explained() -> None:
    text = Path("trainer/data/caption/templates.toml").read_text(encoding="utf-8")
    head = text[: text.index("[en]")]
    for name in config.to_dict(PLAIN):
        assert f"# {name} " in head, name
