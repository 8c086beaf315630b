"""A base and the LoRAs that are to be part of it: read from the arguments, and checked before anything loads."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer import adapter, config, qwen_image
from trainer.config import ConfigError, first_few
from trainer.files import (
    DTYPES,
    HEADER_DTYPES,
    Header,
    content_hash,
    file_in_the_way,
    free_bytes,
    read_header,
    read_json,
    size,
)
from trainer.formats.asked import Asked, read_asked
from trainer.formats.lora import FormatError
from trainer.hub import sources

MERGED_FILE = "merged.json"
"""In a folder with LoRAs in its weights: which, at which strengths, and in which base."""
WEIGHTS = "diffusion_pytorch_model"
"""What the files of the transformer's weights are called, but for their endings."""


@dataclass
class Rounding:
    """What rounding to the result's precision does to the weights that LoRAs change; sums of squares."""

    changed: float = 0.0
    lost: float = 0.0

    def add(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """One weight: as the base has it, with the LoRAs in fp32, and as it is written."""
        self.changed += float((exact - before.float()).norm()) ** 2
        self.lost += float((rounded.float() - exact).norm()) ** 2

    @property
    def share(self) -> float:
        """How far rounding moves the weights, as a share of how far the LoRAs do."""
        return math.sqrt(self.lost / self.changed) if self.changed else 0.0


@dataclass(frozen=True)
class Request:
    """Arguments in order; the base's files are on this machine."""

    base: str
    parts: tuple[Asked, ...]
    dtype: torch.dtype | None
    """The result's; None: as each tensor of the base has it."""
    output: Path

    @property
    def folder(self) -> Path:
        """The base's."""
        return sources.local(self.base)

    def shards(self) -> list[Path]:
        """The files of the transformer's weights."""
        return sources.weight_files(self.folder / "transformer", WEIGHTS)

    def dtypes(self, header: Header) -> dict[str, torch.dtype]:
        """What each tensor of a shard becomes."""
        return {name: self.dtype or HEADER_DTYPES[stored] for name, stored in header.dtypes.items()}

    def num_bytes(self, shard: Path) -> int:
        """What the tensors of a shard will take."""
        header = read_header(shard)
        return sum(math.prod(header.shapes[name]) * dtype.itemsize for name, dtype in self.dtypes(header).items())

    def tensors(self, shard: Path, rounding: Rounding | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a shard with the LoRAs in them, in the order in which the file has them; one is read at a
        time. UserError if a precision cannot hold one. rounding: what is lost is added to it."""
        header = read_header(shard)
        dtypes = self.dtypes(header)
        with safe_open(shard, framework="pt") as file:
            for name in sorted(header.starts, key=header.starts.__getitem__):
                before = file.get_tensor(name)
                exact = folded(name, before, self.parts)
                found = exact.to(dtypes[name])
                if not bool(found.isfinite().all()):
                    raise FormatError(
                        f"{shard}: {name} has values that {dtypes[name]} cannot hold; choose --dtype bf16"
                    )
                if rounding is not None and exact is not before:
                    rounding.add(before, exact, found)
                del before, exact
                yield name, found


def folded(name: str, weight: Tensor, parts: Sequence[Asked]) -> Tensor:
    """W plus the sum of strength b a, in fp32; a tensor that no LoRA changes is returned as it is."""
    module = name.removesuffix(".weight")
    for part in parts:
        if name.endswith(".weight") and module in part.file.modules:
            a, b = part.file.module(module)
            weight = torch.addmm(weight.float(), b, a, alpha=part.strength)
    return weight


def add_arguments(parser: argparse.ArgumentParser, *, lora_needed: bool) -> None:
    """--base or --config, --lora, --output, --dtype, --quiet"""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--base", metavar="MODEL", help="a folder in diffusers' layout, or an id as in [model] base")
    source.add_argument("--config", type=Path, metavar="FILE", help="a run's TOML, for the base of its [model]")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        required=lora_needed,
        metavar="FILE[:STRENGTH]",
        help="a LoRA in any layout, or a folder with one; may be given several times",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", choices=[*DTYPES], help="of the result (default: that of the base's files)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def read_request(options: argparse.Namespace, parts: Sequence[str], problems: list[str]) -> Request:
    """The arguments as a request, with the base's files fetched. ConfigError lists all that is wrong with them, with
    `problems` that are known already; nothing is loaded before.

    parts: of the base that are needed, among them the transformer.
    """
    base = options.base if options.config is None else _configured(options.config, problems)
    need = None if base is None else qwen_image.need(base, parts)
    if base is not None and need is not None:
        need = replace(need, extra=(*need.extra, MERGED_FILE))
        problems += base_problems(base) or sources.check(need)
    modules = None if base is None or problems else adapter.linears(qwen_image.transformer_on_meta(base))
    found = read_asked("--lora", options.lora, modules, problems)
    problems += [problem for asked in found for problem in _unusable(asked)]
    problems += output_problems(options.output)
    if problems or base is None or need is None:
        raise ConfigError(problems)
    sources.fetch([need], quiet=options.quiet)
    if problems := base_problems(base):  # what a repository holds is only known now
        raise ConfigError(problems)
    return Request(base, tuple(found), None if options.dtype is None else DTYPES[options.dtype], options.output)


def _configured(path: Path, problems: list[str]) -> str | None:
    """`[model] base` of a run's TOML; its other tables do not matter here."""
    try:
        table = config.load_table(path, (), problems)
    except ConfigError as error:
        problems += error.problems
        return None
    model = config.parse(qwen_image.ModelConfig, table.get("model", {}), "model", problems)
    return None if model is None else model.base


def base_problems(base: str) -> list[str]:
    """Why nothing can be added to this base's weights."""
    if found := qwen_image.check_base(base):
        return found
    if (file := sources.cached(base, MERGED_FILE)) is not None:
        about = read_json(file)
        names = ", ".join(f"{one['file']} at strength {one['strength']:g}" for one in about["loras"])
        return [
            f"base: {file} says that {names} is in these weights already. Each merge rounds the weights: give the base "
            f"that it was made from ({about['base']}), and all LoRAs together, each by its own --lora"
        ]
    if (kind := qwen_image.stored_quantization(base)) is not None:
        return [
            f"base: {base} is stored in {kind}, to which nothing can be added exactly: give the base in bf16 or fp32"
        ]
    return []


def _unusable(asked: Asked) -> list[str]:
    """Why it cannot be folded in."""
    found = []
    if asked.strength == 0:
        found.append(f"--lora {asked.path}: at strength 0 it changes nothing; leave it out")
    if names := asked.file.not_finite():
        found.append(f"--lora {asked.file.path}: NaN or infinity in {first_few(names)}")
    return found


def output_problems(output: Path) -> list[str]:
    """Why `output` cannot become a new folder."""
    if output.exists():
        return [f"--output: {output} exists already; choose another name"]
    if (file := file_in_the_way(output)) is not None:
        return [f"--output: {file} is a file: no folder can be made in it"]
    return []


def check_room(output: Path, needed: float, what: str) -> None:
    """ConfigError if the disk of `output` has not so many bytes free."""
    if needed > (free := free_bytes(output)):
        raise ConfigError(
            [f"--output: {output} needs {size(needed)} ({what}), and {size(free)} are free there: choose another disk"]
        )


def record(request: Request) -> dict[str, Any]:
    """What merged.json says."""
    loras = [
        {"file": str(part.file.path), "sha256": content_hash(part.file.path), "strength": part.strength}
        for part in request.parts
    ]
    commit = sources.commit(request.base)
    return {"base": request.base, **({} if commit is None else {"commit": commit}), "loras": loras}
