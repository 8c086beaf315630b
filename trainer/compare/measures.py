"""Samples of a comparison, measured by image encoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trainer.compare.plan import Comparison, Subject, finished
from trainer.data.cache import key
from trainer.data.dataset import load_picture
from trainer.data.pictures import open_picture
from trainer.files import read_json, write_json
from trainer.measure import diversities
from trainer.text_image import text_image_cosines
from trainer.validation import sample_files

NUM_SAMPLES = 2  # noise seeds of each prompt


def _pictures_key(comparison: Comparison, subject: Subject) -> str:
    seed = comparison.seeds[0]
    cells = [cell for cell in comparison.cells() if cell.subject is subject and cell.seed == seed]
    return key([[comparison.fingerprint(cell), finished(cell)] for cell in cells])


def _pictures_file(comparison: Comparison, subject: Subject) -> Path:
    return comparison.output / "runs" / subject.name / "pictures.json"


def read_pictures(comparison: Comparison, subject: Subject) -> dict[str, Any] | None:
    file = _pictures_file(comparison, subject)
    found = read_json(file) if file.exists() else None
    return found if found is not None and found["key"] == _pictures_key(comparison, subject) else None


def measure_samples(comparison: Comparison, subjects: Sequence[Subject], device: torch.device, quiet: bool) -> None:
    """Embed the samples and the real pictures, and write the measures of each run of the first seed:

    `similarity <encoder>`: the mean cosine of all samples with all held-out pictures; `diversity <encoder>`: the mean
    of 1 - cosine of samples that share a prompt; `fidelity`: the mean cosine of samples with their prompts. How
    similar the training pictures are to the held-out ones is measured in the same way.
    """
    for subject in tqdm(subjects, desc="measure samples", unit="subject", disable=quiet):
        if read_pictures(comparison, subject) is None:
            write_json(_pictures_file(comparison, subject), _measure(comparison, subject, device))


def _measure(comparison: Comparison, subject: Subject, device: torch.device) -> dict[str, Any]:
    files = _samples(comparison, subject)
    held_out, training = (
        [load_picture(e) for e in part] for part in (subject.plan.dataset.held_out, subject.plan.dataset.train)
    )
    sampled = [open_picture(path) for paths in files.values() for path in paths]
    counts = [len(paths) for paths in files.values()]
    similar: dict[str, float] = {}
    runs: dict[str, dict[str, dict[str, float]]] = {name: {} for name, _ in files}
    if comparison.image_encoders is not None and sampled:
        encoders, pictures = comparison.image_encoders, [*held_out, *training, *sampled]
        embedded = comparison.initializers.embed(encoders.method, encoders.options, pictures, device)
        for encoder, rows in embedded.items():
            rows = torch.nn.functional.normalize(rows.double(), dim=1)
            real, shown, rest = rows.split([len(held_out), len(training), len(sampled)])
            similar[f"similarity {encoder}"] = float((shown @ real.T).mean())
            for (name, step), own in zip(files, rest.split(counts), strict=True):
                values = runs[name].setdefault(str(step), {})
                values[f"similarity {encoder}"] = float((own @ real.T).mean())
                values[f"diversity {encoder}"] = float(diversities(own, NUM_SAMPLES).mean())
    settings = comparison.config.validation
    if settings.text_image_model and sampled:
        trigger = comparison.config.data.trigger
        texts = [text.removeprefix(f"{trigger}, ") for text in settings.prompts for _ in range(NUM_SAMPLES)]
        cosines = text_image_cosines(settings.text_image_model, sampled, texts * len(files), device)
        for (name, step), own in zip(files, cosines.split(counts), strict=True):
            runs[name].setdefault(str(step), {})["fidelity"] = float(own.mean())
    return {"key": _pictures_key(comparison, subject), "training": similar, "runs": runs}


def _samples(comparison: Comparison, subject: Subject) -> dict[tuple[str, int], list[Path]]:
    """(run, step) -> samples, those of a prompt together. A run that failed may lack some."""
    files: dict[tuple[str, int], list[Path]] = {}
    for cell in comparison.cells():
        if cell.subject is subject and cell.seed == comparison.seeds[0] and finished(cell):
            for step, paths in sample_files(cell.folder / "samples").items():
                files[f"{cell.arm.name}/{cell.folder.name}", step] = paths
    return files
