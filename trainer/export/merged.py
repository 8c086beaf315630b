"""The base with LoRAs folded into its weights: a model folder that any program opens as it opens the base."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trainer import qwen_image
from trainer.export.request import MERGED_FILE, WEIGHTS, Request, Rounding, check_room, record
from trainer.files import DTYPES, new_folder, read_header, read_json, size, stream_tensors, write_json
from trainer.hardware import parallel
from trainer.qwen_image import ModelConfig

log = logging.getLogger("trainer")

QUANTISED_SHARE = 0.7
"""How large a quantised transformer is at most, as a share of what it was in bf16: a third stays as it is."""


def quantization_problems(quantization: str) -> list[str]:
    """Why a transformer cannot be quantised here."""
    if quantization in ("nf4", "int8") and not torch.cuda.is_available():
        return [
            f"--quantization {quantization}: bitsandbytes quantises on a GPU, and there is none here; "
            "fp8 can be made without one"
        ]
    kind: Any = quantization
    settings = ModelConfig(base=".", quantization=kind)
    return [f"--{problem}" for problem in settings.problems() if problem.startswith("quantization")]


def merge(request: Request, quantization: str, *, quiet: bool) -> list[str]:
    """Write `request.output`, whole or not at all; what became of it, in words. To be quantised it needs a dtype.

    ConfigError if the disk has too little room.
    """
    shards = request.shards()
    rest = _rest(request.folder)
    output, plain = request.output, sum(map(request.num_bytes, shards))
    quantised = 0.0 if quantization == "none" else QUANTISED_SHARE * plain
    copies = sum(path.stat().st_size for path in rest if not _can_link(path, output))
    check_room(output, plain + quantised + copies, "with what is needed on the way" if quantised else "its weights")
    bar = tqdm(total=plain, desc="merging", unit="B", unit_scale=True, disable=quiet or None)
    rounding = Rounding()
    with bar, new_folder(output) as partial:
        linked = [_take(path, partial / path.relative_to(request.folder)) for path in rest]
        for shard in shards:
            _write_shard(request, shard, partial / "transformer" / shard.name, bar, rounding)
        index = request.folder / "transformer" / f"{WEIGHTS}.safetensors.index.json"
        if index.is_file():
            write_json(partial / "transformer" / index.name, _index(read_json(index), int(plain)))
        write_json(partial / MERGED_FILE, record(request))
        if quantization != "none":
            _quantise(partial, quantization, request.dtype)
    changed = {name for part in request.parts for name in part.file.modules}
    lines = [
        f"{output}: {len(request.parts)} LoRA{'s' if len(request.parts) > 1 else ''} in {len(changed)} modules, "
        f"{size(sum(path.stat().st_size for path in (output / 'transformer').iterdir()))} of transformer",
        f"the rest is as in {request.folder}: {sum(linked)} files of weights share their place on the disk with it "
        f"(hard links), {len(linked) - sum(linked)} files are copies",
        f"rounding moved the weights by {rounding.share:.2%} of what the LoRAs change"
        + ("; --dtype fp32 keeps all of it" if rounding.share > 0.01 else ""),
    ]
    if quantization != "none":
        lines.append(f"open it with torch_dtype={request.dtype}: what is quantised is computed in that precision")
    return lines


def _rest(base: Path) -> list[Path]:
    """All files of the base but the transformer's weights, and hidden ones."""
    files = [path for path in sorted(base.rglob("*")) if path.is_file()]
    shown = [path for path in files if not any(name.startswith(".") for name in path.relative_to(base).parts)]
    return [path for path in shown if path.parent != base / "transformer" or path.name == "config.json"]


def _can_link(path: Path, output: Path) -> bool:
    there = next(folder for folder in output.absolute().parents if folder.exists())
    return path.suffix == ".safetensors" and path.stat().st_dev == there.stat().st_dev


def _take(path: Path, target: Path) -> bool:
    """Have a file of the base in the new folder, too: weights by a hard link where the disk has such, which costs no
    room, and small files, which people edit, as copies. Whether it is a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        with suppress(OSError):
            os.link(path.resolve(), target)  # a hub's cache has links to its files
            return True
    shutil.copyfile(path, target)
    return False


def _write_shard(request: Request, shard: Path, target: Path, bar: tqdm, rounding: Rounding) -> None:
    header = read_header(shard)
    shapes = {name: header.shapes[name] for name in sorted(header.starts, key=header.starts.__getitem__)}

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in request.tensors(shard, rounding):
            yield name, tensor
            bar.update(tensor.numel() * tensor.element_size())

    stream_tensors(target, shapes, counted(), request.dtypes(header), metadata={"format": "pt", **header.metadata})


def _index(index: dict[str, object], num_bytes: int) -> dict[str, object]:
    """An index of shards with the same tensors in the same files, of other sizes."""
    about = index.get("metadata")
    return {**index, "metadata": {**(about if isinstance(about, dict) else {}), "total_size": num_bytes}}


def _quantise(folder: Path, quantization: str, dtype: torch.dtype | None) -> None:
    """Quantise the transformer of a model folder as a run's `[model] quantization` does, and save it in its place.
    dtype: of what stays as it is."""
    log.info("quantising to %s", quantization)
    name: Any = next(name for name, value in DTYPES.items() if value == dtype)
    kind: Any = quantization
    settings = ModelConfig(base=str(folder), quantization=kind, dtype=name, keep_quantized=False)
    device = parallel.one_device()
    transformer = qwen_image.load_transformer(settings, device)
    transformer.save_pretrained(folder / "quantised")
    shutil.rmtree(folder / "transformer")
    (folder / "quantised").rename(folder / "transformer")
