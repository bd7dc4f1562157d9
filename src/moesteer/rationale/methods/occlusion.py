"""Occlusion: how much the decision drops when a word is masked.

    score_u = R(x) − R(x without u)

(Zeiler and Fergus 2014, arXiv 1311.2901; of words: Li, Monroe and Jurafsky 2016, arXiv 1612.08220).
It needs no gradient, measures rather than estimates, and costs a forward pass a word. Words that do
the same alone each score nothing: with either gone the other is still there.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from moesteer.engines.readouts import Readout
from moesteer.rationale.layout import Laid
from moesteer.rationale.masking import Mask, without

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.profile import Profile


def occlusion(
    engine: "Engine",
    laid: Sequence[Laid],
    readouts: Sequence[Readout],
    mask: Mask,
    profile: "Profile | None" = None,
) -> "list[Float[np.ndarray, ' unit']]":
    """The drop of each instance's readout, in nats, for each of its units."""
    asked: list[Readout] = []
    for one, readout in zip(laid, readouts, strict=True):
        asked.append(readout)
        asked += [masked(readout, one, unit, mask) for unit in range(len(one.units))]
    values = engine.read(asked, [profile])[0]
    ends = np.cumsum([1 + len(one.units) for one in laid])[:-1]
    return [own[0] - own[1:] for own in np.split(values, ends)]


def masked(readout: Readout, laid: Laid, unit: int, mask: Mask) -> Readout:
    """The readout of an instance's prompt without a unit."""
    ids = without(laid, [unit], mask)
    fewer = len(laid.ids) - len(ids)
    terms = tuple(replace(term, position=term.position - fewer) for term in readout.terms)
    return Readout((*ids, *readout.ids[len(laid.ids) :]), terms)
