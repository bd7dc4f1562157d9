"""Saliency: how fast the decision would change if a token's embedding did, whichever way.

    score_t = ‖∂R/∂e_t‖₁  or  ‖∂R/∂e_t‖₂

(Simonyan, Vedaldi and Zisserman 2014, arXiv 1312.6034; as a norm over a word's embedding: Li et al.
2016, arXiv 1506.01066). Never negative: it doesn't say for which label a token speaks.
"""

import numpy as np
from jaxtyping import Float

from moesteer.engines.base import TokenGradient


def l1(found: TokenGradient) -> Float[np.ndarray, " token"]:
    """The sum of absolute values of each token's gradient."""
    return found.gradient.abs().sum(-1).numpy()


def l2(found: TokenGradient) -> Float[np.ndarray, " token"]:
    """The Euclidean length of each token's gradient."""
    return found.gradient.norm(dim=-1).numpy()
