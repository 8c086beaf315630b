"""The published layout of an i2L expert: which tensors a file holds, for which modules of Qwen-Image.

An expert has four groups of layers, each with one block for every block of the transformer. Tensor names number the
blocks of all groups in a row: block 60 of a published file is block 0 of the second group. No layer has a bias or an
activation.

    blocks.{b}.layers.{j}.proj_{a,b}.proj_in.weight    compress, embedding_size
    blocks.{b}.layers.{j}.proj_a.proj_out.weight       rank * in_features, compress
    blocks.{b}.layers.{j}.proj_b.proj_out.weight       rank * out_features, compress
    blocks.{b}.proj_residual.proj_in.weight            residual.compress, residual.width          (not in Style)
    blocks.{b}.proj_residual.proj_out.weight           compress, residual.num_tokens * residual.compress
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from trainer.config import first_few
from trainer.files import Header, LayoutError

Shape = tuple[int, ...]

PUBLISHED_RANK = 4
COARSE_TOKENS = 8 * 8 + 7
"""Hidden states of a 224x224 picture after the system text: 64 of the picture, 7 of the text behind it."""
FINE_TOKENS = 37 * 37 + 7
"""The same of a 1024x1024 picture, which the processor resizes to 1036x1036."""

# For each group its layers in order: name, in_features and out_features in units of the hidden size.
GROUPS: tuple[tuple[tuple[str, int, int], ...], ...] = (
    (("attn.to_q", 1, 1), ("attn.to_k", 1, 1), ("attn.to_v", 1, 1), ("attn.to_out.0", 1, 1)),
    (("img_mlp.net.2", 4, 1), ("img_mod.1", 1, 6)),
    (("attn.add_q_proj", 1, 1), ("attn.add_k_proj", 1, 1), ("attn.add_v_proj", 1, 1), ("attn.to_add_out", 1, 1)),
    (("txt_mlp.net.2", 4, 1), ("txt_mod.1", 1, 6)),
)
_LAYER_NAME = re.compile(r"blocks\.(\d+)\.(?:layers\.\d+\.proj_[ab]|proj_residual)\.proj_(?:in|out)\.weight")


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The second input of Coarse and Fine, beside the image embedding: hidden states of Qwen2.5-VL."""

    num_tokens: int
    """Number of hidden states of one picture."""
    compress: int
    """Width to which each hidden state is compressed."""
    width: int = 3584
    """Hidden size of the text encoder."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Everything that the layout of an expert depends on; the defaults are Style, as published."""

    num_blocks: int = 60
    """Number of blocks of the transformer."""
    hidden_size: int = 3072
    """Hidden size of the transformer."""
    embedding_size: int = 1536 + 4096
    """Width of an image embedding: SigLIP2's, then DINOv3's."""
    compress: int = 64
    """Width between the two linear layers that predict a factor."""
    rank: int = PUBLISHED_RANK
    """Rank of the LoRA that is predicted from one picture."""
    residual: Residual | None = None
    """The residual that is read; None for Style."""

    @property
    def kind(self) -> str:
        """Style, Coarse or Fine, by the residual's number of tokens; else "unknown residual"."""
        if self.residual is None:
            return "Style"
        return {COARSE_TOKENS: "Coarse", FINE_TOKENS: "Fine"}.get(self.residual.num_tokens, "unknown residual")


class Layer(NamedTuple):
    """A target module, and the block and position of the layers that predict its factors."""

    block: int
    position: int
    module: str
    in_features: int
    out_features: int


class Published(NamedTuple):
    """A published expert: its file, its geometry, and the md5 of its layout."""

    file: str
    geometry: Geometry
    md5: str


PUBLISHED: dict[str, Published] = {
    "style": Published("Qwen-Image-i2L-Style.safetensors", Geometry(), "0aad514690602ecaff932c701cb4b0bb"),
    "coarse": Published(
        "Qwen-Image-i2L-Coarse.safetensors",
        Geometry(compress=128, residual=Residual(num_tokens=COARSE_TOKENS, compress=1024)),
        "a166c33455cdbd89c0888a3645ca5c0f",
    ),
    "fine": Published(
        "Qwen-Image-i2L-Fine.safetensors",
        Geometry(compress=128, residual=Residual(num_tokens=FINE_TOKENS, compress=64)),
        "a5476e691767a4da6d3a6634a10f7408",
    ),
}


