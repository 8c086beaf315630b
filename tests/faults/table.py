"""One fault and what must come of it. The tests go through the table of all, and docs/faults.md is made from it."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.world import Outcome


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong."""

    kind: str
    """A section of the page."""
    what: str
    """What happens to the file or the run, for the page."""
    do: Callable[[], Outcome]
    """Lets it happen in the current folder, which is a copy of the world, and runs the program. It raises an
    AssertionError if something was lost that should not be, or if the run cannot go on as it should."""
    code: int
    says: str
    """Words that must be in what the program says."""
    lost: str = "nothing"
    slow: bool = False
    by_command: bool = False
    """Whether only the command lets it happen, and no test: it takes minutes."""
    posix: bool = False
    """Whether processes are forked or pipes made, which Windows has not."""
    stable: bool = False
    """Whether the page's row is the same on each machine, and quick to make: then a test compares it."""

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.what}"
