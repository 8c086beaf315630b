"""All faults, in the order of the page."""

from tests.faults import damage, nan, pictures, settings

FAULTS = [*settings.FAULTS, *pictures.FAULTS, *damage.FAULTS, *nan.FAULTS]
