"""The same training from several starts: python train.py --config C --compare random i2l --output DIR

For each subject, seed, start (an *arm*) and learning rate a run, all with the same pictures, batches, sigmas and noise.
The base is loaded once; adapters come and go. What a run leaves lies in OUTPUT/runs/<subject>/<arm>/<rate>-<seed>, and
a run that is done is not done again: the command goes on where it was stopped, and takes new arms in.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trainer import checkpoint, config, folder
from trainer.compare.measures import measure_samples, read_pictures
from trainer.compare.plan import CONTROLS, SCHEMA, Comparison, Subject, finished, read_result
from trainer.compare.report import write_report
from trainer.compare.runs import Workbench
from trainer.data.dataset import Example
from trainer.errors import TrainingError, UserError
from trainer.files import remove_leftovers, write_json
from trainer.hardware import machine, parallel
from trainer.hub import sources

log = logging.getLogger("trainer")


def own_part() -> tuple[int, int]:
    """Under `accelerate launch`: each process does a part of the runs, and does it alone, on its own GPU."""
    if parallel.uses_fsdp():
        raise UserError("--compare does each run on one GPU: launch it with configs/accelerate/ddp.yaml")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    number, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if count > 1 and torch.cuda.is_available():
        torch.cuda.set_device(local)
    return number + 1, count


def execute(comparison: Comparison, *, quiet: bool) -> Path | None:
    """Do this process's part; the report's folder if all parts are done. See `loop.train` for what it raises.

    UserError if another process is doing this part.
    """
    number, count = comparison.request.part
    with folder.held(comparison.output, f"part-{number}-of-{count}"):
        return _execute(comparison, quiet=quiet)


def _execute(comparison: Comparison, *, quiet: bool) -> Path | None:
    output, request = comparison.output, comparison.request
    number, count = request.part
    units = own_units(comparison)
    cells = [cell for cell in comparison.cells() if (cell.subject, cell.seed) in units]
    todo = [cell for cell in cells if not finished(cell)]
    for cell in todo:
        remove_leftovers(cell.folder)
    bench = Workbench(comparison, quiet)
    sources.fetch(comparison.needs, quiet=quiet)
    for subject in tqdm(dict.fromkeys(cell.subject for cell in todo), "subjects prepared", disable=quiet):
        bench.prepare_subject(subject, list(dict.fromkeys(cell.arm for cell in todo if cell.subject is subject)))
    with tqdm(total=len(cells), initial=len(cells) - len(todo), desc="runs", unit="run", disable=quiet) as bar:
        for cell in todo:
            bar.set_postfix_str(f"{cell.subject.name} {cell.arm.name} {cell.learning_rate:g} seed {cell.seed}")
            if cell.result_file.exists():  # it failed: what it left must not be taken for the new run's
                shutil.rmtree(cell.folder)
            result = bench.run(cell)
            write_json(cell.result_file, result)
            shutil.rmtree(cell.folder / checkpoint.FOLDER, ignore_errors=True)
            bar.update()
            if result["status"] == "failed":
                log.error("%s; traceback: %s", result["error"], output / result["traceback"])
    bench.close()
    seen = [subject for subject, seed in units if seed == comparison.seeds[0]]  # only the first seed draws
    measure_samples(comparison, seen, bench.device, quiet)
    missing = [cell for cell in comparison.cells() if not cell.result_file.exists()]
    if missing or any(read_pictures(comparison, subject) is None for subject in comparison.subjects):
        log.info("part %d of %d is done; %d runs of other parts are missing", number, count, len(missing))
        return None
    report = collect(comparison)
    write_report(output, report)
    log.info("done: %s", output / "report.html")
    tell_failures(report["runs"], output / "report.html")
    return output


def own_units(comparison: Comparison) -> list[tuple[Subject, int]]:
    """The subjects and seeds of this process's part. The parts are pieces of one row, sorted by subject: then few
    subjects have to be prepared by two of them."""
    number, count = comparison.request.part
    units = [(subject, seed) for subject in comparison.subjects for seed in comparison.seeds]
    return units[len(units) * (number - 1) // count : len(units) * number // count]


def tell_failures(runs: Sequence[Mapping[str, Any]], page: Path) -> None:
    """Say how many runs failed. TrainingError if none is left of a start, or of a subject: the report is then silent
    about it, which must not be taken for an answer."""
    failed = [run for run in runs if run["status"] == "failed"]
    if not failed:
        return
    log.warning(
        "%d of %d runs failed and are left out; given again, the command tries them again", len(failed), len(runs)
    )
    lost = []
    for kind in ("arm", "subject"):
        for name in dict.fromkeys(run[kind] for run in failed):
            own = [run for run in runs if run[kind] == name]
            if all(run["status"] == "failed" for run in own):
                lost.append(f"all {len(own)} runs of {name} failed, the first by {own[0]['error']}")
    if lost:
        raise TrainingError("\n".join([*lost, f"{page} lists them; when it is solved, give the same command again"]))


def collect(comparison: Comparison) -> dict[str, Any]:
    """The content of report.json; docs/comparison.md describes it."""
    runs, pictures = [], {subject: read_pictures(comparison, subject) or {} for subject in comparison.subjects}
    for cell in comparison.cells():
        result = read_result(cell)
        assert result is not None
        measured = pictures[cell.subject].get("runs", {}).get(f"{cell.arm.name}/{cell.folder.name}", {})
        for point in result["curve"] if cell.seed == comparison.seeds[0] else []:
            point.update(measured.get(str(point["step"]), {}))
        result["folder"] = cell.folder.relative_to(comparison.output).as_posix()
        runs.append(result)
    request = comparison.request
    return {
        "schema": SCHEMA,
        "baseline": comparison.baseline,
        "arms": [
            {
                "name": arm.name,
                "method": arm.start.method,
                "options": config.to_dict(arm.start.options),
                "control": CONTROLS[arm.control] if arm.control else None,
            }
            for arm in comparison.arms
        ],
        "learning_rates": list(request.learning_rates),
        "seeds": list(comparison.seeds),
        "config": config.to_dict(comparison.config),
        "versions": machine.versions(),
        "subjects": [
            {
                "name": subject.name,
                "group": subject.group,
                "train": _entries(subject.plan.dataset.train),
                "held_out": _entries(subject.plan.dataset.held_out),
                "training_pictures": pictures[subject].get("training", {}),
            }
            for subject in comparison.subjects
        ],
        "runs": runs,
    }


def _entries(examples: Sequence[Example]) -> list[dict[str, str]]:
    return [{"path": str(e.path), "sha256": e.digest, "caption": e.caption} for e in examples]
