"""Table cells from what runs found, and comparisons of arms that no run makes itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from moesteer.evaluation.comparison import (
    LEVEL,
    RESAMPLES,
    Comparison,
    Difference,
    Share,
    mcnemar_p,
    paired_bootstrap_difference,
    pool_of,
)
from moesteer.evaluation.evaluate import replies_of
from moesteer.rationale.summary import Change, Mean
from moesteer.rationale.summary import Difference as RationaleDifference
from moesteer.report.blocks import signs
from moesteer.report.comparison_page import p_words
from moesteer.report.rationale_words import value_words
from moesteer.reproduce.outcome import Entry
from moesteer.runs import read_run

NOTHING = Entry("–")


def text(words: object) -> Entry:
    return Entry(str(words))


def number(value: float | None, form: str = ",.0f") -> Entry:
    return NOTHING if value is None else Entry(signs(format(value, form)), float(value))


# -- shares and differences of an evaluation -----------------------------------------------------


def share(found: Share) -> Entry:
    """A share with Wilson's interval: 62 % (39 … 82)."""
    if found.share is None:
        return Entry("unjudged")
    words = f"{found.share:.0%} ({100 * found.low:.0f} … {100 * found.high:.0f})"
    return Entry(words, found.share, found.low, found.high)


def pool(comparison: Comparison, task: str, arm: str) -> Entry:
    """The mean share of a pool of arms, and how far they lie apart: 50 % [48 – 52]."""
    of_pool = [s for s in comparison.shares if s.task == task and pool_of(s.arm) == arm]
    if len(of_pool) == 1:
        return share(of_pool[0])
    shares = [s.share for s in of_pool if s.share is not None]
    if not shares:
        return NOTHING
    mean, low, high = sum(shares) / len(shares), min(shares), max(shares)
    return Entry(f"{mean:.0%} [{100 * low:.0f} – {100 * high:.0f}]", mean, low, high)


def difference(comparison: Comparison, task: str, arm: str, against: str) -> Entry:
    """A difference of two pools in percentage points; a dash where one of them is not there."""
    found = [
        d for d in comparison.differences if (d.task, d.arm, d.against) == (task, arm, against)
    ]
    return points(found[0]) if found else NOTHING


def points(found: Difference) -> Entry:
    """A difference in percentage points with its interval and Holm's p."""
    if found.difference is None or found.low is None or found.high is None:
        return NOTHING
    return in_points(found.difference, found.low, found.high, found.holm)


def in_points(value: float, low: float, high: float, p: float | None = None) -> Entry:
    """Of shares from −1 to 1, in percentage points: +50 (+25 … +75) p = 0.016."""
    if not (value or low or high):
        return Entry("0", 0.0, 0.0, 0.0)
    mean, start, end = (round(100 * x) for x in (value, low, high))
    words = signs(f"{mean:+d} ({start:+d} … {end:+d})")
    return Entry(f"{words} {p_words(p)}".rstrip(), value, low, high)


# -- comparisons that no run makes itself --------------------------------------------------------

Hits = Mapping[int, bool]


def hits(folder: Path, task: str, arm: str, outcome: str) -> dict[int, bool]:
    """By prompt, whether an arm's reply in a run of `evaluate` was the outcome; unjudged ones are
    left out."""
    return {
        reply["item"]: reply["outcome"] == outcome
        for reply in replies_of(read_run(folder))
        if (reply["task"], reply["arm"]) == (task, arm) and reply["outcome"] is not None
    }


def paired(ours: Hits, theirs: Hits) -> Entry:
    """The difference of two arms prompt by prompt, with McNemar's p (of this pair alone)."""
    items = sorted(ours.keys() & theirs.keys())
    if not items:
        return NOTHING
    by_item = np.array([float(ours[i]) - float(theirs[i]) for i in items])
    p = mcnemar_p([ours[i] for i in items], [theirs[i] for i in items])
    return in_points(float(by_item.mean()), *paired_bootstrap_difference(by_item), p)


def ratio(one: tuple[Hits, Hits], other: tuple[Hits, Hits], seed: int = 0) -> Entry:
    """How large one effect is, as a share of another on the same prompts, with its interval.

    Each effect is (steered, unsteered). The interval is a percentile bootstrap over prompts; a dash
    where the other effect's own interval holds 0, as a share of nothing means nothing.
    """
    items = sorted(set.intersection(*(set(side) for effect in (one, other) for side in effect)))
    if not items:
        return NOTHING
    mine, theirs = (
        np.array([float(steered[i]) - float(unsteered[i]) for i in items])
        for steered, unsteered in (one, other)
    )
    low, high = paired_bootstrap_difference(theirs, seed=seed)
    if low <= 0 <= high:
        return NOTHING
    drawn = np.random.default_rng(seed).integers(len(items), size=(RESAMPLES, len(items)))
    below = theirs[drawn].mean(1)
    ratios = mine[drawn].mean(1)[below != 0] / below[below != 0]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(mine.mean() / theirs.mean())
    words = signs(f"{value:.0%} ({100 * low:.0f} … {100 * high:.0f})")
    return Entry(words, value, float(low), float(high))


def rank_correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Entry:
    """Spearman's ρ with a percentile bootstrap over the points; a dash with fewer than 4."""
    from scipy.stats import rankdata

    if len(x) < 4:
        return NOTHING

    def rho(drawn: Int[np.ndarray, "resample point"]) -> Float[np.ndarray, " resample"]:
        """NaN where all values of one side are equal."""
        ranks = (rankdata(np.asarray(side)[drawn], axis=1) for side in (x, y))
        one, other = (of - of.mean(1, keepdims=True) for of in ranks)
        with np.errstate(invalid="ignore"):
            return (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))

    value = float(rho(np.arange(len(x))[None])[0])
    if np.isnan(value):
        return NOTHING
    found = rho(np.random.default_rng(seed).integers(len(x), size=(1000, len(x))))
    low, high = np.nanquantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    words = signs(f"{value:+.2f} ({low:+.2f} … {high:+.2f})")
    return Entry(words, value, float(low), float(high))


def rating(folder: Path, task: str, arm: str) -> Entry:
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
        return NOTHING
    value, (low, high) = float(np.mean(rated)), paired_bootstrap_difference(np.array(rated))
    return Entry(f"{value:.2f} ({low:.2f} … {high:.2f})", value, low, high)


# -- of rationales -------------------------------------------------------------------------------


def mean(found: Mean | None, pale: bool = False) -> Entry:
    """A mean with its interval; pale where it means little."""
    if found is None:
        return NOTHING
    if found.measure == "tokens":
        return Entry(f"{found.value:.1f}", found.value, found.low, found.high)
    return Entry(value_words(found), found.value, found.low, found.high, pale)


def change(found: Change | RationaleDifference | None, pale: bool = False) -> Entry:
    """A difference with its interval and Holm's p."""
    if found is None:
        return NOTHING
    if not (found.difference or found.low or found.high):
        return Entry("0", 0.0, 0.0, 0.0, pale)
    words = signs(f"{found.difference:+.2f} ({found.low:+.2f} … {found.high:+.2f})")
    p = p_words(found.holm)
    return Entry(f"{words} {p}".rstrip(), found.difference, found.low, found.high, pale)
