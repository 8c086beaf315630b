"""Which files are which experts, and whether they belong together and to the model that is trained."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from initializers.i2l import encoders
from initializers.i2l.layout import (
    COARSE_TOKENS,
    FILES,
    FINE_TOKENS,
    PUBLISHED,
    Geometry,
    geometry_text,
    header_rank,
    infer_geometry,
    is_expert,
    is_lora,
    layout_md5,
    module_shapes,
)
from trainer.adapter import InitContext
from trainer.files import Header, LayoutError, read_header
from trainer.formats import check_lora

ORDER = tuple(FILES)  # style, coarse, fine, bias: the order of the ranks in the result
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class Source:
    """One expert, found and recognised, but not loaded."""

    kind: str  # one of ORDER
    path: Path
    header: Header
    geometry: Geometry | None  # None for Bias

    @property
    def resolution(self) -> int | None:
        """Of the pictures that its residual is made from, if it has one."""
        return encoders.RESOLUTIONS.get(self.kind)

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """in_features and out_features of what it covers."""
        if self.geometry is not None:
            return module_shapes(self.geometry)
        return {name: (inside, out) for name, (inside, out, _) in check_lora(self.path).items()}


def place(weights: str, name: str) -> tuple[str, str]:
    """Folder or hub id, and file, of an expert given by name or path. ValueError if there is no such expert."""
    if name in FILES:
        return weights, FILES[name]
    path = Path(name).expanduser()
    if path.is_file():
        return str(path.parent), path.name
    raise ValueError(f'"{name}" is neither an expert ({", ".join(ORDER)}) nor a file')


def recognise(name: str, path: Path) -> Source:
    """What the file is, by its layout; its name must agree. ValueError if damaged, incomplete or something else."""
    header = read_header(path)
    if not is_expert(header.shapes):
        if is_lora(header.shapes) and name not in PUBLISHED:
            check_lora(path)
            return Source("bias", path, header, None)
        raise LayoutError(f"{path}: no i2L expert; `python -m initializers.i2l inspect {path}` tells what it is")
    try:
        geometry = infer_geometry(header.shapes, header_rank(header))
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from None
    kind = geometry.kind.lower()
    if kind not in PUBLISHED:
        assert geometry.residual is not None
        raise LayoutError(
            f"{path}: its residual has {geometry.residual.num_tokens} tokens; that of Coarse has {COARSE_TOKENS}, "
            f"of Fine {FINE_TOKENS}"
        )
    if name in FILES and name != kind:
        raise LayoutError(f'{path}: expected the expert "{name}", found the {geometry_text(geometry)}')
    return Source(kind, path, header, geometry)


def combination_problems(kinds: Sequence[str]) -> list[str]:
    found = []
    if "fine" in kinds and "coarse" not in kinds:
        found.append('fine works only together with coarse: add "coarse"')
    found += [f"more than one {kind} expert" for kind in ORDER[:3] if kinds.count(kind) > 1]
    return found


def encoder_problems(source: str, geometries: dict[str, Geometry]) -> list[str]:
    """Encoders and experts must have been trained together: their embeddings must at least have one size."""
    try:
        size = encoders.embedding_size(source)
    except LayoutError as error:
        return [f"encoders: {error}"]
    return [
        f'encoders: {source} gives image embeddings of {size} numbers, the expert "{name}" takes '
        f"{geometry.embedding_size}"
        for name, geometry in geometries.items()
        if size not in (None, geometry.embedding_size)
    ]


def check_fit(found: Sequence[Source], context: InitContext) -> None:
    """ValueError if an expert was made for another transformer than the one that shall be trained."""
    for source in found:
        made_for = source.modules
        common = made_for.keys() & context.modules.keys()
        if not common:
            raise ValueError(
                f"{source.path}: predicts none of the modules that are to be trained. It covers {_first(made_for)}; "
                f"to be trained are {_first(context.modules)}"
            )
        for module in sorted(common):
            if made_for[module] != tuple(context.modules[module]):
                raise ValueError(
                    f"{source.path}: made for another model: {module} is {_shape(made_for[module])} in the expert and "
                    f"{_shape(context.modules[module])} in {context.base}"
                )
        blocks = max((int(match[1]) + 1 for name in context.modules if (match := _BLOCK.match(name))), default=0)
        if source.geometry is not None and blocks > (num_blocks := source.geometry.num_blocks):
            raise ValueError(f"{source.path}: made for a model of {num_blocks} blocks, but {context.base} has {blocks}")


def fingerprint(source: Source) -> dict[str, Any]:
    with source.path.open("rb") as file:
        content = hashlib.file_digest(file, "md5").hexdigest()
    return {"md5": content, "layout_md5": layout_md5(source.header.shapes), "bytes": source.header.num_bytes}


def _first(names: Iterable[str], count: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "") or "nothing"


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} -> {shape[1]}"
