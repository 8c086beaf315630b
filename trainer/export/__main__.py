"""`python -m trainer.export merged | onnx | comfyui | hub`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.cli import guarded
from trainer.config import ConfigError
from trainer.export import request
from trainer.files import DTYPES


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export",
        description="A finished LoRA, as other programs take it.",
        epilog="Exit codes: 0 done; 1 it failed on the way, and nothing was left; 2 something is wrong with the "
        "arguments or the files.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    merged = commands.add_parser("merged", help="the base with LoRAs folded into its weights")
    request.add_arguments(merged, lora_needed=True)
    merged.add_argument(
        "--quantization",
        choices=("none", "nf4", "int8", "fp8"),
        default="none",
        help="of the merged transformer, as [model] quantization; nf4 and int8 need a GPU; the rest of it is in bf16 "
        "unless --dtype says otherwise (default: none)",
    )
    merged.set_defaults(run=_merged)
    onnx = commands.add_parser("onnx", help="the transformer as ONNX, with LoRAs folded in")
    request.add_arguments(onnx, lora_needed=False)
    onnx.add_argument(
        "--resolution", type=int, default=1024, metavar="PIXELS", help="whose buckets trtexec is told (default: 1024)"
    )
    onnx.set_defaults(run=_onnx)
    comfyui = commands.add_parser("comfyui", help="a LoRA in ComfyUI's layout, with the settings of its workflow")
    hub = commands.add_parser("hub", help="a run's result with its model card, samples and ComfyUI's file, to upload")
    for command in (comfyui, hub):
        command.add_argument("path", type=Path, metavar="FILE|RUN", help="a LoRA, or the folder of a finished run")
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
        command.add_argument("--dtype", choices=[*DTYPES], default="fp32", help="of ComfyUI's file (default: fp32)")
    hub.add_argument("--push", metavar="REPO", help="upload it to Hugging Face, into a private repository if it is new")
    comfyui.set_defaults(run=_comfyui)
    hub.set_defaults(run=_hub)
    options = parser.parse_args(arguments)
    return guarded(lambda: options.run(options))


def _merged(options: argparse.Namespace) -> None:
    from trainer.export.merged import merge, quantization_problems
    from trainer.qwen_image import PARTS

    if options.quantization != "none" and options.dtype is None:
        options.dtype = "bf16"  # in which diffusers opens a quantised model unless it is told otherwise
    asked = request.read_request(options, PARTS, quantization_problems(options.quantization))
    _show_notes(asked)
    print("\n".join(merge(asked, options.quantization, quiet=options.quiet)))


def _onnx(options: argparse.Namespace) -> None:
    from trainer.export.onnx_folder import export_onnx, problems

    asked = request.read_request(options, ("transformer",), problems(options.resolution))
    _show_notes(asked)
    print("\n".join(export_onnx(asked, options.resolution, quiet=options.quiet)))


def _comfyui(options: argparse.Namespace) -> None:
    from trainer.export.comfyui import SETTINGS_FILE, find, write_comfyui

    write_comfyui(find(options.path, options.output), options.output, options.dtype)
    print(f"{options.output}:\n\n{(options.output / SETTINGS_FILE).read_text(encoding='utf-8')}", end="")


def _hub(options: argparse.Namespace) -> None:
    from trainer.export.comfyui import find, write_hub
    from trainer.export.result import push

    if options.push and options.push.count("/") != 1:
        raise ConfigError([f'--push: "{options.push}" is not a repository (owner/name)'])
    write_hub(find(options.path, options.output, with_card=True), options.output, options.dtype)
    print(f"{options.output}: {', '.join(sorted(path.name for path in options.output.iterdir()))}")
    if options.push:
        print(f"uploaded to {push(options.output, options.push)}")


def _show_notes(asked: request.Request) -> None:
    for part in asked.parts:
        for note in part.file.notes:
            print(f"note: {part.file.path}: {note}")


if __name__ == "__main__":
    sys.exit(main())
