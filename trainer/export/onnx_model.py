"""Qwen-Image's transformer in arithmetic that ONNX has: rotations by cosines and sines instead of complex numbers.

diffusers' own module runs; only its RoPE and the processor of its attention are replaced.
"""

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from trainer.qwen_image import ModelError

THETA = 10_000.0
INPUTS = ("latents", "timestep", "prompt_embeds", "prompt_mask")
OUTPUT = "velocity"


class Rope(nn.Module):
    """Angles of the tokens, as `QwenEmbedRope` of diffusers has them with scale_rope: rows and columns of patches count
    from the middle of the picture, and the prompt's tokens go on from its edge, on all three axes."""

    def __init__(self, axes: tuple[int, int, int]):
        """axes: how many channels of a head turn with frame, row and column."""
        super().__init__()
        self._frequencies = [THETA ** -(torch.arange(0, size, 2, dtype=torch.float32) / size) for size in axes]

    def forward(self, img_shapes: Any, max_txt_seq_len: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, each (L + H W) x half of a head, of the prompt's L tokens and then the picture's H W, row by
        row; of one frame, whose angle is 0. The arguments are those of diffusers: [[(1, H, W)]] and L."""
        frame, rows, columns = (values.to(device) for values in self._frequencies)
        height, width = img_shapes[0][0][1:]
        first = torch.sym_max(height // 2, width // 2)
        words = torch.arange(max_txt_seq_len, device=device)[:, None] + first
        text = words * torch.cat([frame, rows, columns])
        at_row = (torch.arange(height, device=device) - (height - height // 2))[:, None] * rows
        at_column = (torch.arange(width, device=device) - (width - width // 2))[:, None] * columns
        parts = [
            torch.zeros(height, width, len(frame), device=device),
            at_row[:, None].expand(height, width, len(rows)),
            at_column[None].expand(height, width, len(columns)),
        ]
        angles = torch.cat([text, torch.cat(parts, dim=-1).flatten(0, 1)])
        return angles.cos(), angles.sin()


class Attention:
    """The joint attention of prompt and picture, as `QwenDoubleStreamAttnProcessor2_0` of diffusers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: None,
        attention_mask: None,
        image_rotary_emb: tuple[Tensor, Tensor],
        prompt_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states: B N D of the picture; encoder_hidden_states: B L D of the prompt, its mask B L."""
        length = encoder_hidden_states.shape[1]

        def joint(own: Any, of_text: Any, norm: Any = None, norm_text: Any = None) -> Tensor:
            """B S heads channels, of prompt and picture together."""
            picture = own(hidden_states).unflatten(-1, (attn.heads, -1))
            text = of_text(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
            return torch.cat([norm_text(text), norm(picture)] if norm else [text, picture], dim=1)

        query = _turned(joint(attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q), *image_rotary_emb)
        key = _turned(joint(attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k), *image_rotary_emb)
        value = joint(attn.to_v, attn.add_v_proj)
        seen = functional.pad(prompt_mask, (0, hidden_states.shape[1]), value=True)[:, None, None]
        found = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen
        )
        found = found.transpose(1, 2).flatten(2)
        return attn.to_out[0](found[:, length:]), attn.to_add_out(found[:, :length])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of B S heads channels as complex numbers, times cos + i sin; in fp32."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class OnnxTransformer(nn.Module):
    """The transformer with inputs that say all sizes by their shapes."""

    def __init__(self, transformer: QwenImageTransformer2DModel):
        """`transformer` is changed: its RoPE and its attention are replaced. ModelError if its RoPE is another one."""
        super().__init__()
        config = transformer.config
        if config["use_layer3d_rope"] or config["zero_cond_t"] or config["use_additional_t_cond"]:
            raise ModelError("only the text-to-image models of Qwen-Image can be written as ONNX")
        transformer.pos_embed = Rope(tuple(config["axes_dims_rope"]))
        transformer.set_attn_processor(Attention())
        self.transformer = transformer

    def forward(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        """The velocity, B H W 4C: as `trainer.qwen_image.pack` gives it, in rows.

        latents: B H W 4C, the packed patches of H rows and W columns; timestep: sigma of each, B; prompt_embeds:
        B L D; prompt_mask: B L, False where a shorter prompt is filled.
        """
        height, width = latents.shape[1:3]
        found = self.transformer(
            hidden_states=latents.flatten(1, 2),
            timestep=timestep,
            encoder_hidden_states=prompt_embeds,
            attention_kwargs={"prompt_mask": prompt_mask},
            img_shapes=[[(1, height, width)]],
            return_dict=False,
        )[0]
        return found.unflatten(1, (height, width))
