"""Models by name: on this machine, on Hugging Face, on ModelScope."""
