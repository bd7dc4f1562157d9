"""Intervals and tests of many means over the same instances at once.

A column is a measure of every instance, NaN where an instance has none. A resample draws instances,
not values, so all columns share it, and a mean over some instances only (the wrongly labelled) has
as many as were drawn of these.

    interval   percentiles of the means of 10,000 resamples with replacement (Efron & Tibshirani
               1993, chapter 13); of no width where every instance has the same value
    p          two-sided: the share of patterns of signs under which the columns' sum is as far from
               0 as it is (Fisher 1935, §21). All 2ᵐ patterns for m ≤ 13 differences that aren't 0,
               else 10,000 random ones, with the observed one among them, so that p is never 0
               (Phipson & Smyth 2010, arXiv 1603.05766). On differences of 0 and ±1 it is McNemar's
               exact test. It takes for granted that, by chance alone, an instance's difference
               would be as likely with the other sign.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from moesteer.statistics.intervals import percentile_interval

RESAMPLES = 10_000
EXACT = 13
"""Up to so many differences all patterns of signs are looked at."""
AT_ONCE = 1000
"""Resamples that are held in memory together."""


def counts_and_means(
    columns: Float[np.ndarray, "item column"],
) -> tuple[Int[np.ndarray, " column"], Float[np.ndarray, " column"]]:
    """How many instances have each measure, and its mean over them; NaN of none."""
    n = (~np.isnan(columns)).sum(0)
    with np.errstate(invalid="ignore"):
        return n, np.nansum(columns, axis=0) / n


def bootstrap_intervals(
    columns: Float[np.ndarray, "item column"], seed: int
) -> Float[np.ndarray, "2 column"]:
    """Lower and upper end of each column's mean; NaN where it has no value.

    A resample that drew none of a column's instances says nothing of it and is left out there.
    """
    there = ~np.isnan(columns)
    gaps = ~there.all(0)
    values, present = np.nan_to_num(columns), there[:, gaps].astype(float)
    drawn = np.empty((RESAMPLES, columns.shape[1]))
    for rows, weights in _draws(len(columns), seed):
        n = np.full((AT_ONCE, columns.shape[1]), float(len(columns)))
        n[:, gaps] = weights @ present
        with np.errstate(invalid="ignore"):
            drawn[rows] = weights @ values / n
    ends = np.full((2, columns.shape[1]), np.nan)
    for column, means in enumerate(drawn.T):
        if len(means := means[~np.isnan(means)]):
            ends[:, column] = percentile_interval(means)
    return ends


def sign_flip_p(
    columns: Float[np.ndarray, "item column"], seed: int
) -> Float[np.ndarray, " column"]:
    """Two-sided p of each column of differences that its instances' signs are chance; 1 of none."""
    values = np.nan_to_num(columns)
    extreme = np.abs(values.sum(0)) - 1e-9 * np.abs(values).sum(0)
    generator = np.random.default_rng(seed)
    hits = np.ones(values.shape[1])
    few = (values != 0).sum(0) <= EXACT
    if not few.all():
        for _ in range(0, RESAMPLES, AT_ONCE):
            signs = generator.choice([-1.0, 1.0], size=(AT_ONCE, len(values)))
            hits[~few] += (np.abs(signs @ values[:, ~few]) >= extreme[~few]).sum(0)
    p = hits / (RESAMPLES + 1)
    for column in np.flatnonzero(few):
        differences = values[values[:, column] != 0, column]
        sums = _all_signs(len(differences)) @ differences
        p[column] = (np.abs(sums) >= extreme[column]).mean()
    return p


def _all_signs(m: int) -> Int[np.ndarray, "pattern m"]:
    """All patterns of m signs."""
    return (np.arange(2**m)[:, None] >> np.arange(m) & 1) * 2 - 1


def _draws(items: int, seed: int) -> Iterator[tuple[slice, Float[np.ndarray, "resample item"]]]:
    """How often each resample draws each item, some resamples at a time."""
    generator = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, AT_ONCE):
        drawn = generator.integers(items, size=(AT_ONCE, items))
        places = drawn + items * np.arange(AT_ONCE)[:, None]
        weights = np.bincount(places.ravel(), minlength=places.size).reshape(places.shape)
        yield slice(start, start + AT_ONCE), weights.astype(float)
