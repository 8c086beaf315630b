"""An evaluation before it starts: its arguments and configuration, read and checked."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trainer import config, plan, qwen_image
from trainer.data.dataset import Dataset, Example, scan
from trainer.data.pictures import DataError
from trainer.evaluate.names import distinct
from trainer.files import read_json
from trainer.formats.asked import Asked, read_asked
from trainer.formats.lora import LoraFile
from trainer.formats.origin import read_origin
from trainer.hardware import parallel
from trainer.hub.sources import Need
from trainer.plan import Initializers, RunConfig
from trainer.studio import look_at
from trainer.text_image import text_image_need, text_image_problems

BASE = "base"
FOLDER = "evaluation"  # in the run's output, unless another is named
REPORT_FILE = "evaluation.json"  # until the end it holds only what is asked for
SIGMAS = (0.3, 0.5, 0.7)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for on the command line."""

    config: Path
    loras: tuple[str, ...]
    """FILE or FILE:STRENGTH each."""
    overrides: tuple[str, ...] = ()
    output: Path | None = None
    seeds: int = 4
    """Samples of each prompt."""
    sigmas: tuple[float, ...] = SIGMAS
    """How much noise held-out pictures are redrawn from."""
    blind: bool = False


@dataclass(frozen=True)
class Candidate:
    """A LoRA at a strength; the base, if it has no file."""

    name: str
    asked: Asked | None = None


@dataclass(frozen=True)
class Evaluation:
    """What has passed every check that needs no weights."""

    request: Request
    config: RunConfig
    dataset: Dataset
    candidates: tuple[Candidate, ...]
    """The base first."""
    output: Path
    prompts: tuple[str, ...]
    """What samples are drawn from."""
    embed: Callable[[Sequence[Image.Image], torch.device], Mapping[str, Tensor]] | None
    """Embeddings of pictures by image encoders, encoder -> N D."""
    embed_needs: tuple[Need, ...]
    """The image encoders' files."""
    notes: tuple[str, ...]

    @property
    def needs(self) -> list[Need]:
        """All files of models that are loaded."""
        source = self.config.validation.text_image_model
        fidelity = [text_image_need(source)] if source else []
        return [qwen_image.need(self.config.model.base), *self.embed_needs, *fidelity]

    @property
    def looked_at(self) -> tuple[Example, ...]:
        """The held-out pictures that losses are computed on, and that are redrawn."""
        return self.dataset.held_out[: self.config.validation.num_pictures]


def prepare(request: Request, initializers: Initializers) -> Evaluation:
    """Check everything that needs no weights; ConfigError lists every problem at once."""
    problems, notes = _request_problems(request), list[str]()
    try:
        run, start = plan.load_config(request.config, [*request.overrides], initializers)
    except config.ConfigError as error:
        raise config.ConfigError([*problems, *error.problems]) from None
    modules, multiple = look_at(run.model, parallel.one_device(), problems)
    asked = read_asked("--lora", request.loras, modules, problems)
    dataset = _dataset(run, multiple, problems)
    problems += [*start.embed_problems(), *text_image_problems(run.validation.text_image_model)]
    output = request.output or Path(run.output) / FOLDER
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and stopped(output) is None):
        problems.append(f"--output: {output} is there already; choose another name")
    if problems or dataset is None:
        raise config.ConfigError(problems)
    prompts = _prompts(run, dataset.held_out, notes)
    endings = ["" if one.strength == 1 else f":{one.strength:g}" for one in asked]
    names = distinct([one.path for one in asked], endings)
    candidates = [Candidate(name, one) for name, one in zip(names, asked, strict=True)]
    notes += [note for candidate in candidates for note in _notes(candidate, dataset.held_out)]
    everyone, needs = (Candidate(BASE), *candidates), tuple(start.embed_needs)
    return Evaluation(request, run, dataset, everyone, output, prompts, start.embed, needs, tuple(notes))


def stopped(output: Path) -> dict[str, Any] | None:
    """What was asked of an evaluation that was stopped in this folder; None if none was. UserError as `read_json`."""
    file = output / REPORT_FILE
    found = read_json(file) if file.is_file() else None
    return found if isinstance(found, dict) and "measures" not in found else None


def _prompts(run: RunConfig, held_out: Sequence[Example], notes: list[str]) -> tuple[str, ...]:
    if run.validation.prompts:
        return run.validation.prompts
    notes.append("There are no [validation] prompts: samples are drawn from the captions of held-out pictures.")
    return tuple(dict.fromkeys(example.caption for example in held_out))[: run.validation.num_pictures]


def _request_problems(request: Request) -> list[str]:
    found = [] if request.loras else ["--lora FILE is needed, once for each LoRA"]
    if request.seeds < 1:
        found.append(f"--seeds must be at least 1, not {request.seeds}")
    if bad := [sigma for sigma in request.sigmas if not 0 < sigma <= 1]:
        found.append(f"--sigmas must be above 0 and at most 1, not {config.first_few(bad)}")
    if parallel.num_processes() > 1:
        found.append("accelerate: an evaluation runs in one process; start it with python")
    if importlib.util.find_spec("torchmetrics") is None:
        found.append('PSNR and SSIM need torchmetrics: pip install -e ".[evaluate]"')
    return found


def _notes(candidate: Candidate, held_out: Sequence[Example]) -> list[str]:
    assert candidate.asked is not None
    found = [f"{candidate.name}: {note}" for note in candidate.asked.file.notes]
    if leaked := _made_from(candidate.asked.file, held_out):
        found.append(
            f"{candidate.name} was made from {len(leaked)} of {len(held_out)} held-out pictures, as its file says "
            f"({config.first_few(leaked)}): what they say of it is no test."
        )
    return found


def _made_from(file: LoraFile, held_out: Sequence[Example]) -> list[str]:
    """Held-out pictures that a LoRA of ours was trained on or predicted from."""
    pictures = read_origin(file.metadata).get("pictures", ())
    return [example.name for example in held_out if example.digest in pictures]


def _dataset(run: RunConfig, multiple: int, problems: list[str]) -> Dataset | None:
    """The run's pictures, split as the run does it."""
    try:
        dataset = scan(run.data, multiple=multiple, seed=run.seed)
    except DataError as error:
        problems += [f"[data] {problem}" for problem in error.problems]
        return None
    if not dataset.held_out:
        problems.append(
            "[data] held_out: no picture is held out, and there is nothing to measure against. Name a folder, or set "
            "the number that the LoRA was trained with: others, it may have been trained on"
        )
    return dataset
