"""The hypernetwork: an image embedding in, the LoRA factors of every module out, in two linear layers for each factor.

a = A_out (A_in x + r)    (rank, in_features)          r = R_out flatten(R_in residual)   or 0 in Style
b = B_out (B_in x + r)    (out_features, rank)         dW = b a, at scale 1
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from initializers.i2l.layout import (
    GROUPS,
    Geometry,
    Layer,
    LayoutError,
    Residual,
    block_layers,
    header_rank,
    infer_geometry,
)
from trainer.files import read_header, write_tensors
from trainer.lowrank import LowRank

INITIAL_SCALE = 0.3
Factors = tuple[Tensor, Tensor]  # a: B rank in, b: B out rank


class Expert(nn.Module):
    """An expert whose `state_dict` has exactly the published names.

    `device` "meta" gives an expert without weights; else they are drawn from `generator` (default: seed 0).
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
        """nn.Linear's own start, then as published: `proj_a` and the residual's way out x 0.3, and `b` zero."""
        for name, weight in self.named_parameters():
            if name.endswith("proj_b.proj_out.weight"):
                weight.zero_()
                continue
            bound = 1 / math.sqrt(weight.shape[1])  # kaiming_uniform_ with a = sqrt(5)
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
            if ".proj_a." in name or name.endswith("proj_residual.proj_out.weight"):
                weight.mul_(INITIAL_SCALE)

    def forward(self, embeddings: Tensor, residual: Tensor | None = None) -> dict[str, Factors]:
        """embeddings: B embedding_size; residual: B num_tokens width, already times 0.05. Module -> (a, b)."""
        _check_inputs(self.geometry, embeddings, residual)
        result: dict[str, Factors] = {}
        for block in self.blocks:
            result.update(block(embeddings, residual))
        return result


class _Block(nn.Module):
    """The layers of one block of one group, with the residual they share."""

    def __init__(self, geometry: Geometry, block: int):
        super().__init__()
        self._layers, self._rank = block_layers(geometry, block), geometry.rank
        self.layers = nn.ModuleList(_Pair(geometry, layer) for layer in self._layers)
        self.proj_residual = _ResidualProjection(geometry.residual, geometry.compress) if geometry.residual else None

    def forward(self, embeddings: Tensor, residual: Tensor | None) -> dict[str, Factors]:
        shift = self.proj_residual(residual) if self.proj_residual is not None else None  # B compress
        result = {}
        for layer, pair in zip(self._layers, self.layers, strict=True):
            assert isinstance(pair, _Pair)
            a = pair.proj_a(embeddings, shift).unflatten(1, (self._rank, layer.in_features))
            b = pair.proj_b(embeddings, shift).unflatten(1, (layer.out_features, self._rank))
            result[layer.module] = (a, b)
        return result


class _Pair(nn.Module):
    def __init__(self, geometry: Geometry, layer: Layer):
        super().__init__()
        self.proj_a = _Projection(geometry.embedding_size, geometry.compress, geometry.rank * layer.in_features)
        self.proj_b = _Projection(geometry.embedding_size, geometry.compress, geometry.rank * layer.out_features)


class _Projection(nn.Module):
    def __init__(self, in_features: int, compress: int, out_features: int):
        super().__init__()
        self.proj_in = nn.Linear(in_features, compress, bias=False)
        self.proj_out = nn.Linear(compress, out_features, bias=False)

    def forward(self, x: Tensor, shift: Tensor | None) -> Tensor:
        compressed = self.proj_in(x)
        return self.proj_out(compressed if shift is None else compressed + shift)


class _ResidualProjection(nn.Module):
    def __init__(self, residual: Residual, out_features: int):
        super().__init__()
        self.proj_in = nn.Linear(residual.width, residual.compress, bias=False)
        self.proj_out = nn.Linear(residual.num_tokens * residual.compress, out_features, bias=False)

    def forward(self, residual: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(residual).flatten(1))


def _check_inputs(geometry: Geometry, embeddings: Tensor, residual: Tensor | None) -> None:
    if embeddings.ndim != 2 or embeddings.shape[1] != geometry.embedding_size:
        raise ValueError(
            f"the expert takes image embeddings of {geometry.embedding_size} numbers, not {tuple(embeddings.shape)}: "
            "the encoders and the expert do not belong together"
        )
    expected = (len(embeddings), geometry.residual.num_tokens, geometry.residual.width) if geometry.residual else None
    given = tuple(residual.shape) if residual is not None else None
    if expected != given:
        raise ValueError(f"the expert takes a residual of shape {expected}, not {given}")


def read_geometry(path: Path) -> Geometry:
    """The geometry of an expert's file, from its header. LayoutError if it is damaged, incomplete or something else."""
    header = read_header(path)
    try:
        return infer_geometry(header.shapes, header_rank(header))
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from None


def factor_shapes(geometry: Geometry, num_pictures: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of a and b of every module, in the order in which `predict` gives them."""
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
    """What the expert in `path` predicts from each picture, module by module; fp32, where `embeddings` are.

    Each weight is read once, for all pictures. Two blocks are in memory at a time: one is read while the other
    computes. `progress` wraps the loop. ValueError if there is NaN in what comes out.
    """
    geometry = read_geometry(path)
    embeddings = embeddings.float()
    residual = None if residual is None else residual.float().to(embeddings.device)
    _check_inputs(geometry, embeddings, residual)
    num_blocks = len(GROUPS) * geometry.num_blocks
    with safe_open(path, framework="pt") as file, ThreadPoolExecutor(1) as reader, torch.no_grad():

        def read(index: int) -> _Block:
            with torch.device("meta"):
                block = _Block(geometry, index)
            # to the device in the file's own precision: fp32 would be twice the way
            weights = {
                name: file.get_tensor(f"blocks.{index}.{name}").to(embeddings.device).float()
                for name in block.state_dict()
            }
            block.load_state_dict(weights, assign=True)
            return block

        ahead = reader.submit(read, 0)
        for index in progress(range(num_blocks)):
            block = ahead.result()
            if index + 1 < num_blocks:
                ahead = reader.submit(read, index + 1)
            for module, pair in block(embeddings, residual).items():
                if not all(bool(factor.isfinite().all()) for factor in pair):
                    raise ValueError(f"{path}: NaN or infinity in what it predicts for {module}")
                yield module, pair


def merge_pictures(pair: Factors, pictures: Sequence[int] | None = None) -> LowRank:
    """The mean of the pictures' dW, as one LoRA: concatenated on rank, picture after picture, `a` divided by their
    number. a: B rank in, b: B out rank; `pictures`: which of the B, default all."""
    a, b = pair if pictures is None else (pair[0][list(pictures)], pair[1][list(pictures)])
    return LowRank(a.flatten(0, 1) / len(a), b.transpose(0, 1).flatten(1))


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
