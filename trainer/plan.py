"""A run before it starts: its configuration, read and checked, what it would do, what it would need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor

from trainer import adapter, config, folder, qwen_image, stages
from trainer.adapter import AdapterConfig, AdapterWeights, InitContext, Initializer, RunFacts, Work
from trainer.checkpoint import CheckpointConfig, course
from trainer.data.dataset import DataConfig, Dataset, scan
from trainer.data.epoch import course_of_folders
from trainer.data.pictures import DataError
from trainer.data.prior import Prior, PriorConfig
from trainer.data.prior import prepare as prepare_prior
from trainer.export.result import METHOD_LAYOUTS, ExportConfig
from trainer.flow import FlowConfig
from trainer.formats.asked import read_asked
from trainer.hardware import memory, offload, parallel
from trainer.hub import sources
from trainer.hub.sources import Need
from trainer.loop import Job
from trainer.optimizer import TrainConfig
from trainer.qwen_image import ModelConfig
from trainer.stages import StageConfig, StagePlan
from trainer.validation import GREY, ValidationConfig


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """`[init]`"""

    method: str = "random"
    """What the adapter starts from: "random", "gaussian", "i2l", or the path of a LoRA file. Each may have settings of
    its own, in a table such as `[init.i2l]`."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    output: str
    """The folder of the run. Everything that the run makes is written into it."""
    seed: int = 0
    """Decides the adapter's random rows, the order of the pictures, the noise and the sigmas. The same seed gives the
    same run."""
    model: ModelConfig
    data: DataConfig
    prior: PriorConfig | None = None
    adapter: AdapterConfig = AdapterConfig()
    init: InitConfig = InitConfig()
    train: TrainConfig = TrainConfig()
    flow: FlowConfig = FlowConfig()
    stages: tuple[StageConfig, ...] = ()
    """Parts of the run, one after the other. Without any the run is one."""
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()

    def problems(self) -> list[str]:
        return [] if self.output.strip() else ["output must name a folder"]

    @property
    def cache(self) -> Path:
        """The folder of what is expensive to compute."""
        return Path(self.data.cache or Path(self.output) / "cache")


class Initializers(Protocol):
    """What a run asks of the package `initializers`, which is handed in, since it lies on a floor above."""

    def resolve(self, method: str) -> tuple[str, dict[str, Any]]: ...

    def config_class(self, method: str) -> type[Any]: ...

    def check(self, method: str, config: Any) -> list[str]: ...

    def check_run(self, method: str, config: Any, facts: RunFacts) -> list[str]: ...

    def needs(self, method: str, config: Any, base: str) -> list[Need]: ...

    def work(self, method: str, config: Any, model: ModelConfig, facts: RunFacts) -> Work: ...

    def notes(self, method: str, config: Any) -> list[str]: ...

    def identity(self, method: str, config: Any) -> list[str]: ...

    def file_keys(self, method: str) -> tuple[str, ...]: ...

    def embeds(self, method: str) -> bool: ...

    def embed_needs(self, method: str, config: Any) -> list[Need]: ...

    def embed(
        self, method: str, config: Any, pictures: Sequence[Image.Image], device: torch.device
    ) -> dict[str, Tensor]: ...

    def greys(self, method: str) -> bool: ...

    def grey(self, method: str, config: Any, context: InitContext) -> AdapterWeights: ...

    def get(self, method: str) -> Initializer: ...


