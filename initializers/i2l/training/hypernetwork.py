"""The network that is trained: an expert, or the static Bias, on top of frozen experts. Pictures in, a LoRA out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from initializers.i2l import encoders, layout
from initializers.i2l.expert import Expert, Factors, load_expert, mean_over_pictures, read_geometry, save_expert
from initializers.i2l.layout import Residual
from trainer.adapter import AdapterWeights
from trainer.files import LayoutError
from trainer.formats import write_lora
from trainer.hub import sources
from trainer.hub.sources import Need
from trainer.lowrank import LowRank

_NUM_TOKENS = {"coarse": layout.COARSE_TOKENS, "fine": layout.FINE_TOKENS}
_FROZEN = {"style": (), "coarse": (), "fine": ("coarse",), "bias": ("coarse", "fine")}


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """`[expert]`"""

    kind: Literal["style", "coarse", "fine", "bias"] = "style"
    """Which expert is trained. "style" predicts a LoRA from the image embeddings alone; "coarse" also from what Qwen-VL
    reads in the picture at 224 pixels; "fine" the same at 1024 pixels, on top of a frozen Coarse; "bias" is one LoRA
    for all pictures, on top of a frozen Coarse and Fine."""
    weights: str = "DiffSynth-Studio/Qwen-Image-i2L"
    """Folder or id, as `[model] base`, of the frozen experts. Set it to train Fine or Bias on experts of your own."""
    encoders: str = "DiffSynth-Studio/General-Image-Encoders"
    """Folder or id, as `[model] base`, of the image encoders SigLIP2 and DINOv3. An expert works only with the encoders
    that it was trained with."""
    train_encoders: bool = False
    """Whether SigLIP2 and DINOv3 are trained along with the expert. Only for encoders that nobody has pretrained, and
    for small square pictures, all of one size."""
    compress: int = 64
    """Width between the two linear layers that predict a factor; the expert's size grows with it. 64 in the published
    Style, 128 in Coarse and Fine."""
    residual_compress: int = 64
    """Width to which each hidden state of Qwen-VL is compressed; the size of Coarse and Fine grows with it. 1024 in the
    published Coarse, 64 in Fine."""
    rank: int = 4
    """Rank of the LoRA that is predicted from one picture; for "bias", the rank of Bias. 4 in the published experts."""

    def problems(self) -> list[str]:
        names = ("compress", "residual_compress", "rank")
        found = [f"{name} must be at least 1" for name in names if getattr(self, name) < 1]
        for kind, file in zip(_FROZEN[self.kind], self.frozen_files, strict=True):
            if wrong := sources.check(Need(self.weights, (file,))):
                found += [f"weights: {why}" for why in wrong]
            elif (path := sources.cached(self.weights, file)) is not None:
                try:
                    geometry = read_geometry(path)
                except LayoutError as error:
                    found.append(f"weights: {error}")
                    continue
                if geometry.kind.lower() != kind:
                    found.append(f"weights: {path} has the {layout.geometry_text(geometry)}; {kind} is expected here")
        if self.train_encoders and self.kind not in ("style", "coarse"):
            found.append(
                f'train_encoders: not with kind = "{self.kind}", whose frozen experts need the encoders as they are'
            )
        return found

    @property
    def frozen_files(self) -> tuple[str, ...]:
        """Names of the frozen experts' files in `weights`."""
        return tuple(layout.FILES[kind] for kind in _FROZEN[self.kind])

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side of the squares, in pixels, that Qwen-VL reads for the residuals of all experts at work."""
        return tuple(
            encoders.RESOLUTIONS[kind] for kind in (*_FROZEN[self.kind], self.kind) if kind in encoders.RESOLUTIONS
        )


def geometry(config: ExpertConfig, transformer: Any, embedding_size: int) -> layout.Geometry:
    """The geometry of the expert that is trained. transformer: its configuration, whose text width is Qwen-VL's."""
    num_tokens = _NUM_TOKENS.get(config.kind)
    return layout.Geometry(
        num_blocks=transformer.num_layers,
        hidden_size=transformer.num_attention_heads * transformer.attention_head_dim,
        embedding_size=embedding_size,
        compress=config.compress,
        rank=config.rank,
        residual=Residual(
            num_tokens=num_tokens, compress=config.residual_compress, width=transformer.joint_attention_dim
        )
        if num_tokens
        else None,
    )


