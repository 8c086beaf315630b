"""What the command lines share: arguments, logging, exit codes."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 3
EXIT_CODES = (
    "Exit codes: 0 done, 1 training failed, 2 something in the configuration or the data is wrong, "
    "3 stopped by a signal after saving a checkpoint."
)

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "ncclRemoteError")


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


def guarded(program: Callable[[], object], *, again: str = "continue with --resume") -> int:
    """Run a program; errors meant for users become a message and an exit code, all others a traceback. `again` says how
    to go on."""
    import torch

    from trainer.hub.sources import DownloadError
    from trainer.loop import Interrupted, TrainingError

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _quiet_libraries()
    try:
        program()
    except Interrupted as stop:
        logging.warning("%s; %s", stop, again)
        return EXIT_INTERRUPTED
    except TrainingError as error:
        logging.error("training stopped: %s", error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        logging.error("stopped at once; what was trained since the last checkpoint is lost; %s", again)
        return EXIT_FAILED
    except DownloadError as error:
        logging.error("%s", error)
        return EXIT_FAILED
    except torch.OutOfMemoryError as error:
        logging.error("the GPU's memory is full: %s\n--plan --vram GB lists settings that fit; then %s", error, again)
        return EXIT_FAILED
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        logging.error("another process of this run has ended; its own message is above. Then %s", again)
        return EXIT_FAILED
    except OSError as error:
        logging.error("%s\nThe last checkpoint is whole. When this is solved, %s", error, again)
        return EXIT_FAILED
    except ValueError as error:  # ConfigError, DataError, CheckpointError and their like
        logging.error("%s", error)
        return EXIT_BAD_INPUT
    return 0


def _quiet_libraries() -> None:
    """Their bars, their warnings about optional packages and a line for each request would bury ours."""
    for name in ("diffusers", "transformers", "accelerate", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
