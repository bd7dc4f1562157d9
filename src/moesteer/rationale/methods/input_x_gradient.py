"""Input×Gradient: what each token adds to the decision, to first order.

    score_t = e_t · ∂R/∂e_t

(Shrikumar et al. 2016, arXiv 1605.01713). Were R linear in the embeddings, this would be each
token's weight times its input, and the scores would sum to R less its constant. A token with a
positive score speaks for the chosen label, one with a negative for the next best.
"""

import numpy as np
from jaxtyping import Float

from moesteer.engines.base import TokenGradient


def input_x_gradient(found: TokenGradient) -> Float[np.ndarray, " token"]:
    """Each token's embedding times its gradient, in nats."""
    return (found.embedding * found.gradient).sum(-1).numpy()
