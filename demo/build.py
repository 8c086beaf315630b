"""Build the demo's models and pictures from nothing: python -m demo.build [STEP ...]

Every step goes on where it was stopped. What the repository ships is written into demo/, everything else into the work
folder. Times are for 2 cores.

    text             make tokenizer, random text encoder, scheduler   seconds
    vae              pretrain the VAE                                 12 minutes
    base             pretrain the transformer                         35 minutes
    vision           pretrain the image encoders                      12 minutes
    subjects         paint the subjects of hypernetwork training      1 minute
    style            train the Style expert, the encoders with it     45 minutes
    coarse           train the Coarse expert                          40 minutes
    detail_subjects  paint the subjects of Fine                       1 minute
    fine             train the Fine expert on top of Coarse           35 minutes
    captioner        train a Qwen2.5-VL that captions                 20 minutes
    drawn            let the base draw pictures                       2 minutes
    bias             train Bias on top of Coarse and Fine             7 minutes
    images           paint the held-out creature's folder             seconds
    measure          have a classifier read drawings of prompts       3 minutes
    manifest         list sizes, hashes and figures of shipped files  seconds
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from tqdm import tqdm

from demo import base, caption_model, measure, painter, text_encoder, vae, vision
from initializers.i2l import encoders
from initializers.i2l.expert import load_expert, save_expert
from initializers.i2l.layout import FILES
from initializers.i2l.training import draw, train
from trainer import checkpoint, loop
from trainer import config as configuration
from trainer.checkpoint import CheckpointConfig
from trainer.cli import guarded
from trainer.files import new_folder, write_json, write_text
from trainer.formats import read_lora, write_lora
from trainer.loop import Objective, TrainConfig

DEMO = Path("demo")
MODEL, IMAGES, CAPTIONER = DEMO / "model", DEMO / "images", DEMO / "captioner"
CONFIGS = Path("configs")

VAE_TRAIN = TrainConfig(
    steps=4200, batch_size=8, learning_rate=1e-3, lr_schedule="cosine", warmup_steps=100, weight_decay=0.0
)
BASE_TRAIN = TrainConfig(steps=12_000, batch_size=64, learning_rate=2e-3, lr_schedule="cosine", warmup_steps=200)
VISION_TRAIN = TrainConfig(steps=3000, batch_size=64, learning_rate=1e-3, lr_schedule="cosine", warmup_steps=100)
CAPTION_TRAIN = TrainConfig(steps=2000, batch_size=64, learning_rate=1.5e-3, lr_schedule="cosine", warmup_steps=150)
NUM_SUBJECTS, PICTURES_EACH = 15_000, 3
NUM_DETAIL_SUBJECTS, NUM_DRAWN = 7500, 600
HELD_OUT_CREATURE, NUM_IMAGES = ("zorp", 4), 8  # name, and index in the tier "new"


def main(arguments: Sequence[str] | None = None) -> int:
    steps: dict[str, Callable[[Path], None]] = {
        "text": build_text,
        "vae": build_vae,
        "base": build_base,
        "vision": build_vision,
        "subjects": build_subjects,
        "style": build_style,
        "coarse": build_coarse,
        "detail_subjects": build_detail_subjects,
        "fine": build_fine,
        "captioner": build_captioner,
        "drawn": build_drawn,
        "bias": build_bias,
        "images": build_images,
        "measure": build_measurements,
        "manifest": build_manifest,
    }
    parser = argparse.ArgumentParser(
        prog="python -m demo.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "steps", nargs="*", choices=[[], *steps], default=[], metavar="STEP", help="default: all, in order"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/demo"), help="work folder (default: outputs/demo)")
    options = parser.parse_args(arguments)

    def build() -> None:
        for name in options.steps or steps:
            print(f"== {name}", flush=True)
            steps[name](options.work)

    return guarded(build)


def pretrain(objective: Objective, config: TrainConfig, output: Path, validate_every: int) -> None:
    """Train to the end, from the newest checkpoint if there is one."""
    saved = checkpoint.latest(output / checkpoint.FOLDER)
    if saved and saved.step == config.steps:
        objective.load_tensors(saved.tensors)
        return
    accelerator = Accelerator()
    job = loop.Job(output, config, CheckpointConfig(every=250), validate_every)
    loop.train(objective, job, accelerator, resume=True, quiet=not sys.stderr.isatty())


def build_text(work: Path) -> None:
    text_encoder.save(MODEL)
    base.save_scheduler(MODEL / "scheduler")


def build_vae(work: Path) -> None:
    objective = vae.VaeObjective(VAE_TRAIN.batch_size)
    pretrain(objective, VAE_TRAIN, work / "vae", validate_every=250)
    model = objective.module
    assert isinstance(model, AutoencoderKLQwenImage)
    quality = vae.finish(model, MODEL / "vae")
    write_json(work / "vae.json", {"psnr_db": round(quality, 2)})
    print(f"PSNR on 30 held-out pictures: {quality:.1f} dB")


def build_base(work: Path) -> None:
    file = work / "base_data.safetensors"
    if not file.exists():
        base.prepare(MODEL, file)
    objective = base.BaseObjective(file, BASE_TRAIN.batch_size)
    pretrain(objective, BASE_TRAIN, work / "base", validate_every=500)
    model = objective.module
    assert isinstance(model, QwenImageTransformer2DModel)
    model.half().save_pretrained(MODEL / "transformer")
    write_model_index(MODEL)


def write_model_index(model: Path) -> None:
    """`model_index.json`, as diffusers writes it."""
    write_json(
        model / "model_index.json",
        {
            "_class_name": "QwenImagePipeline",
            "_diffusers_version": "0.35.0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "QwenImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
        },
    )


def build_subjects(work: Path) -> None:
    """Creatures of the tier "hyper", each in several scenes. Captions name the scene, not the creature's traits."""
    paint_subjects(work / "subjects", "hyper", 0, NUM_SUBJECTS, PICTURES_EACH)


