"""Behaviour routing: how far a token's experts are those of a behaviour.

A detector gives each expert a score s_le of how much it goes with a behaviour (positive: with A);
a token's is the sum over the experts that it selects,

    score_t = Σ_layers Σ_{e selected at t} s_le

With the risk difference as score (see `detection/risk_difference.py`) this is how much more of the
token's routing is met with the behaviour than without it. It looks at nothing but routing: no label
and no gradient, so it says which words wake the behaviour, not which decide. Ours.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.profile_fit import check_model

if TYPE_CHECKING:
    from moesteer.engines.base import Engine


def behaviour_routing(
    engine: "Engine",
    texts: Sequence[Sequence[int]],
    behaviour: Profile,
    profile: Profile | None = None,
) -> list[Float[np.ndarray, " token"]]:
    """The summed scores of each token's experts; `profile` steers, `behaviour` has the scores.

    An expert of which a detector says nothing (NaN: its layer was not looked into) counts 0. Raises
    MoesteerError where the behaviour's profile has no scores, or those of another model.
    """
    if behaviour.scores is None:
        raise MoesteerError(
            f"{behaviour.name} has no scores of experts; give a profile from `moesteer detect`."
        )
    check_model(behaviour, engine.facts)
    return engine.weigh_selections(texts, np.nan_to_num(behaviour.scores.value), profile)
