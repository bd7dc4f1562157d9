"""Gate gradient: what knocking out every expert would do, to first order, at the price of one pass.

Intuition: if a little less of an expert makes the pair's decision R lean less to A, the expert
carries A. Multiply its weight by a gate g = 1; then

    score = mean over pairs of ∂R/∂g,    R(expert off) − R  ≈  −∂R/∂g,

so that the score estimates that of a knock-out (`knocking.py`), sign included, for all experts from
one forward and one backward pass a pair. It is wrong where R bends: where a switched expert is
replaced by another (a router always selects k), or where log-odds saturate: of the nine experts
planted in the testbed, five get the wrong sign. An expert that no token selects has score 0.
Molchanov et al. 2017 (arXiv 1611.06440); attribution patching: Syed, Rager, Conmy 2023 (arXiv
2310.10348).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from moesteer.errors import MoesteerError

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
from moesteer.engines.readouts import Readout


def gate_gradient(
    engine: "Engine", readouts: "Sequence[Sequence[Readout]]"
) -> Float[np.ndarray, "pair layer expert"]:
    """∂R/∂g of each pair (its readouts added up), in nats; positive where the expert carries A.

    Raises MoesteerError where there are no pairs, or the model lets no gradients through.
    """
    if not readouts or not all(readouts):
        raise MoesteerError("there are no pairs to take gradients of.")
    found = engine.gate_gradients([readout for pair in readouts for readout in pair])
    starts = np.cumsum([0, *(len(pair) for pair in readouts)])[:-1]
    return np.add.reduceat(found, starts, axis=0)
