"""How sure a score is: intervals from resampling examples.

The unit that is drawn is the pair, not the token: the tokens of one text go the same way together,
and treating them as independent calls nearly every expert significant.

A percentile interval knows only what was seen: with few pairs it is too narrow, and where every
token of every pair did the same (a score of ±1) it has no width at all.
"""

import numpy as np
from jaxtyping import Float

from moesteer.detection.counts import RoutingCounts

RESAMPLES = 1000
LEVEL = 0.95


def bootstrap_interval(
    counts: RoutingCounts, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[Float[np.ndarray, "layer expert"], Float[np.ndarray, "layer expert"]]:
    """Percentile interval of the risk difference, drawing pairs with replacement.

    A resample is a count of draws a pair (multinomial), so all resamples are one matrix product a
    layer. Efron & Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    pairs, _, layers, experts = counts.selected.shape
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(pairs, np.full(pairs, 1 / pairs), size=resamples)
    draws = draws.astype(np.float32)  # sums of counts stay exact below 2²⁴
    tokens = draws.astype(np.float64) @ counts.tokens
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.empty((layers, experts)), np.empty((layers, experts))
    for layer in range(layers):
        rates = [
            (draws @ counts.selected[:, side, layer].astype(np.float32)) / tokens[:, side, None]
            for side in (0, 1)
        ]
        low[layer], high[layer] = np.quantile(rates[0] - rates[1], tails, axis=0)
    return low, high
