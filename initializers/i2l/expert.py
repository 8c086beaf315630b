"""An expert: an image embedding in, the LoRA factors of every module out, by two linear layers for each factor.

a = A_out (A_in x + r)    (rank, in_features)          r = R_out flatten(R_in residual)   or 0 in Style
b = B_out (B_in x + r)    (out_features, rank)         dW = b a, at scale 1
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from initializers.i2l.layout import (
    GROUPS,
    Geometry,
    Header,
    LayoutError,
    block_layers,
    header_rank,
    infer_geometry,
)
from trainer.errors import UserError
from trainer.files import HEADER_DTYPES, read_header, write_tensors
from trainer.hardware.threads import parallel_map

INITIAL_SCALE = 0.3
PIECE = 1 << 21
"""Bytes of a weight that are read, converted to fp32 and multiplied at once: they fit into the processor's cache."""
Factors = tuple[Tensor, Tensor]
"""a and b of a module for B pictures: B rank in, and B out rank."""


class Expert(nn.Module):
    """An expert whose `state_dict` has exactly the published names.

    With `device` "meta" it has no weights; else they are drawn from `generator` (default: seed 0).
    """

    def __init__(
        self, geometry: Geometry, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ):
        super().__init__()
        self.geometry = geometry
        with torch.device("meta"):
            blocks = [_Block(geometry, block) for block in range(len(GROUPS) * geometry.num_blocks)]
        self.blocks = nn.ModuleList(blocks)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """nn.Linear's own start; as published, `proj_a` and `proj_residual.proj_out` times 0.3, `proj_b.proj_out` 0."""
        for name, weight in self.named_parameters():
            if name.endswith("proj_b.proj_out.weight"):
                weight.zero_()
                continue
            bound = 1 / math.sqrt(weight.shape[1])  # kaiming_uniform_ with a = sqrt(5)
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
            if ".proj_a." in name or name.endswith("proj_residual.proj_out.weight"):
                weight.mul_(INITIAL_SCALE)

    def forward(self, embeddings: Tensor, residual: Tensor | None = None) -> dict[str, Factors]:
        """Module -> (a, b). embeddings: B embedding_size. residual: B num_tokens width, already times 0.05.

        ValueError if the inputs have other shapes.
        """
        _check_inputs(self.geometry, embeddings, residual)
        result: dict[str, Factors] = {}
        for block in self.blocks:
            result.update(block(embeddings, residual))
        return result


class _Block(nn.Module):
    """The weights of a block of a group: those of its layers, and those of the residual that the layers share."""

    def __init__(self, geometry: Geometry, index: int):
        super().__init__()
        self._geometry, self._index = geometry, index
        width, compress = geometry.embedding_size, geometry.compress
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "proj_a": _projection(width, compress, compress, geometry.rank * layer.in_features),
                    "proj_b": _projection(width, compress, compress, geometry.rank * layer.out_features),
                }
            )
            for layer in block_layers(geometry, index)
        )
        if (residual := geometry.residual) is not None:
            inside = residual.num_tokens * residual.compress
            self.proj_residual = _projection(residual.width, residual.compress, inside, compress)

    def forward(self, embeddings: Tensor, residual: Tensor | None) -> dict[str, Factors]:
        return _factors(self._geometry, self._index, embeddings, residual, lambda name, x: self.get_submodule(name)(x))


def _projection(in_features: int, compress: int, inside: int, out_features: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "proj_in": nn.Linear(in_features, compress, bias=False),
            "proj_out": nn.Linear(inside, out_features, bias=False),
        }
    )


def _factors(
    geometry: Geometry,
    index: int,
    embeddings: Tensor,
    residual: Tensor | None,
    times: Callable[[str, Tensor], Tensor],
) -> dict[str, Factors]:
    """The prediction of block `index`: module -> (a, b). `times` multiplies with the block's weight of that name."""
    shift = None
    if residual is not None:
        shift = times("proj_residual.proj_out", times("proj_residual.proj_in", residual).flatten(1))  # B compress
    result = {}
    for layer in block_layers(geometry, index):
        flat = []
        for factor in ("proj_a", "proj_b"):
            compressed = times(f"layers.{layer.position}.{factor}.proj_in", embeddings)
            shifted = compressed if shift is None else compressed + shift
            flat.append(times(f"layers.{layer.position}.{factor}.proj_out", shifted))
        a = flat[0].unflatten(1, (geometry.rank, layer.in_features))
        result[layer.module] = (a, flat[1].unflatten(1, (layer.out_features, geometry.rank)))
    return result


def _check_inputs(geometry: Geometry, embeddings: Tensor, residual: Tensor | None) -> None:
    if embeddings.ndim != 2 or embeddings.shape[1] != geometry.embedding_size:
        raise UserError(
            f"the expert takes image embeddings of {geometry.embedding_size} numbers, not {tuple(embeddings.shape)}: "
            "the encoders and the expert do not belong together"
        )
    expected = (len(embeddings), geometry.residual.num_tokens, geometry.residual.width) if geometry.residual else None
    given = tuple(residual.shape) if residual is not None else None
    if expected != given:
        raise UserError(f"the expert takes a residual of shape {expected}, not {given}")


