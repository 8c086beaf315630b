"""Preprocessing against PIL and transformers, encoders saved and loaded, the residual of Qwen2.5-VL."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DINOv3ViTConfig, DINOv3ViTModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from demo import text_encoder
from initializers.i2l import encoders
from trainer import qwen_image
from trainer.files import LayoutError

SIZES = pytest.mark.parametrize("size", [(64, 64), (130, 90), (90, 131), (1500, 1024), (2000, 2000), (1024, 1024)])


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(
        np.clip(np.asarray(coarse) + rng.integers(-20, 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    )


@pytest.fixture(scope="module")
def siglip() -> SiglipVisionModel:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    return SiglipVisionModel(config).eval()


@pytest.fixture(scope="module")
def dinov3() -> DINOv3ViTModel:
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_register_tokens=4,
        use_gated_mlp=True,
        hidden_act="silu",
        query_bias=False,
        key_bias=False,
        value_bias=False,
    )
    return DINOv3ViTModel(config).eval()


@SIZES
def test_cover_crop_keeps_the_middle(size: tuple[int, int]) -> None:
    """Against one bilinear resampling of the middle square itself: equal but for the edge and rounding."""
    source = picture(size)
    cropped = encoders.cover_crop(source, 1024)
    assert cropped.size == (1024, 1024)
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    box = (left, top, left + side, top + side)
    expected = source.resize((1024, 1024), Image.Resampling.BILINEAR, box=box)
    difference = np.abs(np.asarray(cropped, dtype=float) - np.asarray(expected, dtype=float))[16:-16, 16:-16]
    assert difference.mean() < 1.0  # the published order rounds the size and the offset to pixels
    assert encoders.cover_crop(cropped, 1024).tobytes() == cropped.tobytes()


@SIZES
def test_siglip_pixels(size: tuple[int, int]) -> None:
    """Against transformers' processor with SigLIP2's settings (bilinear)."""
    processor = SiglipImageProcessorPil(
        size={"height": 48, "width": 48}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    expected = processor(images=[encoders.cover_crop(picture(size), 1024)], return_tensors="np")["pixel_values"][0]
    pixels = encoders.siglip_pixels(picture(size), 48)
    assert pixels.shape == (3, 48, 48) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


@SIZES
def test_dinov3_pixels(size: tuple[int, int]) -> None:
    """Against torch's antialiased bilinear interpolation, as DINOv3's processor does it."""
    square = torch.from_numpy(np.array(encoders.cover_crop(picture(size), 1024))).permute(2, 0, 1)[None].float() / 255
    resized = torch.nn.functional.interpolate(square, size=(48, 48), mode="bilinear", antialias=True)[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (resized - mean[:, None, None]) / std[:, None, None]
    pixels = encoders.dinov3_pixels(picture(size), 48)
    assert pixels.shape == (3, 48, 48) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected.numpy(), atol=2e-5)


def test_a_batch_of_small_squares_is_preprocessed_alike() -> None:
    pictures = [picture((64, 64), seed) for seed in range(3)]
    batch = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2).float() / 255
    siglip, dinov3 = encoders.square_pixels(batch, 64, 32)
    assert siglip.shape == (3, 3, 64, 64) and dinov3.shape == (3, 3, 32, 32)
    step = 1 / 255  # one 8-bit step, in units of the normalised values
    for index, one in enumerate(pictures):
        difference = np.abs(siglip[index].numpy() - encoders.siglip_pixels(one, 64))
        assert difference.max() < 1.5 * step / 0.5 and difference.mean() < 0.5 * step / 0.5
        assert np.abs(dinov3[index].numpy() - encoders.dinov3_pixels(one, 32)).max() < 1.0 * step / 0.22


def test_many_small_squares_are_embedded_alike() -> None:
    source = "demo/encoders"
    pictures = [Image.open(path).convert("RGB") for path in sorted(Path("demo/images/zorp").glob("*.png"))]
    stacked = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2)
    quick, slow = encoders.encode_squares(stacked, source), encoders.encode_pictures(pictures, source)
    assert quick.shape == slow.shape == (8, 192)
    spread = (slow - slow.mean(0)).norm(dim=1).min()
    assert (quick - slow).norm(dim=1).max() < 0.1 * spread  # rounding to 8 bits


def test_encoders_survive_saving(siglip: SiglipVisionModel, dinov3: DINOv3ViTModel, tmp_path: Path) -> None:
    encoders.save_siglip(siglip, tmp_path / "siglip")
    encoders.save_dinov3(dinov3, tmp_path / "dinov3")
    for model, again in (
        (siglip, encoders.load_siglip(tmp_path / "siglip")),
        (dinov3, encoders.load_dinov3(tmp_path / "dinov3")),
    ):
        pixels = torch.rand(2, 3, 32, 32)
        assert not again.training
        assert torch.equal(model(pixels).pooler_output, again(pixels).pooler_output)
        assert model.state_dict().keys() == again.state_dict().keys()
    names = load_file(tmp_path / "dinov3" / "model.safetensors")
    assert "layer.0.attention.q_proj.weight" in names and not any(name.startswith("model.") for name in names)
    assert not any("vision_model" in name for name in load_file(tmp_path / "siglip" / "model.safetensors"))


def test_half_precision_halves_the_file(siglip: SiglipVisionModel, tmp_path: Path) -> None:
    encoders.save_siglip(siglip, tmp_path, torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert encoders.load_siglip(tmp_path, torch.float32).dtype == torch.float32


def test_damaged_encoders_are_named(siglip: SiglipVisionModel, tmp_path: Path) -> None:
    encoders.save_siglip(siglip, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.probe"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(LayoutError, match=r"1 tensors missing.*head\.probe"):
        encoders.load_siglip(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(LayoutError, match="not the published encoder"):
        encoders.load_siglip(tmp_path)
    with pytest.raises(LayoutError, match="cannot be read"):
        encoders.load_siglip(tmp_path / "nowhere")


def test_embeddings_are_siglip_then_dinov3(siglip: SiglipVisionModel, dinov3: DINOv3ViTModel, tmp_path: Path) -> None:
    encoders.save_siglip(siglip, tmp_path / "SigLIP2-G384")
    encoders.save_dinov3(dinov3, tmp_path / "DINOv3-7B")
    pictures = [picture((80, 64), seed) for seed in range(10)]  # more than one chunk
    found = encoders.encode_pictures(pictures, tmp_path)
    assert found.shape == (10, 32) and found.dtype == torch.float32
    assert encoders.embedding_size(str(tmp_path)) == 32
    with torch.no_grad():
        first = siglip(torch.from_numpy(encoders.siglip_pixels(pictures[9], 32))[None]).pooler_output
        second = dinov3(torch.from_numpy(encoders.dinov3_pixels(pictures[9], 32))[None]).last_hidden_state[:, 0]
    torch.testing.assert_close(found[9:], torch.cat([first, second], dim=1), rtol=1e-4, atol=1e-5)


def test_each_encoder_asks_for_room_on_the_gpu(
    siglip: SiglipVisionModel, dinov3: DINOv3ViTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And runs where it is told to."""
    encoders.save_siglip(siglip, tmp_path / "SigLIP2-G384", torch.float16)
    encoders.save_dinov3(dinov3, tmp_path / "DINOv3-7B")
    asked, placed = list[tuple[str, float, str]](), list[str]()

    def room(num_bytes: float, device: torch.device, what: str) -> torch.device:
        asked.append((what, num_bytes, str(device)))
        return torch.device("cpu")

    real = encoders._load
    monkeypatch.setattr(qwen_image, "device_with_room", room)
    monkeypatch.setattr(encoders, "_load", lambda *given: (placed.append(str(given[-1])), real(*given))[1])
    encoders.encode_pictures([picture((80, 64), 0)], tmp_path, "cuda")
    sizes = [4 * sum(p.numel() for p in model.parameters()) for model in (siglip, dinov3)]
    assert [what for what, _, _ in asked] == ["SigLIP2", "DINOv3"] and {device for *_, device in asked} == {"cuda"}
    for (_, num_bytes, _), size in zip(asked, sizes, strict=True):
        assert size <= num_bytes <= 1.2 * size
    assert placed == ["cpu", "cpu"]


