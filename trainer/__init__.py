"""LoRA fine-tuning of Qwen-Image, from any start. Read `run.py`, then `loop.py`."""
