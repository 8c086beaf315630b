"""LoRA files for Qwen-Image: their layouts, reading and writing them, and what each trainer does with them."""

from trainer.formats.layouts import LAYOUTS, OUTER_MODULES, module_name
from trainer.formats.lora import FormatError, check_lora, read_lora, write_lora

__all__ = ["LAYOUTS", "OUTER_MODULES", "FormatError", "check_lora", "module_name", "read_lora", "write_lora"]
