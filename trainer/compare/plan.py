"""A comparison before it starts: which runs, from which starts, of which subjects; read, checked, described."""

import filecmp
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from trainer import config, folder, plan, plan_words, qwen_image
from trainer.adapter import RunFacts
from trainer.data.cache import key
from trainer.data.pictures import SUFFIXES, pictures_in
from trainer.errors import UserError
from trainer.files import read_json
from trainer.hub.sources import Need
from trainer.plan import InitConfig, Initializers, Plan, RunConfig, Start
from trainer.text_image import text_image_need, text_image_problems

SCHEMA = 2  # of report.json, and of the results that it is made from
log = logging.getLogger("trainer")

CONTROLS = {
    "norm-matched": "i2l's singular values with random directions: is it only the size of the seed?",
    "wrong-pictures": "i2L of the next subject's pictures: does it carry the subject, or an average one?",
    "bias-only": "the expert Bias alone, which has seen no picture",
    "no-training": "i2l as it is, never trained",
}
CONTROLLED = "i2l"  # the arm that the controls belong to
HELD_OUT = "held_out"  # a subject's folder of pictures that no run is trained on


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    initializers: tuple[str, ...]
    seeds: int = 3
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    controls: tuple[str, ...] = ()
    subjects: Path | None = None
    part: tuple[int, int] = (1, 1)
    """Which of how many parts of the work this process does."""


@dataclass(frozen=True, eq=False)
class Arm:
    name: str
    start: Start
    control: str | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    name: str
    """Its path below the folder of subjects; the folders above the last are its group."""
    plan: Plan

    @property
    def group(self) -> str:
        return self.name.rpartition("/")[0]


@dataclass(frozen=True, eq=False)
class Cell:
    """One run."""

    subject: Subject
    arm: Arm
    learning_rate: float
    seed: int
    folder: Path

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"


@dataclass(frozen=True)
class Comparison:
    config: RunConfig
    request: Request
    arms: tuple[Arm, ...]
    subjects: tuple[Subject, ...]
    initializers: Initializers
    image_encoders: Start | None
    """The initializer whose image encoders measure the samples."""

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.config.seed + number for number in range(self.request.seeds))

    @property
    def baseline(self) -> str:
        """What the others are compared with."""
        names = [arm.name for arm in self.arms]
        return "random" if "random" in names else names[0]

    def cells(self) -> list[Cell]:
        return [
            self.cell(subject, arm, rate, seed)
            for subject in self.subjects
            for seed in self.seeds
            for arm in self.arms
            if arm.control != "no-training"
            for rate in self.request.learning_rates
        ]

    def cell(self, subject: Subject, arm: Arm, rate: float, seed: int) -> Cell:
        folder = self.output / "runs" / subject.name / arm.name / f"{rate:g}-{seed}"
        return Cell(subject, arm, rate, seed, folder)

    def plan_of(self, cell: Cell) -> Plan:
        settings = self.config
        train = replace(settings.train, learning_rate=cell.learning_rate)
        data = cell.subject.plan.config.data
        init = InitConfig(method=cell.arm.start.method)
        settings = replace(settings, output=str(cell.folder), seed=cell.seed, train=train, data=data, init=init)
        return replace(cell.subject.plan, config=settings, start=cell.arm.start)

    def other(self, subject: Subject) -> Subject | None:
        """The next subject of the same group."""
        group = [one for one in self.subjects if one.group == subject.group]
        return group[(group.index(subject) + 1) % len(group)] if len(group) > 1 else None

    def fingerprint(self, cell: Cell) -> str:
        """A hash of all that decides a run's result, the content of models and experts included."""
        prepared = self.plan_of(cell)
        other = self.other(cell.subject) if cell.arm.control == "wrong-pictures" else None
        shown = [(example.digest, *example.captions) for example in other.plan.dataset.train] if other else []
        held_out = [example.digest for example in prepared.dataset.held_out]
        settings = config.to_dict(self.config.validation)
        run, train = prepared.course(), self.config.train
        lengths = [train.steps, train.gradient_accumulation_steps]
        return key(SCHEMA, run, lengths, cell.arm.control, shown, held_out, settings)

    @property
    def needs(self) -> list[Need]:
        """All files of models that the runs load, and what looks at their samples."""
        source = self.config.validation.text_image_model
        found = [qwen_image.need(self.config.model.base), *(need for arm in self.arms for need in arm.start.needs)]
        return [*found, text_image_need(source)] if source else found

    @cached_property
    def sample_steps(self) -> tuple[int, ...]:
        """Where pictures are drawn: at 0, and then at twice the step before, up to the end."""
        every, steps = self.config.validation.every, self.config.train.steps
        found = [0]
        while found[-1] < steps:
            found.append(min(max(every, 2 * found[-1]), steps))
        return tuple(found)