def paint_subjects(folder: Path, tier: painter.Tier, first: int, count: int, pictures_each: int) -> None:
    """A folder of subjects for hypernetwork training. If it exists already, it is left as it is."""
    if folder.exists():
        return
    lines = []
    with new_folder(folder) as partial:
        for index in tqdm(range(first, first + count), desc="paint subjects", unit="subject"):
            who, rng = painter.identity(tier, index), np.random.default_rng([13, index])
            for number in range(pictures_each):
                where = painter.scene(int(rng.integers(base.FIRST_SCENE, 2**31)))
                name = f"{index:05d}-{number}.png"
                Image.fromarray(painter.paint(who, where)).save(partial / name, compress_level=1)
                named = str(rng.choice(painter.NAMES)) if rng.uniform() < 0.5 else None
                row = {"file_name": name, "text": painter.caption(where, name=named), "subject": f"{index:05d}"}
                lines.append(json.dumps(row))
        write_text(partial / "metadata.jsonl", "\n".join(lines) + "\n")


def build_vision(work: Path) -> None:
    objective = vision.VisionObjective(VISION_TRAIN.batch_size)
    pretrain(objective, VISION_TRAIN, work / "vision", validate_every=250)
    vision.save_encoders(objective.siglip, objective.dinov3, work / "encoders")


def train_expert(kind: str, work: Path, images: str, **options: Path) -> Path:
    """Train, write the expert into demo/i2l in half precision, and the figures of the last validation into the work
    folder. Returns the run's folder."""
    overrides = [f"output={work / kind}", f"data.images={work / images}", f"model.base={MODEL}"]
    overrides += [f"expert.{name}={value}" for name, value in options.items()]
    settings = configuration.load(train.HypernetworkConfig, CONFIGS / f"i2l_creatures_{kind}.toml", overrides)
    output = Path(settings.output)
    train.execute(settings, resume=(output / "run.json").exists(), quiet=not sys.stderr.isatty())
    saved = checkpoint.latest(output / checkpoint.FOLDER)
    assert saved is not None
    last = saved.state["validations"][-1]
    write_json(work / f"{kind}.json", {name: round(value, 4) for name, value in last.items() if name != "seconds"})
    file = DEMO / "i2l" / FILES[kind]
    if kind == "bias":
        write_lora(file, read_lora(output / FILES[kind])[0], {}, torch.float16)
    else:
        save_expert(load_expert(output / FILES[kind]), file, torch.float16)
    return output


