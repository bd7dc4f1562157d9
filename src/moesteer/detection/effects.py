"""From an effect per pair to scores: mean, interval and test of every expert.

The effects are differences already (of log-odds, in nats), so that the mean over pairs is the
score, pairs are drawn for the interval, and signs are flipped for the test: see `significance`. A
small q says that the decision changes the same way in most pairs, not that it changes much: decoys
of the testbed have q < 0.05 too, at 4 % of the planted experts' effect or less. Size comes first.
"""

import numpy as np
from jaxtyping import Bool, Float

from moesteer.detection.significance import (
    RESAMPLES,
    false_discovery_rate,
    sign_flip_test,
)
from moesteer.profile import Scores
from moesteer.statistics.intervals import LEVEL, percentile_interval, resampled

INTERVAL = f"{LEVEL:.0%} percentile bootstrap over pairs, {RESAMPLES} resamples"


def effect_scores(
    effects: Float[np.ndarray, "pair layer expert"],
    rates: Float[np.ndarray, "2 layer expert"],
    exists: Bool[np.ndarray, "layer expert"],
    *,
    seed: int = 0,
) -> Scores:
    """Mean effect of each expert, with a percentile interval, p and q; `rates` are kept beside it.

    Experts whose effects were not measured (NaN) score 0 with p = q = 1.
    """
    measured = exists & ~np.isnan(effects).any(0)
    known = np.where(measured, effects, 0.0)
    value = known.mean(0)
    low, high = _interval(known, seed) if len(effects) > 1 else (value, value)
    p, q = np.ones_like(value), np.ones_like(value)
    if len(effects) > 1 and measured.any():
        p[measured] = sign_flip_test(known, seed=seed)[measured]
        q = false_discovery_rate(p, measured)
    return Scores(value, low, high, p, q, rates[0], rates[1])


def _interval(
    effects: Float[np.ndarray, "pair layer expert"], seed: int
) -> tuple[Float[np.ndarray, "layer expert"], Float[np.ndarray, "layer expert"]]:
    pairs = len(effects)
    draws = resampled(pairs, RESAMPLES, np.random.default_rng(seed)) / pairs
    low, high = np.empty(effects.shape[1:]), np.empty(effects.shape[1:])
    for layer in range(effects.shape[1]):
        low[layer], high[layer] = percentile_interval(draws @ effects[:, layer])
    return low, high