@dataclass(frozen=True)
class Start:
    """The chosen initializer with its own table, the problems its check found, and the models it will load."""

    method: str
    initialize: Initializer
    options: Any
    problems: list[str]
    needs: list[Need]
    check_run: Callable[[RunFacts], list[str]] = lambda facts: []
    """What is wrong with the options in the run that is planned."""
    identity: Callable[[], list[str] | None] = list
    """Hashes of the files that it reads; None if they are not all on this machine."""
    file_keys: tuple[str, ...] = ()
    """The options that only say where these files are."""
    work: Callable[[RunFacts], Work] = lambda facts: Work()
    """What it will do in the run that is planned."""
    notes: Sequence[str] = ()
    """What is worth a word in the files that it starts from."""
    grey: Callable[[InitContext], AdapterWeights] | None = None
    """What the initializer makes of grey pictures; None if it cannot say."""
    embed: Callable[[Sequence[Image.Image], torch.device], dict[str, Tensor]] | None = None
    """Embeddings of pictures by image encoders that the configuration names, encoder -> N D; None if it has none."""
    embed_needs: Sequence[Need] = ()
    """The files of these encoders."""

    def embed_problems(self) -> list[str]:
        """What is wrong with these encoders."""
        return [f"[init.i2l] encoders: {problem}" for need in self.embed_needs for problem in sources.check(need)]


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights."""

    config: RunConfig
    start: Start
    dataset: Dataset
    transformer: QwenImageTransformer2DModel
    """On the meta device: shapes only."""
    modules: dict[str, tuple[int, int]]
    prior: Prior | None = None
    resized: Mapping[int, Dataset] = field(default_factory=dict)
    """The pictures of stages that have a resolution of their own, by their number."""

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """At least one."""
        run, found, begin = self.config, list[StagePlan](), 0
        for number, own in enumerate(run.stages or (StageConfig(steps=run.train.steps),)):
            weight = own.prior_weight
            if weight is None:
                weight = run.prior.weight if run.prior else 0.0
            outside = run.data.mask_outside if own.mask_outside is None else own.mask_outside
            found.append(
                StagePlan(
                    begin=begin,
                    end=begin + own.steps,
                    train=stages.train_of(own, run.train),
                    flow=stages.flow_of(own, run.flow),
                    examples=self.resized.get(number, self.dataset).train,
                    mask_outside=outside,
                    prior_weight=weight,
                    learns=stages.learning_modules(own, self.modules),
                )
            )
            begin += own.steps
        return tuple(found)

    def stage_at(self, step: int) -> StagePlan:
        """The one of update `step`, from 0."""
        return next((stage for stage in self.stages if step < stage.end), self.stages[-1])

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def needs(self) -> list[Need]:
        """All files of models that the run loads."""
        encoders = self.start.embed_needs if self.config.validation.likeness else ()
        return [qwen_image.need(self.config.model.base), *self.start.needs, *encoders]

    @property
    def cache(self) -> Path:
        return self.config.cache

    def job(self) -> Job:
        """What the loop must know of the run."""
        run = self.config

        def learns(step: int, name: str) -> bool:
            modules = self.stage_at(step).learns
            return modules is None or adapter.module_of(name) in modules

        return Job(
            self.output,
            run.train,
            run.checkpoint,
            run.validation.every,
            self.course(),
            rate=lambda step: self.stage_at(step).rate(step),
            lr_factor=lambda name: adapter.lr_factor(run.adapter, name),
            learns=learns,
        )

    def course(self) -> dict[str, Any]:
        """What must be the same when the run is resumed: not where its models and pictures lie, but what is in them;
        not what only saves memory or time; not its length, unless the learning rate depends on it."""
        method = self.start.method
        values = config.to_dict(self.config)
        values["data"] |= course_of_folders(self.config.data, self.dataset)
        if self.prior:
            values["prior"] = self.prior.course()
        values["init"] = {"method": method, method: config.to_dict(self.start.options)}
        free = {*FREE, *(f"init.{method}.{name}" for name in self.start.file_keys)}
        if self.config.train.lr_schedule == "constant" and not self.config.stages:
            free.add("train.steps")
        masks = [(e.digest, e.mask.digest) for e in self.dataset.train if e.mask]
        if not masks:
            free.add("data.mask_outside")
        models = {
            "model.base": qwen_image.identity(self.config.model.base, qwen_image.PARTS),
            f"init.{method}": self.start.identity(),
        }
        return course(values, [(e.digest, *e.captions) for e in self.dataset.train], models, free, masks)


FREE = (
    "output", "validation", "checkpoint", "export",
    "model.base", "model.attention", "model.compile", "model.keep_quantized", "model.offload_blocks",
    "data.images", "data.recursive", "data.held_out", "data.trigger", "data.default_caption", "data.audit",
    "data.captions", "data.masks", "data.cache",
    "train.gradient_accumulation_steps", "train.gradient_checkpointing", "train.offload_activations",
)  # fmt: skip
"""Keys that do not change what a run computes, or do so only by the pictures, captions and models of its course."""


def load_config(path: Path, overrides: list[str], initializers: Initializers) -> tuple[RunConfig, Start]:
    """Read a run's TOML with the tables of the initializers. ConfigError lists every problem.

    Tables of initializers that are not chosen are checked too, but need not have an effect: `--init` chooses anew.
    """
    problems: list[str] = []
    table = config.load_table(path, overrides, problems)
    init = table.get("init")
    tables = (
        {name: init.pop(name) for name, value in [*init.items()] if isinstance(value, dict)}
        if isinstance(init, dict)
        else {}
    )
    run = config.parse(RunConfig, table, "", problems)
    if table.get("stages") and isinstance(train := table.get("train"), dict) and "steps" in train:
        problems.append("[train] steps has no effect with [[stages]], each of which has its own: leave it out")
    if run is not None and run.stages:
        run = replace(run, train=replace(run.train, steps=sum(stage.steps for stage in run.stages)))
    wanted = init.get("method") if isinstance(init, dict) else None
    method, preset = "random", dict[str, Any]()
    if isinstance(wanted, str):  # anything else is a problem that `parse` has told, or the default
        try:
            method, preset = initializers.resolve(wanted)
        except ValueError as error:
            problems.append(f"[init] method: {error}")
    parsed = {}
    for name in {method, *tables}:
        try:
            kind = initializers.config_class(name)
        except (KeyError, ValueError) as error:
            problems.append(f"[init.{name}] {error}")
            continue
        given = {**tables.get(name, {}), **(preset if name == method else {})}
        parsed[name] = config.parse(kind, given, f"init.{name}", problems)
    if problems:
        raise config.ConfigError(problems)
    assert run is not None
    options = parsed[method]
    found = initializers.check(method, options)
    needs = [] if found else initializers.needs(method, options, run.model.base)
    check_run = partial(initializers.check_run, method, options)

    def identity() -> list[str] | None:
        whole = not found and all(sources.is_here(need) for need in needs)
        return initializers.identity(method, options) if whole else None

    keys, work = initializers.file_keys(method), partial(initializers.work, method, options, run.model)
    notes = [] if found else initializers.notes(method, options)
    embedder = next((name for name in parsed if initializers.embeds(name)), None)
    embed = partial(initializers.embed, embedder, parsed[embedder]) if embedder else None
    embed_needs = initializers.embed_needs(embedder, parsed[embedder]) if embedder else []
    grey = partial(initializers.grey, method, options) if initializers.greys(method) else None
    initialize = initializers.get(method)
    return run, Start(
        method, initialize, options, found, needs, check_run, identity, keys, work, notes, grey, embed, embed_needs
    )


def prepare(run: RunConfig, start: Start, *, resume: bool) -> Plan:
    """Check models, data, output, targets and initializer; ConfigError lists every problem at once."""
    output = Path(run.output)
    if resume and folder.is_begun(output):  # the seed is in the checkpoint: the initializer is not asked again
        start = replace(start, problems=[], needs=[], check_run=lambda facts: [], work=lambda facts: Work(), notes=())
    problems = [f"[init.{start.method}] {problem}" for problem in start.problems]
    problems += folder.problems(output, resume=resume, steps=run.train.steps)
    if run.model.quantization == "fp8" and not run.train.gradient_checkpointing:
        problems.append(
            '[model] quantization: "fp8" saves nothing without [train] gradient_checkpointing = true, since what is '
            "kept for the backward pass includes every weight as it was cast"
        )
    problems += parallel.problems(run.model.dtype, run.model.quantization, run.train.optimizer)
    problems += offload.problems(run.model.offload_blocks, gradient_checkpointing=run.train.gradient_checkpointing)
    if run.model.quantization != "none" and run.adapter.use_dora:
        problems.append(
            '[adapter] use_dora: DoRA needs the base\'s weights unquantised; set [model] quantization = "none"'
        )
    if run.model.offload_blocks and run.adapter.use_dora:
        problems.append("[adapter] use_dora: DoRA needs all weights beside the adapter; set [model] offload_blocks = 0")
    if run.adapter.use_dora:  # its magnitudes cannot be said as b a
        for name in ("layouts", "rank"):
            if getattr(run.export, name):
                problems.append(f"[export] {name}: with [adapter] use_dora the effect is no low-rank change")
    problems += _kind_problems(run)
    transformer, dataset, prior, modules, multiple = None, None, None, {}, 16
    try:
        wrong = sources.check(qwen_image.need(run.model.base))
        problems += [f"[model] base: {problem}" for problem in wrong]
        if not wrong:
            transformer = qwen_image.transformer_on_meta(run.model.base)
            problems += _quantization_problems(run.model, transformer)
            modules = adapter.target_modules(transformer, run.adapter)
            multiple = qwen_image.picture_multiple(run.model.base)
    except adapter.AdapterError as error:
        problems.append(f"[adapter] {error}")
    except (qwen_image.ModelError, sources.SourceError) as error:
        problems.append(str(error))
    try:
        dataset = scan(run.data, multiple=multiple, seed=run.seed)
    except DataError as error:
        problems += [f"[data] {problem}" for problem in error.problems]
    problems += stages.problems(run.stages, run.train, run.flow, modules, has_prior=run.prior is not None)
    resized = _resized(run, dataset, multiple, problems)
    try:
        if run.prior:
            prior = prepare_prior(run.prior, run.data, dataset, multiple=multiple, seed=run.seed)
    except DataError as error:
        problems += [f"[prior] {problem}" for problem in error.problems]
    problems += _validation_problems(run, start, dataset)
    problems += _negative_problems(run.validation.negative_lora, start, transformer)
    if dataset is not None:
        problems += [f"[init.{start.method}] {problem}" for problem in start.check_run(facts(run, dataset))]
    if problems:
        raise config.ConfigError(problems)
    assert dataset is not None and transformer is not None
    return Plan(run, start, dataset, transformer, modules, prior, resized)


def facts(run: RunConfig, dataset: Dataset) -> RunFacts:
    images = tuple(example.path for example in dataset.train)
    return RunFacts(images, run.adapter, can_try=not parallel.uses_fsdp(), diagnose=run.validation.diagnose)


def _resized(run: RunConfig, dataset: Dataset | None, multiple: int, problems: list[str]) -> dict[int, Dataset]:
    """The pictures at the resolutions of stages; what is wrong with them is added to `problems`."""
    found = {}
    for number, stage in enumerate(run.stages):
        if stage.resolution is None or dataset is None:
            continue
        try:
            found[number] = scan(stages.data_of(stage, run.data), multiple=multiple, seed=run.seed)
        except DataError as error:
            problems += [f"[stages.{number}] {problem}" for problem in error.problems]
    return found


def _kind_problems(run: RunConfig) -> list[str]:
    """What does not go with a LoHa or LoKr."""
    kind = run.adapter.kind
    if kind == "lora":
        return []
    found, name = [], adapter.KINDS[kind]
    if run.model.quantization != "none":
        found.append(
            f'[adapter] kind: PEFT\'s {name} needs the base unquantised; set [model] quantization = "none", or '
            'kind = "lora"'
        )
    if wrong := [layout for layout in run.export.layouts if layout not in METHOD_LAYOUTS]:
        found.append(
            f"[export] layouts: a {name} has no form in {', '.join(wrong)}, only in {' and '.join(METHOD_LAYOUTS)}"
        )
    return found


def _validation_problems(run: RunConfig, start: Start, dataset: Dataset | None) -> list[str]:
    found = []
    if run.validation.patience and dataset is not None and not dataset.held_out:
        found.append("[validation] patience waits for a better step by held-out pictures: set [data] held_out")
    if run.validation.likeness:
        if start.embed is None:
            found.append("[validation] likeness needs image encoders: add the table [init.i2l], with its encoders")
        found += start.embed_problems()
    return found


def _negative_problems(wanted: str, start: Start, transformer: QwenImageTransformer2DModel | None) -> list[str]:
    if wanted == GREY and start.grey is None:
        return [f'[validation] negative_lora: "{GREY}" needs [init] method = "i2l"; or name a LoRA file']
    if wanted in ("", GREY) or transformer is None:
        return []
    problems = list[str]()
    read_asked("[validation] negative_lora:", [wanted], adapter.linears(transformer), problems)
    return problems


def _quantization_problems(model: ModelConfig, transformer: QwenImageTransformer2DModel) -> list[str]:
    stored = qwen_image.stored_quantization(model.base)
    if stored not in (None, model.quantization):
        advice = f'set it to "{stored}"' if stored in ("nf4", "int8") else "such a base cannot be trained on here"
        return [f'[model] quantization: the base is stored in "{stored}"; {advice}']
    names = [name for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    return [
        f'[model] quantization_skip: "{wanted}" is in the name of no linear layer'
        for wanted in model.quantization_skip
        if not any(f"{wanted}." in f"{name}." for name in names)
    ]


def notes(plan: Plan) -> list[str]:
    """What is worth a word in pictures, captions, the start and the model; how captions are cut, if the tokenizer is on
    this machine."""
    found, base = [*plan.dataset.notes, *plan.start.notes], plan.config.model.base
    found += [f"[prior] {note}" for note in (plan.prior.notes if plan.prior else ())]
    if plan.start.method == "i2l" and qwen_image.is_2512(base):
        found.append(
            "i2L was made for the first Qwen-Image, Qwen/Qwen-Image: on Qwen-Image-2512 its LoRA has the right shape, "
            "and how well it fits is not known; look at the samples of step 0, and compare with --init random"
        )
    if plan.config.validation.likeness and not plan.config.validation.prompts:
        found.append("[validation] likeness is that of samples, and without prompts none are drawn")
    if plan.config.model.dtype == "fp16":
        found.append(
            "[model] dtype: in fp16, numbers inside Qwen-Image's blocks exceed the largest there is (65504): they are "
            "cut off, and black samples and NaN are common; bf16 needs no more memory"
        )
    if sources.is_here(qwen_image.need(base, ("tokenizer",))):
        examples = (*plan.dataset.train, *plan.dataset.held_out)
        texts = [text for e in examples for text in e.captions]
        cut = qwen_image.cut_prompts(base, [*texts, *plan.config.validation.prompts])
        for text, end in cut.items():
            names = [e.path.name for e in examples if text in e.captions] or ["[validation] prompts"]
            found.append(f'too long for the text encoder, which reads only up to "{end}": {config.first_few(names)}')
    return found


def pixels(plan: Plan) -> int:
    """The number of pixels of the largest training picture."""
    examples = (*plan.dataset.train, *(example for stage in plan.stages for example in stage.examples))
    return max(width * height for example in examples for width, height in example.buckets)


def prior_pixels(plan: Plan) -> int:
    """The number of pixels of the largest picture that is trained on for the prior; 0 without one."""
    if plan.prior is None:
        return 0
    return max((width * height for e in plan.prior.examples for width, height in e.buckets), default=pixels(plan))


def memory_request(plan: Plan) -> memory.Request:
    run = plan.config
    return memory.Request(
        transformer=plan.transformer,
        model=run.model,
        adapter=run.adapter,
        train=run.train,
        pixels=pixels(plan),
        start=plan.start.work(facts(run, plan.dataset)),
        draws=bool(run.validation.prompts),
        prior_pixels=prior_pixels(plan),
        draws_prior=bool(plan.prior and plan.prior.drawn),
    )
