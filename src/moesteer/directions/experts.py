"""Directions of single experts: what each of them writes differently for A and for B.

    forced   v[e] = mean over A − mean over B of what the layer's feed-forward part writes at each
             of the last n tokens while expert e is forced
    own      v[e] = the same of the expert's own output, unweighted, over those of the last n tokens
             that are routed to it; nothing is forced

Forcing shows every expert the same tokens, so that the directions differ by what the experts do
and not by what they are given; but the others of the k stay in the sum. A direction of an expert is
used at that expert, weighted by the router's probability (method one), or those of all experts of a
layer whose routing differs are used together (method two): Marbut, Olson, Wheeler 2026, arXiv
2606.04160. Which one steers, no number here says: the experts whose routing differs most need not
be those that steer best.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesteer.direction import Candidates
from moesteer.directions.aiming import Aim, aimed
from moesteer.directions.expert_means import Kind, mean_differences
from moesteer.directions.residual import evidence_of
from moesteer.directions.routing import (
    THRESHOLD,
    by_expert,
    over_threshold,
    rates,
    routing_scores,
)
from moesteer.errors import MoesteerError
from moesteer.model_facts import ModelFacts
from moesteer.profile import Profile

if TYPE_CHECKING:
    from moesteer.directions.prompts import PromptSets
    from moesteer.engines.base import Engine

DETECTORS: dict[Kind, str] = {
    "forced": "difference of means, expert forced",
    "own": "difference of means, expert's own output",
}


def chosen_layers(
    model: ModelFacts, layers: Sequence[int] | None, threshold: float = THRESHOLD
) -> list[int]:
    """The layers to measure, ascending; all that have experts where none are named.

    Raises MoesteerError for layers without experts, and a threshold that is none, so that it can be
    asked before the work.
    """
    if not 0 < threshold <= 100:
        raise MoesteerError(
            f"--threshold is {threshold:g}; it is a number of percentage points, above 0 to 100."
        )
    routed = [shape.layer for shape in model.layers]
    if not routed:
        raise MoesteerError(f"{model.id} is a dense model: it has no experts.")
    chosen = sorted(set(routed if layers is None else layers))
    if not chosen:
        raise MoesteerError("--layers names none; name some, or leave it out for all.")
    if without := [layer for layer in chosen if layer not in routed]:
        raise MoesteerError(
            f"layer {without[0]} of {model.id} has no experts; those that have are"
            f" {', '.join(map(str, routed))}."
        )
    return chosen


def find_expert_directions(
    engine: "Engine",
    sets: "PromptSets",
    *,
    last: int,
    threshold: float = THRESHOLD,
    kind: Kind = "own",
    layers: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    source: str = "prompts",
    command: str = "",
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measure the direction of every expert of the layers (all by default); none is used yet.

    The profile's scores are the differences of routing. A candidate's are its expert's difference
    (`routing`; `routing_top_k` counts all of a token's experts), whether that is over the
    threshold, in percentage points (`kept`), how probable the expert is on A and on B
    (`probability_a`, `probability_b`), and the norm. `progress` is told how many prompts were read,
    once for each layer, of how many; for `checkpoint` see `mean_differences`. Raises MoesteerError
    for layers without experts, and where no direction has a length.
    """
    shapes = engine.facts.layers
    chosen = chosen_layers(engine.facts, layers, threshold)
    scores, interval, stability = routing_scores(engine, sets.fit, last, seed=seed)
    probable_a, probable_b = rates(engine, sets.fit, last, "probability")
    selected_a, selected_b = rates(engine, sets.fit, last, "top-k")
    difference = by_expert(scores.value, shapes)
    kept = over_threshold(scores, shapes, threshold)

    measured = mean_differences(
        engine,
        sets.fit,
        chosen,
        last,
        kind,
        batch_size=batch_size,
        checkpoint=checkpoint,
        progress=progress,
    )
    positions = range(-last, 0) if kind == "forced" else (0,)
    found = [
        (layer, position, expert, vector)
        for layer in chosen
        for expert, row in enumerate(measured[layer])
        for position, vector in zip(positions, row, strict=True)
        if vector.any()
    ]
    if not found:
        raise MoesteerError(
            f"no expert of {engine.facts.id} writes anything else for A than for B: all"
            " differences have norm 0. Do the prompts differ?"
        )
    layer, position, expert, vector = zip(*found, strict=True)
    whose = list(zip(layer, expert, strict=True))
    table = np.array(vector)
    candidates = Candidates(
        kind,
        np.array(layer),
        np.array(position),
        np.array(expert),
        table,
        {
            "routing": np.array([difference[one] for one in whose]),
            "routing_top_k": np.array([selected_a[one] - selected_b[one] for one in whose]),
            "kept": np.array([float(one in kept) for one in whose]),
            "probability_a": np.array([probable_a[one] for one in whose]),
            "probability_b": np.array([probable_b[one] for one in whose]),
            "norm": np.linalg.norm(table.astype(np.float64), axis=1),
        },
    )
    evidence = evidence_of(
        sets,
        DETECTORS[kind],
        last,
        seed=seed,
        source=source,
        command=command,
        threshold=threshold,
        kept=len(kept),
    )
    return Profile(
        model=engine.facts,
        chat_options=sets.chat_options,
        evidence=replace(evidence, counted="top-1", interval=interval, stability=stability),
        scores=scores,
        candidates=candidates,
        name=source,
    )


def method_one(
    profile: Profile, layer: int, expert: int, position: int, coefficient: float
) -> Profile:
    """The direction of one expert, added at its layer, weighted by the router's probability."""
    number = _candidates(profile).find(layer, position, expert)
    return aimed(profile, [number], Aim(coefficient=coefficient))


def method_two(
    profile: Profile,
    layer: int,
    position: int,
    coefficient: float,
    experts: Sequence[int] | None = None,
) -> Profile:
    """The directions of several experts of a layer together: those that the threshold kept.

    `experts` names others. Raises MoesteerError where the layer has none that were kept.
    """
    candidates = _candidates(profile)
    if experts is None:
        here = (candidates.layer == layer) & (candidates.position == position)
        experts = candidates.expert[here & (candidates.scores["kept"] > 0)].tolist()
    if not experts:
        raise MoesteerError(
            f"{profile.name}: no expert of layer {layer} was kept at position {position}: the"
            " routing of none differs by the threshold. Name experts, or find the directions with"
            " a lower --threshold."
        )
    numbers = [candidates.find(layer, position, expert) for expert in experts]
    return aimed(profile, numbers, Aim(coefficient=coefficient))


def ablated(profile: Profile, layer: int, expert: int, position: int) -> Profile:
    """The direction of one expert, projected out of that expert's own output."""
    number = _candidates(profile).find(layer, position, expert)
    return aimed(profile, [number], Aim("ablate"))


def _candidates(profile: Profile) -> Candidates:
    if profile.candidates is None or profile.candidates.kind == "residual":
        raise MoesteerError(
            f"{profile.name} holds no directions of experts; find them with"
            " `moesteer direction --experts`."
        )
    return profile.candidates
