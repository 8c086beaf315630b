"""How a program ends when it cannot go on. These errors become a message; all others are faults of the program."""


class UserError(ValueError):
    """Something that the user gave is wrong: settings, pictures, files. The text says what, where, and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on; nothing was updated with bad values."""


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint is safe."""
