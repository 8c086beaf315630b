"""What each folder gives to an epoch: in words for the plan, in numbers for the course of a run."""

from typing import Any

from trainer.data.dataset import DataConfig, Dataset, items
from trainer.data.folders import as_list


def folder_lines(config: DataConfig, dataset: Dataset) -> list[str]:
    """A line for each folder; none if there is nothing to say but the number of pictures."""
    if not config.folders and len(as_list(config.resolution)) == 1:
        return []
    lines = []
    for number, own in enumerate(config.each_folder()):
        train = [example for example in dataset.train if example.folder == number]
        repeats = config.folders[number].repeats if config.folders else 1
        sides = " and ".join(map(str, as_list(own.resolution)))
        count = sum(map(len, items(train).values()))
        lines.append(f"{own.images}: {len(train)} pictures, repeats {repeats}, at {sides}: {count} items in each epoch")
    return lines


def course_of_folders(config: DataConfig, dataset: Dataset) -> dict[str, Any]:
    """What of `[[data.folders]]` decides a training, in place of those keys of `[data]` that it takes the place of."""
    if not config.folders:
        return {"folders": {}}
    found = {}
    for number, (folder, own) in enumerate(zip(config.folders, config.each_folder(), strict=True)):
        pictures = sum(example.folder == number for example in dataset.train)
        found[str(number)] = {"repeats": folder.repeats, "resolution": own.resolution, "pictures": pictures}
    return {"folders": found, "resolution": {}}
