"""All that is known of Qwen-Image, against diffusers' own pipeline on a small random model."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from demo import painter, text_encoder
from trainer import flow, qwen_image
from trainer.data.cache import Cache
from trainer.data.encode import encode_prompts
from trainer.flow import generator
from trainer.hub import hubs, sources
from trainer.qwen_image import ModelConfig

CPU = torch.device("cpu")
PROMPTS = ["a big creature in the middle, in a meadow", "night", ""]


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path) -> QwenImagePipeline:
    """The whole of it, as a user loads it."""
    whole = QwenImagePipeline.from_pretrained(tiny_base, torch_dtype=torch.float32)
    whole.set_progress_bar_config(disable=True)
    return whole


@pytest.fixture(scope="module")
def prompts(tiny_base: Path) -> list[torch.Tensor]:
    return qwen_image.PromptEncoder(qwen_image.TextEncoder(str(tiny_base), CPU), torch.float32)(PROMPTS)


@pytest.fixture(scope="module")
def transformer(tiny_base: Path) -> QwenImageTransformer2DModel:
    return qwen_image.load_transformer(ModelConfig(base=str(tiny_base), dtype="fp32"), CPU)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator("test", *shape))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10)])
def test_pack_and_unpack_are_the_pipeline_s(height: int, width: int) -> None:
    latents = noise(2, 16, 1, height, width)
    tokens = qwen_image.pack(latents)
    # the pipeline's functions want B 1 C h w, and pixels instead of latent sizes
    expected = QwenImagePipeline._pack_latents(latents.transpose(1, 2), 2, 16, height, width)
    assert torch.equal(tokens, expected)
    assert torch.equal(qwen_image.unpack(tokens, height, width), latents)
    assert torch.equal(QwenImagePipeline._unpack_latents(tokens, height * 8, width * 8, 8), latents)


def test_prompts_are_encoded_as_by_the_pipeline(pipeline: QwenImagePipeline, prompts: list[torch.Tensor]) -> None:
    assert len({len(prompt) for prompt in prompts}) == len(PROMPTS)  # of different lengths, so padding is tried
    for text, embeds in zip(PROMPTS, prompts, strict=True):
        expected, mask = pipeline.encode_prompt(text, device=CPU)
        assert mask is None or bool(mask.all())
        assert embeds.shape == expected.shape[1:]
        torch.testing.assert_close(embeds, expected[0], rtol=1e-4, atol=1e-5)


def test_captions_and_prompts_are_read_as_far_as_the_pipeline_reads_them(
    pipeline: QwenImagePipeline, tiny_base: Path, tmp_path: Path
) -> None:
    """What the whole pipeline gives to the transformer, for texts around the limits of 512 and 1024 tokens."""
    word, after = "red ", len(pipeline.tokenizer(pipeline.prompt_template_encode.split("{}")[1]).input_ids)
    counts = [1, 500, *range(512 - after - 1, 514), 700, 1024, 1100]
    texts = [(word * count).strip() for count in counts]
    assert [len(pipeline.tokenizer(text).input_ids) for text in texts] == counts
    given: list[torch.Tensor] = []

    def note(_: object, arguments: tuple[object, ...], named: dict[str, torch.Tensor]) -> None:
        mask = named["encoder_hidden_states_mask"]
        given.append(named["encoder_hidden_states"][0] if mask is None else named["encoder_hidden_states"][0][mask[0]])

    handle = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    for text in texts:
        pipeline(text, width=32, height=32, num_inference_steps=1, output_type="latent", true_cfg_scale=1.0)
    handle.remove()
    encoder = qwen_image.TextEncoder(str(tiny_base), CPU)
    captions = encode_prompts(Cache(tmp_path), encoder, torch.float32, texts, quiet=True)
    prompts = qwen_image.PromptEncoder(encoder, torch.float32)(texts)
    for text, count, expected, prompt in zip(texts, counts, given, prompts, strict=True):
        assert len(expected) == min(count + after, 512)
        for found in (captions[text], prompt):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    cut = qwen_image.cut_prompts(str(tiny_base), texts)
    assert [*cut] == [text for text, count in zip(texts, counts, strict=True) if count > 512]
    assert {*cut.values()} == {(word * 12).strip()}


def test_the_template_has_the_length_that_the_pipeline_cuts_off(pipeline: QwenImagePipeline) -> None:
    """34 tokens and 64: else the real code would cut into the prompt, or leave the template in it."""
    plain, edit = text_encoder.templates()
    tokenizer = pipeline.tokenizer
    assert plain == pipeline.prompt_template_encode
    assert len(tokenizer(plain.split("{}")[0]).input_ids) == pipeline.prompt_template_encode_start_idx == 34
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    assert pad in edit and len(tokenizer(edit.split(pad)[0]).input_ids) == 64
    caption = painter.caption(painter.scene(3))
    whole, begin = tokenizer(plain.format(caption)).input_ids, tokenizer(caption).input_ids
    assert whole[34 : 34 + len(begin)] == begin  # the caption starts exactly there


def test_stacked_prompts_are_padded_and_masked(prompts: list[torch.Tensor]) -> None:
    embeds, mask = qwen_image.stack_prompts(prompts)
    assert mask is not None and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [len(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        assert torch.equal(embeds[row][mask[row]], prompt) and not embeds[row][~mask[row]].any()
    assert qwen_image.stack_prompts([prompts[0], prompts[0]])[1] is None


def test_padding_a_prompt_changes_no_velocity(
    transformer: QwenImageTransformer2DModel, prompts: list[torch.Tensor]
) -> None:
    latents, sigmas = noise(3, 16, 1, 8, 6), torch.tensor([0.1, 0.5, 0.9])
    embeds, mask = qwen_image.stack_prompts(prompts)
    with torch.no_grad():
        together = qwen_image.predict_velocity(transformer, latents, sigmas, embeds, mask)
        for row, prompt in enumerate(prompts):
            alone = qwen_image.predict_velocity(transformer, latents[row, None], sigmas[row, None], prompt[None], None)
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)
        wrong = qwen_image.predict_velocity(transformer, latents, sigmas, embeds, None)
    assert together.shape == latents.shape
    assert (wrong[1:] - together[1:]).abs().max() > 1e-4  # the mask is what makes the difference


def test_velocity_is_what_the_pipeline_s_loop_asks_the_transformer_for(
    pipeline: QwenImagePipeline, transformer: QwenImageTransformer2DModel, prompts: list[torch.Tensor]
) -> None:
    """At each step of a sample: the scheduler's sigmas, not those of the way back."""
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(_: object, given: tuple[object, ...], named: dict[str, torch.Tensor], found: tuple[torch.Tensor]) -> None:
        asked.append((named["hidden_states"], found[0]))

    handle = pipeline.transformer.register_forward_hook(note, with_kwargs=True)
    pipeline(PROMPTS[0], width=48, height=64, num_inference_steps=4, output_type="latent", true_cfg_scale=1.0)
    handle.remove()
    sigmas = pipeline.scheduler.sigmas[:-1]
    assert len(asked) == len(sigmas) == 4 and sigmas[0] == 1
    for (tokens, expected), sigma in zip(asked, sigmas, strict=True):
        with torch.no_grad():
            found = qwen_image.predict_velocity(
                transformer, qwen_image.unpack(tokens, 8, 6), sigma[None], prompts[0][None], None
            )
        torch.testing.assert_close(qwen_image.pack(found), expected, rtol=1e-4, atol=1e-5)


