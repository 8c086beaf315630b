"""LoRA fine-tuning of Qwen-Image, from any start. Read `run.py`, then `loop.py`."""

import logging

for _name in ("bitsandbytes", "torchao"):  # at every import they warn of what nobody needs
    logging.getLogger(_name).setLevel(logging.ERROR)
