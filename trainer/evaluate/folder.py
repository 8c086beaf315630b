"""The output folder of an evaluation: what is asked for, then pictures and numbers as they come, so that an evaluation
that was stopped goes on. Whatever is made of them reads them from there, stopped or not."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import config
from trainer.errors import UserError
from trainer.evaluate.plan import REPORT_FILE, Candidate, Evaluation, stopped
from trainer.files import content_hash, read_json, remove_leftovers, write_json
from trainer.hub import sources

SCHEMA = 1


@dataclass(frozen=True)
class Drawn:
    """A sample, and its file."""

    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Seen:
    """The files in which it is kept what was seen of a LoRA."""

    candidate: Candidate
    numbers: Path
    """JSON: `errors`, N 8, the stable error of each held-out picture at each sigma, and `drift`, or null."""
    redrawn: Mapping[float, Sequence[Path]]
    """Sigma -> each held-out picture."""
    samples: Sequence[Drawn]
    """Those of a prompt together, in the order of their seeds."""

    @property
    def whole(self) -> bool:
        redrawn = (path for paths in self.redrawn.values() for path in paths)
        return all(path.is_file() for path in (self.numbers, *redrawn, *(one.path for one in self.samples)))

    @property
    def errors(self) -> Tensor:
        return torch.tensor(self._numbers["errors"])

    @property
    def drift(self) -> float | None:
        found: float | None = self._numbers["drift"]
        return found

    @cached_property
    def _numbers(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.numbers)
        return found


def seen_of(evaluation: Evaluation) -> list[Seen]:
    """One of each LoRA, the base first: `samples/<LoRA>/numbers.json`, `samples/<LoRA>/<prompt>-<seed>.png`, and
    `redrawn/<picture>-<sigma>-<LoRA>.png`."""
    request, found = evaluation.request, list[Seen]()
    for number, candidate in enumerate(evaluation.candidates):
        name = f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '_', candidate.name)}"
        folder = evaluation.output / "samples" / name
        samples = [
            Drawn(prompt, evaluation.config.validation.seed + place, folder / f"{row}-{place}.png")
            for row, prompt in enumerate(evaluation.prompts)
            for place in range(request.seeds)
        ]
        redrawn = {sigma: _redrawn(evaluation, f"-{sigma:g}-{name}") for sigma in request.sigmas}
        found.append(Seen(candidate, folder / "numbers.json", redrawn, samples))
    return found


def originals_of(evaluation: Evaluation) -> list[Path]:
    """The held-out pictures as the VAE gives them back: `redrawn/<picture>.png`."""
    return _redrawn(evaluation, "")


def _redrawn(evaluation: Evaluation, ending: str) -> list[Path]:
    return [evaluation.output / "redrawn" / f"{place}{ending}.png" for place in range(len(evaluation.looked_at))]


def begin(evaluation: Evaluation, seen: Sequence[Seen]) -> dict[str, Any]:
    """Write what is asked for, the beginning of the report, which is returned. UserError if an evaluation with other
    settings was stopped in this folder."""
    wanted, before = _asked_for(evaluation, seen), stopped(evaluation.output)
    if before is not None and (other := [name for name in wanted if before.get(name) != wanted[name]]):
        raise UserError(
            f"--output: in {evaluation.output} an evaluation was stopped that differs in {config.first_few(other)}. "
            "Choose another folder, or delete this one"
        )
    if before is None:
        write_json(evaluation.output / REPORT_FILE, wanted)
    remove_leftovers(evaluation.output)
    return wanted


def _asked_for(evaluation: Evaluation, seen: Sequence[Seen]) -> dict[str, Any]:
    """All that decides what is seen, as JSON."""
    return {
        "schema": SCHEMA,
        "config": config.to_dict(evaluation.config),
        "sources": sources.used(evaluation.needs),
        "held_out": [
            {"picture": e.name, "sha256": e.digest, "caption": e.caption} for e in evaluation.dataset.held_out
        ],
        "looked_at": [example.name for example in evaluation.looked_at],
        "prompts": list(evaluation.prompts),
        "seeds": evaluation.request.seeds,
        "sigmas": list(evaluation.request.sigmas),
        "loras": [
            {
                "name": one.candidate.name,
                **_told(one.candidate),
                "samples": [drawn.path.relative_to(evaluation.output).as_posix() for drawn in one.samples],
            }
            for one in seen
        ],
    }


def _told(candidate: Candidate) -> dict[str, Any]:
    asked = candidate.asked
    if asked is None:
        return {"strength": None}
    return {"strength": asked.strength, "file": str(asked.path), "sha256": content_hash(asked.file.path)}
