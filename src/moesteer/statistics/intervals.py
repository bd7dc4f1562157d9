"""Intervals around what was measured: of a share, and of anything that can be computed anew.

share            Wilson's score interval (1927)
anything else    percentiles over resamples with replacement (Efron & Tibshirani 1993, ch. 13)
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

LEVEL = 0.95


def wilson_interval(count: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share; 0 to 1 where nothing was judged.

    Wilson 1927, Journal of the American Statistical Association 22, 209–212.
    """
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(count, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def resampled(
    items: int, resamples: int, generator: np.random.Generator
) -> Int[np.ndarray, "resample item"]:
    """How often each resample draws each item; a row adds up to the items."""
    return generator.multinomial(items, np.full(items, 1 / items), size=resamples)


def percentile_interval(
    drawn: Float[np.ndarray, "resample ..."],
    level: float = LEVEL,
    method: Literal["linear", "inverted_cdf"] = "linear",
) -> tuple[Any, Any]:
    """Lower and upper end of the middle part of some resamples, of each column on its own."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0, method=method)
    return low, high


def mean_interval(
    by_item: Float[np.ndarray, " item"],
    *,
    resamples: int = 10_000,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a mean over items: of differences, where these are given.

    Few values occur, so a resample is a draw of how often each does (multinomial), not of items.
    Of no width where every item did the same: read the shares' own intervals there.
    """
    values, often = np.unique(by_item, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(
        len(by_item), often / len(by_item), size=resamples
    )
    low, high = percentile_interval(draws @ values / len(by_item), level)
    return float(low), float(high)
