"""A bootstrap of 5,000 pairs × 6,144 experts: matrix products against one resample at a time.

The other draws the pairs of a resample and adds their counts up, as one would write it first. It
makes only a few of the thousand resamples, which ours are compared with one by one.
"""

import time

import numpy as np
from paired import Figure, Ratio

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.resampling import layer_scores, pooled
from moesteer.detection.risk_difference import score
from moesteer.detection.significance import bootstrapped

PAIRS, LAYERS, EXPERTS, TOP_K, TOKENS = 5_000, 48, 128, 8, 30
RESAMPLES, THEIRS = 1_000, 5
ROUNDS = 3


def figures() -> list[Figure]:
    counts = _counts()
    draws = np.random.default_rng(1).integers(0, PAIRS, size=(THEIRS, PAIRS))
    weights = np.stack([np.bincount(draw, minlength=PAIRS) for draw in draws]).astype(float)
    ours = np.stack(list(layer_scores(pooled, score, counts, weights)), axis=1)
    if not np.allclose(ours, [_one(counts, draw) for draw in draws]):
        raise RuntimeError("the two bootstraps differ")
    ratios = []
    for _ in range(ROUNDS):
        start = time.process_time()
        bootstrapped(pooled, score, counts, resamples=RESAMPLES)
        middle = time.process_time()
        for draw in draws:
            _one(counts, draw)
        end = time.process_time()
        ratios.append((end - middle) / THEIRS / ((middle - start) / RESAMPLES))
    name = f"a resample of {PAIRS:,} pairs × {LAYERS * EXPERTS:,} experts, with quantiles: speed"
    return [Figure("Resampling", f"{name} in units of one at a time", Ratio(tuple(ratios)))]


def _one(counts: RoutingCounts, draw: np.ndarray) -> np.ndarray:
    selected, tokens = counts.selected[draw].sum(0), counts.tokens[draw].sum(0)
    return selected[0] / tokens[0] - selected[1] / tokens[1]


def _counts() -> RoutingCounts:
    generator = np.random.default_rng(0)
    shape = (PAIRS, 2, LAYERS, EXPERTS)
    selected = generator.binomial(TOKENS, TOP_K / EXPERTS, size=shape).astype(np.int32)
    return RoutingCounts(selected, np.full((PAIRS, 2), TOKENS))
