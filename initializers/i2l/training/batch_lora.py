"""A LoRA for each sample of a batch, as a hypernetwork predicts it, applied to a frozen transformer."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from initializers.i2l.expert import Factors


class BatchLora:
    """Hooks on linear layers that add (x a_i^T) b_i^T to the output of sample i inside `applied`; else nothing.

    transformer: a diffusers model, on which gradient checkpointing has been switched on if it is wanted.
    """

    def __init__(self, transformer: Any, modules: Iterable[str]):
        self._factors: Mapping[str, Factors] = {}
        for name in modules:
            transformer.get_submodule(name).register_forward_hook(self._hook(name))
        if transformer.is_gradient_checkpointing:
            transformer.enable_gradient_checkpointing(self._remembering(transformer._gradient_checkpointing_func))

    @contextmanager
    def applied(self, factors: Mapping[str, Factors]) -> Iterator[None]:
        """factors: module -> (a: B rank in, b: B out rank), at scale 1, for batches of B samples."""
        before, self._factors = self._factors, factors
        try:
            yield
        finally:
            self._factors = before

    def _hook(self, name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name not in self._factors:
                return output
            x = inputs[0]
            a, b = (factor.to(x.dtype) for factor in self._factors[name])  # small; raising x would keep it once more
            tokens = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
            added = torch.bmm(torch.bmm(tokens, a.transpose(1, 2)), b.transpose(1, 2))  # B T out
            return output + added.view(output.shape)

        return add

    def _remembering(self, checkpoint: Any) -> Any:
        """`checkpoint`, whose blocks have the factors of their forward pass when the backward pass, which comes after
        `applied`, computes them again."""

        def remembering(block: nn.Module, *inputs: Any) -> Any:
            factors = self._factors

            def with_factors(*inputs: Any) -> Any:
                with self.applied(factors):
                    return block(*inputs)

            return checkpoint(with_factors, *inputs)

        return remembering
