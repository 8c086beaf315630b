"""Prior preservation: beside each training picture something that the base can do already, so that it is not forgotten.

method = "pictures" (DreamBooth, Ruiz et al. 2022, arXiv:2208.12242, equation 2): other pictures of the subject's kind,
of a folder or drawn by the base, are trained on with the ordinary loss:

    loss = mean |v(x, c) - (noise - x_0)|^2 + weight * mean |v(x', c') - (noise' - x_0')|^2

method = "prediction" (OneTrainer's concepts of the type PRIOR_PREDICTION, ai-toolkit's diff_output_preservation): no
pictures. At the noised latents x of the training pictures, with prompts c' that do not name the subject, the frozen
base's own velocity is the target:

    loss = mean |v(x, c) - (noise - x_0)|^2 + weight * mean |v(x, c') - v_base(x, c')|^2
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from trainer import qwen_image
from trainer.config import first_few, to_dict
from trainer.data.cache import key
from trainer.data.captions import CaptionError, clean, has_trigger, without_trigger
from trainer.data.dataset import DataConfig, Dataset, Example, scan
from trainer.data.pictures import DataError
from trainer.flow import generator
from trainer.hardware import parallel
from trainer.qwen_image import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """`[prior]`"""

    method: Literal["pictures", "prediction"]
    """What keeps the base's abilities. "pictures": other pictures of the subject's kind are trained on, too.
    "prediction": with prompts that do not name the subject, the LoRA is to change nothing. It needs no pictures."""
    weight: float = 1.0
    """The factor of the prior's loss."""
    images: str | None = None
    """For "pictures": a folder of them, with captions as the training pictures have them, without the trigger."""
    default_caption: str = ""
    """The caption of pictures in `images` that have none of their own."""
    prompts: tuple[str, ...] = ()
    """For "pictures": without `images`, the base draws them from these prompts, before the training. For "prediction":
    the prompts. By default they are the captions without the trigger."""
    class_word: str = ""
    """For "prediction" without `prompts`: what takes the place of the trigger in captions, such as "a creature". By
    default the trigger is left out."""
    num_pictures: int = 50
    """How many pictures are drawn. The prompts take turns, and so do the shapes of the training pictures."""
    num_inference_steps: int = 20
    """The number of denoising steps of a picture that is drawn."""
    true_cfg_scale: float = 4.0
    """The strength of guidance in pictures that are drawn. 1 is no guidance, and takes half the time."""
    seed: int = 0
    """Decides the noise of pictures that are drawn."""

    @property
    def draws(self) -> bool:
        return self.method == "pictures" and self.images is None

    def problems(self) -> list[str]:
        least = {"num_pictures": 1, "num_inference_steps": 2, "true_cfg_scale": 1}
        found = [f"{name} must be at least {value}" for name, value in least.items() if getattr(self, name) < value]
        if not self.weight > 0:
            found.append(f"weight must be above 0, not {self.weight:g}; to train without a prior, leave [prior] out")
        found += [f"{name} has no effect with {why}" for name, why in self._idle()]
        if self.draws and not self.prompts:
            found.append('method = "pictures" needs images, a folder, or prompts from which the base draws them')
        if self.draws and self.num_pictures < len(self.prompts):
            found.append(f"num_pictures = {self.num_pictures} leaves out some of the {len(self.prompts)} prompts")
        if twice := sorted({text for text in self.prompts if self.prompts.count(text) > 1}):
            found.append(f'prompts: "{twice[0]}" is there more than once')
        for name, texts in (("prompts", self.prompts), ("class_word", (self.class_word,))):
            for text in texts:
                try:
                    clean(text)
                except CaptionError as error:
                    found.append(f'{name}: "{text}" {error}')
        if not all(text.strip() for text in self.prompts):
            found.append("prompts: one is empty; write what the base is to keep, such as the subject's kind")
        return found

    def _idle(self) -> list[tuple[str, str]]:
        """Keys that are set and do nothing, with the reason."""
        names: tuple[str, ...]
        drawing = ("num_pictures", "num_inference_steps", "true_cfg_scale", "seed")
        if self.method == "prediction":
            names, why = ("images", "default_caption", *drawing), 'method = "prediction"'
        elif self.images is not None:
            names, why = ("prompts", "class_word", *drawing), "images"
        else:
            names, why = ("default_caption", "class_word"), 'method = "pictures" without images'
        defaults = {field.name: field.default for field in fields(self)}
        found = [(name, why) for name in names if getattr(self, name) != defaults[name]]
        if self.method == "prediction" and self.prompts and self.class_word:
            found.append(("class_word", "prompts"))
        return found


