"""Paired t: how far the mean difference of a pair's rates is from 0, in standard errors.

    dᵢ = a₁ᵢ / n₁ᵢ − a₂ᵢ / n₂ᵢ,   t = mean(d) / √(var(d) / N)

over the N pairs. The risk difference asks how large a difference is, t how regular: an expert that
every pair shifts a little outranks one that a few pairs shift far. Each pair weighs the same,
whatever its length. Student 1908, Biometrika 6.

Where all pairs do alike the variance is 0 and t infinite. But rates are counted in whole tokens,
and a number rounded to steps of 1/n has a variance of 1/(12 n²) from rounding alone: the variance
is taken to be at least mean(1/n₁ᵢ² + 1/n₂ᵢ²) / 12. Positive means that the expert goes with A.
"""

import numpy as np
from jaxtyping import Float


def parts(
    selected: Float[np.ndarray, "pair 2 expert"], tokens: Float[np.ndarray, "pair 2"]
) -> tuple[np.ndarray, ...]:
    """dᵢ, dᵢ², the rounding variance and 1 of each pair."""
    rates = selected / tokens[:, :, None]
    difference = rates[:, 0] - rates[:, 1]
    rounding = (1 / tokens**2).sum(1, keepdims=True) / 12
    return difference, difference**2, rounding, np.ones_like(rounding)


def score(
    differences: np.ndarray, squares: np.ndarray, rounding: np.ndarray, pairs: np.ndarray
) -> np.ndarray:
    """t; see the module for the formula."""
    mean = differences / pairs
    variance = (squares - pairs * mean**2) / np.maximum(pairs - 1, 1)
    return mean / np.sqrt(np.maximum(variance, rounding / pairs) / pairs)
