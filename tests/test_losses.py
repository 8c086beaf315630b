"""Short fixed runs whose curves are committed: a change that was not meant to touch the arithmetic does not move them.

One that was meant to writes them anew, `python -m tests.test_losses`, and says why in its commit message.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import train

ROOT = Path(__file__).parents[1]
CURVES = ROOT / "tests" / "losses"
COMMON = ("train.steps=4", "train.batch_size=2", "validation.every=2", "validation.prompts=[]", "init.i2l.strength=1.0")
RUNS: dict[str, list[tuple[str, ...]]] = {
    "random": [("init.method=random",)],
    "i2l": [()],
    "merge": [("init.i2l.mode=merge",)],
    "dora": [("adapter.use_dora=true", "adapter.target_modules=attention")],
    "accumulation": [("train.gradient_accumulation_steps=2", "data.caption_dropout=0.3")],
    "two_resolutions": [("data.resolution=32",), ("data.resolution=64", "train.lr_schedule=cosine")],
}
"""Settings of the runs, one after the other, on configs/creatures.toml."""


def curve(name: str, folder: Path, cache: Path) -> str:
    """The runs' numbers, a line for each record of metrics.jsonl: six digits, without times."""
    lines = []
    for number, settings in enumerate(RUNS[name]):
        output = folder / str(number)
        arguments = ["--config", str(ROOT / "configs" / "creatures.toml"), "--output", str(output), "--quiet"]
        arguments += [word for setting in (*COMMON, f"data.cache={cache}", *settings) for word in ("--set", setting)]
        assert train.main(arguments) == 0
        lines.append(f"# {' '.join(settings) or 'as it is'}")
        for record in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
            lines.append(" ".join(f"{key} {record[key]:.6g}" for key in record if key not in ("seconds", "time")))
    return "\n".join(lines) + "\n"


def values(text: str) -> tuple[list[str], list[float]]:
    """The words of a curve, and its numbers."""
    words, numbers = [], []
    for word in text.split():
        try:
            numbers.append(float(word))
        except ValueError:
            words.append(word)
    return words, numbers


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("random", "i2l") else [pytest.mark.slow]) for name in RUNS]
)
def test_the_curve_is_the_committed_one(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the configuration names the miniature's folders
    words, numbers = values(curve(name, tmp_path, cache))
    expected_words, expected = values((CURVES / f"{name}.txt").read_text())
    assert words == expected_words
    assert numbers == pytest.approx(expected, rel=1e-4)  # other processors add in another order


def test_the_starts_differ_where_they_should() -> None:
    curves = {name: (CURVES / f"{name}.txt").read_text() for name in RUNS}
    first = {name: values(text)[1][1] for name, text in curves.items()}  # the held-out loss before the first step
    assert first["i2l"] < 0.98 * first["random"]
    assert first["merge"] == pytest.approx(first["i2l"], rel=0.05) and first["merge"] != first["i2l"]
    assert first["i2l"] < first["dora"] < 0.98 * first["random"]  # on the attention alone
    assert len(set(curves.values())) == len(curves)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            (CURVES / f"{name}.txt").write_text(curve(name, Path(folder) / name, Path(folder) / "cache"))
