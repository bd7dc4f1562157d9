"""Two numbers of how a text was routed, beside how reference texts are.

Drift: by layer, the distribution of the text's selections over experts, and how far it is from the
reference's; the mean over layers, in nats:

    drift = mean over layers l of Σ_e p_l(e) · log( p_l(e) / q_l(e) ) = mean KL(p_l ‖ q_l)

p is what the text's tokens selected; q is what the reference's did, with half a selection added to
each expert (the Jeffreys prior), so that an expert that the reference never selected gives a large
drift, not an infinite one.

A short text has a large drift by chance alone: with n independent selections of E experts, all as
in the reference, by about (E − 1) / 2n nats (Miller 1955), and tokens of one text are not
independent. It is not corrected here, where it would rest on that independence, but by comparing a
text with reference texts of its own length (`threshold.py`).

Linked share: the share of (token, linked expert) pairs in which the token selects the expert: 0
where the linked experts are silent, 1 where every token selects all of them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num

from moesteer.model_facts import LayerShape
from moesteer.profile import Expert

PRIOR = 0.5
"""Selections added to each expert of the reference."""


def reference_shares(
    selected: Num[np.ndarray, "layer expert"], layers: Sequence[LayerShape]
) -> Float[np.ndarray, "layer expert"]:
    """Each expert's share of its layer's selections, none of them 0; experts that a layer lacks
    have 0."""
    exists = np.arange(selected.shape[1]) < np.array([[shape.experts] for shape in layers])
    smoothed = (selected + PRIOR) * exists
    return smoothed / smoothed.sum(-1, keepdims=True)


def routing_drift(
    selected: Num[np.ndarray, "layer expert"], reference: Float[np.ndarray, "layer expert"]
) -> float:
    """Mean over layers of KL(text ‖ reference), in nats, of a text that selects in every layer."""
    shares = selected / selected.sum(-1, keepdims=True)
    used = shares > 0
    ratio = np.log(np.where(used, shares, 1) / np.where(used, reference, 1))
    return float((shares * ratio).sum() / len(shares))


def linked_share(
    selected: Num[np.ndarray, "layer expert"],
    tokens: int,
    linked: Sequence[Expert],
    layers: Sequence[LayerShape],
) -> float:
    """Of all pairs of a token and a linked expert, the share in which the token selects it."""
    rows = {shape.layer: row for row, shape in enumerate(layers)}
    return float(sum(selected[rows[layer], expert] for layer, expert in linked)) / (
        tokens * len(linked)
    )
