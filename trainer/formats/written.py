"""What `merge`, `subtract` and `extract` share: the options of the new LoRA, writing it, and what is told of it."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.adapter import AdapterWeights
from trainer.files import DTYPES, file_in_the_way, free_bytes, new_folder, size
from trainer.formats.layouts import LAYOUTS, module_type, module_types
from trainer.formats.lora import FormatError, interface_metadata, write_lora
from trainer.formats.origin import MADE_OF, PEFT_FILE
from trainer.lowrank import LowRank, energy_kept, rank, relative_difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--output, --rank, --energy, --layout, --dtype, --quiet"""
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the new file; of peft a new folder")
    parser.add_argument("--rank", type=int, help="at most, of each module, by exact truncation")
    parser.add_argument(
        "--energy", type=float, metavar="SHARE", help="instead: the smallest rank that keeps this share, such as 0.95"
    )
    default = Form.layout
    parser.add_argument("--layout", choices=[*LAYOUTS], default=default, help=f"default: {default}, for ComfyUI")
    parser.add_argument("--dtype", choices=[*DTYPES], default=Form.dtype, help=f"default: {Form.dtype}")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the new LoRA is to be."""

    output: Path
    rank: int | None = None
    """At most, of each module; with neither this nor `energy`, nothing is truncated."""
    energy: float | None = None
    """The rank is the smallest that keeps this share of the energy of all modules together."""
    layout: str = "diffusion_model"
    dtype: str = "fp32"
    quiet: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Form":
        return cls(
            output=options.output,
            rank=options.rank,
            energy=options.energy,
            layout=options.layout,
            dtype=options.dtype,
            quiet=options.quiet,
        )

    def problems(self) -> list[str]:
        found = []
        if self.rank is not None and self.energy is not None:
            found.append("--rank and --energy: choose one of them")
        if self.rank is not None and self.rank < 1:
            found.append(f"--rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            found.append(f"--energy must be above 0 and at most 1, as 0.95 is for 95 %, not {self.energy:g}")
        is_file = self.output.suffix == ".safetensors"
        if self.layout == "peft" and is_file:
            found.append(f"--output: a folder is written in the layout peft: choose a name unlike {self.output.name}")
        elif self.layout != "peft" and not is_file:
            found.append(f"--output: {self.output}: the file's name must end in .safetensors")
        if self.output.exists():
            found.append(f"--output: {self.output} is there already: choose another name")
        elif other := file_in_the_way(self.output.parent):
            found.append(f"--output: {other} is a file, and no folder can be made of it: choose another folder")
        return found

    def check_room(self, rank: int, sizes: Iterable[Sequence[int]]) -> None:
        """FormatError if there is no room for a file of this rank; sizes: in_features and out_features of modules."""
        needed = DTYPES[self.dtype].itemsize * rank * sum(map(sum, sizes))
        if (free := free_bytes(self.output)) < needed:
            room = f"{size(needed)} are needed in {self.output.parent}, where {size(free)} are free"
            raise FormatError(f"--output: {room}: free some of the disk, or choose a lower --rank or --dtype bf16")


@dataclass(frozen=True)
class Account:
    """The energy of each module before truncation, and the share of it that is kept."""

    energies: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)

    def table(self) -> list[str]:
        """A row for each module type: how many, their share of the energy of all, and what they keep of theirs."""
        kinds = module_types(self.kept)
        by_kind = {kind: [name for name in self.kept if module_type(name) == kind] for kind in kinds}
        width = max(map(len, kinds))
        rows = [f"{'':{width}}  modules  of the energy    kept"]
        for kind, names in [*by_kind.items(), ("all", [*self.kept])]:
            share = sum(self.energies[name] for name in names) / (sum(self.energies.values()) or 1.0)
            own = energy_kept({name: self.kept[name] for name in names}, self.energies)["total"]
            rows.append(f"{kind:{width}}  {len(names):7}  {share:13.2%}  {own:6.2%}")
        return rows


def write(
    form: Form,
    factors: Mapping[str, LowRank],
    account: Account,
    made_of: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> None:
    """Write effective factors, whole or not at all, and print what they keep. FormatError if all are zero.

    made_of: for the file's metadata, beside the energy that all modules and each one keep.
    """
    ranks = [rank(x) for x in factors.values() if rank(x)]
    if not ranks:
        raise FormatError("nothing is left: the change is zero in all modules, so there is no file to write")
    kept = energy_kept(account.kept, account.energies)
    told = {**made_of, "energy_kept": kept, "modules": {name: round(x, 6) for name, x in account.kept.items()}}
    shown = interface_metadata(form.layout, form.output.stem, ranks)
    entries = {**metadata, **shown, MADE_OF: json.dumps(told)}
    weights, dtype = AdapterWeights(factors), DTYPES[form.dtype]
    if form.layout == "peft":
        with new_folder(form.output) as partial:
            write_lora(partial / PEFT_FILE, weights, entries, dtype, layout=form.layout)
    else:
        write_lora(form.output, weights, entries, dtype, layout=form.layout)
    least, most = min(ranks), max(ranks)
    of_rank = f"rank {most}" if least == most else f"ranks {least} to {most}"
    print("\n".join(account.table()))
    print(f"{form.output}: {len(ranks)} modules, {of_rank}, with {kept['total']:.2%} of the energy")
    if form.dtype != "fp32":
        print(f"rounded to {form.dtype}: dW differs by at most {_rounding(factors.values(), dtype):.1%}")


def _rounding(factors: Iterable[LowRank], dtype: torch.dtype) -> float:
    """The largest relative difference of a module's dW after rounding."""
    return max(relative_difference(x, LowRank(x.a.to(dtype).float(), x.b.to(dtype).float())) for x in factors)
