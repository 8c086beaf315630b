"""Epochs: what pictures and folders give to one, and the batches that it is dealt in."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from trainer.data.dataset import DataConfig, Dataset, Example
from trainer.data.folders import as_list
from trainer.flow import generator

_Size = tuple[int, int]  # width, height


def items(examples: Iterable[Example]) -> dict[_Size, list[Example]]:
    """What an epoch consists of, by bucket: each picture at each resolution, as often as its folder repeats it."""
    found: dict[_Size, list[Example]] = defaultdict(list)
    for example in examples:
        for bucket in example.buckets:
            found[bucket] += [example] * example.repeats
    return found


def batch(examples: tuple[Example, ...], batch_size: int, *, seed: int, index: int) -> list[Example]:
    """Batch number `index` of an endless sequence, a function of its arguments alone. All of one bucket.

    Each epoch deals every item of every example; the last batch of a bucket is filled up from the start of its shuffle.
    With several processes and accumulation, index = (step * accumulation + micro_step) * num_processes + process.
    """
    if not examples or batch_size < 1 or index < 0:
        raise ValueError(f"no batch {index} of {batch_size} from {len(examples)} examples")
    members = items(examples)
    starts = [(size, i) for size in sorted(members) for i in range(0, len(members[size]), batch_size)]
    epoch, position = divmod(index, len(starts))
    order = torch.randperm(len(starts), generator=generator(seed, "order", epoch))
    size, start = starts[int(order[position])]
    group = members[size]
    shuffle = torch.randperm(len(group), generator=generator(seed, "shuffle", epoch, *size))
    return [group[int(shuffle[i % len(group)])].at(size) for i in range(start, start + batch_size)]


def drops_caption(probability: float, *, seed: int, index: int, position: int) -> bool:
    """Whether the picture at `position` of batch `index` is shown without its caption."""
    if probability == 0:
        return False
    return bool(torch.rand((), generator=generator(seed, "caption_dropout", index, position)) < probability)


def drawn_caption(example: Example, *, seed: int, index: int, position: int) -> str:
    """That of the picture at `position` of batch `index`: of several, each is as likely."""
    if not example.more_captions:
        return example.caption
    random = generator(seed, "caption", index, position)
    return example.captions[int(torch.randint(len(example.captions), (), generator=random))]


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
