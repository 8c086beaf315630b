"""Pictures that show the same, by the distance of their perceptual hashes."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np


def groups(hashes: Sequence[str], distance: float) -> list[list[int]]:
    """Positions that belong together, each group with two or more: hashes that differ in less than `distance` of their
    bits, and what is linked by others."""
    parents = list(range(len(hashes)))

    def root(item: int) -> int:
        while parents[item] != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    for one, other in _close(hashes, distance):
        parents[root(other)] = root(one)
    members = defaultdict(list)
    for item in range(len(hashes)):
        members[root(item)].append(item)
    return [group for group in members.values() if len(group) > 1]


def _close(hashes: Sequence[str], distance: float) -> Iterator[tuple[int, int]]:
    """Pairs of positions, the smaller one first. There is one row of distances at a time: memory grows with the number
    of hashes, not with its square."""
    if not hashes:
        return
    data = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), -1)
    bits = np.unpackbits(data, axis=1)
    for row in range(len(hashes) - 1):
        differing = (bits[row + 1 :] != bits[row]).mean(axis=1)
        yield from ((row, row + 1 + int(other)) for other in np.flatnonzero(differing < distance))
