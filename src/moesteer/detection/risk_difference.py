"""Risk difference: how much more often an expert is selected on A's tokens than on B's.

    Δ[l, e] = a₁ / n₁ − a₂ / n₂

a = target tokens whose top-k holds expert e of layer l, n = all target tokens of that side, pooled
over the pairs. In [−1, 1]; positive means that the expert goes with A. SteerMoE, arXiv 2509.09660,
section 3.1. Selected does not mean needed: see the causal detectors for that.

The same difference is taken of two other counts: of tokens on which the expert has the largest
weight (top-1; expert-aware refusal steering, arXiv 2606.04160), and of its summed probabilities,
which also see an expert that comes close to being selected.
"""

import numpy as np
from jaxtyping import Float

from moesteer.detection.counts import RoutingCounts


def score(a1: np.ndarray, a2: np.ndarray, n1: np.ndarray, n2: np.ndarray) -> np.ndarray:
    """Δ of each expert; see the module for the formula."""
    return a1 / n1 - a2 / n2


def selection_rates(counts: RoutingCounts) -> Float[np.ndarray, "2 layer expert"]:
    """Share of each side's target tokens that selected each expert, or its mean probability."""
    tokens = counts.tokens.sum(0).astype(np.float64)
    return counts.selected.sum(0, dtype=np.float64) / tokens[:, None, None]
