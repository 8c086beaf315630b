"""`python -m initializers.i2l inspect | predict | draw | train | bench`"""

import argparse
import hashlib
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from initializers.i2l import encoders
from initializers.i2l.initializer import Config, check, initialize, needs
from initializers.i2l.layout import (
    PUBLISHED,
    LayoutError,
    geometry_text,
    header_rank,
    infer_geometry,
    is_expert,
    is_lora,
    layout_md5,
    module_names,
    published_name,
)
from initializers.i2l.training import draw
from trainer import config, qwen_image
from trainer.adapter import AdapterConfig, AdapterWeights, InitContext, linears, target_modules
from trainer.data.pictures import SUFFIXES, pictures_in
from trainer.export import origin
from trainer.files import DTYPES, Header, read_header
from trainer.formats import FormatError, check_lora, write_lora
from trainer.formats.check import verdict_text
from trainer.formats.convert import Target, hand_off
from trainer.formats.read_config import RecipeError, read_recipe
from trainer.formats.rules import TRAINERS
from trainer.hardware.threads import parallel_map
from trainer.hub import sources
from trainer.lowrank import truncate

_ENCODERS = {encoders.SIGLIP_MD5: "SigLIP2-G384", encoders.DINOV3_MD5: "DINOv3-7B"}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:  # its own arguments
        from initializers.i2l.training import train

        return int(train.main(arguments[1:]) or 0)
    if arguments[:1] == ["bench"]:
        from initializers.i2l.training import bench

        return bench.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m initializers.i2l", description="i2L: pictures in, a LoRA out")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="which expert a file is, and whether it is complete")
    inspect.add_argument("file", type=Path)
    predict = commands.add_parser("predict", help="write the LoRA that the experts predict, without training")
    predict.add_argument("--config", type=Path, required=True, help="TOML of a run: its [init.i2l] and [model] base")
    predict.add_argument("--images", type=Path, required=True, help="folder of pictures; all of them are used")
    predict.add_argument("--rank", type=int, help="rank of the LoRA, by exact truncation; --recipe may say it instead")
    predict.add_argument("--output", type=Path, required=True, help="the .safetensors file; with --for a new folder")
    predict.add_argument("--for", dest="trainer", choices=[*TRAINERS], help="as that trainer wants it, ready to paste")
    recipe = "that trainer's configuration, to read rank, alpha and targets from"
    predict.add_argument("--recipe", type=Path, metavar="FILE", help=recipe)
    predict.add_argument("--strength", type=float, help="factor of the LoRA (default: the configuration's; 1 for auto)")
    predict.add_argument("--dtype", choices=[*DTYPES], default="fp32", help="of the file (default: fp32)")
    draws = commands.add_parser("draw", help="let the base draw pictures of prompts, to train Bias on")
    draws.add_argument("--base", required=True, help="folder or id (as [model] base) of the pipeline")
    draws.add_argument("--prompts", type=Path, required=True, help="text file, a prompt a line")
    draws.add_argument("--output", type=Path, required=True, help="new folder for the pictures")
    draws.add_argument("--resolution", type=int, default=1024, help="side of the square (default: 1024)")
    draws.add_argument("--dtype", choices=[*DTYPES], default="bf16", help="default: bf16")
    draws.add_argument("--num-inference-steps", type=int, default=30, help="default: 30")
    draws.add_argument("--true-cfg-scale", type=float, default=4.0, help="guidance; default: 4, as Qwen-Image's")
    commands.add_parser("train", help="train an expert; see train --help")
    commands.add_parser("bench", help="time and memory at full size, with random weights; see bench --help")
    options = parser.parse_args(arguments)
    if options.command == "inspect":
        return inspect_file(options.file)
    try:
        if options.command == "draw":
            return draw_prompts(options)
        return predict_file(options)
    except sources.DownloadError as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def draw_prompts(options: argparse.Namespace) -> int:
    """ValueError lists what is wrong with the arguments."""
    problems = [f"--{problem}" for problem in qwen_image.check_base(options.base)]
    problems = problems or [f"--base: {problem}" for problem in sources.check(qwen_image.need(options.base))]
    prompts = []
    if options.prompts.is_file():
        prompts = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        problems.append(f"--prompts: {options.prompts} is no file with a prompt a line")
    if options.output.exists():
        problems.append(f"--output: {options.output} is there already; choose another")
    if options.resolution < 16 or options.resolution % 16:
        problems.append("--resolution must be a multiple of 16")
    if problems:
        raise config.ConfigError(problems)
    sources.fetch([qwen_image.need(options.base)])
    draw.draw(
        options.base,
        prompts,
        options.output,
        size=(options.resolution, options.resolution),
        num_inference_steps=options.num_inference_steps,
        true_cfg_scale=options.true_cfg_scale,
        dtype=options.dtype,
    )
    print(f"{options.output}: {len(prompts)} pictures, their prompts beside them")
    return 0


def inspect_file(path: Path) -> int:
    """Print what a file is, from its header alone. 0 if it is known and complete, else 1."""
    try:
        header = read_header(path)
        print(f"{path}")
        if is_expert(header.shapes):
            lines = _expert_lines(header)
        elif is_lora(header.shapes):
            lines = _lora_lines(path, header)
        elif (name := _ENCODERS.get(layout_md5(header.shapes))) is not None:
            lines = [f"{name}, the image encoder of i2L, as published", *_size_lines(header), "complete"]
        else:
            raise LayoutError("neither an i2L expert, nor a LoRA, nor one of its encoders")
    except (LayoutError, FormatError) as error:
        print(error)
        return 1
    print("\n".join(f"  {line}" for line in lines))
    return 0


