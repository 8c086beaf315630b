"""The program on a pretended GPU, at full width: nothing raises, it fits, and the plan has said so.

What is run is in `tests/pretended_gpu/cases.py`, by one process for all tests, since torch must be changed before it is
imported. By default the configuration for 24 GB runs, with 2 and 3 blocks, which are carried on to 60. `-m slow` runs
the others so, and `warm_start`; `-m long` everything.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.pretended_gpu import guard, table
from trainer.hardware.memory import CONTEXT_BYTES, usable

ROOT = Path(__file__).parents[1]
SHIPPED = ("qwen_image_12gb", "qwen_image_16gb", "qwen_image_24gb", "qwen_image_80gb")
DAILY, SLOW = ("quick_24gb",), ("quick_12gb", "quick_16gb", "quick_80gb", "quick_prior")
"""The same with fewer experts."""
LONG = ("quick_recipe", "quick_loha", "quick_lokr")


def runs(but: str = "") -> list[Any]:
    marks = {
        **dict.fromkeys(DAILY, ()),
        **dict.fromkeys(SLOW, pytest.mark.slow),
        **dict.fromkeys(LONG, pytest.mark.long),
    }
    return [pytest.param(name, marks=mark) for name, mark in marks.items() if name != but]


OTHERS = ("merge", "compare", "i2l_style", "i2l_coarse", "i2l_fine")
WHOLE = {
    "trying strengths": 6,
    "seeding": 1,
    "stable losses": 4,
    "drawing samples": 2,
    "decoding samples": 2,
    "training": 2,
    "saving": 2,
    "export": 2,
}
"""Stages of a run, and how often each comes."""
ROUNDED = 1.005
"""The plan leaves out what is below half a percent: tables of positions, the picture that is encoded."""

pytestmark = pytest.mark.skipif(guard.obstacle() is not None, reason=str(guard.obstacle()))


def run(folder: Path, *words: str) -> dict[str, Any]:
    """What `python -m tests.pretended_gpu` finds; once for all processes of a test run."""
    file = folder / f"pretended-{'-'.join(words)}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            command = [sys.executable, "-m", "tests.pretended_gpu", *words, "--json", str(file)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(file.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test run have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def quick(shared: Path, name: str) -> Any:
    slow, daily = (*SLOW, "warm_start"), ("itself", *DAILY)
    return run(shared, *(slow if name in slow else daily), "--share")[name]


@pytest.fixture(scope="session")
def everything(shared: Path) -> dict[str, Any]:
    """All, carried on to 60 blocks."""
    return run(shared)


@pytest.fixture(scope="session")
def at_full_depth(shared: Path) -> dict[str, Any]:
    return run(shared, "qwen_image_24gb", "--blocks", "60")


def in_order(found: Any) -> None:
    """Nothing raised, and each part of a run came as often as it should."""
    for size in found["sizes"]:
        assert not size["error"], size["error"]
        times = {stage: told["times"] for stage, told in size["stages"].items()}
        if size["planned"]:
            assert {stage: times.get(stage) for stage in WHOLE} == WHOLE


def in_half_precision(found: Any) -> None:
    """Nothing of the transformer's is large in fp32, except what diffusers raises for a moment in norms and positions,
    head by head, and the sums of attention's backward pass."""
    by_head = re.compile(r"\w+ \(\d+, (\d+, 24|24, \d+), 128\)")
    for size in found["sizes"]:
        for stage in ("trying strengths", "stable losses", "drawing samples", "training"):
            told = size["stages"].get(stage, {"large": {}})["large"]
            assert all(by_head.fullmatch(what) for what in told), (stage, told)


def few_waits_and_copies(found: Any) -> None:
    """A step asks the GPU for its loss and for the norm of its gradients, and gets a batch; no more."""
    for size in found["sizes"]:
        training = size["stages"]["training"]
        assert training["syncs"] == 2 * training["times"]
        assert not training["copies"].keys() - {"cpu to cuda"}
        if not size["changes"]:  # no block comes from the CPU
            assert training["copies"]["cpu to cuda"] < 5e6 * training["times"]


def as_planned(found: Any) -> None:
    """No stage needs more than the plan of this very model says."""
    for size in found["sizes"]:
        compared = {name: told for name, told in size["planned"].items() if name in size["stages"]}
        assert len(compared) >= 4
        for name, told in compared.items():
            assert size["stages"][name]["peak"] + CONTEXT_BYTES <= ROUNDED * told["num_bytes"], name


