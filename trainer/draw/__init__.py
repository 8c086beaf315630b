"""Pictures from prompts, with LoRAs and without training: see `trainer.draw.__main__`."""
