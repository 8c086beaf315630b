"""Recognise the files of experts, and check that they fit one another and the model that is trained."""

import hashlib
import re
from collections.abc import Sequence
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
from trainer.config import first_few
from trainer.errors import UserError
from trainer.files import Header, LayoutError, read_header
from trainer.formats import check_lora

ORDER = tuple(FILES)
"""style, coarse, fine, bias: the order in which their ranks are concatenated."""
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class ExpertFile:
    """The file of an expert, recognised by its header; its weights are not loaded."""

    kind: str
    """One of ORDER."""
    path: Path
    header: Header
    geometry: Geometry | None
    """None for Bias, which is an ordinary LoRA."""

    @property
    def resolution(self) -> int | None:
        """Side of the squares, in pixels, that Qwen-VL reads for its residual; None if it takes no residual."""
        return encoders.RESOLUTIONS.get(self.kind)

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """in_features and out_features of the modules that it covers."""
        if self.geometry is not None:
            return module_shapes(self.geometry)
        return {name: (inside, out) for name, (inside, out, _) in check_lora(self.path).items()}


def expert_location(weights: str, name: str) -> tuple[str, str]:
    """Folder or hub id, and name, of an expert's file. name: of an expert in `weights`, or a path. ValueError if there
    is no such expert."""
    if name in FILES:
        return weights, FILES[name]
    path = Path(name).expanduser()
    if path.is_file():
        return str(path.parent), path.name
    raise UserError(f'"{name}" is neither an expert ({", ".join(ORDER)}) nor a file')


def recognise(name: str, path: Path) -> ExpertFile:
    """The expert that the file holds, by its layout. ValueError if the file is damaged or incomplete, if it is not an
    expert, or if `name` is the name of another one."""
    header = read_header(path)
    if not is_expert(header.shapes):
        if is_lora(header.shapes) and name not in PUBLISHED:
            check_lora(path)
            return ExpertFile("bias", path, header, None)
        raise LayoutError(f"{path}: not an i2L expert; `python -m initializers.i2l inspect {path}` shows what it is")
    try:
        geometry = infer_geometry(header.shapes, header_rank(header))
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from None
    kind = geometry.kind.lower()
    if kind not in PUBLISHED:
        assert geometry.residual is not None
        raise LayoutError(
            f"{path}: neither Coarse nor Fine: its residual has {geometry.residual.num_tokens} tokens, theirs have "
            f"{COARSE_TOKENS} and {FINE_TOKENS}"
        )
    if name in FILES and name != kind:
        raise LayoutError(f'{path}: expected the expert "{name}", found the {geometry_text(geometry)}')
    return ExpertFile(kind, path, header, geometry)


def combination_problems(kinds: Sequence[str]) -> list[str]:
    """Problems of experts that cannot be used together."""
    found = []
    if "fine" in kinds and "coarse" not in kinds:
        found.append('fine works only together with coarse: add "coarse"')
    found += [f"more than one {kind} expert" for kind in ORDER[:3] if kinds.count(kind) > 1]
    return found


def encoder_problems(encoders_from: str, geometries: dict[str, Geometry]) -> list[str]:
    """Problems of experts that were not trained with these encoders, as far as the size of the embeddings shows it."""
    try:
        size = encoders.embedding_size(encoders_from)
    except LayoutError as error:
        return [f"encoders: {error}"]
    return [
        f'encoders: {encoders_from} gives image embeddings of {size} numbers, the expert "{name}" takes '
        f"{geometry.embedding_size}"
        for name, geometry in geometries.items()
        if size not in (None, geometry.embedding_size)
    ]


def check_fit(experts: Sequence[ExpertFile], context: InitContext) -> None:
    """ValueError if an expert was made for another transformer than the one that is trained."""
    for expert_file in experts:
        path, made_for = expert_file.path, expert_file.modules
        common = made_for.keys() & context.modules.keys()
        if not common:
            raise UserError(
                f"{path}: predicts none of the modules that are to be trained. It covers {first_few(made_for)}; "
                f"to be trained are {first_few(context.modules) or 'none'}"
            )
        for module in sorted(common):
            if made_for[module] != tuple(context.modules[module]):
                raise UserError(
                    f"{path}: made for another model: {module} is {_shape(made_for[module])} in the expert and "
                    f"{_shape(context.modules[module])} in {context.base}"
                )
        blocks = max((int(match[1]) + 1 for name in context.modules if (match := _BLOCK.match(name))), default=0)
        if expert_file.geometry is not None and blocks > (num_blocks := expert_file.geometry.num_blocks):
            raise UserError(f"{path}: made for a model of {num_blocks} blocks, but {context.base} has {blocks}")


def file_hashes(expert_file: ExpertFile) -> dict[str, Any]:
    """md5 of the file and of its layout, and its size, for reports."""
    with expert_file.path.open("rb") as file:
        content = hashlib.file_digest(file, "md5").hexdigest()
    return {"md5": content, "layout_md5": layout_md5(expert_file.header.shapes), "bytes": expert_file.header.num_bytes}


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} -> {shape[1]}"
