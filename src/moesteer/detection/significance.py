"""How sure a score is: intervals, tests and stability from resampling examples.

The unit that is drawn is the pair, not the token: the tokens of one text go the same way together,
and treating them as independent calls nearly every expert significant.

Interval: draw pairs with replacement, score again, take percentiles (Efron & Tibshirani, An
Introduction to the Bootstrap, chapter 13). It knows only what was seen: with few pairs it is too
narrow, and where every token of every pair did the same it has no width at all. In simulations
whose texts have rates of their own, the intervals of 95 % of risk difference, log-odds, nPMI and
paired t hold the truth 88–89 % of the time with 10 pairs, 91–92 % with 20, 93–94 % with 50, 94–95 %
with 200; 2 points less often for rare experts.

Test: if an expert is routed alike on both sides, it is chance which side of a pair is called A.
Swap the sides of random pairs and see how often the mean difference gets as large as the one
observed (Phipson & Smyth 2010, arXiv 1603.05766, for the p-value). One p an expert, and as there
are thousands of experts, q: the Benjamini–Hochberg false discovery rate among all experts with at
most that p (Benjamini & Hochberg 1995). The test asks whether routing differs, not whether an
expert matters; and where one side is always longer, its position and length may be what differs.
Rates of texts of unequal length are not symmetric about equal means: at 3–11 tokens against 20–90
p is still what it says, but at 1–3 against 100–300 a rare expert has p < 0.05 in 13 % of
simulations without a difference (20 pairs). Experts of a layer compete, so false ones come in
bunches: none in nearly all shuffles of the testbed's sides, and dozens in the few others.

Stability: do two random halves of the pairs rank the experts alike?
"""

import numpy as np
from jaxtyping import Bool, Float

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.resampling import (
    Estimate,
    Parts,
    Score,
    halves,
    layer_scores,
    scores_of_all,
)
from moesteer.statistics.intervals import LEVEL, percentile_interval, resampled

RESAMPLES = 1000
PERMUTATIONS = 1000
SPLITS = 50


def bootstrapped(
    parts: Parts,
    score: Score,
    counts: RoutingCounts,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Scores with their percentile intervals, drawing pairs with replacement."""
    value = scores_of_all(parts, score, counts)
    pairs = len(counts.tokens)
    if pairs == 1:
        return Estimate(value, value, value, "none: one pair can't be resampled")
    draws = resampled(pairs, resamples, np.random.default_rng(seed))
    low, high = np.empty_like(value), np.empty_like(value)
    for layer, drawn in enumerate(layer_scores(parts, score, counts, draws.astype(np.float64))):
        low[layer], high[layer] = percentile_interval(drawn, level)
    words = f"{level:.0%} percentile bootstrap over pairs, {resamples} resamples"
    return Estimate(value, low, high, words)


def permutation_test(
    counts: RoutingCounts, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> Float[np.ndarray, "layer expert"]:
    """p of each expert: is its rate the same on both sides? Swaps A and B within pairs.

    The statistic is the mean over pairs of a₁/n₁ − a₂/n₂ (each pair weighs the same, whatever its
    length), so that swapping a pair's sides flips the sign of its difference.
    """
    flips = _flips(permutations, len(counts.tokens), seed)
    tokens = counts.tokens.astype(np.float64)[:, :, None]
    p = np.empty(counts.selected.shape[2:])
    for layer in range(len(p)):
        rates = counts.selected[:, :, layer] / tokens
        p[layer] = _sign_flip_p(rates[:, 0] - rates[:, 1], flips)
    return p


def sign_flip_test(
    differences: Float[np.ndarray, "pair layer expert"],
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Float[np.ndarray, "layer expert"]:
    """p of each expert: are its pairs' differences symmetric about 0? Flips their signs.

    Two-sided, p = (1 + #{|flipped sum| ≥ |sum|}) / (1 + permutations). Where no permutation gets
    there, p is at most 1 / (1 + permutations); as thousands of experts are tested that may be too
    coarse, so a bound on the exact p takes over where it is smaller: with random signs s,
    P(|Σ s d| ≥ |Σ d|) ≤ 2 exp(−(Σ d)² / (2 Σ d²)) (Hoeffding 1963). It holds for any number of
    pairs, and p stays valid: at a level of 1 / (1 + permutations) or more it is the permutations'
    p, below that the bound.
    """
    flips = _flips(permutations, len(differences), seed)
    p = np.empty(differences.shape[1:])
    for layer in range(len(p)):
        p[layer] = _sign_flip_p(differences[:, layer].astype(np.float64), flips)
    return p


def false_discovery_rate(
    p: Float[np.ndarray, "layer expert"], exists: Bool[np.ndarray, "layer expert"]
) -> Float[np.ndarray, "layer expert"]:
    """q of each expert by Benjamini–Hochberg, over the experts that exist; 1 for the others."""
    from scipy.stats import false_discovery_control

    q = np.ones_like(p)
    q[exists] = false_discovery_control(p[exists])
    return q


def split_half_stability(
    parts: Parts,
    score: Score,
    counts: RoutingCounts,
    exists: Bool[np.ndarray, "layer expert"],
    *,
    splits: int = SPLITS,
    seed: int = 0,
) -> float | None:
    """Mean rank correlation (Spearman) of the scores from two random halves of the pairs.

    None from a single pair, or where a half scores all experts alike.
    """
    from scipy.stats import rankdata

    pairs = len(counts.tokens)
    if pairs < 2:
        return None
    first = halves(pairs, splits, seed)
    both = np.concatenate([first, 1 - first])
    scores = np.stack(list(layer_scores(parts, score, counts, both)), axis=1)[:, exists]
    ranks = rankdata(scores, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    size = np.sqrt((ranks**2).sum(1))
    if not size.all():
        return None
    ranks /= size[:, None]
    return float((ranks[:splits] * ranks[splits:]).sum(1).mean())


def _flips(permutations: int, pairs: int, seed: int) -> Float[np.ndarray, "permutation pair"]:
    """Random signs: −1 swaps the sides of a pair."""
    generator = np.random.default_rng(seed)
    return 2.0 * generator.integers(0, 2, size=(permutations, pairs), dtype=np.int8) - 1


def _sign_flip_p(
    differences: Float[np.ndarray, "pair expert"], flips: Float[np.ndarray, "permutation pair"]
) -> Float[np.ndarray, " expert"]:
    observed = np.abs(differences.sum(0))
    # A flip that only adds up in another order must count as equal.
    rounding = 1e-9 * np.abs(differences).sum(0)
    reached = (np.abs(flips @ differences) >= observed - rounding).sum(0)
    squares = (differences**2).sum(0)
    exponent = np.divide(observed**2, 2 * squares, out=np.zeros_like(squares), where=squares > 0)
    by_chance = (1 + reached) / (1 + len(flips))
    # Thousands of pairs that do alike: the bound is too small for a float, and p is never 0.
    bound = np.maximum(2 * np.exp(-exponent), np.finfo(np.float64).tiny)
    return np.where(reached == 0, np.minimum(by_chance, bound), by_chance)
