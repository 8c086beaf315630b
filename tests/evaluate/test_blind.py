"""The page of pairs: what it shows, what it hides, and what comes of it in a browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers import BAD_INPUT, FINISHED
from trainer.config import ConfigError
from trainer.evaluate import blind, votes
from trainer.evaluate.__main__ import main
from trainer.validation import Sample, write_sample

HOSTILE = "</script><script>document.title = 'taken'</script>"
NAMES = ("first_secret", "second_secret")
PROMPTS = ("a hat", HOSTILE, "a bow")
SEEDS = 2
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Samples of three prompts with two seeds, of two LoRAs."""
    random = np.random.default_rng(0)
    for name in NAMES:
        for row, prompt in enumerate(PROMPTS):
            for seed in range(SEEDS):
                picture = Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8))
                write_sample(tmp_path / name / f"{row}-{seed}.png", Sample(prompt, seed, picture))
    return [tmp_path / name for name in NAMES]


def made(folders: list[Path], seed: int = 0) -> tuple[Path, dict[str, Any]]:
    """The page and its key."""
    page = folders[0].parent / "page.html"
    key = blind.write_page(page, blind.pair_up(blind.read_folders(folders), seed))
    return page, json.loads(key.read_text())


def test_each_prompt_and_seed_is_a_pair_with_sides_by_the_seed(folders: list[Path]) -> None:
    found = blind.pair_up(blind.read_folders(folders), 0)
    assert sorted((pair.prompt, pair.seed) for pair in found) == sorted(
        (p, str(s)) for p in PROMPTS for s in range(SEEDS)
    )
    for pair in found:
        assert {pair.left, pair.right} == {*NAMES}
        assert (pair.left_file.parent.name, pair.right_file.parent.name) == (pair.left, pair.right)
        assert pair.left_file.name == pair.right_file.name
    assert blind.pair_up(blind.read_folders(folders), 0) == found
    others = [blind.pair_up(blind.read_folders(folders), seed) for seed in range(1, 5)]
    assert any(other != found for other in others)
    sides = [pair.left for other in (found, *others) for pair in other]
    assert 5 < sides.count(NAMES[0]) < 25


def test_of_three_each_two_are_held_against_each_other(folders: list[Path], tmp_path: Path) -> None:
    third = Path(shutil.copytree(folders[0], tmp_path / "third"))
    (third / "0-0.png").unlink()
    found = blind.pair_up(blind.read_folders([*folders, third]), 0)
    counts = {frozenset((pair.left, pair.right)) for pair in found}
    assert len(found) == 6 + 5 + 5 and len(counts) == 3


def test_the_page_does_not_know_the_names(folders: list[Path]) -> None:
    page, key = made(folders)
    source = page.read_text(encoding="utf-8")
    assert not any(name in source for name in (*NAMES, "secret", "key.json"))
    assert len(key["pairs"]) == 6 and key["page"] in source
    assert {side for pair in key["pairs"].values() for side in (pair["left"], pair["right"])} == {*NAMES}
    assert source.count("data:image/") == 12 and "http" not in source


def test_a_hostile_prompt_stays_a_text(folders: list[Path]) -> None:
    source = made(folders)[0].read_text(encoding="utf-8")
    assert HOSTILE not in source and source.count("<script") == 2


def test_pictures_without_texts_are_paired_by_their_names(tmp_path: Path) -> None:
    for name, files in (("a", "xy"), ("b", "yz")):
        (tmp_path / name).mkdir()
        for file in files:
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{file}.png")
    (pair,) = blind.pair_up(blind.read_folders([tmp_path / "a", tmp_path / "b"]), 0)
    assert (pair.prompt, pair.seed) == ("y", "")


def test_what_is_wrong_with_folders_is_told(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        "two folders": [folders[0]],
        "no such folder": [folders[0], tmp_path / "none"],
        "no picture in it": [folders[0], tmp_path / "empty"],
    }
    for expected, given in cases.items():
        with pytest.raises(ConfigError, match=expected):
            blind.read_folders(given)
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "q.png")
    with pytest.raises(ConfigError, match="has its like"):
        blind.read_folders([folders[0], tmp_path / "empty"])
    (folders[1] / "0-0.png").write_bytes(b"no picture")
    assert main(["blind", *map(str, folders), "--output", str(tmp_path / "p.html")]) == BAD_INPUT
    assert not (tmp_path / "p.html").exists()


def test_the_command(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.html"
    arguments = ["blind", *map(str, folders), "--output", str(page), "--real", str(folders[0]), "--question", "Which?"]
    assert main(arguments) == FINISHED and "6 pairs" in capsys.readouterr().out
    assert page.read_text().count("a real picture") == 6 and (page.parent / "key.json").exists()
    assert main([*arguments[:3], "--output", str(tmp_path / "page")]) == BAD_INPUT


DRIVER = """
<script>
  const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const leave = (id, text) => {
    const out = document.createElement("pre");
    out.id = id;
    out.textContent = text;
    document.body.append(out);
  };
  URL.createObjectURL = (blob) => {
    blob.text().then((text) => leave("saved", text));
    return "#";
  };
  const seen = [];
  const told = () => seen.push(document.getElementById("place").textContent);
  told();
  press("ArrowLeft"); press("ArrowDown"); press("ArrowLeft"); told();
  press("ArrowUp"); told(); press("ArrowRight");                       // another answer to the third pair
  document.querySelector("#choices [data-choice=right]").click();
  document.querySelector("#pair [data-choice=left]").click();
  document.getElementById("next").click(); told();                     // the last one is skipped
  document.getElementById("save").click();
  leave("seen", JSON.stringify(seen));
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_votes_in_a_browser_are_counted(folders: list[Path], tmp_path: Path) -> None:
    page, key = made(folders)
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", DRIVER + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dumped = subprocess.run(
        [str(CHROMIUM), *options, "--virtual-time-budget=4000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip

    def text(name: str) -> Any:
        (found,) = re.findall(f'<pre id="{name}">(.*?)</pre>', dumped, re.DOTALL)
        return json.loads(html.unescape(found))

    assert text("seen") == [
        "pair 1 of 6, 0 judged", "pair 4 of 6, 3 judged", "pair 3 of 6, 3 judged", "5 judged",
    ]  # fmt: skip
    assert "<title>Which picture is better?</title>" in dumped, "a prompt is no script"
    pairs = [*key["pairs"]]
    saved = tmp_path / "votes.json"
    saved.write_text(json.dumps(text("saved")))
    read, _ = votes.read_votes([saved], page.with_name("key.json"))
    sides = dict(zip(pairs, ["left", "equal", "right", "right", "left"], strict=False))
    assert {vote.pair: vote.preferred for vote in read} == {
        pair: key["pairs"][pair].get(side) for pair, side in sides.items()
    }
    (row,) = votes.count(read)["overall"]
    assert row["ties"] == 1 and row["wins"] + row["losses"] == 4
