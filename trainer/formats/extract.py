"""A LoRA from a fine-tuned transformer: `python -m trainer.formats extract`.

dW = tuned - base of each Linear layer in float64, and the best LoRA of a rank for it. Weights are read module by
module: no more than two tensors are in memory, and no model is built.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from trainer.config import ConfigError, first_few
from trainer.files import HEADER_DTYPES, Header, read_header
from trainer.formats.layouts import module_name, module_type
from trainer.formats.lora import FormatError
from trainer.formats.written import Account, Form, write
from trainer.hardware import parallel
from trainer.hub import sources
from trainer.hub.sources import Need
from trainer.lowrank import LowRank, common_rank, nearest, squared_singular_values

WEIGHTS = "diffusion_pytorch_model"
_PREFIX = re.compile(r"(?:model\.)?diffusion_model\.")
"""What ComfyUI and others put before the transformer's names in a file that holds more than the transformer."""


def extract(tuned: str, base: str, form: Form) -> None:
    """Write the LoRA that is nearest to tuned - base, and print what it keeps, and what changed and is not in it.

    tuned, base: each a folder of diffusers' transformer or of a whole pipeline, a .safetensors file, or an id as
    `trainer.hub.sources` reads it. ConfigError lists all that is wrong, before a weight is read.
    """
    pair = open_pair(tuned, base, form)
    device = parallel.one_device()
    others = _others(pair, form.quiet)
    rank = form.rank or _rank(pair, form, device)
    form.check_room(rank, [pair.base.shapes[f"{name}.weight"] for name in pair.modules])
    factors, account = dict[str, LowRank](), Account()
    for name in _bar(pair.modules, "extracting", form.quiet):
        change = pair.change(f"{name}.weight", device)
        (a, b), account.kept[name] = nearest(change, rank)
        factors[name], account.energies[name] = LowRank(a.cpu(), b.cpu()), float(change.square().sum())
    besides = others.told(sum(account.energies.values()))
    write(form, factors, account, {"tuned": tuned, "base": base, "besides": besides}, {})
    print("\n".join(besides))


