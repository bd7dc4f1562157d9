"""Controls: the same intervention with experts, and along directions, that should not matter.

Steering as many experts as a profile does, at the same layers, perturbs a model whoever they are,
and so does a push as strong along any direction; only what goes beyond the controls says something
about the experts and directions that were chosen.

    random          as many others of the same layers; random directions of the same norm
    matched         for each expert one of its layer that is selected about as often
    bottom          as many of those that the detector ranked last, over all layers
    other experts   of directions weighted by experts: others of the layer, see direction_controls
    reversed        the same, the other way round: this one should matter; an ablation has none
    shuffled        the detector's scores dealt to random experts, for a search to choose from
    ungated         of a profile with a gate: the same on every request. No control, but the price
                    that the gate saves

Where a profile holds both, both are replaced at once: directions by random ones wherever it is not
said how. A gate stays as it is: controls steer the same requests.

Random and matched experts are drawn among those that are *not* steered: they ask whether others do
as well. If the choice was no better than chance, chosen and drawn ones are still alike, so nothing
is claimed too often; if it was, they lack the experts that were found, and lie lower than experts
drawn among all would. The bottom may hold experts that no token selects: deactivating these
changes nothing, so it is the weakest control of all.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moesteer.detection.selecting import experts_table, ranked_experts, scores_by_expert
from moesteer.direction import Direction
from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import STEERED, UNGATED, UNSTEERED
from moesteer.evaluation.direction_controls import directions_of_others, random_directions
from moesteer.model_facts import LayerShape
from moesteer.profile import Expert, Profile, Side
from moesteer.profile_fit import check_fits

NEAREST = 3
"""A matched expert is drawn among so many whose selection rate is nearest."""


def random_control(profile: Profile, layers: tuple[LayerShape, ...], seed: int) -> Profile:
    """As many random experts in the same layers, none of them the profile's own; and random
    directions of the same norms at the same sites.

    MoesteerError where a layer has too few others, or the profile doesn't fit the layers.
    """
    activated, deactivated = _random_experts(profile, layers, seed)
    what = [*["experts"] * bool(profile.steered_layers or not profile.directions)]
    what += ["directions of the same norm"] * bool(profile.directions)
    directions = random_directions(profile.directions, seed)
    name = f"random {' and '.join(what)} (seed {seed})"
    return _control(profile, activated, deactivated, directions, name)


def other_experts(profile: Profile, layers: tuple[LayerShape, ...], seed: int) -> Profile:
    """Directions of other experts of the same layers, below the routing threshold, of equal norm.

    Steered experts, and directions of no expert, are replaced as in `random_control`. MoesteerError
    where the profile doesn't hold other experts' vectors, or a layer has too few.
    """
    activated, deactivated = _random_experts(profile, layers, seed)
    directions = directions_of_others(profile, seed)
    name = f"directions of other experts (seed {seed})"
    return _control(profile, activated, deactivated, directions, name)


def _random_experts(
    profile: Profile, layers: tuple[LayerShape, ...], seed: int
) -> tuple[list[Expert], list[Expert]]:
    check_fits(profile, layers)
    generator = random.Random(seed)
    activated: list[Expert] = []
    deactivated: list[Expert] = []
    for layer in profile.steered_layers:
        up, down = profile.experts_of(layer)
        drawn = generator.sample(_others(profile, layers, layer), len(up) + len(down))
        activated += [(layer, expert) for expert in drawn[: len(up)]]
        deactivated += [(layer, expert) for expert in drawn[len(up) :]]
    return activated, deactivated


def matched_control(profile: Profile, layers: tuple[LayerShape, ...], seed: int) -> Profile:
    """For each steered expert another one of its layer that is selected about as often.

    Rates are those of the profile's scores, pooled over A's and B's target tokens; each is drawn
    among the `NEAREST` that are left. MoesteerError where the profile has no scores, or a layer too
    few others.
    """
    check_fits(profile, layers)
    rates = _selection_rates(profile)
    generator = random.Random(seed)
    left = {layer: set(_others(profile, layers, layer)) for layer in profile.steered_layers}

    def other(expert: Expert) -> Expert:
        layer, _ = expert
        near = sorted(left[layer], key=lambda e: (abs(rates[layer, e] - rates[expert]), e))
        drawn = generator.choice(near[:NEAREST])
        left[layer].remove(drawn)
        return layer, drawn

    activated = [other(expert) for expert in profile.activated]
    deactivated = [other(expert) for expert in profile.deactivated]
    directions = random_directions(profile.directions, seed)
    name = _beside_random("usage-matched experts", directions, f" (seed {seed})")
    return _control(profile, activated, deactivated, directions, name)


def bottom_ranked(profile: Profile, layers: tuple[LayerShape, ...]) -> Profile:
    """As many experts with the smallest |score|, over all layers, none of them the profile's own.

    Where a layer can't take one more, the next is taken. MoesteerError where the profile has no
    scores or too few experts are left. SteerMoE's control, arXiv 2509.09660.
    """
    check_fits(profile, layers)
    _check_scores(profile)
    steered = {*profile.activated, *profile.deactivated}
    waiting = [expert for expert in reversed(ranked_experts(profile)) if expert not in steered]
    activated = that_fit(waiting, layers, room_up, len(profile.activated))
    waiting = [expert for expert in waiting if expert not in activated]
    deactivated = that_fit(waiting, layers, room_down, len(profile.deactivated))
    if len(activated) + len(deactivated) < len(steered):
        raise MoesteerError(
            f"{profile.name} steers {len(steered)} experts, which leaves too few others for a"
            " bottom-ranked control."
        )
    directions = random_directions(profile.directions, 0)
    name = _beside_random("bottom-ranked experts", directions)
    return _control(profile, activated, deactivated, directions, name)


def reversed_control(profile: Profile, layers: tuple[LayerShape, ...]) -> Profile:
    """The profile with activated and deactivated experts swapped, and directions turned round.

    A layer that can't obey keeps those of the highest |score| (without scores: the first); the
    control's name then says how many of how many. MoesteerError where a direction is ablated.
    """
    check_fits(profile, layers)
    directions = tuple(direction.reversed() for direction in profile.directions)
    every = len(profile.activated) + len(profile.deactivated)
    activated = that_fit(_strongest(profile, profile.deactivated), layers, room_up, every)
    deactivated = that_fit(_strongest(profile, profile.activated), layers, room_down, every)
    kept = len(activated) + len(deactivated)
    name = f"{profile.name} reversed"
    if kept < every:
        name += f" in part: {kept} of {every} experts, as a layer can't take more"
    sides: dict[Side | None, Side] = {"a": "b", "b": "a"}
    control = _control(profile, activated, deactivated, directions, name)
    return replace(control, toward=sides.get(profile.toward))


def shuffled_ranking(profile: Profile, seed: int) -> Profile:
    """The profile's scores dealt out to random experts of all layers, with nothing chosen."""
    _check_scores(profile)
    assert profile.scores is not None
    value = scores_by_expert(profile)
    shuffled = random.Random(seed).sample(list(value.values()), len(value))
    dealt = dict(zip(value, shuffled, strict=True))
    table = np.zeros_like(profile.scores.value)
    assert profile.model is not None
    for row, shape in enumerate(profile.model.layers):
        table[row, : shape.experts] = [dealt[shape.layer, e] for e in range(shape.experts)]
    return replace(
        profile,
        activated=(),
        deactivated=(),
        scores=replace(profile.scores, value=table),
        name=f"random ranking (seed {seed})",
    )


