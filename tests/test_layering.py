"""A file imports only from floors below it: who reads upwards never needs what comes later."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {
    0: ("trainer.errors", "trainer.lowrank", "trainer.template"),
    1: (
        "trainer.compare.statistics",
        "trainer.config",
        "trainer.data.audit.boxes",
        "trainer.data.audit.duplicates",
        "trainer.choice",
        "trainer.data.audit.rules",
        "trainer.data.folders",
        "trainer.data.pictures",
        "trainer.draw.views",
        "trainer.evaluate.metrics",
        "trainer.evaluate.names",
        "trainer.files",
        "trainer.flow",
        "trainer.hardware.live",
        "trainer.hardware.parallel",
        "trainer.hardware.threads",
        "trainer.hub.hubs",
        "trainer.lycoris",
    ),
    2: (
        "trainer.adapter",
        "trainer.checkpoint",
        "trainer.data.audit.measures",
        "trainer.data.audit.page",
        "trainer.data.audit.people",
        "trainer.data.cache",
        "trainer.data.caption.templates",
        "trainer.data.notes",
        "trainer.diagnosis",
        "trainer.evaluate.votes",
        "trainer.hardware.offload",
        "trainer.hub.sources",
        "trainer.optimizer",
        "trainer.tracking",
    ),
    3: (
        "trainer.data.audit.find",
        "trainer.data.audit.verdicts",
        "trainer.data.captions",
        "trainer.qwen_image",
        "trainer.text_image",
    ),
    4: (
        "trainer.data.caption.answers",
        "trainer.data.caption.written",
        "trainer.data.masks",
        "trainer.export.onnx_model",
        "trainer.folder",
        "trainer.formats",
        "trainer.validation",
    ),
    5: (
        "trainer.compare.report",
        "trainer.data.caption.vision_model",
        "trainer.data.dataset",
        "trainer.export.request",
        "trainer.export.result",
        "trainer.loop",
        "trainer.measure",
    ),
    6: (
        "trainer.cli",
        "trainer.export.comfyui",
        "trainer.export.merged",
        "trainer.export.onnx_folder",
        "trainer.data.audit.words",
        "trainer.data.encode",
        "trainer.data.epoch",
        "trainer.data.prior",
        "trainer.hardware.memory",
        "trainer.stages",
    ),
    7: ("trainer.data.audit.picture", "trainer.plan", "trainer.studio"),
    8: (
        "trainer.draw.library",
        "trainer.plan_words",
        "trainer.data.audit.judge",
        "trainer.data.audit.masks",
        "trainer.evaluate.plan",
        "trainer.hardware.machine",
        "trainer.page",
    ),
    9: (
        "trainer.data.audit.run",
        "trainer.data.caption.run",
        "trainer.evaluate.blind",
        "trainer.evaluate.folder",
        "trainer.evaluate.report",
        "trainer.export.__main__",
        "trainer.formats.__main__",
        "trainer.hardware.seconds",
        "trainer.objective",
    ),
    10: ("trainer.data.__main__", "trainer.evaluate.measures", "trainer.evaluate.results", "trainer.run"),
    11: ("trainer.bench", "trainer.compare.plan", "trainer.draw.plan", "trainer.evaluate.run"),
    12: ("trainer.draw.run", "trainer.compare.measures", "trainer.doctor"),
    13: ("trainer.compare.runs",),
    14: ("trainer.compare.execute",),
    15: ("trainer.compare.__main__",),
    16: ("initializers",),
    17: ("demo", "trainer.draw.__main__", "trainer.evaluate.__main__"),
    18: ("train",),
}
"""Modules one by one. A package that is in the table itself counts as a whole: its files may import one another. The
other packages of `trainer` are rooms for what belongs together, on whatever floors."""

PROGRAMS = ("trainer.draw.__main__", "trainer.evaluate.__main__")
"""Like train.py, they hand the initializers to the trainer."""
OURS = ("trainer", "initializers", "demo", "train")


def modules() -> dict[str, Path]:
    """Every module of the program by its dotted name."""
    paths = [ROOT / "train.py"]
    for package in OURS[:3]:
        paths += (ROOT / package).rglob("*.py")
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: path for path, name in names.items()}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Our modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in wanted:  # `from trainer import flow` is the module, `from trainer.flow import x` a name in it
            if name.split(".")[0] in OURS:
                found.add(name if name in known else name.rpartition(".")[0])
    return found


HOME = {name: number for number, names in FLOORS.items() for name in names}
ROOMS = {
    "trainer",
    "trainer.bench",
    "trainer.compare",
    "trainer.data",
    "trainer.data.audit",
    "trainer.data.caption",
    "trainer.draw",
    "trainer.evaluate",
    "trainer.export",
    "trainer.hardware",
    "trainer.hub",
}
"""Packages that hold nothing themselves."""


def entry(module: str) -> str:
    """The module, or the package around it, that the table names."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in HOME:
            return name
    raise AssertionError(f"{module} has no floor yet: give it a place in FLOORS, above all that it imports")


def test_every_module_imports_only_from_below() -> None:
    known = modules()
    assert len(known) > 25
    edges = 0
    for name, path in known.items():
        if name in ROOMS:
            assert imports(path, known) == set()
            continue
        for other in imports(path, known):
            edges += 1
            assert other in known, f"{name} imports {other}, which is not there"
            if other in ROOMS or entry(name) == entry(other):
                continue
            here, there = HOME[entry(name)], HOME[entry(other)]
            assert there < here, f"{name} (floor {here}) imports {other} (floor {there})"
    assert edges > 60


def test_the_table_names_only_what_exists() -> None:
    for names in FLOORS.values():
        for name in names:
            assert name in modules()


def test_nothing_imports_itself_by_a_detour() -> None:
    known = modules()
    order = [*TopologicalSorter({name: imports(path, known) for name, path in known.items()}).static_order()]
    assert set(order) >= known.keys() - ROOMS


def test_the_trainer_knows_nothing_of_initializers_and_demo() -> None:
    known = modules()
    for name, path in known.items():
        if name.startswith("trainer") and name not in PROGRAMS:
            assert not {other for other in imports(path, known) if other.split(".")[0] in ("initializers", "demo")}
        if name.startswith("initializers"):
            assert not {other for other in imports(path, known) if other.split(".")[0] == "demo"}
