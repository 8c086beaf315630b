"""Work on many items by several threads, in which torch computes by itself.

Small matrices and decompositions gain little from threads that share each product, and wait whenever one of these
threads has something else to do; whole items side by side use all cores.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `work` gives for each item, in order, without gradients. Only a few are ahead of what is taken, so that all
    together need not fit into memory.

    Until all is taken, or the iterator closed, torch uses one thread everywhere.
    """
    num_threads = torch.get_num_threads()
    num_workers = num_threads + 1  # one more than can compute: one may wait for the disk
    without_gradients = torch.no_grad()(work)
    ahead: deque[Future[Result]] = deque()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_workers) as pool:
            for item in items:
                ahead.append(pool.submit(without_gradients, item))
                if len(ahead) > num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    finally:
        torch.set_num_threads(num_threads)
