"""A profile that is being made by hand: experts cycled one by one, or taken from its ranking.

A draft may ask for what a layer can't do; what is wrong with it is said (`checked`), and nothing is
applied or saved until it is mended. What the page shows and sends is always the draft's.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from moesteer.detection.selecting import (
    experts_table,
    ranked_experts,
    scores_by_expert,
    select_experts,
)
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.profile import Expert, Profile, Side

Use = Literal["untouched", "activated", "deactivated"]

NEXT: dict[Use, Use] = {
    "untouched": "activated",
    "activated": "deactivated",
    "deactivated": "untouched",
}
"""What a click makes of an expert."""

BY_HAND = "by hand"
"""The name of a profile that begins with nothing."""


@dataclass(frozen=True)
class Draft:
    """A profile to begin with, and what was chosen since.

    `ranked`: how many were activated and deactivated from the top of the ranking, None where
    experts were chosen otherwise, one by one.
    """

    base: Profile
    activated: tuple[Expert, ...]
    deactivated: tuple[Expert, ...]
    toward: Side
    dose: float
    ranked: tuple[int, int] | None

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        assert self.base.model is not None
        return self.base.model.layers

    @property
    def steers(self) -> bool:
        return bool(self.activated or self.deactivated or self.base.directions)

    @property
    def is_base(self) -> bool:
        """Whether it does what the profile does that it began with."""
        chosen = (set(self.activated), set(self.deactivated), self.dose)
        return chosen == (set(self.base.activated), set(self.base.deactivated), self.base.dose)


def begin(profile: Profile | None, model: ModelFacts) -> Draft:
    """A draft that does what the profile does; without one, nothing yet."""
    base = profile or Profile(name=BY_HAND)
    if base.model is None:
        base = replace(base, model=model)
    draft = Draft(base, base.activated, base.deactivated, base.toward or "a", base.dose, None)
    counts = (len(base.activated), len(base.deactivated))
    if base.scores is None or any(n > m for n, m in zip(counts, limits(draft), strict=True)):
        return draft
    ranking = choose(draft, *counts, draft.toward)
    return ranking if ranking.is_base else draft


def use_of(draft: Draft, expert: Expert) -> Use:
    if expert in draft.activated:
        return "activated"
    return "deactivated" if expert in draft.deactivated else "untouched"


def cycle(draft: Draft, expert: Expert) -> Draft:
    """Untouched, activated, deactivated, untouched …; MoesteerError where there is no such expert.

    Experts of a draft that is edited by hand stand in the order of layers.
    """
    if not any(s.layer == expert[0] and 0 <= expert[1] < s.experts for s in draft.layers):
        raise MoesteerError(f"the model has no expert {expert[1]} in layer {expert[0]}.")
    use = NEXT[use_of(draft, expert)]
    activated, deactivated = set(draft.activated) - {expert}, set(draft.deactivated) - {expert}
    if use == "activated":
        activated.add(expert)
    elif use == "deactivated":
        deactivated.add(expert)
    edited = replace(
        draft,
        activated=tuple(sorted(activated)),
        deactivated=tuple(sorted(deactivated)),
        ranked=None,
    )
    assert edited.base.model is not None
    return begin(edited.base, edited.base.model) if edited.is_base else edited


def choose(draft: Draft, activate: int, deactivate: int, toward: Side) -> Draft:
    """The experts that `select_experts` would take, whether or not a layer can do with them.

    As many as there are, where fewer have a score of that sign.
    """
    with_target, against = _by_sign(draft, toward)
    return replace(
        draft,
        activated=with_target[:activate],
        deactivated=against[:deactivate],
        toward=toward,
        ranked=(min(activate, len(with_target)), min(deactivate, len(against))),
    )


def limits(draft: Draft, toward: Side | None = None) -> tuple[int, int]:
    """The most experts that can be activated and deactivated from the ranking.

    As many as have a score of that sign, and as the model's layers together have room for.
    """
    if draft.base.scores is None:
        return 0, 0
    with_target, against = _by_sign(draft, toward or draft.toward)
    up = sum(shape.top_k for shape in draft.layers)
    down = sum(shape.experts - shape.top_k for shape in draft.layers)
    return min(up, len(with_target)), min(down, len(against))


def _by_sign(draft: Draft, toward: Side) -> tuple[tuple[Expert, ...], tuple[Expert, ...]]:
    """The ranking, of those that go with the side that is steered toward, and of the others."""
    sign = 1 if toward == "a" else -1
    value = scores_by_expert(draft.base)
    ranked = ranked_experts(draft.base)
    with_target = tuple(expert for expert in ranked if sign * value[expert] > 0)
    return with_target, tuple(expert for expert in ranked if sign * value[expert] < 0)


def scores_of(draft: Draft) -> dict[str, dict[Expert, float]] | None:
    """Score, interval and q by expert; None where the profile has none."""
    if draft.base.scores is None:
        return None
    return {key: experts_table(draft.base, key) for key in ("value", "low", "high", "q")}


def crowded(draft: Draft) -> dict[int, str]:
    """The layers that can't do what is asked of them, and why, in a few words."""
    found = {}
    for shape in draft.layers:
        up = sum(layer == shape.layer for layer, _ in draft.activated)
        down = sum(layer == shape.layer for layer, _ in draft.deactivated)
        if up > shape.top_k:
            found[shape.layer] = f"{up} activated, k = {shape.top_k}"
        elif shape.experts - down < shape.top_k:
            found[shape.layer] = f"{shape.experts - down} left, k = {shape.top_k}"
    return found


