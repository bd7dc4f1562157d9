"""Comparisons of arms that no run makes itself, each a number with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from moesteer.evaluation.evaluate import replies_of
from moesteer.runs import read_run
from moesteer.statistics.intervals import mean_interval, percentile_interval
from moesteer.statistics.paired import mcnemar_p

Hits = Mapping[int, bool]
"""By prompt, whether an arm's reply was the outcome."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, and its p where it has one."""

    value: float
    low: float
    high: float
    p: float | None = None


def hits(folder: Path, task: str, arm: str, outcome: str) -> dict[int, bool]:
    """By prompt, whether an arm's reply in a run of `evaluate` was the outcome; unjudged ones are
    left out."""
    return {
        reply["item"]: reply["outcome"] == outcome
        for reply in replies_of(read_run(folder))
        if (reply["task"], reply["arm"]) == (task, arm) and reply["outcome"] is not None
    }


def paired(ours: Hits, theirs: Hits) -> Estimate | None:
    """The difference of two arms prompt by prompt, with McNemar's p (of this pair alone); None
    without a prompt that both answered."""
    items = sorted(ours.keys() & theirs.keys())
    if not items:
        return None
    by_item = np.array([float(ours[i]) - float(theirs[i]) for i in items])
    p = mcnemar_p([ours[i] for i in items], [theirs[i] for i in items])
    return Estimate(float(by_item.mean()), *mean_interval(by_item), p)


def ratio(one: tuple[Hits, Hits], other: tuple[Hits, Hits], seed: int = 0) -> Estimate | None:
    """How large one effect is, as a share of another on the same prompts, with its interval.

    Each effect is (steered, unsteered). The interval is a percentile bootstrap over prompts; None
    where the other effect's own interval holds 0, as a share of nothing means nothing.
    """
    items = sorted(set.intersection(*(set(side) for effect in (one, other) for side in effect)))
    if not items:
        return None
    mine, theirs = (
        np.array([float(steered[i]) - float(unsteered[i]) for i in items])
        for steered, unsteered in (one, other)
    )
    low, high = mean_interval(theirs, seed=seed)
    if low <= 0 <= high:
        return None
    drawn = np.random.default_rng(seed).integers(len(items), size=(10_000, len(items)))
    below = theirs[drawn].mean(1)
    ratios = mine[drawn].mean(1)[below != 0] / below[below != 0]
    low, high = percentile_interval(ratios)
    value = float(mine.mean() / theirs.mean())
    return Estimate(value, float(low), float(high))


def rank_correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Estimate | None:
    """Spearman's ρ with a percentile bootstrap over the points; None with fewer than 4."""
    from scipy.stats import rankdata

    if len(x) < 4:
        return None

    def rho(drawn: Int[np.ndarray, "resample point"]) -> Float[np.ndarray, " resample"]:
        """NaN where all values of one side are equal."""
        ranks = (rankdata(np.asarray(side)[drawn], axis=1) for side in (x, y))
        one, other = (of - of.mean(1, keepdims=True) for of in ranks)
        with np.errstate(invalid="ignore"):
            return (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))

    value = float(rho(np.arange(len(x))[None])[0])
    if np.isnan(value):
        return None
    found = rho(np.random.default_rng(seed).integers(len(x), size=(1000, len(x))))
    low, high = percentile_interval(found[~np.isnan(found)])
    return Estimate(value, float(low), float(high))


def rating(folder: Path, task: str, arm: str) -> Estimate | None:
    """The mean of (s − 1)/4 over an arm's replies that were rated from 1 to 5, with a bootstrap
    interval over prompts: the paper's scale of fluency."""
    rated = [
        (float(verdict["score"]) - 1) / 4
        for reply in replies_of(read_run(folder))
        if (reply["task"], reply["arm"]) == (task, arm)
        for verdict in reply["verdicts"]
        if verdict["score"] is not None
    ]
    if not rated:
        return None
    value, (low, high) = float(np.mean(rated)), mean_interval(np.array(rated))
    return Estimate(value, low, high)
