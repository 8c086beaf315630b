"""An evaluation, top to bottom: see what each LoRA does, embed it, write numbers, page and pictures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trainer import config, qwen_image
from trainer.data.dataset import load_picture
from trainer.evaluate import blind, report, results
from trainer.evaluate.measures import Examiner, Seen
from trainer.evaluate.plan import Evaluation
from trainer.evaluate.results import Embedded, Measure
from trainer.files import new_folder, write_json
from trainer.hardware import machine, parallel
from trainer.hub import sources
from trainer.text_image import text_image_cosines
from trainer.validation import Sample, write_png, write_sample

JSON_FILE, PAGE, BLIND_PAGE = "evaluation.json", "evaluation.html", "blind.html"
SCHEMA = 1
MAX_TRAIN = 64  # training pictures that are embedded


def execute(evaluation: Evaluation, *, quiet: bool) -> dict[str, Any]:
    """Evaluate, and write the output folder, whole or not at all; returns what evaluation.json holds."""
    accelerator = parallel.make_accelerator(evaluation.config.model.dtype)
    sources.fetch(evaluation.needs, quiet=quiet)
    seen, originals = _see(evaluation, accelerator, quiet=quiet)
    qwen_image.free_memory()  # the base has gone before the encoders come
    measures, notes = _measures(evaluation, seen, originals, accelerator.device)
    with new_folder(evaluation.output) as folder:
        files = _write_pictures(folder, evaluation, seen, originals)
        written = _report(evaluation, seen, measures, [*evaluation.notes, *notes], files)
        write_json(folder / JSON_FILE, written)
        report.write_page(folder / PAGE, written, folder)
        if evaluation.request.blind:
            _write_blind(folder, evaluation, files)
    return written


def _see(evaluation: Evaluation, accelerator: Any, *, quiet: bool) -> tuple[list[Seen], list[Image.Image]]:
    examiner = Examiner(evaluation, accelerator, quiet=quiet)
    return list(examiner.see(evaluation.candidates)), examiner.originals()


def _measures(
    evaluation: Evaluation, seen: Sequence[Seen], originals: Sequence[Image.Image], device: torch.device
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
            "Likeness, diversity and distances need image encoders, those of the table [init.i2l]: none are named "
            "there, or they are not on this machine."
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
    pictures = [*held_out, *train, *(picture for one in seen for picture in one.samples)]
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
    texts = [text.removeprefix(f"{trigger}, ") for text in evaluation.prompts for _ in range(evaluation.request.seeds)]
    pictures = [picture for one in seen for picture in one.samples]
    source = evaluation.config.validation.text_image_model
    cosines = text_image_cosines(source, pictures, texts * len(seen), device)
    return dict(zip((one.candidate.name for one in seen), cosines.split(len(texts)), strict=True))


Files = Mapping[str, dict[tuple[str, str], Path]]
"""By the LoRA's name, samples by prompt and seed."""


def _write_pictures(
    folder: Path, evaluation: Evaluation, seen: Sequence[Seen], originals: Sequence[Image.Image]
) -> Files:
    """`samples/<LoRA>/<prompt>-<seed>.png`, and `redrawn/<picture>-<sigma>-<LoRA>.png` beside the picture as the VAE
    gives it back."""
    found = dict[str, dict[tuple[str, str], Path]]()
    for place, picture in enumerate(originals):
        write_png(folder / "redrawn" / f"{place}.png", picture)
    first, seeds = evaluation.config.validation.seed, evaluation.request.seeds
    for number, one in enumerate(seen):
        own = found.setdefault(one.candidate.name, {})
        name = f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '_', one.candidate.name)}"
        for place, picture in enumerate(one.samples):
            prompt, seed = evaluation.prompts[place // seeds], first + place % seeds
            path = folder / "samples" / name / f"{place // seeds}-{place % seeds}.png"
            write_sample(path, Sample(prompt, seed, picture))
            own[prompt, str(seed)] = path
        for sigma, pictures in one.redrawn.items():
            for place, picture in enumerate(pictures):
                write_png(folder / "redrawn" / f"{place}-{sigma:g}-{name}.png", picture)
    return found


def _write_blind(folder: Path, evaluation: Evaluation, files: Files) -> None:
    """Pairs of all LoRAs; of one alone, with the base."""
    named = {name: own for name, own in files.items() if len(files) < 3 or name != evaluation.candidates[0].name}
    pairs = blind.pair_up(named, evaluation.config.validation.seed)
    blind.write_page(folder / BLIND_PAGE, pairs, real=[example.path for example in evaluation.dataset.held_out])


def _report(
    evaluation: Evaluation, seen: Sequence[Seen], measures: Sequence[Measure], notes: Sequence[str], files: Files
) -> dict[str, Any]:
    """evaluation.json"""
    run, request = evaluation.config, evaluation.request
    output = next(iter(next(iter(files.values())).values())).parents[2]
    return {
        "schema": SCHEMA,
        "config": config.to_dict(run),
        "versions": machine.versions(),
        "sources": sources.used(evaluation.needs),
        "held_out": [
            {"picture": e.name, "sha256": e.digest, "caption": e.caption} for e in evaluation.dataset.held_out
        ],
        "looked_at": [example.name for example in evaluation.looked_at],
        "prompts": list(evaluation.prompts),
        "seeds": request.seeds,
        "sigmas": list(request.sigmas),
        "loras": [
            {
                "name": one.candidate.name,
                "strength": one.candidate.strength if one.candidate.path else None,
                **one.origin,
                "samples": [path.relative_to(output).as_posix() for path in files[one.candidate.name].values()],
            }
            for one in seen
        ],
        "measures": [{**asdict(measure), "best": sorted(results.best(measure))} for measure in measures],
        "errors": {one.candidate.name: one.errors.tolist() for one in seen},
        "notes": list(notes),
    }
