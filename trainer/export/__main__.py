"""`python -m trainer.export merged | onnx | comfyui | hub`"""

import argparse
import sys
from collections.abc import Sequence

from trainer.cli import guarded
from trainer.export import request


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
        help="of the merged transformer, as [model] quantization; nf4 and int8 need a GPU (default: none)",
    )
    merged.set_defaults(run=_merged)
    onnx = commands.add_parser("onnx", help="the transformer as ONNX, with LoRAs folded in")
    request.add_arguments(onnx, lora_needed=False)
    onnx.add_argument(
        "--resolution", type=int, default=1024, metavar="PIXELS", help="whose buckets trtexec is told (default: 1024)"
    )
    onnx.set_defaults(run=_onnx)
    options = parser.parse_args(arguments)
    return guarded(lambda: options.run(options))


def _merged(options: argparse.Namespace) -> None:
    from trainer.export.merged import merge, quantization_problems
    from trainer.qwen_image import PARTS

    asked = request.read_request(options, PARTS, quantization_problems(options.quantization))
    _show_notes(asked)
    print("\n".join(merge(asked, options.quantization, quiet=options.quiet)))


def _onnx(options: argparse.Namespace) -> None:
    from trainer.export.onnx_folder import export_onnx, problems

    asked = request.read_request(options, ("transformer", "vae"), problems(options.resolution))
    _show_notes(asked)
    print("\n".join(export_onnx(asked, options.resolution, quiet=options.quiet)))


def _show_notes(asked: request.Request) -> None:
    for part in asked.parts:
        for note in part.file.notes:
            print(f"note: {part.file.path}: {note}")


if __name__ == "__main__":
    sys.exit(main())