@dataclass(frozen=True)
class Model:
    """The tensors of a transformer, by the names that they have in diffusers; none is read yet."""

    source: str
    places: dict[str, tuple[Path, str]]
    """The file of each tensor, and its key there."""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def modules(self) -> list[str]:
        """The Linear layers that a LoRA can change."""
        weights = [name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight")]
        return [name for name in weights if module_name(name) == name and len(self.shapes[f"{name}.weight"]) == 2]

    def tensor(self, name: str) -> Tensor:
        """FormatError if there is NaN or infinity in it."""
        path, key = self.places[name]
        with safe_open(path, framework="pt") as file:
            found: Tensor = file.get_tensor(key)
        if not bool(found.isfinite().all()):
            raise FormatError(f"{path}: {key} contains NaN or infinity: no difference can be taken from it")
        return found


@dataclass(frozen=True)
class Pair:
    """Two transformers of the same shape."""

    tuned: Model
    base: Model

    @property
    def modules(self) -> list[str]:
        return self.base.modules()

    def change(self, name: str, device: torch.device) -> Tensor:
        """tuned - base of a tensor, in float64."""
        return self.tuned.tensor(name).to(device).double().sub_(self.base.tensor(name).to(device))


def open_pair(tuned: str, base: str, form: Form) -> Pair:
    """Both models by their headers, fetched if need be. ConfigError lists all that is wrong."""
    problems = form.problems()
    if form.rank is None and form.energy is None:
        problems.append("--rank or --energy is needed: a difference of whole weights has a rank of thousands")
    needs = [need for source in (tuned, base) if (need := _need(source)) is not None]
    for need in needs:
        problems += sources.check(need) or sources.download_problems([need])
    if problems:
        raise ConfigError(problems)
    sources.fetch(needs, quiet=form.quiet)
    pair = Pair(_open(tuned), _open(base))
    if problems := [*_unusable(pair.tuned), *_unusable(pair.base)] or _misfits(pair):
        raise ConfigError(problems)
    return pair


def _need(source: str) -> Need | None:
    """The files of a transformer in a folder or repository; None of a single file."""
    path = Path(source)
    if path.is_file():
        return None
    part = "" if (path / "config.json").is_file() and not (path / "transformer").is_dir() else "transformer/"
    return Need(source, (f"{part}config.json", f"{part}{WEIGHTS}*.safetensors"))


def _open(source: str) -> Model:
    need = _need(source)
    paths = (
        [Path(source)] if need is None else sources.weight_files(sources.locate(source, need.files[0]).parent, WEIGHTS)
    )
    headers = {path: read_header(path) for path in paths}
    names = {path: _names(header) for path, header in headers.items()}
    return Model(
        source,
        {name: (path, key) for path, own in names.items() for name, key in own.items()},
        {name: headers[path].shapes[key] for path, own in names.items() for name, key in own.items()},
        {name: headers[path].dtypes[key] for path, own in names.items() for name, key in own.items()},
    )


def _names(header: Header) -> dict[str, str]:
    """Keys by their names in diffusers; where some have ComfyUI's prefix, the others are not of the transformer."""
    prefixed = {key[match.end() :]: key for key in header.shapes if (match := _PREFIX.match(key))}
    return prefixed or {key: key for key in header.shapes}


def _unusable(model: Model) -> list[str]:
    modules = model.modules()
    if not modules:
        return [f"{model.source}: no Linear layer of Qwen-Image's transformer is in it: choose another folder or file"]
    dtypes = {name: model.dtypes[f"{name}.weight"] for name in modules}
    if not (wrong := [name for name in modules if dtypes[name] not in HEADER_DTYPES]):
        return []
    return [
        f"{model.source}: {len(wrong)} of its {len(modules)} Linear layers are quantised, {wrong[0]} as "
        f"{dtypes[wrong[0]]}: their difference would be that of the rounding; take the model in bf16, fp16 or fp32"
    ]


def _misfits(pair: Pair) -> list[str]:
    shapes = [model.shapes for model in (pair.tuned, pair.base)]
    modules = dict.fromkeys([*pair.tuned.modules(), *pair.base.modules()])
    sizes = {name: [own.get(f"{name}.weight") for own in shapes] for name in modules}
    if not (wrong := [name for name, (one, other) in sizes.items() if one != other]):
        return []
    one, other = (shape or "missing" for shape in sizes[wrong[0]])
    return [
        f"{pair.tuned.source} is not made from {pair.base.source}: {len(wrong)} of {len(modules)} Linear layers are "
        f"missing in one of them or of another size, such as {wrong[0]} ({one}, and in the base {other})"
    ]


def _rank(pair: Pair, form: Form, device: torch.device) -> int:
    """The smallest rank that keeps the energy, from all singular values."""
    assert form.energy is not None
    changes = (
        pair.change(f"{name}.weight", device) for name in _bar(pair.modules, "singular values, first", form.quiet)
    )
    return common_rank((squared_singular_values(change) for change in changes), form.energy)


@dataclass(frozen=True)
class Others:
    """The tensors that no LoRA holds: biases, norms."""

    unpaired: dict[str, list[str]]
    """Those that one model alone has, or has in another shape, by where it came from."""
    compared: int
    changes: dict[str, float]
    """|tuned - base|^2 of those that changed."""
    size: float
    """|base|^2 of these together."""

    def told(self, energy: float) -> list[str]:
        """In words. energy: of the change of all Linear layers."""
        lines = [
            f"only in {source}, or of another shape: {first_few(_kinds(names))}"
            for source, names in self.unpaired.items()
            if names
        ]
        if not self.changes:
            return [*lines, f"the {self.compared} other tensors, such as biases and norms, did not change"]
        whole = sum(self.changes.values())
        by = f"by {math.sqrt(whole / self.size):.2%} of their size" if self.size else "from zero"
        count = f"{len(self.changes)} of {self.compared} other tensors"
        share = f"{whole / (whole + energy):.2%} of the energy of all changes"
        return [*lines, f"not in the LoRA: {count} changed ({first_few(_kinds(self.changes))}), {by}; that is {share}"]


def _others(pair: Pair, quiet: bool) -> Others:
    tuned, base, modules = pair.tuned.shapes, pair.base.shapes, {f"{name}.weight" for name in pair.modules}
    both = [name for name in base if name not in modules and tuned.get(name) == base[name]]
    compared, changes, size = {*both, *modules}, dict[str, float](), 0.0
    for name in _bar(both, "biases and norms", quiet):
        if change := float(pair.change(name, torch.device("cpu")).square().sum()):
            changes[name] = change
            size += float(pair.base.tensor(name).double().square().sum())
    unpaired = {model.source: [*(model.shapes.keys() - compared)] for model in (pair.tuned, pair.base)}
    return Others(unpaired, len(both), changes, size)


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted({module_type(name) for name in names})


def _bar(names: Sequence[str], title: str, quiet: bool) -> Iterable[str]:
    bar: Iterable[str] = tqdm(names, desc=title, unit="tensor", leave=False, disable=quiet or None)
    return bar
