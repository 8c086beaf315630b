"""What the command lines share: arguments, logging, exit codes."""

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from trainer.errors import Interrupted, TrainingError, UserError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 3
EXIT_CODES = (
    "Exit codes: 0 done, 1 training failed, 2 something in the configuration or the data is wrong, "
    "3 stopped by a signal after saving a checkpoint."
)

CPU_MEMORY = "DefaultCPUAllocator"  # in the message of torch, which has no class for it


def add_run_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """--config, --output, --resume, --set, --quiet"""
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"the run's TOML, such as {example}")
    parser.add_argument("--output", metavar="DIR", help="the run's folder, instead of the configuration's")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one key: --set train.steps=50"
    )
    parser.add_argument("--quiet", action="store_true", help="a line now and then instead of progress bars")
    parser.epilog = EXIT_CODES


def guarded(program: Callable[[], object], *, again: str = "give the same command again") -> int:
    """Run a program; errors meant for users become a message and an exit code, all others a traceback.

    How to go on is said by a note on the error, as `folder.ending_told` adds it, else by `again`.
    """
    import torch

    from trainer.hardware import parallel
    from trainer.hub.sources import DownloadError

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console without UTF-8 shows what it can
    try:
        program()
        sys.stdout.flush()
    except Interrupted as stop:
        logging.warning("%s; %s", stop, _how_to_go_on(stop, again))
        return EXIT_INTERRUPTED
    except KeyboardInterrupt as stop:
        logging.error("stopped at once; %s", _how_to_go_on(stop, again))
    except TrainingError as error:
        logging.error("training stopped: %s\n%s", error, _how_to_go_on(error, again))
    except UserError as error:
        logging.error("%s", error)
        return EXIT_BAD_INPUT
    except DownloadError as error:
        logging.error("%s", error)
    except BrokenPipeError:  # what reads the output has seen enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python itself flushes once more at its end
        return 0
    except OSError as error:
        logging.error("%s\nwhen this is solved: %s", error, _how_to_go_on(error, again))
    except RuntimeError as error:
        if parallel.lost_a_process(error):
            what = "another process of this run has ended"
        elif isinstance(error, torch.OutOfMemoryError):
            what = f"the GPU's memory is full: {error}\n--plan --vram GB lists settings that fit"
        elif CPU_MEMORY in str(error):
            what = f"the CPU's memory is full: {error}\nclose other programs, or choose settings that need less"
        else:
            raise
        logging.error("%s\nthen: %s", what, _how_to_go_on(error, again))
    else:
        return 0
    return EXIT_FAILED


def _how_to_go_on(error: BaseException, again: str) -> str:
    return "; ".join(getattr(error, "__notes__", [again]))


def _is_of_use(record: logging.LogRecord) -> bool:
    return "no triton" not in str(record.msg)  # torchao's, on every machine without a GPU


def _quiet_libraries() -> None:
    """Their bars, their warnings about optional packages and a line for each request would bury ours. What is worth a
    word in a picture is said by notes."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger().addFilter(_is_of_use)
    others = ("PIL", "diffusers", "transformers", "accelerate", "httpx", "httpx2", "torchao")
    for name in (*others, "onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