def prepare(path: Path, overrides: Sequence[str], request: Request, initializers: Initializers) -> Comparison:
    """Check everything that needs no weights; ConfigError lists every problem at once."""
    problems = _request_problems(request) + _name_problems(request, initializers)
    settings, arms = _arms(path, overrides, request, initializers, problems)
    if settings is None or not arms:
        raise config.ConfigError(list(dict.fromkeys(problems)))
    if settings.validation.every > settings.train.steps:
        problems.append(
            f"[validation] every = {settings.validation.every} is more than [train] steps = {settings.train.steps}: "
            "there would be no curve; validate more often, or train longer"
        )
    if settings.model.compile:
        problems.append("[model] compile: each run of --compare has an adapter of its own, and would be compiled anew")
    if own := [number for number, stage in enumerate(settings.stages) if stage.learning_rate is not None]:
        problems.append(
            f"[stages.{own[0]}] learning_rate: --compare sets the rate of each run; leave it out in all stages"
        )
    problems += text_image_problems(settings.validation.text_image_model)
    subjects = _subjects(settings, arms[0].start, request, problems)
    settings = replace(settings, init=InitConfig())  # each arm has its own
    image_encoders = _image_encoders(path, overrides, initializers)
    comparison = Comparison(settings, request, tuple(arms), tuple(subjects), initializers, image_encoders)
    if "wrong-pictures" in request.controls:
        alone = [subject.name for subject in subjects if comparison.other(subject) is None]
        others = ", ".join(name for name in CONTROLS if name != "wrong-pictures")
        problems += [
            f"--controls wrong-pictures: {name} is alone in its group; give --subjects with two, or only {others}"
            for name in alone
        ]
    problems += _start_problems(comparison)
    if folder.is_used(comparison.output):
        problems.append(f"output: {comparison.output} holds a run; choose another --output")
    if not problems:
        problems += _foreign_results(comparison)
    if problems:
        raise config.ConfigError(list(dict.fromkeys(problems)))
    return comparison


def _arms(
    path: Path, overrides: Sequence[str], request: Request, initializers: Initializers, problems: list[str]
) -> tuple[RunConfig | None, list[Arm]]:
    """The configuration, None if no start can be read, and the starts; what is wrong is added to `problems`."""
    settings, arms = None, list[Arm]()
    wanted: list[tuple[str, str, str | None, tuple[str, ...]]]
    wanted = [(_arm_name(method), method, None, ()) for method in request.initializers]
    wanted += [
        (name, CONTROLLED, name, _CONTROL_SETTINGS.get(name, ())) for name in request.controls if name in CONTROLS
    ]
    for name, method, control, extra in wanted:
        method_override = f"init.method={json.dumps(method, ensure_ascii=False)}"
        try:
            settings, start = plan.load_config(path, [*overrides, method_override, *extra], initializers)
        except config.ConfigError as error:
            problems += error.problems
            continue
        problems += [f"[init.{start.method}] {problem}" for problem in start.problems]
        arms.append(Arm(name, start, control))
    starts = {arm.name: arm.start.options for arm in arms}
    if "bias-only" in starts and starts["bias-only"] == starts.get(CONTROLLED):
        problems.append("--controls bias-only: i2l has no other expert, so it is the same start; leave it out")
    if "norm-matched" in request.controls and settings is not None and settings.adapter.kind == "lokr":
        problems.append(
            '--controls norm-matched: [adapter] kind = "lokr" keeps little of random directions, so that no norm would '
            "match; leave it out"
        )
    return settings, arms