def within_a_tenth(found: Any) -> None:
    """What 60 blocks need: no stage more than the plan's highest, which is not far above."""
    measured, planned = table.found_peaks(found), table.planned_peaks(found)
    assert 0.9 * max(planned.values()) <= max(measured.values()) <= ROUNDED * max(planned.values())
    for name in measured.keys() & planned.keys():
        assert measured[name] <= ROUNDED * planned[name], name
    assert 0.9 * planned["training"] <= measured["training"]


def fits(found: Any) -> None:
    """With room for what is not counted: cuDNN's workspaces, fragmentation."""
    assert max(table.found_peaks(found).values()) <= usable(found["card"])


def fits_with_what_is_absent(found: Any, limit: float) -> None:
    """The same by few blocks, and what the others would take that are not there."""
    for size in found["sizes"]:
        for name, told in size["stages"].items():
            assert told["peak"] + told["absent"] + CONTEXT_BYTES <= limit, name


@pytest.mark.slow
def test_it_notices_what_it_is_there_for(shared: Path) -> None:
    in_order(quick(shared, "itself"))


@pytest.mark.parametrize("name", [*runs(), pytest.param("warm_start", marks=pytest.mark.slow)])
def test_nothing_raises(shared: Path, name: str) -> None:
    in_order(quick(shared, name))


@pytest.mark.parametrize("name", runs())
def test_a_run_is_as_planned(shared: Path, name: str) -> None:
    as_planned(quick(shared, name))


@pytest.mark.parametrize("name", runs(but="quick_loha"))  # whose product is formed in fp32, as PEFT forms it
def test_nothing_large_is_in_fp32(shared: Path, name: str) -> None:
    in_half_precision(quick(shared, name))


@pytest.mark.parametrize("name", runs(but="quick_prior"))
def test_a_step_waits_twice(shared: Path, name: str) -> None:
    """But with a prior: a pretended GPU is asked for each number of a list, where a real one is asked once."""
    few_waits_and_copies(quick(shared, name))


@pytest.mark.parametrize("name", runs())
def test_a_run_fits_its_card(shared: Path, name: str) -> None:
    found = quick(shared, name)
    fits_with_what_is_absent(found, usable(found["card"]))


@pytest.mark.slow
def test_encoders_find_room_beside_a_transformer(shared: Path) -> None:
    found = quick(shared, "warm_start")
    fits_with_what_is_absent(found, found["bytes"])
    siglip, dinov3 = (found["sizes"][0]["stages"][f"encoding pictures by {name}"] for name in ("SigLIP2", "DINOv3"))
    assert siglip["peak"] > 3e9 > dinov3["peak"]  # the larger one has gone to the CPU


@pytest.mark.parametrize("name", runs())
def test_the_plan_of_60_blocks(shared: Path, name: str) -> None:
    within_a_tenth(quick(shared, name))
    fits(quick(shared, name))


@pytest.mark.long
@pytest.mark.parametrize("name", [*SHIPPED, *OTHERS])
def test_nothing_raises_in_any_size(everything: dict[str, Any], name: str) -> None:
    in_order(everything[name])


@pytest.mark.long
@pytest.mark.parametrize("name", [*SHIPPED, "merge"])
def test_every_plan_of_60_blocks(everything: dict[str, Any], name: str) -> None:
    as_planned(everything[name])
    within_a_tenth(everything[name])
    fits(everything[name])
    in_half_precision(everything[name])
    few_waits_and_copies(everything[name])


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS[1:])
def test_nothing_large_is_in_fp32_elsewhere(everything: dict[str, Any], name: str) -> None:
    if name == "compare":
        in_half_precision(everything[name])
        few_waits_and_copies(everything[name])
    fits(everything[name])


@pytest.mark.long
def test_the_page_is_as_it_is_found(everything: dict[str, Any]) -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.markdown(everything) in page.split(table.BEGIN)[1].split(table.END)[0]


@pytest.mark.long
def test_what_is_carried_on_is_what_60_blocks_need(everything: dict[str, Any], at_full_depth: dict[str, Any]) -> None:
    in_order(at_full_depth["qwen_image_24gb"])
    carried_on, measured = (table.found_peaks(found["qwen_image_24gb"]) for found in (everything, at_full_depth))
    for name in table.planned_peaks(everything["qwen_image_24gb"]):
        assert measured[name] == pytest.approx(carried_on[name], rel=0.003), name
    within_a_tenth(at_full_depth["qwen_image_24gb"])
    fits(at_full_depth["qwen_image_24gb"])


def test_why_it_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(guard.shutil, "which", lambda name: None)
    assert "no C++ compiler" in str(guard.obstacle())
