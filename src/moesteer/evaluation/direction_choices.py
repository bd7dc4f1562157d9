"""What a search among directions tries: a candidate with its coefficient, and which of them.

Of the residual stream every candidate, at every coefficient. Of experts those whose routing differs
between the sides: one at a time (method one), and all of a layer together (method two). A control
tries as many choices that should not matter: random vectors of the same norms, or experts below the
routing threshold, of the same layers (Marbut, Olson, Wheeler 2026, arXiv 2606.04160).
"""

import random
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moesteer.direction import Candidates
from moesteer.directions.aiming import Aim, aimed
from moesteer.errors import MoesteerError
from moesteer.evaluation.direction_controls import below_threshold, over_threshold, random_vector
from moesteer.profile import Expert, Profile, Side

RESIDUAL = (0.25, 0.5, 1.0, 2.0, 4.0)
WEIGHTED = (1, 1.5, 2.2, 3.3, 5, 7.5, 11, 17, 25, 38, 57, 85, 130, 190, 280, 400)
"""Coefficients of a vector of the residual stream, and of one weighted by a router's probability,
which is small."""
Method = Literal["one", "two"]


@dataclass(frozen=True)
class Choice:
    """A candidate with its coefficient; `experts`: none, one, or all that are kept of a layer.

    `control` is the seed of the search-matched control that it belongs to.
    """

    control: int | None
    layer: int
    position: int
    experts: tuple[int, ...]
    coefficient: float

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        whose = f"layer {self.layer}"
        if self.experts:
            many = "experts" if len(self.experts) > 1 else "expert"
            whose = f"{many} {', '.join(map(str, self.experts))} of {whose}"
        where = f"position {self.position}" if self.position else "mean over positions"
        return f"{self.coefficient:+g}× {whose}, {where}"


@dataclass(frozen=True)
class DirectionPlan:
    """What decides a search: the side, the least share of each price, the largest KL of stage 1,
    what is tried, how many are judged, and the controls."""

    toward: Side
    prices: dict[str, float]
    max_kl: float
    coefficients: tuple[float, ...]
    methods: tuple[Method, ...]
    budget: int
    others: int
    seeds: int


def choices(candidates: Candidates, plan: DirectionPlan) -> list[Choice]:
    """Every choice of one search, layer by layer."""
    if candidates.kind == "residual":
        found = [
            Choice(None, layer, position, (), coefficient)
            for layer, position, _ in sorted(_measured(candidates))
            for coefficient in _signed(plan)
        ]
    else:
        kept = over_threshold(candidates)
        if not kept:
            raise MoesteerError(
                "the routing of no expert is over the threshold, so there is none to search among;"
                " find the directions with a lower --threshold."
            )
        found = _weighted(candidates, plan, kept, None)
    if not found:
        raise MoesteerError("there are no candidates to search among.")
    return found


def control_choices(
    candidates: Candidates, plan: DirectionPlan, mine: Sequence[Choice], seed: int
) -> list[Choice]:
    """What a search-matched control tries, no more choices than the search itself.

    Of the residual stream the same places, whose vectors are then random. Of experts others, spread
    over the layers as the kept ones are; for method two as many of a layer as are kept there.
    """
    if candidates.kind == "residual":
        return [replace(choice, control=seed) for choice in mine]
    kept = over_threshold(candidates)
    generator = random.Random(seed)
    waiting = {
        layer: generator.sample(below := below_threshold(candidates, layer), len(below))
        for layer in dict.fromkeys(layer for layer, _ in kept)
    }
    together = [
        (layer, expert)
        for layer, others in waiting.items()
        for expert in others[: sum(where == layer for where, _ in kept)]
    ]
    order = [layer for layer, _ in generator.sample(kept, len(kept))]
    drawn: list[Expert] = []
    number = min(max(plan.others, len(kept)), sum(map(len, waiting.values())))
    while len(drawn) < number:
        for layer in order:
            if waiting[layer] and len(drawn) < number:
                drawn.append((layer, waiting[layer].pop()))
    alone = sum(len(choice.experts) == 1 for choice in mine)
    one = _weighted(candidates, replace(plan, methods=("one",)), drawn, seed)
    two = _weighted(candidates, replace(plan, methods=("two",)), together, seed)
    one = generator.sample(one, min(len(one), alone))
    two = [choice for choice in two if len(choice.experts) > 1][: len(mine) - alone]
    return sorted([*one, *two], key=lambda c: (c.layer, c.experts, c.position, c.coefficient))