def test_velocity_depends_on_sigma_prompt_and_place(
    transformer: QwenImageTransformer2DModel, prompts: list[torch.Tensor]
) -> None:
    latents = noise(1, 16, 1, 8, 8)

    @torch.no_grad()
    def velocity(latents: torch.Tensor, sigma: float, prompt: torch.Tensor) -> torch.Tensor:
        return qwen_image.predict_velocity(transformer, latents, torch.tensor([sigma]), prompt[None], None)

    first = velocity(latents, 0.5, prompts[0])
    for other in (velocity(latents, 0.6, prompts[0]), velocity(latents, 0.5, prompts[1])):
        assert (other - first).abs().max() > 1e-5
    moved = velocity(latents.roll(2, -1), 0.5, prompts[0]).roll(-2, -1)
    assert (moved - first).abs().max() > 1e-6


# --- the VAE ----------------------------------------------------------------------------------------------


def pictures(count: int) -> list[Image.Image]:
    who = painter.identity("new", 0)
    return [Image.fromarray(painter.paint(who, painter.scene(number))) for number in range(count)]


def test_pixels_are_what_the_pipeline_s_processor_makes(pipeline: QwenImagePipeline) -> None:
    images = pictures(2)
    expected = pipeline.image_processor.preprocess(images)
    torch.testing.assert_close(qwen_image.to_pixels(images)[:, :, 0], expected, rtol=0, atol=1e-6)
    assert qwen_image.to_pixels(images).shape == (2, 3, 1, *np.asarray(images[0]).shape[:2])