def test_embeddings_have_gradients(siglip: SiglipVisionModel, dinov3: DINOv3ViTModel) -> None:
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    total = encoders.embed_siglip(siglip, pixels).sum() + encoders.embed_dinov3(dinov3, pixels).square().sum()
    total.backward()
    assert pixels.grad is not None and pixels.grad.any()
    patches = next(p for name, p in siglip.named_parameters() if name.endswith("embeddings.patch_embedding.weight"))
    assert patches.grad is not None
    assert dinov3.embeddings.cls_token.grad is not None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    text_encoder.save(folder)
    return folder


@pytest.mark.parametrize(("resolution", "num_tokens"), [(224, 64 + 7), (1024, 37 * 37 + 7)])
def test_residual_is_what_the_edit_pipeline_sees(base: Path, resolution: int, num_tokens: int) -> None:
    """Against `QwenImageEditPipeline`'s own encoding, for which the model is given three-dimensional positions."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    one = picture((100, 70))
    found = encoders.qwen_vl_residual([one, picture((70, 100), 1)], str(base), resolution)
    assert found.shape == (2, num_tokens, text_encoder.HIDDEN_SIZE) and found.dtype == torch.float32
    assert not torch.equal(found[0], found[1])

    tokenizer = Qwen2Tokenizer.from_pretrained(base / "tokenizer")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base / "text_encoder", dtype=torch.float32).eval()
    images = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)

    def processor(text: list[str], images_: object = None, **options: object) -> "_Inputs":
        pixels = images(images=[encoders.cover_crop(one, resolution)], return_tensors="pt")
        count = int(pixels["image_grid_thw"].prod()) // 4
        tokens = tokenizer(text[0].replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
        return _Inputs({**tokens, **pixels})

    class _Inputs(dict):
        __getattr__ = dict.__getitem__

        def to(self, device: object) -> "_Inputs":
            return self

    def with_positions(**inputs: torch.Tensor) -> object:
        return model(**inputs, mm_token_type_ids=(inputs["input_ids"] == model.config.image_token_id).long())

    nothing = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer", "processor"))
    pipeline: Any = QwenImageEditPipeline(**nothing)
    pipeline.processor = lambda text, images=None, **options: processor(text, images, **options)
    pipeline.text_encoder = with_positions
    with torch.no_grad():
        expected, _ = pipeline._get_qwen_prompt_embeds([""], None, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(found[:1], 0.05 * expected, rtol=1e-4, atol=1e-6)


def test_residual_without_a_processor_is_published_settings(base: Path, tmp_path: Path) -> None:
    """Qwen-Image has no processor; transformers' defaults would make 1024 pixels smaller and lose tokens."""
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(base / part)
    one = [picture((64, 64))]
    assert torch.equal(
        encoders.qwen_vl_residual(one, str(tmp_path), 1024), encoders.qwen_vl_residual(one, str(base), 1024)
    )


def test_the_edit_template() -> None:
    template, drop = encoders.edit_template()
    assert drop == 64 and template.count("<|image_pad|>") == 1
    tokenizer = text_encoder.build_tokenizer()
    assert len(tokenizer(template.split("<|vision_start|>")[0]).input_ids) == drop