def build_style(work: Path) -> None:
    output = train_expert("style", work, "subjects", encoders=work / "encoders")
    for load, save, part in (
        (encoders.load_siglip, encoders.save_siglip, encoders.SIGLIP_FOLDER),
        (encoders.load_dinov3, encoders.save_dinov3, encoders.DINOV3_FOLDER),
    ):
        save(load(output / "encoders" / part), DEMO / "encoders" / part, torch.float16)


def build_coarse(work: Path) -> None:
    train_expert("coarse", work, "subjects", encoders=DEMO / "encoders")


def build_detail_subjects(work: Path) -> None:
    """Other subjects than Coarse was trained on, since its errors on those are smaller than on new ones. There are
    fewer, with one reference each, because Fine reads 1024 pixels, which takes long."""
    paint_subjects(work / "detail_subjects", "hyper", NUM_SUBJECTS, NUM_DETAIL_SUBJECTS, PICTURES_EACH)


def build_fine(work: Path) -> None:
    train_expert("fine", work, "detail_subjects", encoders=DEMO / "encoders", weights=DEMO / "i2l")


def build_captioner(work: Path) -> None:
    objective = caption_model.CaptionObjective(MODEL, CAPTION_TRAIN.batch_size)
    pretrain(objective, CAPTION_TRAIN, work / "captioner", validate_every=250)
    caption_model.save(objective.captioner, MODEL, CAPTIONER)


def build_drawn(work: Path) -> None:
    """Pictures that the base draws from captions, with the creature's traits in every second one."""
    prompts = []
    for index in range(NUM_DRAWN):
        where, who = painter.scene(base.FIRST_SCENE + index), painter.identity("hyper", 900_000 + index)
        prompts.append(painter.caption(where, who if index % 2 else None))
    settings = draw.Settings(size=(painter.SIZE, painter.SIZE), num_inference_steps=20)
    draw.draw(str(MODEL), prompts, work / "drawn", settings)


def build_bias(work: Path) -> None:
    train_expert("bias", work, "drawn", encoders=DEMO / "encoders", weights=DEMO / "i2l")


def build_images(work: Path) -> None:
    """The training pictures of configs/creatures.toml: a creature of the tier "new" in eight scenes, with captions."""
    name, index = HELD_OUT_CREATURE
    with new_folder(IMAGES / name) as folder:
        for number in range(NUM_IMAGES):
            where = painter.scene(number)
            Image.fromarray(painter.paint(painter.identity("new", index), where)).save(folder / f"{number}.png")
            write_text(folder / f"{number}.txt", painter.caption(where) + "\n")


def build_measurements(work: Path) -> None:
    """Draw held-out prompts and write down what the classifier reads in the drawings."""
    figures = measure.measure_prompts(MODEL, work / "prompts.png")
    write_json(work / "prompts.json", figures)
    for name, values in figures.items():
        print(f"{name}: " + ", ".join(f"{trait} {share:.0%}" for trait, share in values.items()))


def build_manifest(work: Path) -> None:
    """Write `demo/manifest.json`: size and hash of every shipped file, and the figures that were measured."""
    folders = ("model", "encoders", "i2l", "captioner")
    files = sorted(path for folder in folders for path in (DEMO / folder).rglob("*") if path.is_file())
    listed = {
        path.relative_to(DEMO).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    figures = {
        name: json.loads((work / f"{name}.json").read_text())
        for name in ("vae", "prompts", *FILES)
        if (work / f"{name}.json").exists()
    }
    total = sum(path.stat().st_size for path in files)
    write_json(DEMO / "manifest.json", {"total_bytes": total, "figures": figures, "files": listed})
    print(f"{len(files)} files, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
