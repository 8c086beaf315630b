"""The miniature Qwen2.5-VL: a tokenizer and a model with random weights.

Qwen-Image's prompt templates have as many tokens as with the published tokenizer.
Random weights are enough: the hidden states of different words differ, and the transformer learns what they mean.
"""

import json
from pathlib import Path

import torch
from diffusers import QwenImageEditPipeline, QwenImagePipeline
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from demo import painter
from trainer.files import write_json

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
HIDDEN_SIZE = 64


def templates() -> tuple[str, str]:
    """The prompt templates of the text-to-image and the edit pipeline, as diffusers holds them."""
    nothing = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
    plain = QwenImagePipeline(**nothing).prompt_template_encode
    edit = QwenImageEditPipeline(**nothing, processor=None).prompt_template_encode
    return plain, edit


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE, trained until every word of the templates and captions is one token, as it is in Qwen's own."""
    words = [*templates(), "assistant\n"]
    for background in painter.BACKGROUNDS.values():
        words.append(f"a small big creature {background}, {', '.join(painter.PLACES.values())}")
    for names in (painter.SHAPES, painter.PATTERNS, painter.HEADGEAR, painter.HUES, painter.NAMES):
        words += [f"{name} {name}, " for name in names]
    words += ["a creature with one eye", "with two eyes", "with three eyes", "with a pale belly"]
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        min_frequency=1,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([_plain_text(text) for text in words], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    built = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, extra_special_tokens=list(SPECIAL_TOKENS[1:]))
    built.model_max_length = 131072
    return built


def _plain_text(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n")
    return text.replace("{}", "")


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The model with its vision tower, with random weights (seed 0). 224 pixels give 64 tokens, as in the original."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 63) // 64 * 64,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 2 * HIDDEN_SIZE,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 2 * HIDDEN_SIZE,
            "num_heads": 4,
            "out_hidden_size": HIDDEN_SIZE,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(config).eval()


def save(folder: Path) -> None:
    """Write `text_encoder`, `tokenizer` and `processor` (as `Qwen/Qwen-Image-Edit` has it) under `folder`."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).half().save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "processor")
    write_json(
        folder / "processor" / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "merge_size": 2,
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "processor_class": "Qwen2_5_VLProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "temporal_patch_size": 2,
        },
    )