def read_geometry(path: Path) -> Geometry:
    """The geometry of an expert's file, from its header. LayoutError if it is damaged, incomplete or something else."""
    header = read_header(path)
    try:
        return infer_geometry(header.shapes, header_rank(header))
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from None


def factor_shapes(geometry: Geometry, num_pictures: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Module -> shapes of a and b, in the order in which `predict` yields them."""
    return {
        layer.module: (
            (num_pictures, geometry.rank, layer.in_features),
            (num_pictures, layer.out_features, geometry.rank),
        )
        for index in range(len(GROUPS) * geometry.num_blocks)
        for layer in block_layers(geometry, index)
    }


def predict(
    path: Path,
    embeddings: Tensor,
    residual: Tensor | None = None,
    *,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Iterator[tuple[str, Factors]]:
    """The factors that the expert in `path` predicts from each picture, module by module; fp32, where `embeddings` are.

    Each weight is read once for all pictures, and multiplied piece by piece. Several threads work on a block each, so
    that some read while others compute. `progress` wraps the loop over blocks. ValueError if a prediction has NaN or
    infinity.
    """
    geometry, header = read_geometry(path), read_header(path)
    if foreign := sorted(set(header.dtypes.values()) - HEADER_DTYPES.keys()):
        raise LayoutError(f"{path}: weights in {', '.join(foreign)}; an expert has them in {', '.join(HEADER_DTYPES)}")
    embeddings = embeddings.float()
    residual = None if residual is None else residual.float().to(embeddings.device)
    _check_inputs(geometry, embeddings, residual)

    piece = max(PIECE, *(4 * shape[1] for shape in header.shapes.values()))  # at least one row

    def block(index: int) -> dict[str, Factors]:
        with path.open("rb") as file:
            weights = _Weights(path, file, header, piece, embeddings.device)
            times = partial(weights.times, f"blocks.{index}")
            predicted = _factors(geometry, index, embeddings, residual, times)
        for module, pair in predicted.items():
            if not all(bool(factor.isfinite().all()) for factor in pair):
                raise UserError(
                    f"{path}: NaN or infinity in what it predicts for {module}. The file may be damaged: fetch it again"
                )
        return predicted

    for predicted in parallel_map(block, progress(range(len(GROUPS) * geometry.num_blocks))):
        yield from predicted.items()


class _Weights:
    """The weights of an open file. They are never in memory whole: only as many rows as fit into `piece` bytes."""

    def __init__(self, path: Path, file: BufferedReader, header: Header, piece: int, device: torch.device):
        self._path, self._file, self._header, self._device = path, file, header, device
        self._bytes = torch.empty(piece, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._floats = torch.empty(piece // 2, device=device)

    def times(self, block: str, name: str, x: Tensor) -> Tensor:
        """The product of x with the weight of that name in that block. x: ... columns -> ... rows"""
        name = f"{block}.{name}.weight"
        (num_rows, num_columns), dtype = self._header.shapes[name], HEADER_DTYPES[self._header.dtypes[name]]
        flat = x.reshape(-1, num_columns)
        result = flat.new_empty(len(flat), num_rows)
        at_once = len(self._bytes) // (num_columns * dtype.itemsize)
        self._file.seek(self._header.starts[name])
        for start in range(0, num_rows, at_once):
            count = min(at_once, num_rows - start) * num_columns
            read = self._bytes[: count * dtype.itemsize]
            if self._file.readinto(read.numpy().data) != len(read):
                raise LayoutError(f"{self._path}: cut short while it was read")
            weight = self._floats[:count].view(-1, num_columns)
            weight.copy_(
                read.view(dtype).view(-1, num_columns).to(self._device)
            )  # converted there: moving fp32 would take twice as long
            torch.mm(flat, weight.T, out=result[:, start : start + len(weight)])
        return result.view(*x.shape[:-1], num_rows)


def mean_over_pictures(pair: Factors) -> Factors:
    """The mean of the dW of K pictures, as one LoRA of K times the rank, picture after picture:

        1/K (b_1 a_1 + ... + b_K a_K) = [b_1 ... b_K] ([a_1; ...; a_K] / K)

    As published, only `a` is divided. a: ... K rank in, b: ... K out rank -> a: ... K*rank in, b: ... out K*rank.
    """
    a, b = pair
    count = a.shape[-3]
    joined = a.flatten(-3, -2)
    return (joined / count if count > 1 else joined), b.movedim(-3, -2).flatten(-2)


def save_expert(expert: Expert, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write the published layout, in `dtype` if given (float16 or bfloat16 halve the file)."""
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in expert.state_dict().items()}
    # one entry only: safetensors writes several in an order that changes from run to run
    write_tensors(path, tensors, {"rank": str(expert.geometry.rank)})


def load_expert(path: Path, *, device: torch.device | str = "cpu") -> Expert:
    """The whole expert in fp32, to train it further."""
    expert = Expert(read_geometry(path), device="meta")
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name).to(device, torch.float32) for name in expert.state_dict()}
    expert.load_state_dict(weights, assign=True)
    return expert
