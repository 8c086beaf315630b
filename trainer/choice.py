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
    """That of the difference between the two losses: see `difference`."""
    waited: int
    """How many validations have come after the chosen step."""
    verdict: Verdict
    text: str
    """One or two sentences."""


def choose(errors: Errors) -> Choice | None:
    """A later step replaces the chosen one only where it is better by more than the standard error of the difference;
    None without validations."""
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
    """How much higher the mean of `one` is, and the standard error of that.

    Both have the same pictures, noise and sigmas, so the pairs differ only by the model. The sigmas are always the same
    eight, so that only the pictures are a sample: the variance of the differences is taken over pictures at each sigma,
    as of a stratified sample (Cochran, Sampling Techniques, 1977, chapter 5). Of a single picture it is taken over its
    sigmas.
    """
    pairs = one.double() - other.double()
    num_pictures, num_sigmas = pairs.shape
    if num_pictures > 1:
        variance = float(pairs.var(dim=0).mean()) / num_pictures
    else:
        variance = float(pairs.var()) if num_sigmas > 1 else 0.0
    return float(pairs.mean()), math.sqrt(variance / num_sigmas)


def _verdict(errors: Errors, steps: list[int], chosen: int) -> Verdict:
    if len(steps) < 3:
        return ""
    last = steps[-1]
    higher, error = difference(errors[last], errors[chosen])
    if higher > error:
        return "overfitting"
    middle = steps[len(steps) * 2 // 3 - 1]  # what the last third has brought
    lower, error = difference(errors[middle], errors[last])
    return "still learning" if lower > error else "converged"


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