def arms(
    profile: Profile, layers: tuple[LayerShape, ...], seeds: int
) -> tuple[dict[str, Profile | None], list[str]]:
    """The profile beside its controls, by name: unsteered, steered, reversed, random 0 and so on.

    A control that can't be had (a profile without scores, too few other experts) is left out; the
    list says which, and why.
    """
    makers: dict[str, Callable[[], Profile]] = {
        "reversed": lambda: reversed_control(profile, layers),
        **{f"random {s}": lambda s=s: random_control(profile, layers, s) for s in range(seeds)},
    }
    if profile.steered_layers or not profile.directions:
        makers |= {
            **{
                f"matched {s}": lambda s=s: matched_control(profile, layers, s)
                for s in range(seeds)
            },
            "bottom": lambda: bottom_ranked(profile, layers),
        }
    if any(direction.expert is not None for direction in profile.directions):
        makers |= {
            f"other experts {s}": lambda s=s: other_experts(profile, layers, s)
            for s in range(seeds)
        }
    found: dict[str, Profile | None] = {UNSTEERED: None, STEERED: profile}
    if profile.gate is not None:
        found[UNGATED] = replace(profile.ungated, name=f"{profile.name} without its gate")
    missing: dict[str, list[str]] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except MoesteerError as error:
            missing.setdefault(str(error), []).append(name)
    return found, [f"no control {', '.join(names)}: {why}" for why, names in missing.items()]