def _arm_name(method: str) -> str:
    return Path(method).name.removesuffix(".safetensors")


def _name_problems(request: Request, initializers: Initializers) -> list[str]:
    """Starts that have one name, or are one LoRA."""
    found = []
    given = [(name, name) for name in request.initializers] + [(name, "") for name in request.controls]
    by_name: dict[str, list[str]] = {}
    for name, method in given:
        by_name.setdefault(_arm_name(name), []).append(method)
    for name, methods in by_name.items():
        if len({Path(method).expanduser().resolve() for method in methods if method}) > 1:
            listed = ", ".join(dict.fromkeys(methods))
            found.append(f"--compare: {name} is the name of several starts ({listed}); rename the files")
        elif len(methods) > 1:
            found.append(f"--compare: {name} is there twice")
    files = {name: Path(name).expanduser() for name in dict.fromkeys(request.initializers)}
    files = {name: file for name, file in files.items() if file.exists() and not _is_method(name, initializers)}
    for name in files:
        if _is_method(_arm_name(name), initializers) or _arm_name(name) in CONTROLS:
            found.append(f"--compare: {name} is called as another start is, {_arm_name(name)}; rename the file")
    for (one, first), (two, second) in combinations(files.items(), 2):
        if _arm_name(one) != _arm_name(two) and _same(first, second):
            found.append(f"--compare: {one} and {two} are the same LoRA; leave one out")
    return found


def _is_method(name: str, initializers: Initializers) -> bool:
    """Whether it names an initializer, and no file."""
    try:
        return initializers.resolve(name)[0] == name
    except ValueError:
        return False


def _same(one: Path, two: Path) -> bool:
    if one.is_file() and two.is_file():
        return filecmp.cmp(one, two, shallow=False)
    return one.samefile(two)


def _start_problems(comparison: Comparison) -> list[str]:
    """What each start lacks in the pictures of a subject, such as a second one to try strengths on."""
    found = []
    for subject in comparison.subjects:
        images = tuple(example.path for example in subject.plan.dataset.train)
        facts = RunFacts(images, comparison.config.adapter, can_try=True)
        for start in (arm.start for arm in comparison.arms):
            found += [f"{subject.name}: [init.{start.method}] {problem}" for problem in start.check_run(facts)]
    return found


def _image_encoders(path: Path, overrides: Sequence[str], initializers: Initializers) -> Start | None:
    try:
        return plan.load_config(path, [*overrides, f'init.method="{CONTROLLED}"'], initializers)[1]
    except config.ConfigError:
        return None  # told already if it is compared


_CONTROL_SETTINGS = {"bias-only": ('init.i2l.experts=["bias"]',)}


def _request_problems(request: Request) -> list[str]:
    found = []
    if request.seeds < 1:
        found.append("--seeds must be at least 1")
    found += [
        f"--learning-rates: {rate} must be a finite number above 0"
        for rate in request.learning_rates
        if not (math.isfinite(rate) and rate > 0)
    ]
    written = [f"{rate:g}" for rate in request.learning_rates]  # as in the names of the runs' folders
    if twice := sorted({rate for rate in written if written.count(rate) > 1}):
        found.append(f"--learning-rates: {', '.join(twice)} is there twice, to six digits")
    found += [
        f"--controls: {name} is not one of {', '.join(CONTROLS)}" for name in request.controls if name not in CONTROLS
    ]
    if request.controls and CONTROLLED not in request.initializers:
        found.append(f"--controls are of {CONTROLLED}: name it in --compare")
    number, count = request.part
    if not 1 <= number <= count:
        found.append(f"--part {number}/{count}: the first number is from 1 to the second")
    if request.subjects is not None and not request.subjects.is_dir():
        found.append(f"--subjects: there is no folder {request.subjects.absolute()}")
    elif request.subjects is not None and pictures_in(request.subjects):
        found.append(
            f"--subjects: {request.subjects} has pictures itself: it must hold a folder for each subject; for one "
            "subject, leave --subjects out and name its folder in [data] images"
        )
    return found


