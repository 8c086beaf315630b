"""`python -m initializers.i2l inspect`: which expert or encoder a file is, and whether it is complete."""

import math
from pathlib import Path

from initializers.i2l import encoders
from initializers.i2l.layout import (
    PUBLISHED,
    LayoutError,
    geometry_text,
    header_rank,
    infer_geometry,
    is_expert,
    is_lora,
    layout_md5,
    module_names,
    published_name,
)
from trainer.files import Header, read_header
from trainer.formats import FormatError, check_lora

_ENCODERS = {encoders.SIGLIP_MD5: "SigLIP2-G384", encoders.DINOV3_MD5: "DINOv3-7B"}


def inspect_file(path: Path) -> int:
    """Print what a file is, from its header alone. Returns 0 if it is known and complete, else 1."""
    try:
        header = read_header(path)
        print(f"{path}")
        if is_expert(header.shapes):
            lines = _expert_lines(header)
        elif is_lora(header.shapes):
            lines = _lora_lines(path, header)
        elif (name := _ENCODERS.get(layout_md5(header.shapes))) is not None:
            lines = [f"{name}, an image encoder of i2L, as published", *_size_lines(header), "complete"]
        else:
            raise LayoutError("neither an i2L expert, nor a LoRA, nor one of i2L's image encoders")
    except (LayoutError, FormatError) as error:
        print(error)
        return 1
    print("\n".join(f"  {line}" for line in lines))
    return 0


def _expert_lines(header: Header) -> list[str]:
    geometry = infer_geometry(header.shapes, header_rank(header))
    if published_name(header.shapes) is not None:
        title = f"Qwen-Image-i2L {geometry.kind}, as published: {geometry_text(geometry)}"
    elif geometry.num_blocks == PUBLISHED["style"].geometry.num_blocks:
        title = f"not a published file: {geometry_text(geometry)}"
    else:
        title = f"miniature {geometry_text(geometry)}"
    return [
        title,
        *_size_lines(header),
        f"modules      {len(module_names(geometry))}",
        f"rank         {geometry.rank} for each picture",
        "complete",
    ]


def _lora_lines(path: Path, header: Header) -> list[str]:
    modules = check_lora(path)
    ranks = sorted({rank for _, _, rank in modules.values()})
    return [
        "LoRA (as Qwen-Image-i2L-Bias is)",
        *_size_lines(header),
        f"modules      {len(modules)}",
        f"rank         {', '.join(map(str, ranks))}",
        "complete",
    ]


def _size_lines(header: Header) -> list[str]:
    parameters = sum(math.prod(shape) for shape in header.shapes.values())
    dtypes = ", ".join(sorted(set(header.dtypes.values())))
    return [
        f"layout md5   {layout_md5(header.shapes)}",
        f"parameters   {parameters:,} in {len(header.shapes):,} tensors ({dtypes})",
        f"file         {header.num_bytes / 1e6:,.1f} MB",
    ]
