"""Work side by side: in order, few ahead, and torch as it was before."""

from collections.abc import Iterator

import pytest
import torch

from trainer.hardware.threads import parallel_map


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_few_are_made_before_they_are_taken(three_threads: None) -> None:
    given = []

    def items() -> Iterator[int]:
        for number in range(100):
            given.append(number)
            yield number

    results = parallel_map(lambda number: number**2, items())
    assert next(results) == 0
    assert len(given) <= 6
    assert list(results) == [number**2 for number in range(1, 100)]


def test_torch_computes_with_one_thread_in_each_and_with_all_afterwards(three_threads: None) -> None:
    assert set(parallel_map(lambda _: torch.get_num_threads(), range(10))) == {1}
    assert torch.get_num_threads() == 3
    some = parallel_map(lambda number: number, range(10))
    next(some)
    some.close()
    assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda number: 1 / number, range(10)))
    assert torch.get_num_threads() == 3


def test_there_are_no_gradients() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert not any(result.requires_grad for result in parallel_map(lambda number: weight * number, range(3)))
