"""Stability selection: how often an expert is among the strongest when half of the pairs are drawn.

    score = sign(Δ) · (share of half-samples in which |Δ*| is among the m largest of all layers)

Δ from all pairs, Δ* from a random half of them. An expert that owes its rank to a few texts drops
out when these are missing. In [−1, 1]; positive means that the expert goes with A. Meinshausen &
Bühlmann 2010, arXiv 0809.2932. m is a choice, by default 2 % of the experts: it says how many
"strongest" are. Experts that tie with the m-th all count, those without any difference never.

The interval is that of a share (Wilson) over the half-samples drawn. It says how well the share is
known, nothing about other pairs.
"""

import numpy as np
from jaxtyping import Float, Int

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.resampling import (
    Estimate,
    Parts,
    Score,
    halves,
    layer_scores,
    scores_of_all,
)
from moesteer.statistics.intervals import LEVEL, wilson_interval

HALF_SAMPLES = 100
STRONGEST = 0.02
"""Share of all experts that count as the strongest."""


def selected_stably(
    parts: Parts,
    score: Score,
    counts: RoutingCounts,
    *,
    strongest: int | None = None,
    half_samples: int = HALF_SAMPLES,
    seed: int = 0,
) -> Estimate:
    """Signed selection shares of any score; `strongest` is m.

    A single pair can't be halved: the share is then 1 or 0.
    """
    full = scores_of_all(parts, score, counts)
    m = strongest or max(1, round(STRONGEST * full.size))
    m = min(m, full.size)
    pairs = len(counts.tokens)
    if pairs == 1:
        value = np.sign(full) * _among_strongest(full[None], m)
        return Estimate(value, value, value, "none: one pair can't be resampled")
    weights = halves(pairs, half_samples, seed)
    drawn = np.stack(list(layer_scores(parts, score, counts, weights)), axis=1)
    times = _among_strongest(drawn, m)
    ends = _wilson(half_samples)[times]
    # Of an expert without any difference the sign is unknown.
    signed_low = np.where(full == 0, -ends[..., 1], np.sign(full) * ends[..., 0])
    signed_high = np.where(full == 0, ends[..., 1], np.sign(full) * ends[..., 1])
    return Estimate(
        np.sign(full) * times / half_samples + 0.0,  # not −0
        np.minimum(signed_low, signed_high) + 0.0,
        np.maximum(signed_low, signed_high) + 0.0,
        f"{LEVEL:.0%} Wilson interval of the share of {half_samples} half-samples"
        f" in which it is among the {m} strongest",
    )


def _among_strongest(
    scores: Float[np.ndarray, "sample layer expert"], m: int
) -> Int[np.ndarray, "layer expert"]:
    """In how many samples each expert is among the m strongest."""
    size = np.abs(scores)
    flat = size.reshape(len(size), -1)
    least = np.partition(flat, -m, axis=1)[:, -m]
    return ((size >= least[:, None, None]) & (size > 0)).sum(0)


def _wilson(n: int) -> Float[np.ndarray, "count 2"]:
    """Ends of the interval of k of n, for each k from 0 to n."""
    return np.array([wilson_interval(k, n) for k in range(n + 1)])