FILES = {**{name: published.file for name, published in PUBLISHED.items()}, "bias": "Qwen-Image-i2L-Bias.safetensors"}
"""Kind -> published file of all four, in the order in which their ranks are concatenated."""


def block_layers(geometry: Geometry, block: int) -> list[Layer]:
    """The layers of `blocks.{block}`."""
    group, index = divmod(block, geometry.num_blocks)
    return [
        Layer(block, j, f"transformer_blocks.{index}.{name}", inward * geometry.hidden_size, out * geometry.hidden_size)
        for j, (name, inward, out) in enumerate(GROUPS[group])
    ]


def layers(geometry: Geometry) -> Iterator[Layer]:
    """All layers in the order of the file."""
    for block in range(len(GROUPS) * geometry.num_blocks):
        yield from block_layers(geometry, block)


def module_names(geometry: Geometry) -> list[str]:
    """The modules that an expert predicts, in the order of the file."""
    return [layer.module for layer in layers(geometry)]


def module_shapes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """in_features and out_features of each module that an expert predicts."""
    return {layer.module: (layer.in_features, layer.out_features) for layer in layers(geometry)}


def expert_layout(geometry: Geometry) -> dict[str, Shape]:
    """Name -> shape of every tensor of an expert."""
    shapes: dict[str, Shape] = {}
    for layer in layers(geometry):
        prefix = f"blocks.{layer.block}.layers.{layer.position}"
        for factor, features in (("a", layer.in_features), ("b", layer.out_features)):
            shapes[f"{prefix}.proj_{factor}.proj_in.weight"] = (geometry.compress, geometry.embedding_size)
            shapes[f"{prefix}.proj_{factor}.proj_out.weight"] = (geometry.rank * features, geometry.compress)
    if (residual := geometry.residual) is not None:
        for block in range(len(GROUPS) * geometry.num_blocks):
            prefix = f"blocks.{block}.proj_residual"
            shapes[f"{prefix}.proj_in.weight"] = (residual.compress, residual.width)
            shapes[f"{prefix}.proj_out.weight"] = (geometry.compress, residual.num_tokens * residual.compress)
    return shapes


def published_bytes(kind: str) -> float:
    """Bytes of a published file in bf16; nothing worth a word for Bias."""
    shapes = expert_layout(PUBLISHED[kind].geometry) if kind in PUBLISHED else {}
    return 2.0 * sum(math.prod(shape) for shape in shapes.values())


def layout_md5(shapes: Mapping[str, Shape]) -> str:
    """The md5 of all names and shapes, by which the published loader recognises a file."""
    entries = [*shapes, *(f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items())]
    return hashlib.md5(",".join(sorted(entries)).encode()).hexdigest()


def published_name(shapes: Mapping[str, Shape]) -> str | None:
    """ "style", "coarse" or "fine", if this is the layout of that published file; else None."""
    md5 = layout_md5(shapes)
    return next((name for name, published in PUBLISHED.items() if published.md5 == md5), None)


def is_expert(shapes: Mapping[str, Shape]) -> bool:
    """Whether any name is that of a tensor of an expert, complete or not."""
    return any(_LAYER_NAME.fullmatch(name) for name in shapes)


def is_lora(shapes: Mapping[str, Shape]) -> bool:
    """Whether any name is that of a factor of a LoRA, as in Bias."""
    return any(re.search(r"\blora_(A|B|down|up)\b|\.lora\.(down|up)\b", name) for name in shapes)


def infer_geometry(shapes: Mapping[str, Shape], rank: int = PUBLISHED_RANK) -> Geometry:
    """The geometry of a complete expert. LayoutError, naming the tensors, if it is incomplete or something else.

    rank: from the metadata (`header_rank`), since the shapes show only rank * hidden_size.
    """
    blocks = sorted({int(match[1]) for name in shapes if (match := _LAYER_NAME.fullmatch(name))})
    if not blocks:
        found = first_few(shapes) or "no tensors"
        raise LayoutError(f"no tensor is named as in an i2L expert (blocks.0.layers.0...); found {found}")
    geometries = [geometry for count in _block_counts(shapes, blocks) if (geometry := _read(shapes, count, rank))]
    if not geometries:
        raise LayoutError(
            "incomplete i2L expert: no block has both weights of proj_a, and of proj_residual if the file has any"
        )
    best = min(geometries, key=lambda geometry: sum(len(names) for names in _differences(shapes, geometry)))
    if problems := _difference_problems(shapes, best):
        raise LayoutError(
            f"incomplete or foreign i2L expert: compared with the {geometry_text(best)}, {'; '.join(problems)}"
        )
    return best