def test_latents_are_normalised_by_the_published_statistics(tiny_base: Path) -> None:
    vae = qwen_image.load_vae(str(tiny_base), CPU)
    assert vae.dtype == torch.float32 and not vae.training
    images = pictures(2)
    latents = qwen_image.encode_pictures(vae, images)
    with torch.no_grad():
        raw = vae.encode(qwen_image.to_pixels(images)).latent_dist.mode()
    for channel, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        torch.testing.assert_close(latents[:, channel], (raw[:, channel] - mean) / std)
    assert torch.equal(latents, qwen_image.encode_pictures(vae, images))  # no noise


def test_decoding_is_the_pipeline_s(pipeline: QwenImagePipeline, tiny_base: Path) -> None:
    """The pipeline decodes what its loop leaves; one step from noise at sigma 0 leaves the latents themselves."""
    vae: AutoencoderKLQwenImage = pipeline.vae
    latents = qwen_image.encode_pictures(vae, pictures(2))
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():  # the lines at the end of QwenImagePipeline.__call__
        decoded = vae.decode(latents / std + mean, return_dict=False)[0][:, :, 0]
    expected = pipeline.image_processor.postprocess(decoded, output_type="pil")
    actual = qwen_image.decode_latents(qwen_image.load_vae(str(tiny_base), CPU), latents)
    for one, other in zip(actual, expected, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


# --- sampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_those_of_the_whole_pipeline(
    guidance: float,
    pipeline: QwenImagePipeline,
    tiny_base: Path,
    transformer: QwenImageTransformer2DModel,
    prompts: list[torch.Tensor],
) -> None:
    start = torch.randn(1, 16, 1, 8, 6, generator=generator(7, "sample"))
    expected = pipeline(
        prompt=PROMPTS[0],
        negative_prompt=PROMPTS[1] if guidance > 1 else None,
        true_cfg_scale=guidance,
        width=48,
        height=64,
        num_inference_steps=3,
        latents=QwenImagePipeline._pack_latents(start.transpose(1, 2), 1, 16, 8, 6),
        output_type="pil",
    ).images[0]
    latents = qwen_image.Sampler(str(tiny_base)).latents(
        transformer,
        prompts[:1],
        size=(48, 64),
        seeds=[7],
        num_inference_steps=3,
        true_cfg_scale=guidance,
        negative_prompt=prompts[1],
    )
    assert latents.shape == (1, 16, 1, 8, 6)
    (actual,) = qwen_image.decode_latents(qwen_image.load_vae(str(tiny_base), CPU), latents)
    assert actual.size == expected.size == (48, 64)
    assert np.abs(np.asarray(actual, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2
    unguided = guidance == 1.0
    other = qwen_image.Sampler(str(tiny_base)).latents(
        transformer,
        prompts[:1],
        size=(48, 64),
        seeds=[7],
        num_inference_steps=3,
        true_cfg_scale=3.0 if unguided else 1.0,
        negative_prompt=prompts[1],
    )
    assert (other - latents).abs().max() > 1e-4


@pytest.mark.parametrize("guidance", [1.5, 4.0])
def test_guidance_leads_away_from_the_negative_prompt(
    guidance: float, tiny_base: Path, transformer: QwenImageTransformer2DModel, prompts: list[torch.Tensor]
) -> None:
    """Two steps written out: v = n + s (p - n), at the length of p, as the pipeline has it."""
    found = qwen_image.Sampler(str(tiny_base)).latents(
        transformer,
        prompts[:1],
        size=(64, 64),
        seeds=[7],
        num_inference_steps=2,
        true_cfg_scale=guidance,
        negative_prompt=prompts[1],
    )
    latents = torch.randn(1, 16, 1, 8, 8, generator=generator(7, "sample"))
    scheduler = qwen_image.Sampler(str(tiny_base))._scheduler
    mu = flow.resolution_mu(16)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=mu)
    for sigma, after in pairwise(scheduler.sigmas):
        with torch.no_grad():
            positive, negative = (
                qwen_image.pack(qwen_image.predict_velocity(transformer, latents, sigma[None], prompt[None], None))
                for prompt in prompts[:2]
            )
        velocity = negative + guidance * (positive - negative)
        velocity *= positive.norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True)
        latents = latents + (after - sigma) * qwen_image.unpack(velocity, 8, 8)
    torch.testing.assert_close(found, latents, rtol=1e-3, atol=1e-4)