def _others(profile: Profile, layers: tuple[LayerShape, ...], layer: int) -> list[int]:
    """The experts of a layer that aren't steered; MoesteerError if fewer than those that are."""
    shape = next(shape for shape in layers if shape.layer == layer)
    up, down = profile.experts_of(layer)
    others = [e for e in range(shape.experts) if e not in {*up, *down}]
    if len(others) < len(up) + len(down):
        raise MoesteerError(
            f"{profile.name}: {len(up) + len(down)} of {shape.experts} experts of layer {layer}"
            " are steered, which leaves too few others for a random control."
        )
    return others


def _control(
    profile: Profile,
    activated: list[Expert],
    deactivated: list[Expert],
    directions: tuple[Direction, ...],
    name: str,
) -> Profile:
    return replace(
        profile,
        activated=tuple(sorted(activated)),
        deactivated=tuple(sorted(deactivated)),
        directions=directions,
        evidence=None,
        scores=None,
        candidates=None,
        name=name,
    )


def _beside_random(what: str, directions: tuple[Direction, ...], seed: str = "") -> str:
    return f"{what}{' and random directions of the same norm' if directions else ''}{seed}"


def _check_scores(profile: Profile) -> None:
    if profile.scores is None or profile.model is None:
        raise MoesteerError(f"{profile.name} holds no scores to choose other experts by.")


def _selection_rates(profile: Profile) -> dict[Expert, float]:
    """Share of all target tokens, A's and B's, that selected each expert."""
    _check_scores(profile)
    a, b = (experts_table(profile, key) for key in ("rate_a", "rate_b"))
    if not any(a.values()) and not any(b.values()):
        raise MoesteerError(f"{profile.name} does not hold how often its experts are selected.")
    seen = profile.evidence
    tokens_a, tokens_b = (seen.tokens_a, seen.tokens_b) if seen is not None else (1, 1)
    return {e: (tokens_a * a[e] + tokens_b * b[e]) / (tokens_a + tokens_b) for e in a}


def room_up(shape: LayerShape) -> int:
    return shape.top_k


def room_down(shape: LayerShape) -> int:
    return shape.experts - shape.top_k


def that_fit(
    waiting: list[Expert],
    layers: tuple[LayerShape, ...],
    room: Callable[[LayerShape], int],
    number: int,
) -> list[Expert]:
    """The first `number` experts, passing over those whose layer has no room left."""
    left = {shape.layer: room(shape) for shape in layers}
    chosen: list[Expert] = []
    for layer, expert in waiting:
        if left[layer] and len(chosen) < number:
            left[layer] -= 1
            chosen.append((layer, expert))
    return chosen


def _strongest(profile: Profile, experts: tuple[Expert, ...]) -> list[Expert]:
    if profile.scores is None or profile.model is None:
        return list(experts)
    value = scores_by_expert(profile)
    return sorted(experts, key=lambda expert: -abs(value[expert]))