@dataclass(frozen=True)
class Prior:
    """The prior of a run, checked."""

    config: PriorConfig
    trigger: str
    captions: tuple[str, ...] = ()
    """Those of the training pictures."""
    examples: tuple[Example, ...] = ()
    """For "pictures": those of the folder, or those that the base draws, in their order; their digests are made up."""
    notes: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[Example, ...]:
        """Those that lie in a folder."""
        return () if self.config.draws else self.examples

    @property
    def drawn(self) -> tuple[Example, ...]:
        """Those that the base draws."""
        return self.examples if self.config.draws else ()

    @property
    def texts(self) -> set[str]:
        """All prompts that may be asked for."""
        if self.config.method == "pictures":
            return {text for example in self.examples for text in example.captions}
        return {*self.config.prompts} or {self._without_trigger(caption) for caption in self.captions}

    def prompt(self, caption: str, *, seed: int, index: int, position: int) -> str:
        """For "prediction": the prompt beside the picture at `position` of batch `index`, which has this caption."""
        if not self.config.prompts:
            return self._without_trigger(caption)
        random = generator(seed, "prior_prompt", index, position)
        return self.config.prompts[int(torch.randint(len(self.config.prompts), (), generator=random))]

    def _without_trigger(self, caption: str) -> str:
        return without_trigger(self.trigger, caption, self.config.class_word)

    def course(self) -> dict[str, Any]:
        """What must be the same when the run is resumed: the settings, with a hash of the folder's contents or of the
        captions without the trigger in place of what they are made from."""
        values = to_dict(replace(self.config, images=None, default_caption="", class_word=""))
        content = key([(e.digest, *e.captions) for e in self.pictures], sorted(self.texts))
        return {**values, "content": content[:16]}


def prepare(config: PriorConfig, data: DataConfig, dataset: Dataset | None, *, multiple: int, seed: int) -> Prior:
    """The prior of a run with this data. DataError lists all that is wrong. dataset: None if it cannot be used."""
    problems, dataset = config.problems(), dataset or Dataset((), (), ())
    if named := [text for text in (*config.prompts, config.class_word) if has_trigger(data.trigger, text)]:
        problems.append(
            f'the trigger "{data.trigger}" is in {_quoted(named)}, and the prior is what is not the subject'
        )
    if config.draws and parallel.uses_fsdp():
        problems.append("prompts: a base that FSDP shards cannot draw; draw them before, and set images")
    prior = Prior(config, data.trigger, tuple(text for example in dataset.train for text in example.captions))
    if config.method == "prediction":
        problems += _prediction_problems(prior)
    elif config.images is None:
        prior = replace(prior, examples=_to_be_drawn(config, dataset))
    else:
        folder = DataConfig(images=config.images, recursive=data.recursive, resolution=data.resolution,
                            default_caption=config.default_caption)  # fmt: skip
        try:
            found = scan(folder, multiple=multiple, seed=seed)
            problems += _picture_problems(found, data, dataset)
            prior = replace(prior, examples=found.train, notes=found.notes)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return prior


def _prediction_problems(prior: Prior) -> list[str]:
    if prior.config.prompts:
        return []
    if not prior.trigger:
        return ["prompts are needed, or [data] trigger, so that it can be left out of the captions"]
    if "" in prior.texts:
        return ["a caption is nothing but the trigger: set class_word to what takes its place, or prompts"]
    return []


def _picture_problems(found: Dataset, data: DataConfig, dataset: Dataset) -> list[str]:
    """Pictures that are the subject's, by their captions or their pixels."""
    problems = []
    if named := [e.path.name for e in found.train if any(has_trigger(data.trigger, c) for c in e.captions)]:
        problems.append(f'images: the trigger "{data.trigger}" is in the captions of {first_few(named)}; remove it')
    known = {e.pixels: e.path for e in (*dataset.train, *dataset.held_out)}
    if same := [f"{e.path} = {known[e.pixels]}" for e in found.train if e.pixels in known]:
        problems.append(f"images: the same pictures are the subject's: {first_few(same)}; remove them")
    return problems


def _quoted(texts: Iterable[str]) -> str:
    return first_few(f'"{text}"' for text in texts)


def _to_be_drawn(config: PriorConfig, dataset: Dataset) -> tuple[Example, ...]:
    """One for each picture; prompts and the shapes of the training pictures take turns."""
    found = list[Example]()
    for number in range(config.num_pictures if config.prompts and dataset.train else 0):
        text = clean(config.prompts[number % len(config.prompts)])[0]
        bucket, name = dataset.train[number % len(dataset.train)].bucket, f"prior picture {number}"
        found.append(Example(Path(name), text, name, bucket, bucket, name))
    return tuple(found)


def drawing_keys(prior: Prior, model: ModelConfig) -> list[str]:
    """Under which the cache keeps the latents of each drawn picture: all that they depend on."""
    config, base = prior.config, qwen_image.identity(model.base, qwen_image.PARTS)
    made_by = base, model.dtype, model.quantization, model.quantization_skip, model.text_encoder_quantization
    how = config.num_inference_steps, config.true_cfg_scale
    return [
        key("prior", made_by, how, config.seed + number, example.caption, example.bucket)
        for number, example in enumerate(prior.drawn)
    ]
