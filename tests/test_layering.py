"""A file imports only from floors below it: who reads upwards never needs what comes later."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {
    0: (
        "trainer.config",
        "trainer.files",
        "trainer.flow",
        "trainer.hubs",
        "trainer.lowrank",
        "trainer.parallel",
        "trainer.pictures",
        "trainer.statistics",
        "trainer.threads",
    ),
    1: (
        "trainer.adapter",
        "trainer.cache",
        "trainer.checkpoint",
        "trainer.dataset",
        "trainer.sources",
        "trainer.tracking",
    ),
    2: ("trainer.lycoris", "trainer.qwen_image"),
    3: ("trainer.encode", "trainer.formats", "trainer.validation"),
    4: ("trainer.export", "trainer.loop", "trainer.report"),
    5: ("trainer.cli", "trainer.memory"),
    6: ("trainer.plan",),
    7: ("trainer.machine",),
    8: ("trainer.profile", "trainer.run"),
    9: ("trainer.comparison",),
    10: ("trainer.samples",),
    11: ("trainer.bench", "trainer.full_size", "trainer.workbench"),
    12: ("trainer.compare",),
    13: ("initializers",),
    14: ("demo",),
    15: ("train",),
}
"""Modules of `trainer` one by one; a package counts as a whole, and its files may import one another."""

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


def floor(module: str) -> int:
    home = {name: number for number, names in FLOORS.items() for name in names}
    for name in (module, ".".join(module.split(".")[:2]), module.split(".")[0]):
        if name in home:
            return home[name]
    raise AssertionError(f"{module} has no floor yet: give it a place in FLOORS, above all that it imports")


def package(module: str) -> str:
    """The folder that counts as a whole: `initializers`, `demo`, or a package inside `trainer`."""
    top, *rest = module.split(".")
    inside = top == "trainer" and rest and (ROOT / top / rest[0]).is_dir()
    return f"{top}.{rest[0]}" if inside else top


def test_every_module_imports_only_from_below() -> None:
    known = modules()
    assert len(known) > 25
    edges = 0
    for name, path in known.items():
        if name == "trainer":  # the package itself is empty
            assert imports(path, known) == set()
            continue
        for other in imports(path, known):
            edges += 1
            assert other in known, f"{name} imports {other}, which is not there"
            same_package = package(name) == package(other) != "trainer"
            assert same_package or floor(other) < floor(name), f"{name} (floor {floor(name)}) imports {other}"
    assert edges > 60


def test_the_table_names_only_what_exists() -> None:
    for names in FLOORS.values():
        for name in names:
            assert name in modules()


def test_nothing_imports_itself_by_a_detour() -> None:
    known = modules()
    order = [*TopologicalSorter({name: imports(path, known) for name, path in known.items()}).static_order()]
    assert set(order) >= known.keys() - {"trainer"}


def test_the_trainer_knows_nothing_of_initializers_and_demo() -> None:
    known = modules()
    for name, path in known.items():
        if name.startswith("trainer"):
            assert not {other for other in imports(path, known) if other.split(".")[0] in ("initializers", "demo")}
        if name.startswith("initializers"):
            assert not {other for other in imports(path, known) if other.split(".")[0] == "demo"}
