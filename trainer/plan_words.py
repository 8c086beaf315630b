"""A plan in words: what `--plan` prints."""

import shlex
from collections.abc import Sequence

from trainer import adapter, qwen_image, stages
from trainer.data.cache import Cache
from trainer.data.epoch import folder_lines, items
from trainer.data.prior import drawing_keys
from trainer.files import size
from trainer.hardware import memory
from trainer.hub import sources
from trainer.plan import Plan, memory_request, notes


def plan_text(plan: Plan) -> str:
    """The plan in words: data, modules, parameters, steps, memory, downloads."""
    run, data = plan.config, plan.dataset
    images_per_step = run.train.batch_size * run.train.gradient_accumulation_steps
    sizes = {bucket: len(members) for bucket, members in items(data.train).items()}
    trainable = adapter.num_parameters(plan.config.adapter, plan.modules)
    base_parameters = sum(p.numel() for p in plan.transformer.parameters())
    lines = [
        f"pictures     {len(data.train)} for training, {len(data.held_out)} held out",
        *(f"folder       {line}" for line in folder_lines(run.data, data)),
        f"buckets      {', '.join(f'{w}x{h}: {n}' for (w, h), n in sorted(sizes.items()))}",
        *_mask_lines(plan),
        f"base         {run.model.base}: {base_parameters / 1e6:,.1f} M parameters in {run.model.dtype}",
        f"adapter      {run.adapter.kind} rank {run.adapter.rank} on {len(plan.modules)} modules, "
        f"{trainable:,} trainable parameters",
        f"start        {plan.start.method}",
        *(
            f"stage        {number}, steps {one.begin + 1} to {one.end}: {stages.describe(own)}"
            for number, (own, one) in enumerate(zip(run.stages, plan.stages, strict=False))
        ),
        f"training     {run.train.steps} steps of {images_per_step} pictures: "
        f"{run.train.steps * images_per_step / sum(sizes.values()):.1f} times through the data",
        *(f"prior        {line}" for line in _prior_lines(plan)),
        *(f"memory       {line}" for line in memory_lines(plan)),
        *(f"download     {line}" for line in sources.download_lines(plan.needs)),
        *(f"note         {note}" for note in notes(plan)),
    ]
    return "\n".join(lines)


def _mask_lines(plan: Plan) -> list[str]:
    data, outside = plan.dataset, plan.config.data.mask_outside
    counts = [sum(example.mask is not None for example in examples) for examples in (data.train, data.held_out)]
    if not any(counts):
        return []
    return [f"masks        of {counts[0]} pictures for training, {counts[1]} held out; black counts {outside:g}"]


def _prior_lines(plan: Plan) -> list[str]:
    if (prior := plan.prior) is None:
        return []
    weight = f"weight {prior.config.weight:g}"
    if prior.config.method == "prediction":
        texts = sorted(prior.texts)
        return [f'{weight}: the base\'s own velocity for {len(texts)} prompts, such as "{texts[0]}"']
    if not prior.drawn:
        return [f"{weight}: {len(prior.pictures)} pictures in {prior.config.images}"]
    missing = len(prior.drawn)
    if sources.is_here(qwen_image.need(plan.config.model.base)):
        missing = Cache(plan.cache).count_missing(drawing_keys(prior, plan.config.model))
    return [f"{weight}: {len(prior.drawn)} pictures, of which {missing} must be drawn before the training"]


def memory_lines(plan: Plan) -> list[str]:
    """Estimates: nothing is loaded."""
    run = memory_request(plan)
    needs, waiting = memory.estimate(run), memory.waiting_bytes(run)
    lines = [f"on the GPU, stage by stage, {size(memory.CONTEXT_BYTES)} for CUDA included:"]
    for stage in needs.stages:
        way = "" if stage.instead is None else f"   without room for it: {stage.how}"
        mark = "   the most that is needed" if stage is needs.highest else ""
        lines.append(f"  {stage.name:<28}{size(stage.num_bytes):>9}{way}{mark}")
    parts = ", ".join(f"{name} {size(value)}" for name, value in needs.parts.items())
    if waiting:
        lines.append(f"in the CPU's memory, beside them: {size(waiting)} that come when they are needed")
    return [*lines, f"while training: {parts}"]


def fit_text(plan: Plan, vram: float) -> str:
    """Which settings would fit a card with so many GB, the smallest change first."""
    ways, usable = memory.ways_to_fit(memory_request(plan)), memory.usable(vram)
    lines = [
        f"on a card with {vram:g} GB, by estimates (it has {size(2**30 * vram)}; what is above {size(usable)} is left "
        "for cuDNN's workspaces and fragmentation):"
    ]

    def tell(num_bytes: float, stage: str, what: str) -> bool:
        verdict = "fits" if num_bytes <= usable else "does not fit"
        lines.append(f"  {verdict:<13}{size(num_bytes):>9} while {stage}: {what}")
        return num_bytes <= usable

    for keys, needs in ways:
        change = " ".join(f"--set {shlex.quote(key)}" for key in _for_each_folder(plan, keys)) or "as it is"
        if tell(needs.peak, needs.highest.name, change):
            moved = [stage for stage in needs.stages if stage.num_bytes > usable]
            lines += [f"  {stage.name}: {stage.how}, since it would need {size(stage.num_bytes)}" for stage in moved]
            break
    else:
        lines.append("  nothing here fits: a smaller [adapter] rank or fewer target_modules help a little")
    if plan.config.model.quantization == "none" and ways[0][1].peak > usable:
        offloaded = memory.offloaded_bytes(plan.transformer, plan.config.model, ways[0][1])
        where = "as it is, the weights in the CPU's memory, slower: accelerate launch --config_file "
        tell(offloaded, "training", f"{where}configs/accelerate/fsdp2_offload.yaml train.py ...")
    return "\n".join(lines)


def _for_each_folder(plan: Plan, keys: Sequence[str]) -> list[str]:
    """The keys, with the resolutions that folders have of their own."""
    own = [number for number, folder in enumerate(plan.config.data.folders) if folder.resolution is not None]
    lower = [key.split("=")[1] for key in keys if key.startswith("data.resolution=")]
    return [*keys, *(f"data.folders.{number}.resolution={side}" for side in lower for number in own)]