def test_samples_depend_on_their_seed_alone(
    tiny_base: Path, transformer: QwenImageTransformer2DModel, prompts: list[torch.Tensor]
) -> None:
    def draw(seeds: list[int], texts: list[torch.Tensor], batch_size: int = 1) -> torch.Tensor:
        sampler = qwen_image.Sampler(str(tiny_base))
        return sampler.latents(
            transformer, texts, size=(64, 64), seeds=seeds, num_inference_steps=2, batch_size=batch_size
        )

    first, state = draw([1], prompts[:1]), torch.random.get_rng_state()
    assert torch.equal(draw([1], prompts[:1]), first) and not torch.equal(draw([2], prompts[:1]), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    long = torch.cat([prompts[0], prompts[0]])
    several = draw([2, 1, 3], [long, prompts[0], prompts[0]], batch_size=3)  # a batch of prompts as long as they are
    torch.testing.assert_close(several[1:2], first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw([2, 1, 3], [long, prompts[0], prompts[0]]), several, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(several[1], several[2], atol=1e-2)


# --- what can be told without loading ---------------------------------------------------------------------


def test_a_base_that_cannot_be_one_is_a_problem(tiny_base: Path, tmp_path: Path) -> None:
    assert qwen_image.check_base(str(tiny_base)) == qwen_image.check_base("Qwen/Qwen-Image") == []
    (missing,) = qwen_image.check_base(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in missing
    shutil.copytree(tiny_base / "vae", tmp_path / "half" / "vae")
    (half,) = qwen_image.check_base(str(tmp_path / "half"))
    assert "transformer, text_encoder, tokenizer missing" in half


def test_the_shape_on_meta_is_the_true_one(tiny_base: Path, transformer: QwenImageTransformer2DModel) -> None:
    empty = qwen_image.transformer_on_meta(str(tiny_base))
    shapes = {name: (parameter.shape, parameter.device.type) for name, parameter in empty.named_parameters()}
    assert shapes == {name: (parameter.shape, "meta") for name, parameter in transformer.named_parameters()}
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_without_a_network_a_plan_takes_the_published_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face is asked once, and not through the many retries of a download."""
    asked = []

    def unreachable(*_: object, **__: object) -> None:
        asked.append(1)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _nothing_here)
    hubs._model_info.cache_clear()
    shape = qwen_image.transformer_on_meta("some/where").config
    assert (shape.num_layers, shape.num_attention_heads, shape.attention_head_dim) == (60, 24, 128)
    assert qwen_image.picture_multiple("some/where") == 16 and asked == [1]
    (line,) = sources.download_lines([qwen_image.need("some/where")])
    assert "some/where is not on this machine" in line and "ConnectionError: no network" in line
    hubs._model_info.cache_clear()


def _nothing_here(*_: object, local_files_only: bool = False, **__: object) -> None:
    assert local_files_only, "a download"
    raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")


def test_pictures_must_fit_vae_and_patches(tiny_base: Path) -> None:
    assert qwen_image.picture_multiple(str(tiny_base)) == 16


def test_identity_changes_with_the_weights_of_the_encoders_only(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    first = qwen_image.identity(str(tiny_base))
    assert qwen_image.identity(str(folder)) == first  # not with the place
    for part, matters in (("transformer", False), ("vae", True), ("text_encoder", True)):
        (weights,) = (folder / part).glob("*.safetensors")
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert (qwen_image.identity(str(folder)) != first) == matters
        first = qwen_image.identity(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_another_tokenizer_is_another_identity(name: str, tiny_base: Path, tmp_path: Path) -> None:
    """The same weights read other tokens: what they made of a text before is not what they would make of it now."""
    shutil.copytree(tiny_base, tmp_path / "model")
    first = qwen_image.identity(str(tmp_path / "model"))
    file = tmp_path / "model" / "tokenizer" / name
    file.write_bytes(file.read_bytes() + b" ")
    assert qwen_image.identity(str(tmp_path / "model")) != first


def test_gradient_checkpointing_keeps_less_and_changes_nothing(tiny_base: Path) -> None:
    kept, gradients = [], []
    for checkpointing in (False, True):
        config = ModelConfig(base=str(tiny_base), dtype="fp32")
        model = qwen_image.load_transformer(config, torch.device("cpu")).train()
        qwen_image.set_up(model, config, gradient_checkpointing=checkpointing)
        latents = torch.randn(2, 16, 1, 8, 8, generator=generator("latents")).requires_grad_()
        prompt = torch.randn(2, 5, 64, generator=generator("prompt"))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            found = qwen_image.predict_velocity(model, latents, torch.tensor([0.3, 0.6]), prompt, None)
        found.square().sum().backward()
        kept.append(sum(saved))
        gradients.append(latents.grad)
    assert kept[1] < 0.3 * kept[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_the_demo_s_parts_are_the_real_classes(tiny_base: Path) -> None:
    index = json.loads((tiny_base / "model_index.json").read_text())
    assert index["text_encoder"][1] == Qwen2_5_VLForConditionalGeneration.__name__
    tokenizer = AutoTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    assert type(tokenizer).__name__.startswith(index["tokenizer"][1])
