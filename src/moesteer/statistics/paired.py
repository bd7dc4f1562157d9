"""Tests of two arms on the same items, exact, and their adjustment for many tests.

one arm against one       McNemar (1947)
one arm against several   Miettinen (1969), matched item by item
many tests                Holm (1979)
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np


def mcnemar_p(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test on paired outcomes; 1 where no pair differs.

    McNemar 1947, Psychometrika 12, 153–157: a binomial test on the discordant pairs.
    """
    from scipy.stats import binomtest

    ahead = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    behind = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0


def matched_p(one: Sequence[bool], many: Sequence[Sequence[bool]]) -> float:
    """Exact two-sided p that an arm hits as often as the arms matched to it, item by item.

    `many` holds an item's replies in the other arms, at least one. Given an item's t hits among its
    1 + s replies, the single arm has one with probability t / (1 + s), so its hits are a sum of
    binomials. p sums what is no likelier than what was seen, as the exact binomial test does.
    Miettinen 1969, Biometrics 25, 339–355.
    """
    from scipy.stats import binom

    chances = Counter(
        (int(hit) + sum(others)) / (1 + len(others)) for hit, others in zip(one, many, strict=True)
    )
    probability = np.ones(1)
    for chance, items in chances.items():
        probability = np.convolve(probability, binom.pmf(np.arange(items + 1), items, chance))
    seen = probability[sum(map(int, one))]
    return float(min(1.0, probability[probability <= seen * (1 + 1e-7)].sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given.

    The i-th smallest of m becomes the largest of (m − j + 1) · p(j) over j ≤ i, at most 1.
    Holm 1979, Scandinavian Journal of Statistics 6, 65–70.
    """
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return [float(value) for value in adjusted]
