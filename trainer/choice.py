"""Which step of a run to take, from the stable errors of held-out pictures, and what happened after it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Verdict = Literal["still learning", "converged", "overfitting", ""]
Errors = Mapping[int, Tensor]
"""Step -> stable errors of the held-out pictures, always of the same ones: N 8."""


@dataclass(frozen=True)
class Choice:
    step: int
    """The chosen one."""
    last: int
    val_loss: float
    val_loss_last: float
    standard_error: float
    """That of the difference between the two losses, over pictures and sigmas."""
    waited: int
    """How many validations have come after the chosen step."""
    verdict: Verdict
    text: str
    """One or two sentences."""


def choose(errors: Errors) -> Choice | None:
    """Later steps replace the chosen one only where they are better by more than `margin`; None without validations."""
    steps = sorted(errors)
    if not steps:
        return None
    chosen = steps[0]
    for step in steps[1:]:
        lower, error = difference(errors[chosen], errors[step])
        if lower > error:
            chosen = step
    last = steps[-1]
    _, error = difference(errors[last], errors[chosen])
    loss, loss_last = (float(errors[step].double().mean()) for step in (chosen, last))
    verdict = _verdict(errors, steps, chosen)
    text = _text(chosen, last, loss, loss_last, error, verdict)
    return Choice(chosen, last, loss, loss_last, error, sum(step > chosen for step in steps), verdict, text)


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """How much higher the mean of `one` is, and the standard error of that over all pairs of entries.

    Both have the same pictures, noise and sigmas, so the pairs differ only by the model. The standard error of a mean
    of n differences is their standard deviation (n - 1 in its divisor) / sqrt(n).
    """
    pairs = (one.double() - other.double()).flatten()
    return float(pairs.mean()), float(pairs.std()) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0


def _verdict(errors: Errors, steps: list[int], chosen: int) -> Verdict:
    """By differences of more than two standard errors, which noise reaches in one of twenty."""
    if len(steps) < 3:
        return ""
    last = steps[-1]
    higher, error = difference(errors[last], errors[chosen])
    if higher > 2 * error:
        return "overfitting"
    middle = steps[len(steps) * 2 // 3 - 1]  # what the last third has brought
    lower, error = difference(errors[middle], errors[last])
    return "still learning" if lower > 2 * error else "converged"


def _text(chosen: int, last: int, loss: float, loss_last: float, error: float, verdict: Verdict) -> str:
    first = f"the best step is {chosen} of {last}, with a held-out loss of {loss:.4f}"
    if chosen != last:
        first += f"; at the end it is {loss_last:.4f}, {loss_last - loss:+.4f} with a standard error of {error:.4f}"
    told = {
        "overfitting": f"Overfitting since step {chosen}: what came after made it worse",
        "converged": f"Converged: after step {chosen} nothing changed by more than noise",
        "still learning": "Still learning when it ended: more steps may help",
        "": "",
    }[verdict]
    return f"{first}. {told}." if told else f"{first}."