class StaticLora(nn.Module):
    """Bias: the same factors for every sample. `b` is zero at the start."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int):
        super().__init__()
        self.names = list(shapes)
        random = torch.Generator().manual_seed(0)
        self.a = nn.ParameterList(
            torch.empty(rank, inside).uniform_(-(inside**-0.5), inside**-0.5, generator=random)
            for inside, _ in shapes.values()
        )
        self.b = nn.ParameterList(torch.zeros(out, rank) for _, out in shapes.values())

    def forward(self, batch_size: int) -> dict[str, Factors]:
        return {
            name: (a.expand(batch_size, -1, -1), b.expand(batch_size, -1, -1))
            for name, a, b in zip(self.names, self.a, self.b, strict=True)
        }


class Hypernetwork(nn.Module):
    """Predicts a LoRA for each sample: the mean over its references, the experts concatenated on rank."""

    def __init__(self, config: ExpertConfig, geometry: layout.Geometry):
        super().__init__()
        self.siglip = self.dinov3 = None
        if config.train_encoders:
            folder = sources.local(config.encoders)
            self.siglip = encoders.load_siglip(folder / encoders.SIGLIP_FOLDER)
            self.dinov3 = encoders.load_dinov3(folder / encoders.DINOV3_FOLDER)
        self.expert = Expert(geometry) if config.kind != "bias" else None
        self.bias = StaticLora(layout.module_shapes(geometry), config.rank) if config.kind == "bias" else None
        self._kinds = (*_FROZEN[config.kind], *([config.kind] if self.expert else []))
        # a plain tuple, not a ModuleList: frozen experts are not trained, saved or resumed
        files = [sources.locate(config.weights, file) for file in config.frozen_files]
        self.frozen = tuple(load_expert(file).requires_grad_(False) for file in files)

    def to_device(self, device: torch.device) -> None:
        """Move the frozen experts; accelerate moves what is trained."""
        for expert in self.frozen:
            expert.to(device)

    def forward(
        self, references: Tensor, residuals: Mapping[int, Tensor], *, learning: bool = True
    ) -> dict[str, Factors]:
        """Module -> (a: B rank in, b: B out rank).

        references: B K 3 S S in uint8 if the encoders are trained, else embeddings B K D. residuals: resolution ->
        B K T W. learning=False: the frozen experts alone.
        """
        batch_size, count = references.shape[:2]
        embeddings = self._embed(references.flatten(0, 1))
        parts = []
        experts = [*self.frozen, *([self.expert] if self.expert is not None and learning else [])]
        for kind, expert in zip(self._kinds, experts, strict=False):
            residual = (
                residuals[encoders.RESOLUTIONS[kind]].flatten(0, 1).float() if kind in encoders.RESOLUTIONS else None
            )
            predicted = expert(embeddings, residual)
            parts.append({name: mean_over_pictures(_grouped(pair, count)) for name, pair in predicted.items()})
        if self.bias is not None and learning:
            parts.append(self.bias(batch_size))
        return concatenated(parts)

    def _embed(self, references: Tensor) -> Tensor:
        if self.siglip is None or self.dinov3 is None:
            return references
        sizes = self.siglip.config.image_size, self.dinov3.config.image_size
        siglip, dinov3 = encoders.square_pixels(references.float() / 255, *sizes)
        return torch.cat(
            [encoders.embed_siglip(self.siglip, siglip), encoders.embed_dinov3(self.dinov3, dinov3)], dim=1
        )

    def save(self, output: Path) -> Path:
        """Write what was trained in the published layout, trained encoders beside it. Returns the expert's file."""
        if self.siglip is not None and self.dinov3 is not None:
            encoders.save_siglip(self.siglip, output / "encoders" / encoders.SIGLIP_FOLDER)
            encoders.save_dinov3(self.dinov3, output / "encoders" / encoders.DINOV3_FOLDER)
        if self.bias is not None:
            factors = {
                name: LowRank(a.detach(), b.detach())
                for name, a, b in zip(self.bias.names, self.bias.a, self.bias.b, strict=True)
            }
            write_lora(output / layout.FILES["bias"], AdapterWeights(factors), {})
            return output / layout.FILES["bias"]
        assert self.expert is not None
        path = output / layout.FILES[self.expert.geometry.kind.lower()]
        save_expert(self.expert, path)
        return path


def _grouped(pair: Factors, count: int) -> Factors:
    """Factors of B*K pictures, K = `count` of each sample in a row: a: B K rank in, b: B K out rank."""
    return pair[0].unflatten(0, (-1, count)), pair[1].unflatten(0, (-1, count))


def concatenated(parts: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """The LoRA whose dW is the sum of the parts' dW: for each module, all factors concatenated on rank."""
    found: dict[str, list[Factors]] = {}
    for part in parts:
        for name, pair in part.items():
            found.setdefault(name, []).append(pair)
    return {
        name: pairs[0]
        if len(pairs) == 1
        else (torch.cat([a for a, _ in pairs], dim=1), torch.cat([b for _, b in pairs], dim=2))
        for name, pairs in found.items()
    }
