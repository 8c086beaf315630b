"""From a configuration to a saved adapter: the program, top to bottom.

check everything -> encode pictures and captions -> ask the initializer -> inject and seed -> train -> save
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from trainer import adapter, checkpoint, config, diagnosis, folder, loop, page, qwen_image, validation
from trainer.adapter import AdapterConfig, AdapterWeights, InitContext, Seed
from trainer.checkpoint import CheckpointError
from trainer.data.dataset import Dataset, Example
from trainer.errors import UserError
from trainer.export import result as export
from trainer.files import content_hash, remove_leftovers, write_json
from trainer.formats import read_lora, write_lora
from trainer.formats.asked import read_asked
from trainer.hardware import machine, parallel
from trainer.hub import sources
from trainer.loop import Result
from trainer.objective import Encoded, LoraObjective, Trials, draw_prior, encode
from trainer.plan import Plan, notes
from trainer.qwen_image import TextEncoder
from trainer.studio import read_worn, together
from trainer.tracking import duration

log = logging.getLogger("trainer")
T = TypeVar("T")

CHOICE_FILE = "choice.json"  # in the output


def execute(plan: Plan, *, resume: bool, quiet: bool) -> Path:
    """Run the plan; returns the adapter's folder. See `loop.train` for what it raises.

    UserError if another process is in the output folder.
    """
    accelerator = parallel.make_accelerator(plan.config.model.dtype)
    machine.check(plan, accelerator.device)
    with accelerator.local_main_process_first():  # the others find it all on the disk
        sources.fetch(plan.needs, quiet=quiet)
    ended = partial(_write_last_page, plan.output)
    with folder.occupied(plan.output, main=accelerator.is_main_process, ended=ended):
        return _execute(plan, accelerator, resume=resume, quiet=quiet)


def _execute(plan: Plan, accelerator: Accelerator, *, resume: bool, quiet: bool) -> Path:
    began, settings = time.monotonic(), plan.config
    for note in notes(plan):
        log.info("note: %s", note)
    job = replace(plan.job(), patience=settings.validation.patience, validated=partial(_watch, plan))
    saved = loop.latest(job, accelerator) if resume else None
    text_encoder, tick = qwen_image.text_encoder(settings.model, accelerator.device), time.monotonic()
    with accelerator.main_process_first():  # the others find it all in the cache
        if resume and accelerator.is_main_process:  # without --resume, the folder may hold files that are not ours
            remove_leftovers(plan.output)
        encoded = encode(plan, accelerator.device, text_encoder, quiet=quiet)
    seconds = {"encode": time.monotonic() - tick}
    if saved:
        log.info("resuming after step %d", saved.step)
        started = _restore(plan, accelerator, encoded, text_encoder, quiet=quiet)
    else:
        if resume:
            log.info("no checkpoint yet: starting from the beginning")
            if accelerator.is_main_process:  # of a start that was given up
                for name in (folder.FROZEN_FILE, folder.NEGATIVE_FILE):
                    (plan.output / name).unlink(missing_ok=True)
        started = _initialize(plan, accelerator, encoded, text_encoder, quiet=quiet)
        seconds["init"] = started.report["seconds"]
    report = {**_report(plan, accelerator), "init": started.report}
    report["sources"] |= started.report["sources"]
    if accelerator.is_main_process:
        write_json(plan.output / folder.RUN_FILE, {"status": "running", **report})
    qwen_image.set_up(
        started.transformer,
        settings.model,
        gradient_checkpointing=settings.train.gradient_checkpointing,
        offload_activations=settings.train.offload_activations,
    )
    objective = LoraObjective(
        plan, started.transformer, encoded, accelerator, others=started.others, negative=started.negative
    )
    result = loop.train(objective, job, accelerator, resume=resume, quiet=quiet)
    parallel.unshard(objective.transformer)
    if accelerator.is_main_process:
        report |= {"seconds": seconds, "peak_memory_bytes": machine.peak_memory(accelerator.device)}
        _finish(plan, started, result, report, began)
    accelerator.end_training()
    return plan.output / "adapter"


@dataclass(frozen=True)
class _Started:
    """The transformer with its adapter, ready to be trained."""

    transformer: QwenImageTransformer2DModel
    settings: AdapterConfig
    """The ranks that the adapter has, which an initializer may have chosen."""
    frozen: AdapterWeights | None
    report: dict[str, Any]
    """The part `init` of run.json."""
    others: Mapping[int, Tensor] = field(default_factory=dict)
    """See `Seed.others`."""
    negative: AdapterWeights | None = None
    """The LoRA of `[validation] negative_lora`."""


def _initialize(
    plan: Plan, accelerator: Accelerator, encoded: Encoded, text_encoder: TextEncoder, *, quiet: bool
) -> _Started:
    """Ask the initializer, and start the adapter with what it gives."""
    began, method = time.monotonic(), plan.start.method
    loading = parallel.loading_device(accelerator.device)
    trials = Trials(plan, encoded, text_encoder, lambda: qwen_image.load_transformer(plan.config.model, loading))
    context = init_context(plan, accelerator.device, None if parallel.uses_fsdp() else trials, text_encoder)
    with accelerator.main_process_first():  # the others find what it predicted in the cache
        seed = plan.start.initialize(context, plan.start.options)
        negative = _negative(plan, context)
    tick = time.monotonic()
    draw_prior(plan, trials.transformer, encoded, accelerator, quiet=quiet)
    began += time.monotonic() - tick  # it is no part of the start
    settings, applied = install(trials.transformer, seed, plan.config.adapter, random_seed=plan.config.seed)
    frozen_hash = None
    if seed.frozen is not None:
        adapter.attach_frozen(trials.transformer, seed.frozen)
        if accelerator.is_main_process:
            write_lora(plan.output / folder.FROZEN_FILE, seed.frozen, {})
            frozen_hash = content_hash(plan.output / folder.FROZEN_FILE)
    report = {"method": method, **seed.report, "applied": applied, "seconds": time.monotonic() - began}
    report |= {"frozen": frozen_hash, "sources": sources.used(plan.start.needs)}
    report["adapter"] = {"rank": settings.rank, "rank_pattern": settings.rank_pattern}
    log.info("%s; %.1f s", start_line(method, applied, seed.frozen), report["seconds"])
    return _Started(trials.transformer, settings, seed.frozen, report, seed.others, negative)


def _restore(
    plan: Plan, accelerator: Accelerator, encoded: Encoded, text_encoder: TextEncoder, *, quiet: bool
) -> _Started:
    """The adapter as it was injected before the run was stopped; the loop loads its tensors from the checkpoint."""
    report = saved_report(plan.output / folder.RUN_FILE)
    settings = replace(plan.config.adapter, **report["adapter"])
    with accelerator.main_process_first():
        negative = _negative(plan, init_context(plan, accelerator.device, None, text_encoder))
    text_encoder.unload()
    transformer = qwen_image.load_transformer(plan.config.model, parallel.loading_device(accelerator.device))
    draw_prior(plan, transformer, encoded, accelerator, quiet=quiet)
    adapter.inject(transformer, settings)
    frozen = frozen_beside(plan.output, report)
    if frozen is not None:
        adapter.attach_frozen(transformer, frozen)
    return _Started(transformer, settings, frozen, report, negative=negative)


def _negative(plan: Plan, context: InitContext) -> AdapterWeights | None:
    """The LoRA of `[validation] negative_lora`. That of grey pictures is kept in the output: it costs as much as the
    start."""
    wanted, file = plan.config.validation.negative_lora, plan.output / folder.NEGATIVE_FILE
    if not wanted:
        return None
    if wanted != validation.GREY:
        return together([read_worn(asked) for asked in read_asked("negative_lora:", [wanted], None, [])])
    if not file.exists():
        assert plan.start.grey is not None
        write_lora(file, plan.start.grey(context), {})
    return read_lora(file)[0]


def frozen_beside(output: Path, report: Mapping[str, Any]) -> AdapterWeights | None:
    """The LoRA beside the one that the run in `output` trains, if there is one. report: of `saved_report`.
    CheckpointError if it is not what it was."""
    if report["frozen"] is None:
        return None
    file = output / folder.FROZEN_FILE
    if not file.exists() or content_hash(file) != report["frozen"]:
        what = "has other content than it had" if file.exists() else "is missing"
        raise CheckpointError(f"{file} {what}: the run was trained on top of the LoRA in it. Put it back.")
    return read_lora(file)[0]


def saved_report(file: Path) -> dict[str, Any]:
    """The part `init` of a run.json."""
    try:
        report = dict(json.loads(file.read_text(encoding="utf-8"))["init"])
        if missing := {"adapter", "frozen", "sources"} - report.keys():
            raise KeyError(", ".join(sorted(missing)))
        return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({_short(error)}), and with it what the adapter was started from. Put it back, or "
            "choose another --output."
        ) from error


def saved_adapter(file: Path) -> AdapterConfig:
    """The adapter of a run, by its run.json. CheckpointError if it cannot be read."""
    problems = list[str]()
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        values = {**told["config"]["adapter"], **told["init"]["adapter"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({_short(error)})") from error
    values = {name: value for name, value in values.items() if value is not None}  # a default, which TOML cannot say
    settings = config.parse(AdapterConfig, values, "adapter", problems)
    if settings is None or problems:
        raise CheckpointError(f"{file}: {'; '.join(problems)}")
    return settings


def _short(error: Exception) -> str:
    return f"there is no {error.args[0]}" if isinstance(error, KeyError) else str(error)


def install(
    transformer: QwenImageTransformer2DModel, seed: Seed, settings: AdapterConfig, *, random_seed: int
) -> tuple[AdapterConfig, dict[str, Any]]:
    """Inject an adapter and write the seed into it; its frozen LoRA is left to `adapter.attach_frozen`.

    Returns the settings that the adapter has, and the report of `apply_seed`.
    """
    settings = adapter.settings_for(seed, settings)
    adapter.inject(transformer, settings)
    return settings, adapter.apply_seed(transformer, seed, random_seed=random_seed)


def init_context(plan: Plan, device: torch.device, trials: Trials | None, text_encoder: TextEncoder) -> InitContext:
    """What an initializer is told of a run: nothing of held-out pictures."""
    return InitContext(
        images=tuple(example.path for example in plan.dataset.train),
        modules=plan.modules,
        rank=plan.config.adapter.rank,
        rank_pattern=plan.config.adapter.rank_pattern,
        seed=plan.config.seed,
        device=device,
        base=plan.config.model.base,
        log=log.info,
        cache=plan.cache,
        text_encoder=text_encoder,
        try_seed=trials,
        diagnose=plan.config.validation.diagnose,
    )


def start_line(method: str, applied: Mapping[str, Any], frozen: AdapterWeights | None) -> str:
    """One line on what the adapter starts from; applied: the report of `adapter.apply_seed`."""
    layers, kind = applied["seeded"] + applied["random"], applied["adapter"]
    if frozen is not None:
        kept = f"the whole prediction of {method} stays on {len(frozen.factors)} layers, frozen"
        return f"{kept}; on top of it a new LoRA on {layers} layers, initialised at random"
    if not applied["seeded"]:
        return f"{kind} initialised at random: {layers} layers"
    parts = [f"{kind} initialised from {method}: {applied['seeded']} of {layers} layers"]
    if applied["padded"]:
        parts.append(f"{applied['padded']} of them filled up to the rank with rows that change nothing yet")
    if applied["dropped"]:
        lost, names = sum(applied["dropped"].values()), config.first_few(applied["dropped"])
        count = len(applied["dropped"])
        share = f"{100 * lost:.1f} % of the energy"
        parts.append(f"left out: {count} layers that are not trained here, with {share} ({names})")
    total, least = (f"{100 * applied['energy_kept'][name]:.1f} %" for name in ("total", "min"))
    cut = "the nearest Kronecker products" if kind == "LoKr" else "truncation"
    kept = f"{cut} kept {total} of the energy (at least {least} in each layer)"
    parts.append("nothing was truncated" if least == "100.0 %" else kept)
    return "; ".join([*parts, f"verified (largest error {applied['largest_error']:.0e})"])


def _report(plan: Plan, accelerator: Accelerator) -> dict[str, Any]:
    """The part of run.json that is known before training."""
    return {
        "config": config.to_dict(plan.config),
        "init_options": config.to_dict(plan.start.options),
        "versions": machine.versions(),
        "hardware": machine.hardware(accelerator.device),
        "data": _data_report(plan.dataset),
        "sources": sources.used(plan.needs),
    }


def _data_report(dataset: Dataset) -> dict[str, Any]:
    return {
        name: [_picture_report(example) for example in examples]
        for name, examples in (("train", dataset.train), ("held_out", dataset.held_out))
    }


def _picture_report(example: Example) -> dict[str, Any]:
    """Captions in a list if there are several."""
    found: dict[str, Any] = {"picture": example.name, "sha256": example.digest, "caption": example.caption}
    if example.more_captions:
        found["caption"] = list(example.captions)
    if example.mask:
        found["mask"] = example.mask.digest
    return found


def _watch(plan: Plan, result: Result) -> None:
    """What is written after each validation, to be looked at while the run goes on."""
    if result.choice is not None:
        write_json(plan.output / CHOICE_FILE, asdict(result.choice))
    if plan.config.validation.diagnose:
        _to_look_at(diagnosis.DIAGNOSIS_FILE, lambda: diagnosis.write_diagnosis(plan.output))
    _write_page(plan.output)


def _write_page(output: Path) -> None:
    _to_look_at(page.PAGE, lambda: page.write_page(output))


def _to_look_at(name: str, write: Callable[[], T]) -> T | None:
    """What it returns; None, and a warning, where it fails: what is only looked at is no reason to lose a training."""
    try:
        return write()
    except (OSError, UserError) as error:
        log.warning("%s was not written: %s", name, error)
        return None


def _write_last_page(output: Path) -> None:
    """How the run ended; a refused one leaves the folder as it is."""
    report, written = output / folder.RUN_FILE, output / page.PAGE
    if report.exists() and not (written.exists() and written.stat().st_mtime_ns >= report.stat().st_mtime_ns):
        _write_page(output)


def _finish(plan: Plan, started: _Started, result: Result, report: Mapping[str, Any], began: float) -> None:
    """Export the best step, and the last one beside it, complete run.json, upload if that was asked for. began: by
    `time.monotonic`."""
    result_folder, settings, choice = plan.output / "adapter", plan.config.export, result.choice
    report = {**report, "status": "finished", "steps": result.step, "validations": result.validations}
    folders = {result_folder: result.step}
    if choice is not None:
        folders = {plan.output / "adapter_last": result.step, result_folder: choice.step}
        report |= {"choice": asdict(choice)}
    for target, step in folders.items():
        if step != result.step:
            assert result.chosen is not None
            adapter.load_tensors(started.transformer, checkpoint.load(result.chosen).result)
        exported = {**report, "steps": step}
        export.export(started.transformer, target, settings, started.settings, started.frozen, exported)
    total = time.monotonic() - began
    report["seconds"] = {**report["seconds"], "train": result.seconds, "total": total}
    write_json(plan.output / folder.RUN_FILE, report)
    if choice is None:
        log.info("no pictures are held out to choose the best step by: the last one is taken (see [data] held_out)")
    else:
        log.info("%s", choice.text)
    if plan.config.validation.diagnose:
        found = _to_look_at(diagnosis.DIAGNOSIS_FILE, lambda: diagnosis.write_diagnosis(plan.output))
        for one in found.doubtful if found else ():
            log.info("look at %s: %s", one.picture, "; ".join(one.reasons))
    log.info("done in %s: %s", duration(total), result_folder)
    if settings.push_to_hub:
        log.info("uploaded to %s", export.push(result_folder, settings.push_to_hub))
