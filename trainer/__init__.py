"""LoRA fine-tuning of Qwen-Image, from any start. Read `run.py`, then `loop.py`."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at every import it warns of a package that nobody needs