def _subjects(settings: RunConfig, start: Start, request: Request, problems: list[str]) -> list[Subject]:
    """Every subject, checked as the data of a run is; what is wrong is added to `problems`."""
    cache = settings.data.cache or str(Path(settings.output) / "cache")
    if request.subjects is None:
        folders = [Path(data.images).resolve().name for data in settings.data.each_folder()]
        found = {"+".join(dict.fromkeys(folders)): settings.data}
    elif settings.data.folders:
        problems.append("--subjects: each subject is one folder; take [[data.folders]] out, and set [data] images")
        found = {}
    elif request.subjects.is_dir():
        found = {}
        for folder in _subject_folders(request.subjects, problems):
            held_out: int | str = settings.data.held_out
            if (folder / HELD_OUT).is_dir():
                held_out = str(folder / HELD_OUT)
            elif isinstance(held_out, str):
                problems.append(f"{folder}: has no folder {HELD_OUT}, and [data] held_out is another subject's")
                continue
            name = folder.relative_to(request.subjects).as_posix()
            found[name] = replace(settings.data, images=str(folder), held_out=held_out)
    else:
        found = {}
    subjects = []
    for name, data in found.items():
        output = Path(settings.output) / "runs" / name
        own = replace(settings, data=replace(data, cache=cache), output=str(output))
        try:
            # what is wrong with starts is told of all of them together
            prepared = plan.prepare(own, replace(start, problems=[], check_run=lambda facts: []), resume=False)
        except config.ConfigError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
            continue
        if not prepared.dataset.held_out:
            problems.append(f"{name}: there is no held-out picture to compare by; set [data] held_out")
        subjects.append(Subject(name, prepared))
    return subjects


def _subject_folders(folder: Path, problems: list[str]) -> Iterator[Path]:
    """Folders with pictures in them, at any depth; a folder with neither pictures nor folders is a problem."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if any(path.suffix.lower() in SUFFIXES for path in entries):
        yield folder
        return
    below = [path for path in entries if path.is_dir() and path.name != HELD_OUT]
    if not below:
        problems.append(f"{folder}: there is no picture in it ({', '.join(SUFFIXES)})")
    for path in below:
        yield from _subject_folders(path, problems)


def _foreign_results(comparison: Comparison) -> list[str]:
    """Results in the output folder that other settings have made."""
    found = []
    for cell in comparison.cells():
        result = read_result(cell)
        if result is not None and result["fingerprint"] != comparison.fingerprint(cell):
            found.append(str(cell.folder))
    if not found:
        return []
    return [f"output: {len(found)} runs there were made with other settings, as {found[0]}; choose another --output"]


def read_result(cell: Cell) -> dict[str, Any] | None:
    """None if there is none, or it is damaged: then the run is done again."""
    if not cell.result_file.exists():
        return None
    try:
        return dict(read_json(cell.result_file))
    except UserError as error:
        log.warning("%s; without it the run is done again", error)
        return None


def finished(cell: Cell) -> bool:
    """Not so a run that failed: it is tried again."""
    return (read_result(cell) or {}).get("status") == "finished"


def plan_text(comparison: Comparison) -> str:
    """What would be done."""
    cells = comparison.cells()
    done = sum(map(finished, cells))
    groups = sorted({subject.group for subject in comparison.subjects})
    return "\n".join(
        [
            f"arms         {', '.join(arm.name for arm in comparison.arms)}; compared with {comparison.baseline}",
            f"subjects     {len(comparison.subjects)}" + (f" in {', '.join(groups)}" if any(groups) else ""),
            f"rates        {', '.join(f'{rate:g}' for rate in comparison.request.learning_rates)}",
            f"seeds        {', '.join(map(str, comparison.seeds))}",
            f"runs         {len(cells)} of {comparison.config.train.steps} steps, {done} of them done",
            f"pictures     drawn at steps {', '.join(map(str, comparison.sample_steps))}, for the first seed",
            "",
            "each run:",
            plan_words.plan_text(comparison.subjects[0].plan),
        ]
    )
