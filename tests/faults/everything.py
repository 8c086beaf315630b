"""All faults, in the order of the page."""

from tests.faults import pictures, settings

FAULTS = [*settings.FAULTS, *pictures.FAULTS]
