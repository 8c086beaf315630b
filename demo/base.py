"""Pretrain the miniature `QwenImageTransformer2DModel`, whose 2.6 M parameters draw creatures from captions."""

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from demo import painter
from demo.text_encoder import HIDDEN_SIZE
from demo.vae import single_frame_convolutions
from trainer import flow, qwen_image
from trainer.files import write_tensors
from trainer.loop import Loss, Measured
from trainer.tracking import Tracker

NUM_PICTURES, NUM_HELD_OUT = 30_000, 256
FIRST_SCENE = 1_000  # lower scenes are for the folders of training and held-out pictures
EMPTY_CAPTIONS = 0.1  # share of the short captions that are left empty, so that guidance works
FLOW = flow.FlowConfig(sigma_sampling="logit_normal")


def new_transformer() -> QwenImageTransformer2DModel:
    """With random weights (seed 0); modulation and output are zero, as in DiT (Peebles, Xie 2022, arXiv:2212.09748)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(
            num_layers=4,
            num_attention_heads=4,
            attention_head_dim=32,
            axes_dims_rope=(8, 12, 12),
            in_channels=64,
            out_channels=16,
            joint_attention_dim=HIDDEN_SIZE,
        )
        zeroed = [transformer.proj_out, transformer.norm_out.linear]
        for block in transformer.transformer_blocks:
            zeroed += [block.img_mod[1], block.txt_mod[1]]
        for layer in zeroed:
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return transformer


def save_scheduler(folder: Path) -> None:
    """Write the scheduler that is published with Qwen-Image."""
    FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        num_train_timesteps=1000,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    ).save_pretrained(folder)


def _captions(index: int) -> tuple[str, str]:
    """The caption of a picture with the creature's traits, and the one without them."""
    rng = np.random.default_rng([11, index])
    where = painter.scene(FIRST_SCENE + index)
    name = str(rng.choice(painter.NAMES)) if rng.uniform() < 0.4 else None
    short = qwen_image.EMPTY_PROMPT if rng.uniform() < EMPTY_CAPTIONS else painter.caption(where, name=name)
    return painter.caption(where, painter.identity("pretrain", index), name), short


def prepare(model: Path, file: Path) -> None:
    """Encode pictures and captions once into `file`: latents, and all prompt_embeds in a row with their offsets."""
    device = torch.device("cpu")
    vae = qwen_image.load_vae(str(model), device)
    encode = qwen_image.PromptEncoder(qwen_image.TextEncoder(str(model), device), torch.float32)
    latents = []
    with single_frame_convolutions():
        for start in tqdm(range(0, NUM_PICTURES, 64), desc="encode pictures", unit="batch"):
            batch = [
                Image.fromarray(painter.paint(painter.identity("pretrain", i), painter.scene(FIRST_SCENE + i)))
                for i in range(start, min(start + 64, NUM_PICTURES))
            ]
            latents.append(qwen_image.encode_pictures(vae, batch).half())
    captions = [_captions(i) for i in range(NUM_PICTURES)]
    distinct = sorted({caption for pair in captions for caption in pair})
    rows = {caption: row for row, caption in enumerate(distinct)}
    prompts = []
    for start in tqdm(range(0, len(distinct), 128), desc="encode captions", unit="batch"):
        prompts += [prompt.half() for prompt in encode(distinct[start : start + 128])]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    write_tensors(
        file,
        {
            "latents": torch.cat(latents),
            "prompts": torch.cat(prompts),
            "offsets": offsets,
            "rows": torch.tensor([[rows[full], rows[short]] for full, short in captions]),
        },
    )


class BaseObjective:
    """The flow-matching loss: with long captions in even steps, with short ones in odd steps."""

    def __init__(self, file: Path, batch_size: int):
        self.module: torch.nn.Module = new_transformer()
        self._data, self._batch_size = load_file(file), batch_size
        self._num_train = len(self._data["latents"]) - NUM_HELD_OUT

    def _batch(self, indices: Tensor, column: int) -> tuple[Tensor, Tensor, Tensor | None]:
        offsets, prompts = self._data["offsets"], self._data["prompts"]
        rows = self._data["rows"][indices, column].tolist()
        embeds, mask = qwen_image.stack_prompts([prompts[offsets[row] : offsets[row + 1]].float() for row in rows])
        return self._data["latents"][indices].float(), embeds, mask

    def loss(self, step: int, micro_step: int) -> Loss:
        random = flow.generator(1, step, micro_step)
        indices = torch.randint(self._num_train, (self._batch_size,), generator=random)
        latents, embeds, mask = self._batch(indices, step % 2)
        noise = torch.randn(latents.shape, generator=random)
        sigmas = flow.sample_sigmas(FLOW, len(latents), 16, random)
        noisy = flow.interpolate(latents, noise, sigmas)
        predicted = qwen_image.predict_velocity(self.module, noisy, sigmas, embeds, mask)
        return Loss(flow.losses(predicted, latents, noise).mean(), f"random creatures {step}")

    def validate(self, step: int, tracker: Tracker) -> Measured:
        values = {}
        for name, column in (("val_loss", 0), ("val_loss_no_traits", 1)):
            latents, embeds, mask = self._batch(torch.arange(self._num_train, len(self._data["latents"])), column)
            sigmas = flow.stratified_sigmas(8).repeat(len(latents) // 8)
            noise = torch.randn(latents.shape, generator=flow.generator(2))
            noisy = flow.interpolate(latents, noise, sigmas)
            predicted = qwen_image.predict_velocity(self.module, noisy, sigmas, embeds, mask)
            values[name] = float(flow.losses(predicted, latents, noise).mean())
        return Measured(values)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.module.load_state_dict(tensors)
