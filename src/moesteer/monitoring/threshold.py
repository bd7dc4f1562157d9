"""Thresholds that at most a chosen share of ordinary texts exceeds, whatever their distribution.

Of n held-out reference texts, the threshold is the score of rank ⌈(n + 1)(1 − a)⌉ from below. A
further text that comes from the same source is as likely to take any of the n + 1 ranks, so it is
above the threshold with a probability of at most a (split conformal prediction: Vovk, Gammerman,
Shafer 2005; ties only lower it). With fewer than 1/a − 1 texts there is no such rank.

Scores of short texts are larger and vary more, so texts are compared with those of their own
length: each bin of lengths has its own threshold, and the probability holds in each (Mondrian
conformal prediction). Bins hold about as many texts each; there are as many, up to four, as leave
enough texts in each. Their borders come from the texts that the reference was fitted on, not from
those that the thresholds come from.

Where two scores can raise an alarm, each has half of the rate (Bonferroni), so that the
probability that any of them does is at most a.

The probability is that of a draw of held-out texts and one further text. With the held-out texts
that one has, the share of alarms varies: with n of them in a bin it is about Beta-distributed with
a standard deviation of √(a(1 − a) / n).
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

MOST_BINS = 4


def least_texts(rate: float) -> int:
    """How many held-out texts a threshold at this rate needs.

    >>> least_texts(0.05), least_texts(0.01)
    (19, 99)
    """
    return int(np.ceil(1 / rate - 1e-9)) - 1


def threshold(scores: Float[np.ndarray, " text"], rate: float) -> float:
    """The score that a further text exceeds with a probability of at most `rate`."""
    allowed = int((len(scores) + 1) * rate + 1e-9)  # (n + 1) − ⌈(n + 1)(1 − a)⌉, without rounding
    if not allowed:
        raise ValueError(f"{len(scores)} texts give no threshold at a rate of {rate}")
    return float(np.sort(scores)[len(scores) - allowed])


def borders_of(
    fitted: Int[np.ndarray, " text"], held_out: Int[np.ndarray, " other"], least: int
) -> tuple[int, ...]:
    """The largest length of each bin but the last, which has none; each holds `least` texts."""
    for bins in range(MOST_BINS, 1, -1):
        inner = np.linspace(0, 1, bins + 1)[1:-1]
        borders = tuple(sorted({int(b) for b in np.quantile(fitted, inner, method="lower")}))
        if min(np.bincount(bins_of(held_out, borders), minlength=len(borders) + 1)) >= least:
            return borders
    return ()


def bins_of(lengths: Sequence[int] | np.ndarray, borders: Sequence[int]) -> list[int]:
    """Which bin each length is in, from 0."""
    return [bisect_left(borders, length) for length in lengths]
