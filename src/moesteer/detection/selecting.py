"""From scores to a choice: which experts to activate and which to deactivate.

Ranked over all layers by |score|, as in SteerMoE. Towards A, experts that go with A are activated
and those that go with B deactivated; towards B the other way round. A layer can't activate more
than k experts: a surplus is an error that names it, never dropped in silence.
"""

import warnings
from dataclasses import replace

import numpy as np

from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.profile import Expert, Profile, Side


def select_experts(profile: Profile, *, activate: int, deactivate: int, toward: Side) -> Profile:
    """The profile with its strongest experts chosen; MoesteerError where there aren't enough."""
    if profile.scores is None or profile.model is None:
        raise MoesteerError(f"{profile.name} holds no scores to select experts by.")
    if activate < 0 or deactivate < 0:
        raise MoesteerError("the number of experts to (de)activate can't be negative.")
    if not (activate or deactivate):
        raise MoesteerError(
            "nothing is to be steered: say how many experts to activate or to deactivate."
        )
    if toward not in ("a", "b"):
        raise MoesteerError(f"toward is {toward!r}; it must be 'a' or 'b'.")
    if profile.directions and profile.toward not in (None, toward):
        raise MoesteerError(
            f"{profile.name} holds a direction that steers towards {profile.toward}, so its experts"
            f" can't be selected towards {toward}. Aim it the other way first (moesteer aim)."
        )
    if profile.gate is not None and profile.toward not in (None, toward):
        warnings.warn(
            f"{profile.name} keeps its gate, which was put on when it steered toward"
            f" {profile.toward}: does it open for the requests that are to be steered toward"
            f" {toward}?",
            MoesteerWarning,
            stacklevel=2,
        )
    sign = 1 if toward == "a" else -1
    ranked = ranked_experts(profile)
    value = scores_by_expert(profile)
    with_target = [expert for expert in ranked if sign * value[expert] > 0]
    against = [expert for expert in ranked if sign * value[expert] < 0]
    for wanted, found, what in (
        (activate, with_target, "activate"),
        (deactivate, against, "deactivate"),
    ):
        if wanted > len(found):
            raise MoesteerError(
                f"{profile.name}: {wanted} experts to {what} toward {toward}, but only"
                f" {len(found)} have a score of that sign."
            )
        if 0 < wanted < len(found) and value[found[wanted - 1]] == value[found[wanted]]:
            cut = value[found[wanted]]
            tied = sum(value[expert] == cut for expert in found)
            warnings.warn(
                f"{profile.name}: {tied} experts share the score {cut:+.3f} at which the {wanted}"
                f" to {what} were cut off; the first of them by layer and number were taken.",
                MoesteerWarning,
                stacklevel=2,
            )
    chosen = replace(
        profile,
        activated=tuple(with_target[:activate]),
        deactivated=tuple(against[:deactivate]),
        toward=toward,
    )
    _warn_of_uncertain(chosen)
    return chosen


def _warn_of_uncertain(profile: Profile) -> None:
    """A MoesteerWarning where a chosen expert's interval doesn't settle its sign."""
    low, high = (experts_table(profile, end) for end in ("low", "high"))
    chosen = (*profile.activated, *profile.deactivated)
    if unsure := [expert for expert in chosen if low[expert] <= 0 <= high[expert]]:
        layer, expert = unsure[0]
        value = scores_by_expert(profile)[unsure[0]]
        warnings.warn(
            f"{profile.name}: the intervals of {len(unsure)} of the {len(chosen)} experts chosen"
            f" contain 0, first that of expert {expert} of layer {layer} ({value:+.3f}, interval"
            f" {low[unsure[0]]:+.3f} … {high[unsure[0]]:+.3f}): they may not go with that side."
            " Steer fewer experts, or detect from more pairs.",
            MoesteerWarning,
            stacklevel=3,
        )


def ranked_experts(profile: Profile) -> list[Expert]:
    """All experts by falling |score|; equal ones in layer and expert order."""
    value = scores_by_expert(profile)
    return sorted(value, key=lambda expert: (-abs(value[expert]), expert))


def scores_by_expert(profile: Profile) -> dict[Expert, float]:
    """Score of each expert that exists, in layer and expert order."""
    return experts_table(profile, "value")


def experts_table(profile: Profile, key: str) -> dict[Expert, float]:
    """Any field of the scores by expert, in layer and expert order."""
    assert profile.scores is not None
    assert profile.model is not None
    rows = zip(profile.model.layers, np.asarray(getattr(profile.scores, key)), strict=True)
    return {(s.layer, e): float(row[e]) for s, row in rows for e in range(s.experts)}