def _weighted(
    candidates: Candidates, plan: DirectionPlan, experts: Sequence[Expert], control: int | None
) -> list[Choice]:
    """Each expert alone, and those of a layer together, at every position and coefficient."""
    measured = _measured(candidates)
    layers = sorted({layer for layer, _ in experts})
    sets: list[tuple[int, tuple[int, ...]]] = []
    for layer in layers:
        here = sorted(expert for where, expert in experts if where == layer)
        alone = [(layer, (expert,)) for expert in here]
        sets += alone if "one" in plan.methods else []
        # Of a single expert both methods are the same.
        if "two" in plan.methods and (len(here) > 1 or "one" not in plan.methods):
            sets.append((layer, tuple(here)))
    return [
        Choice(control, layer, position, chosen, coefficient)
        for layer, chosen in sets
        for position in _positions(measured, layer, chosen)
        for coefficient in _signed(plan)
    ]


def _signed(plan: DirectionPlan) -> list[float]:
    sign = 1 if plan.toward == "a" else -1
    return [sign * coefficient for coefficient in plan.coefficients]


def _measured(candidates: Candidates) -> set[tuple[int, int, int]]:
    """Layer, position and expert (−1: none) of every vector that has a length."""
    there = candidates.vector.any(axis=1)
    columns = (candidates.layer, candidates.position, candidates.expert)
    return set(zip(*(column[there].tolist() for column in columns), strict=True))


def _positions(
    measured: AbstractSet[tuple[int, int, int]], layer: int, experts: Sequence[int]
) -> list[int]:
    """The positions at which each of these experts of a layer has a vector."""
    return [
        position
        for position in sorted({position for where, position, _ in measured if where == layer})
        if all((layer, position, expert) in measured for expert in experts)
    ]


# -- what steers by it ---------------------------------------------------------------------------


def steered_by(source: Profile, choice: Choice) -> Profile:
    """The profile that steers by a choice: added at what enters the layer, or weighted by experts.

    In a control of the residual stream, a random vector of the candidate's norm, always the same.
    """
    candidates = source.candidates
    assert candidates is not None
    whose = choice.experts or (-1,)
    numbers = [candidates.find(choice.layer, choice.position, expert) for expert in whose]
    profile = aimed(source, numbers, Aim(coefficient=choice.coefficient))
    if choice.control is None:
        return replace(profile, name=choice.words)
    what = "of experts below the threshold" if choice.experts else "of random vectors"
    profile = replace(profile, evidence=None, scores=None, candidates=None)
    profile = replace(profile, name=f"{choice.words}, {what}")
    if choice.experts:
        return profile
    (direction,) = profile.directions
    # Not [seed, 0], which is drawn from as the seed alone: those are the random controls' vectors.
    generator = np.random.default_rng([choice.control, *numbers, 1])
    vector = random_vector(len(direction.vector), direction.norm, generator)
    return replace(profile, directions=(replace(direction, vector=vector),))


def widest(source: Profile) -> Profile:
    """The source with as many directions at once as a search among its candidates may use."""
    kept = [] if source.candidates is None else over_threshold(source.candidates)
    if not kept or source.candidates is None:
        return source
    layers = [layer for layer, _ in kept]
    layer = max(layers, key=layers.count)
    experts = tuple(expert for where, expert in kept if where == layer)
    positions = _positions(_measured(source.candidates), layer, experts)
    if not positions:
        return source
    return steered_by(source, Choice(None, layer, positions[0], experts, 1.0))
