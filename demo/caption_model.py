"""Pretrain a miniature Qwen2.5-VL that captions creatures: the base's own has random weights.

It is of the same class, with the base's tokenizer, and is asked as `python -m trainer.data caption` asks, with the
instruction of `demo/captioner.toml`. Held-out creatures are never in its training.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from demo import measure, painter
from demo.base import FIRST_SCENE
from trainer import flow
from trainer.data.caption import templates
from trainer.data.caption.vision_model import END, IMAGE, conversation
from trainer.files import read_json, write_json
from trainer.loop import Loss, Measured
from trainer.tracking import Tracker

NUM_PICTURES, NUM_HELD_OUT = 30_000, 256
SIDE = 112
"""Pixels that the model reads of each side of a picture: 16 tokens."""
WIDTH = 96
TRAITS_WEIGHT = 0.3
"""The share in the loss of heads that name traits from what the vision tower sees, and are thrown away: without them
it learns later."""
TEMPLATE = Path("demo/captioner.toml")


def new_model(config: dict[str, Any]) -> Qwen2_5_VLForConditionalGeneration:
    """With random weights (seed 0). config: that of the miniature's text encoder."""
    tokens = {name: config[name] for name in ("image_token_id", "video_token_id")}
    tokens |= {name: config[name] for name in ("vision_start_token_id", "vision_end_token_id")}
    text = {name: config["text_config"][name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **size}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 4]}
    vision = {"depth": 4, "num_heads": 4, "out_hidden_size": WIDTH, "fullatt_block_indexes": [3], **size}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
        )


def patches(pictures: Tensor) -> Tensor:
    """Pictures, B 3 64 64 in uint8, as the processor cuts them up: B 64 1176. Resizing is a matrix product here, which
    training can afford: equal but for the rounding to 8 bits."""
    square = Image.fromarray(np.eye(painter.SIZE, dtype=np.float32))
    matrix = torch.from_numpy(np.array(square.resize((painter.SIZE, SIDE), Image.Resampling.BICUBIC)))
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    pixels = (matrix @ (pictures.float() / 255) @ matrix.T).clamp(0, 1)
    pixels = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    cut = pixels.reshape(len(pictures), 3, 4, 2, 14, 4, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return cut.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(len(pictures), 64, -1)


class Pictures:
    """Creatures in scenes, with their captions."""

    def __init__(self, seed: int, tier: painter.Tier, count: int):
        rng, pixels, self.captions, traits = np.random.default_rng([29, seed]), list[NDArray[np.uint8]](), [], []
        for _ in tqdm(range(count), desc=f"paint creatures, {tier}", unit="picture"):
            who = painter.identity(tier, int(rng.integers(painter.TIER_SEEDS)))
            where = painter.scene(int(rng.integers(FIRST_SCENE, 2**31)))
            pixels.append(painter.paint(who, where).transpose(2, 0, 1))
            self.captions.append(painter.caption(where, who))
            traits.append([*measure.traits_of(who, where).values()])
        self.pixels, self.traits = torch.from_numpy(np.stack(pixels)), torch.tensor(traits)


class CaptionObjective:
    """The loss: cross entropy of the caption's tokens, and of the traits that heads read in the vision tower."""

    def __init__(self, model: Path, batch_size: int):
        self.captioner = new_model(read_json(model / "text_encoder" / "config.json"))
        heads = nn.ModuleList(nn.Linear(16 * WIDTH, len(values)) for values in measure.TRAITS.values())
        self.module: nn.Module = nn.ModuleList([self.captioner, heads])
        self._heads, self._batch_size = heads, batch_size
        tokenizer = AutoTokenizer.from_pretrained(model, subfolder="tokenizer")
        template = templates.load(TEMPLATE, "en", [])
        assert template is not None
        before, after = conversation(template.instruction).split(IMAGE)
        self._before = tokenizer(before).input_ids + [self.captioner.config.image_token_id] * 16
        self._after = tokenizer(after).input_ids
        self._end, self._tokenize = tokenizer.convert_tokens_to_ids(END), tokenizer
        self._train, self._held_out = Pictures(0, "pretrain", NUM_PICTURES), Pictures(1, "new", NUM_HELD_OUT)

    def _loss(self, pictures: Pictures, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of tokens, that of traits, and the share of captions whose every token is the likeliest."""
        cut = patches(pictures.pixels[rows])
        grid = torch.tensor([[1, 8, 8]]).expand(len(rows), 3)
        seen = torch.stack([*self.captioner.model.get_image_features(cut.flatten(0, 1), grid).pooler_output])
        texts = [[*self._tokenize(pictures.captions[row]).input_ids, self._end] for row in rows]
        longest = max(map(len, texts))
        ids = torch.tensor([self._before + self._after + text + [self._end] * (longest - len(text)) for text in texts])
        asked = len(self._before) + len(self._after)
        first = len(self._before) - 16
        embeds = self.captioner.get_input_embeddings()(ids)
        embeds = torch.cat([embeds[:, :first], seen, embeds[:, first + 16 :]], dim=1)
        types = (ids[:1] == self.captioner.config.image_token_id).int()
        positions, _ = self.captioner.model.get_rope_index(ids[:1], types, image_grid_thw=grid[:1])
        hidden = self.captioner.model.language_model(
            inputs_embeds=embeds, position_ids=positions.expand(3, len(rows), -1), use_cache=False
        ).last_hidden_state
        logits = self.captioner.lm_head(hidden[:, asked - 1 : -1])
        inside = torch.arange(longest) < torch.tensor([[len(text)] for text in texts])
        wanted = ids[:, asked:]
        captions = F.cross_entropy(logits[inside], wanted[inside])
        flat = seen.flatten(1)
        traits = torch.stack([F.cross_entropy(h(flat), pictures.traits[rows, i]) for i, h in enumerate(self._heads)])
        right = ((logits.argmax(-1) == wanted) | ~inside).all(dim=1).float().mean()
        return captions, traits.mean(), right

    def loss(self, step: int, micro_step: int) -> Loss:
        rows = torch.randint(NUM_PICTURES, (self._batch_size,), generator=flow.generator("captions", step, micro_step))
        captions, traits, _ = self._loss(self._train, rows)
        return Loss(captions + TRAITS_WEIGHT * traits, f"random creatures {step}")

    def validate(self, step: int, tracker: Tracker) -> Measured:
        captions, traits, right = self._loss(self._held_out, torch.arange(NUM_HELD_OUT))
        return Measured({"val_loss": float(captions), "val_traits": float(traits), "val_right": float(right)})

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.module.load_state_dict(tensors)


def save(captioner: Qwen2_5_VLForConditionalGeneration, model: Path, folder: Path) -> None:
    """Write it as Qwen2.5-VL is published: all files in one folder."""
    captioner.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / "tokenizer" / name, folder / name)
    settings = read_json(model / "processor" / "preprocessor_config.json")
    write_json(folder / "preprocessor_config.json", {**settings, "min_pixels": SIDE**2, "max_pixels": SIDE**2})
