"""python -m tests.pretended_gpu [CASE ...] [--blocks 2 3] [--json FILE] [--write]"""

from tests.pretended_gpu import guard

guard.load()

import argparse  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402

from tests.pretended_gpu import hollow  # noqa: E402

hollow.install()
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"

from tests.pretended_gpu.cases import CASES, measure  # noqa: E402
from tests.pretended_gpu.world import World  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.pretended_gpu")
    parser.add_argument("cases", nargs="*", default=[*CASES])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    gc.freeze()  # what the imports have made need not be looked through each time
    logging.basicConfig(level=logging.WARNING)
    found = {}
    with tempfile.TemporaryDirectory() as root:
        os.environ["XDG_CACHE_HOME"] = root
        for name in options.cases:
            for blocks in options.blocks:
                t, p = time.time(), time.process_time()
                outcome = measure(CASES[name], World(options.root or Path(root), blocks))
                found[f"{name} {blocks}"] = asdict(outcome)
                print(name, blocks, f"{time.time() - t:.1f} s, {time.process_time() - p:.1f} s of CPU", file=sys.stderr)
                print(outcome.error, file=sys.stderr)
                for s, v in outcome.stages.items():
                    print(f"   {s:<20} {v['peak'] / 1e9:8.3f} {v['absent'] / 1e9:8.3f}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(found))
