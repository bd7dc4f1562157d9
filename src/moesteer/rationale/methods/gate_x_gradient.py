"""Gate × gradient: how much the decision hangs on what the experts did at a token.

Multiply the weights of all experts that a token selects, in every layer, by a gate g_t = 1:

    score_t = ∂R/∂g_t = Σ_layers Σ_experts w · ∂R/∂w

To first order this is what R would lose if the experts were silent at that token. Only a routed
model has it. Gates as places to attribute to: Michel, Levy and Neubig 2019 (arXiv 1905.10650); per
token and over experts it is ours.
"""

import numpy as np
from jaxtyping import Float

from moesteer.engines.base import TokenGradient


def gate_x_gradient(found: TokenGradient) -> Float[np.ndarray, " token"]:
    """Each token's derivative by its gate, in nats; the gates must have been asked for."""
    assert found.gates is not None
    return found.gates.numpy()
