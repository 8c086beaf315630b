"""An evaluation, top to bottom: see what each LoRA does, embed it, write numbers and page."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import qwen_image
from trainer.data.dataset import load_picture
from trainer.data.pictures import open_picture
from trainer.evaluate import blind, report, results
from trainer.evaluate.folder import Seen, begin, originals_of, seen_of
from trainer.evaluate.measures import Examiner
from trainer.evaluate.plan import REPORT_FILE, Evaluation
from trainer.evaluate.results import Embedded, Measure
from trainer.files import write_json
from trainer.hardware import machine, parallel
from trainer.hub import sources
from trainer.text_image import text_image_cosines

PAGE, BLIND_PAGE = "evaluation.html", "blind.html"
MAX_TRAIN = 64  # training pictures that are embedded


def execute(evaluation: Evaluation, *, quiet: bool) -> dict[str, Any]:
    """Evaluate into the output folder, or go on with the same evaluation that was stopped there; returns what
    evaluation.json holds. UserError if it was another one."""
    accelerator = parallel.make_accelerator(evaluation.config.model.dtype)
    sources.fetch(evaluation.needs, quiet=quiet)
    seen, originals, output = seen_of(evaluation), originals_of(evaluation), evaluation.output
    asked_for = begin(evaluation, seen)
    _look(evaluation, accelerator, seen, originals, quiet=quiet)
    qwen_image.free_memory()  # the base has gone before the encoders come
    measures, notes = _measures(evaluation, seen, originals, accelerator.device)
    written = {
        **asked_for,
        "versions": machine.versions(),
        "measures": [{**asdict(measure), "best": sorted(results.best(measure))} for measure in measures],
        "errors": {one.candidate.name: one.errors.tolist() for one in seen},
        "notes": [*evaluation.notes, *notes],
    }
    report.write_page(output / PAGE, written, output)
    if evaluation.request.blind:
        _write_blind(evaluation, seen)
    write_json(output / REPORT_FILE, written)  # with it, the evaluation is done
    return written


def _look(
    evaluation: Evaluation, accelerator: Any, seen: Sequence[Seen], originals: Sequence[Path], *, quiet: bool
) -> None:
    """In a function of its own, so that the base goes when it ends."""
    examiner = Examiner(evaluation, accelerator, quiet=quiet)
    examiner.look(seen)
    examiner.write_originals(originals)


def _measures(
    evaluation: Evaluation, seen: Sequence[Seen], originals: Sequence[Path], device: torch.device
) -> tuple[list[Measure], list[str]]:
    """All measures, and what is to be known of them."""
    settings, request, notes = evaluation.config.validation, evaluation.request, list[str]()
    found = [results.losses(seen), *results.redrawn(seen, originals)]
    spaces = _embedded(evaluation, seen, device)
    for space in spaces:
        found += results.embedded(space, request.seeds)
        notes += results.notes(space)
    if not spaces:
        notes.append(
            "Likeness, diversity and distances need image encoders: add the table [init.i2l] to the configuration; "
            "the encoders that it names are fetched."
        )
    if settings.text_image_model:
        found.append(results.fidelity(_fidelity(evaluation, seen, device)))
    else:
        notes.append("Fidelity needs a SigLIP that reads text: [validation] text_image_model.")
    found += results.drift(seen, len(settings.unrelated_prompts))
    if not settings.unrelated_prompts:
        notes.append("Drift needs [validation] unrelated_prompts.")
    return found, notes


def _embedded(evaluation: Evaluation, seen: Sequence[Seen], device: torch.device) -> list[Embedded]:
    """One for each image encoder: all pictures go through it together, since loading it is what takes long."""
    if evaluation.embed is None:
        return []
    held_out = [load_picture(example) for example in evaluation.dataset.held_out]
    train = [load_picture(example) for example in evaluation.dataset.train[:MAX_TRAIN]]
    pictures = [*held_out, *train, *(open_picture(drawn.path) for one in seen for drawn in one.samples)]
    counts = [len(held_out), len(train), *(len(one.samples) for one in seen)]
    found = []
    for encoder, rows in evaluation.embed(pictures, device).items():
        real, shown, *drawn = torch.nn.functional.normalize(rows.double(), dim=1).split(counts)
        names = (one.candidate.name for one in seen)
        found.append(Embedded(encoder, real, shown, dict(zip(names, drawn, strict=True))))
    return found


def _fidelity(evaluation: Evaluation, seen: Sequence[Seen], device: torch.device) -> dict[str, Tensor]:
    """By name, the cosine of each sample with its prompt, without the trigger, which means nothing to the encoder."""
    trigger = evaluation.config.data.trigger
    texts = [drawn.prompt.removeprefix(f"{trigger}, ") for drawn in seen[0].samples]
    pictures = [open_picture(drawn.path) for one in seen for drawn in one.samples]
    source = evaluation.config.validation.text_image_model
    cosines = text_image_cosines(source, pictures, texts * len(seen), device)
    return dict(zip((one.candidate.name for one in seen), cosines.split(len(texts)), strict=True))


def _write_blind(evaluation: Evaluation, seen: Sequence[Seen]) -> None:
    """Pairs of all LoRAs; of one alone, with the base."""
    files = {
        one.candidate.name: {(drawn.prompt, str(drawn.seed)): drawn.path for drawn in one.samples}
        for one in (seen[1:] if len(seen) > 2 else seen)
    }
    pairs = blind.pair_up(files, evaluation.config.validation.seed)
    real = [example.path for example in evaluation.dataset.held_out]
    blind.write_page(evaluation.output / BLIND_PAGE, pairs, real=real)