def _difference_problems(shapes: Mapping[str, Shape], geometry: Geometry) -> list[str]:
    """What is missing, foreign or of another shape, in words."""
    expected = expert_layout(geometry)
    missing, unexpected, misshapen = _differences(shapes, geometry)
    found = []
    if missing:
        found.append(f"{len(missing)} of {len(expected)} tensors are missing: {first_few(missing)}")
    if unexpected:
        found.append(f"{len(unexpected)} do not belong to it: {first_few(unexpected)}")
    if misshapen:
        name = misshapen[0]
        shape = f"{name} {shapes[name]} instead of {expected[name]}"
        found.append(f"{len(misshapen)} have another shape, such as {shape}")
    return found


def geometry_text(geometry: Geometry) -> str:
    """Style layout (60 blocks, hidden size 3072, embedding 5632, compress 64, rank 4)"""
    values = {
        "hidden size": geometry.hidden_size,
        "embedding": geometry.embedding_size,
        "compress": geometry.compress,
        "rank": geometry.rank,
    }
    text = f"{geometry.kind} layout ({geometry.num_blocks} blocks, " + ", ".join(f"{k} {v}" for k, v in values.items())
    if (residual := geometry.residual) is not None:
        text += f", residual of {residual.num_tokens} x {residual.width}, compress {residual.compress}"
    return text + ")"


def _block_counts(shapes: Mapping[str, Shape], blocks: list[int]) -> set[int]:
    """Possible numbers of transformer blocks, several in case tensors are missing: from where the second group begins,
    whose first layer has four times the in_features; from the highest block; and the published number."""
    rows = {b: shapes.get(f"blocks.{b}.layers.0.proj_a.proj_out.weight", (0,))[0] for b in blocks}
    first = next((count for count in rows.values() if count), 0)
    boundary = next((b for b in blocks if b and rows[b] == 4 * first), 0)
    counts = {boundary, -(-(blocks[-1] + 1) // len(GROUPS)), PUBLISHED["style"].geometry.num_blocks}
    return {count for count in counts if 0 < count <= 4 * (blocks[-1] + 1)}


def _read(shapes: Mapping[str, Shape], num_blocks: int, rank: int) -> Geometry | None:
    """The geometry, by the first complete block of the first group; None if there is none."""
    has_residual = any(".proj_residual." in name for name in shapes)
    for block in range(num_blocks):
        get = [shapes.get(f"blocks.{block}.layers.0.proj_a.{end}.weight") for end in ("proj_in", "proj_out")]
        inside, out = (shape if shape is not None and len(shape) == 2 else None for shape in get)
        get = [shapes.get(f"blocks.{block}.proj_residual.{end}.weight") for end in ("proj_in", "proj_out")]
        residual_in, residual_out = (shape if shape is not None and len(shape) == 2 else None for shape in get)
        if inside is None or out is None or (has_residual and (residual_in is None or residual_out is None)):
            continue
        residual = None
        if residual_in is not None and residual_out is not None:
            compress, width = residual_in
            residual = Residual(num_tokens=residual_out[1] // max(compress, 1), compress=compress, width=width)
        return Geometry(
            num_blocks=num_blocks,
            hidden_size=out[0] // rank,
            embedding_size=inside[1],
            compress=inside[0],
            rank=rank,
            residual=residual,
        )
    return None


def _differences(shapes: Mapping[str, Shape], geometry: Geometry) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, that do not belong to the layout, and that have another shape."""
    expected = expert_layout(geometry)
    return (
        [name for name in expected if name not in shapes],
        [name for name in shapes if name not in expected],
        [name for name in expected if name in shapes and tuple(shapes[name]) != expected[name]],
    )


def header_rank(header: Header) -> int:
    """The rank that a file states in its metadata, else the published one."""
    text = header.metadata.get("rank", str(PUBLISHED_RANK))
    if not text.isdecimal() or int(text) < 1:
        raise LayoutError(f'the metadata says rank "{text}", which must be a whole number of at least 1')
    return int(text)