def made(draft: Draft, name: str) -> Profile:
    """The draft as a profile; MoesteerError where a layer can't obey it (`check_fits`).

    Which side experts steer toward is known of a ranking's, and not of others.
    """
    known = draft.ranked is not None or draft.is_base or draft.base.directions
    return replace(
        draft.base,
        activated=draft.activated,
        deactivated=draft.deactivated,
        dose=draft.dose,
        toward=(draft.base.toward if draft.is_base else draft.toward) if known else None,
        name=name.strip() or draft.base.name,
    )


def remarks(draft: Draft) -> list[str]:
    """What `moesteer select` warns of, of the same choice: ties, and uncertain signs."""
    if draft.ranked is None or not any(draft.ranked):
        return []
    up, down = draft.ranked
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        select_experts(draft.base, activate=up, deactivate=down, toward=draft.toward)
    return [str(warning.message) for warning in told]


def saved(draft: Draft, name: str, command: str) -> tuple[str, bytes]:
    """The name and the bytes of the profile's file; MoesteerError where it can't be one.

    Where the profile has evidence, the line of commands that made it goes on with `command` and
    with what was done on the page.
    """
    profile = made(draft, name)
    if not profile.steers:
        raise MoesteerError("nothing is steered yet: choose experts, then save.")
    profile = profile.made_by(f"{command} (on the page: {done(draft)})")
    stem = re.sub(r"[^\w.-]+", "-", profile.name).strip("-.").removesuffix(".safetensors")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "profile.safetensors"
        profile.save(path)
        return f"{stem or 'profile'}.safetensors", path.read_bytes()


def done(draft: Draft) -> str:
    """What was done on the page, so that it can be done again."""
    dose = "" if draft.dose == draft.base.dose else f", dose {draft.dose:g}"
    if draft.is_base:
        return "unchanged"
    if draft.ranked is not None:
        up, down = draft.ranked
        return f"select --activate {up} --deactivate {down} --toward {draft.toward}{dose}"
    up, down = _named(draft.activated), _named(draft.deactivated)
    return f"edited by hand: activated {up}; deactivated {down}{dose}"


def _named(experts: Sequence[Expert]) -> str:
    return " ".join(f"({layer}, {expert})" for layer, expert in sorted(experts)) or "none"
