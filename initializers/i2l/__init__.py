"""i2L: pictures in, a LoRA out, by a hypernetwork (DiffSynth-Studio/Qwen-Image-i2L).

Read `layout.py`, `expert.py`, `encoders.py`, `recognise.py`, `predictions.py`, then `initializer.py`.
"""

from initializers.i2l.initializer import (
    FILE_KEYS,
    Config,
    check,
    check_run,
    embed,
    embed_needs,
    grey,
    identity,
    initialize,
    needs,
    work,
)

__all__ = [
    "FILE_KEYS",
    "Config",
    "check",
    "check_run",
    "embed",
    "embed_needs",
    "grey",
    "identity",
    "initialize",
    "needs",
    "work",
]
