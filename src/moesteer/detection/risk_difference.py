"""Risk difference: how much more often an expert is selected on A's tokens than on B's.

    Δ[l, e] = a₁ / n₁ − a₂ / n₂

a = target tokens whose top-k holds expert e of layer l, n = all target tokens of that side, pooled
over the pairs. In [−1, 1]; positive means that the expert goes with A. SteerMoE, arXiv 2509.09660,
section 3.1. Selected does not mean needed: see the causal detectors for that.
"""

import numpy as np
from jaxtyping import Float

from moesteer.detection.counts import RoutingCounts


def selection_rates(counts: RoutingCounts) -> Float[np.ndarray, "2 layer expert"]:
    """Share of each side's target tokens that selected each expert."""
    tokens = counts.tokens.sum(0).astype(np.float64)
    return counts.selected.sum(0) / tokens[:, None, None]


def risk_difference(counts: RoutingCounts) -> Float[np.ndarray, "layer expert"]:
    """Δ of each expert; see the module for the formula."""
    rate_a, rate_b = selection_rates(counts)
    return rate_a - rate_b