def _expert_lines(header: Header) -> list[str]:
    geometry = infer_geometry(header.shapes, header_rank(header))
    name = published_name(header.shapes)
    if name is None:
        title = f"miniature {geometry_text(geometry)}"
        if geometry.num_blocks == PUBLISHED["style"].geometry.num_blocks:
            title = f"not a published file: {geometry_text(geometry)}"
    else:
        title = f"Qwen-Image-i2L {geometry.kind}, as published: {geometry_text(geometry)}"
    return [
        title,
        *_size_lines(header),
        f"modules      {len(module_names(geometry))}",
        f"rank         {geometry.rank} for each picture",
        "complete",
    ]


def _lora_lines(path: Path, header: Header) -> list[str]:
    modules = check_lora(path)
    ranks = sorted({rank for _, _, rank in modules.values()})
    return [
        "LoRA (as Qwen-Image-i2L-Bias is)",
        *_size_lines(header),
        f"modules      {len(modules)}",
        f"rank         {', '.join(map(str, ranks))}",
        "complete",
    ]


def _size_lines(header: Header) -> list[str]:
    parameters = sum(math.prod(shape) for shape in header.shapes.values())
    dtypes = ", ".join(sorted(set(header.dtypes.values())))
    return [
        f"layout md5   {layout_md5(header.shapes)}",
        f"parameters   {parameters:,} in {len(header.shapes):,} tensors ({dtypes})",
        f"file         {header.num_bytes / 1e6:,.1f} MB",
    ]


def predict_file(options: argparse.Namespace) -> int:
    """Write the experts' LoRA for all pictures of a folder, truncated. ValueError says what is wrong."""
    own, base = _read_config(options.config)
    if options.strength is not None:
        own = replace(own, strength=options.strength)
    elif own.strength == "auto":
        print('strength = "auto" is found by trying, as train.py does; here it is 1, or --strength')
        own = replace(own, strength=1.0)
    problems = [*check(own), *qwen_image.check_base(base)]
    if own.strength == 0:
        problems.append("--strength 0 leaves nothing to write")
    pictures = _pictures(options.images, problems)
    recipe = None
    if options.recipe and not options.trainer:
        problems.append("--recipe: say whose it is, by --for TRAINER")
    elif options.recipe:
        try:
            recipe = read_recipe(options.recipe, options.trainer)
        except RecipeError as error:
            problems.append(f"--recipe: {error}")
    if options.rank is None and not options.recipe:
        problems.append("--rank is needed; or --for TRAINER --recipe FILE, to take it from there")
    elif options.rank is not None and options.rank < 1:
        problems.append("--rank must be at least 1")
    elif recipe is not None and options.rank not in (None, recipe.rank):
        problems.append(f"--rank {options.rank} contradicts the recipe, which has rank {recipe.rank}: leave one out")
    if options.trainer and options.output.exists():
        problems.append(f"--output: {options.output} is there already; choose another")
    if problems:
        raise config.ConfigError(problems)
    start = time.perf_counter()
    sources.fetch(needs(own, base))
    transformer: Any = qwen_image.transformer_on_meta(base)
    modules = linears(transformer)
    rank = options.rank or recipe.rank  # type: ignore[union-attr]
    context = InitContext(
        images=pictures,
        modules=target_modules(transformer, AdapterConfig()),
        rank=rank,
        seed=0,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        base=base,
        log=lambda message: print(message, flush=True),
    )
    seed = initialize(context, own)
    whole = seed.frozen or seed.weights
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures]
    if options.trainer:
        target = Target(trainer=options.trainer, modules=modules, recipe=recipe, rank=options.rank, dtype=options.dtype)
        done = hand_off(whole, target, options.output, origin(base, seed.report, None, digests, 0))
        print("\n".join([f"{done.file}", *(f"  {line}" for line in done.lines), verdict_text(done.verdict)]))
    else:
        kept, factors = {}, {}
        modules_done = tqdm(whole.factors, desc="truncating", unit="module", leave=False, disable=None)
        truncated = parallel_map(lambda module: (module, *truncate(whole.factors[module], rank)), modules_done)
        for module, short, share in truncated:
            factors[module], kept[module] = short, share
        average = sum(kept.values()) / len(kept)
        metadata = origin(base, seed.report, average, digests, 0)
        write_lora(options.output, AdapterWeights(factors), metadata, DTYPES[options.dtype])
        incoming = seed.report["incoming_rank"]
        print(f"{options.output}: {len(factors)} modules, rank {min(rank, incoming)} of {incoming}, ", end="")
        print(f"from {len(pictures)} pictures")
        print(f"energy kept: {min(kept.values()):.1%} at least, {average:.1%} on average")
    print(
        f"{time.perf_counter() - start:.1f} s ({', '.join(f'{k} {v:.1f}' for k, v in seed.report['seconds'].items())})"
    )
    return 0


def _read_config(path: Path) -> tuple[Config, str]:
    """`[init.i2l]`, and `[model] base`, of a run's TOML; its other tables are not looked at."""
    problems: list[str] = []
    table = config.read_toml(path, problems)
    init = table.get("init", {})
    own = config.parse(Config, init.get("i2l", {}) if isinstance(init, dict) else {}, "init.i2l", problems)
    model = config.parse(qwen_image.ModelConfig, table.get("model", {}), "model", problems)
    if problems or own is None or model is None:
        raise config.ConfigError(problems)
    return own, model.base


def _pictures(folder: Path, problems: list[str]) -> tuple[Path, ...]:
    """All pictures of a folder, by name."""
    if not folder.is_dir():
        problems.append(f"--images {folder}: there is no such folder")
        return ()
    found = pictures_in(folder)
    if not found:
        problems.append(f"--images {folder}: no picture in it ({', '.join(sorted(SUFFIXES))})")
    return tuple(found)


if __name__ == "__main__":
    sys.exit(main())
