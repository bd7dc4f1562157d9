"""Restoring: does more steering bring a behaviour back whose important experts are lost?

The experts that are still there are activated, by what each added to the decision when it was
activated alone (knock-in). How many is chosen on dev prompts, by the share of the target's outcome;
of equal shares the fewest. On the test prompts that stands beside the loss without it, and beside
as many random experts activated in the same layers. Here the model with its experts lost is the
unsteered arm. What brings a refusal back may refuse everything: the price stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moesteer.auditing.importance import Importance
from moesteer.auditing.robustness import losing, lost_words, others_alike
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison
from moesteer.evaluation.controls import room_up, that_fit
from moesteer.model_facts import LayerShape
from moesteer.profile import Expert, Profile


@dataclass(frozen=True)
class Tried:
    """The share of the target's outcome on dev with so many experts activated, and others lost."""

    activated: int
    share: float


@dataclass(frozen=True)
class Restored:
    """With `lost` experts lost: what was tried on dev, and the best of it on the test prompts.

    `test` is None where nothing that was tried is better than activating nobody.
    """

    lost: int
    tried: tuple[Tried, ...]
    best: Tried
    test: Comparison | None


def activating(
    importance: Importance, layers: tuple[LayerShape, ...], lost: Sequence[Expert], most: int
) -> list[Expert]:
    """Experts that are left and add to the behaviour when activated, the most first."""
    left = [e for e in importance.experts if e.knock_in > 0 and e.place not in {*lost}]
    ranked = [e.place for e in sorted(left, key=lambda e: (-e.knock_in, e.place))]
    return that_fit(ranked, layers, room_up, most)


def restoring(lost: Sequence[Expert], activated: Sequence[Expert], name: str) -> Profile:
    """The profile of a loss under which experts are activated."""
    return Profile(activated=tuple(sorted(activated)), deactivated=tuple(sorted(lost)), name=name)


def arms_of_restoring(
    lost: Sequence[Expert],
    activated: Sequence[Expert],
    layers: tuple[LayerShape, ...],
    seeds: int,
) -> dict[str, tuple[str, Profile]]:
    """By role: which arm of the run, by name and profile.

    A seed whose layers have too few other experts left is not there.
    """
    without = lost_words(len(lost))
    what = f"{without}, {len(activated)}"
    arms = {UNSTEERED: (without, losing(lost, without))}
    sets = {STEERED: (f"{what} more activated", tuple(activated))}
    for seed in range(seeds):
        others = others_alike(activated, layers, [*lost, *activated], seed)
        if len(others) == len(activated):
            sets[f"random {seed}"] = (f"{what} random activated (seed {seed})", others)
    for role, (name, experts) in sets.items():
        arms[role] = (name, restoring(lost, experts, name))
    return arms


def best_of(tried: Sequence[Tried]) -> Tried:
    """The largest share, of equal ones that with the fewest experts."""
    return max(tried, key=lambda trial: (trial.share, -trial.activated))
