"""All faults, in the order of the page."""

from tests.faults import pictures

FAULTS = [*pictures.FAULTS]
