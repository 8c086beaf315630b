"""Why each package must be at least as new as `pyproject.toml` says. Nothing is installed."""

import re
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parents[1]
FLOORS = {
    "torch": ("2.6", "FSDP2 is `torch.distributed.fsdp.fully_shard` from here on"),
    "diffusers": ("0.37", "with 0.36 the transformer's forward pass fails without `txt_seq_lens`, which is gone later"),
    "transformers": ("5.4", "the image processor of Qwen2-VL that needs no torchvision is in a module of its own"),
    "peft": ("0.18", "the first for transformers 5"),
    "accelerate": ("1.13", "before, a quantised model on one GPU without an index is refused (its issue 3895)"),
    "bitsandbytes": ("0.48", "models in int8 move between devices; transformers takes none before 0.46.1 for nf4"),
    "torchao": ("0.15", "diffusers takes none that is older"),
    "safetensors": ("0.5", "writes types of eight bits"),
    "tomli": ("2.1", "its errors hold the text and the place, for the message about a configuration"),
    "huggingface_hub": ("1.20", "goes on with a download whose connection broke; transformers 5.4 needs 1.5"),
}  # fmt: skip


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def declared() -> dict[str, str]:
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return dict(line.split(">=") for line in lines if ">=" in line)


@pytest.mark.parametrize("name", FLOORS)
def test_the_floor_is_what_the_code_needs(name: str) -> None:
    floor, reason = FLOORS[name]
    assert declared()[name] == floor and reason


@pytest.mark.parametrize("name", FLOORS)
def test_the_tested_version_is_not_below_the_floor(name: str) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("-", "_").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    assert numbers(tested[name]) >= numbers(FLOORS[name][0])
