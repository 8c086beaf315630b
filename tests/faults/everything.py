"""All faults, in the order of the page."""

from tests.faults import damage, pictures, settings

FAULTS = [*settings.FAULTS, *pictures.FAULTS, *damage.FAULTS]
