"""All faults, in the order of the page."""

from tests.faults import damage, disk, kills, nan, pictures, settings

FAULTS = [*settings.FAULTS, *pictures.FAULTS, *damage.FAULTS, *disk.FAULTS, *kills.FAULTS, *nan.FAULTS]
