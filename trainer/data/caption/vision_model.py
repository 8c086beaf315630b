"""Qwen2.5-VL, asked about pictures: a pipeline's text encoder, or the same model in a folder of its own."""

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig

from trainer import qwen_image
from trainer.data.caption.answers import Answer
from trainer.files import read_header, read_json
from trainer.hub import sources
from trainer.hub.sources import Need
from trainer.qwen_image import ModelConfig, TextEncoder

MAX_PIXELS = 1024 * 1024
"""Larger pictures are scaled down before the model reads them: 1369 tokens."""
MAX_RATIO = 200
"""The longest side by the shortest; the model's own preprocessing refuses more."""
IMAGE, END = "<|image_pad|>", "<|im_end|>"
_CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<|vision_start|>{IMAGE}<|vision_end|>{{}}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def conversation(instruction: str) -> str:
    """A picture, an instruction, and the beginning of the answer, as Qwen2.5-VL was trained with."""
    return _CONVERSATION.replace("{}", instruction)


def need(model: ModelConfig, captioner: str | None) -> Need:
    """The files of the model that captions: the base's text encoder, or `captioner`, in the layout of
    Qwen/Qwen2.5-VL-7B-Instruct."""
    if captioner is None:
        whole = qwen_image.need(model.base, ("text_encoder", "tokenizer"))
        return Need(whole.source, whole.files, whole.extra, partial(_misfits, model.base, "text_encoder"), whole.early)
    files = ("config.json", "model*.safetensors", "tokenizer_config.json")
    extra = ("tokenizer.json", "vocab.json", "merges.txt", "preprocessor_config.json", "model.safetensors.index.json")
    return Need(captioner, files, extra, partial(_misfits, captioner, ""))


def _misfits(source: str, part: str) -> list[str]:
    """Why the model that lies there cannot write."""
    folder = sources.local(source) / part
    found = read_json(folder / "config.json")
    if found.get("model_type") != "qwen2_5_vl":
        return [f"{folder}: config.json says model_type = {found.get('model_type')}, but qwen2_5_vl is needed"]
    tied = found.get("tie_word_embeddings", found.get("text_config", {}).get("tie_word_embeddings", False))
    names = {name for file in folder.glob("model*.safetensors") for name in read_header(file).shapes}
    if tied or "lm_head.weight" in names:
        return []
    return [f"{folder}: has no language head (lm_head.weight), so it can read but not write; name a --captioner"]


def text_encoder(model: ModelConfig, captioner: str | None, device: torch.device) -> TextEncoder:
    """The model that captions, stored as the configuration says; nothing is loaded yet."""
    if captioner is None:
        return qwen_image.text_encoder(model, device)
    return TextEncoder(captioner, device, model.text_encoder_quantization, part="")


class Captioner:
    """Answers questions about pictures; always the likeliest token, so that the same picture has the same answer."""

    def __init__(self, text_encoder: TextEncoder, dtype: torch.dtype):
        folder, alone = sources.local(text_encoder.base), text_encoder.part == ""
        self._processor = qwen_image.picture_processor(folder if alone else folder / "processor")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="" if alone else "tokenizer")
        self._model = text_encoder.model(dtype)
        ends = self._tokenizer.convert_tokens_to_ids([END, "<|endoftext|>"])
        self._ends, self._padding = [token for token in ends if token is not None], ends[-1]
        # what is published with the model would have it draw lots
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self._ends, pad_token_id=self._padding
        )

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], instruction: str, max_tokens: int) -> list[Answer]:
        size, device = self._processor.size, self._model.device
        limits = {"shortest_edge": size["shortest_edge"], "longest_edge": min(size["longest_edge"], MAX_PIXELS)}
        patches = self._processor(images=list(pictures), size=limits, return_tensors="pt")
        grids = patches["image_grid_thw"]
        ids = self._prompts(instruction, [int(n) for n in grids.prod(dim=1) // self._processor.merge_size**2])
        made = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=(ids != self._padding).long().to(device),
            mm_token_type_ids=(ids == self._model.config.image_token_id).int().to(device),
            pixel_values=patches["pixel_values"].to(device, self._model.dtype),
            image_grid_thw=grids.to(device),
            max_new_tokens=max_tokens,
        )[:, ids.shape[1] :].cpu()
        ended = torch.isin(made, torch.tensor(self._ends)).any(dim=1).tolist()
        texts = self._tokenizer.batch_decode(made, skip_special_tokens=True)
        return [Answer(text.strip(), end) for text, end in zip(texts, ended, strict=True)]

    def _prompts(self, instruction: str, numbers: Sequence[int]) -> torch.Tensor:
        """Ids of the conversation with each picture's number of tokens, filled up on the left."""
        before, after = (self._tokenizer(part).input_ids for part in conversation(instruction).split(IMAGE))
        rows = [before + [self._model.config.image_token_id] * number + after for number in numbers]
        longest = max(map(len, rows))
        return torch.tensor([[self._padding] * (longest - len(row)) + row for row in rows])
