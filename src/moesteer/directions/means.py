"""Means of the residual stream over prompts, as they come: nothing is kept but the mean.

    m ← m + (x − m) / n        Welford 1962, in fp64

which stays exact where a sum of many large numbers would not: the mean of n equal vectors is that
vector. Memory is layers × positions × hidden, however many prompts there are.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from moesteer.errors import MoesteerError

if TYPE_CHECKING:
    from moesteer.directions.prompts import AskedPrompt
    from moesteer.engines.base import Engine


class RunningMean:
    """The mean of the arrays added so far, all of one shape, in fp64; `count` is how many."""

    def __init__(self) -> None:
        self.count = 0
        self.value = np.zeros(())

    def add(self, arrays: Float[np.ndarray, "item ..."]) -> None:
        for array in arrays:
            self.count += 1
            self.value = self.value + (array - self.value) / self.count


def mean_residuals(
    engine: "Engine",
    prompts: "Sequence[AskedPrompt]",
    last: int,
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "layer position hidden"]:
    """The mean over prompts of what enters each decoder layer at the last `last` tokens.

    Prompts of similar length share a batch, the longest first; each is read once. `progress` is
    told how many were read since the last call. Raises MoesteerError where one gives NaN.
    """
    mean = RunningMean()
    order = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        read = engine.residuals([prompt.ids for prompt in batch], last)
        if not np.isfinite(read).all():
            text, layer, position, _ = (int(n) for n in np.argwhere(~np.isfinite(read))[0])
            raise MoesteerError(
                f"{batch[text].source}: what enters layer {layer} of {engine.facts.id} is NaN or"
                f" infinite at position {position - last}; load the model in another dtype"
                " (--dtype float32 or bfloat16)."
            )
        mean.add(read)
        if progress is not None:
            progress(len(batch))
    return mean.value
