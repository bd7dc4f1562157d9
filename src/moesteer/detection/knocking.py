"""Knock-out and knock-in: switch every single expert off, then on, and see what is decided.

Intuition: an expert that merely goes with a behaviour can be switched without consequence; one that
carries it can't. Each expert alone is deactivated at every token (knock-out), then activated
(knock-in), and the effect is the change of what the pair decides (`decision.py`), in nats:

    knock-out score = −(R(expert off) − R)        knock-in score = R(expert on) − R

so that both are positive for a carrier of A. Every effect is measured beside others, on other
behaviours and on neutral text: an expert whose loss moves all of them damages the model, and
carries nothing in particular. Causal intervention on components: Vig et al. 2020 (arXiv
2004.12265); that observed routing does not predict it: the causal audit of arXiv 2606.10703.

Two runs of every text for each expert are many. Where a model has many experts, layers are screened
first: blocks of a layer's experts are deactivated together, and only the layers with the strongest
block are gone into. What only a knock-in shows is not found so. Group testing: Dorfman 1943.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from moesteer.detection.decision import summed_by_pair
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.engines.readouts import Readout
    from moesteer.runs import Run

MANY_EXPERTS = 1000
"""Up to so many experts, every layer is gone into unless the caller says otherwise."""
BLOCKS = 8
"""Into how many blocks of experts screening divides a layer."""

Read = Callable[[int], None]
"""Called with how many texts were read since the last call."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Scores of single experts in nats, for each pair, positive where the expert carries A.

    `beside` holds the mean *changes* of the other readouts by name, [0] when an expert is knocked
    out and [1] when it is knocked in. NaN in layers that were not gone into, 0 for experts that a
    layer lacks.
    """

    knock_out: Float[np.ndarray, "pair layer expert"]
    knock_in: Float[np.ndarray, "pair layer expert"]
    beside: Mapping[str, Float[np.ndarray, "2 layer expert"]]


@dataclass(frozen=True)
class Cost:
    """What knocking takes: interventions, and texts and tokens to be read under all of them."""

    interventions: int
    texts: int
    tokens: int
    layers: int


def knocking_cost(
    layers: Sequence[LayerShape],
    readouts: "Sequence[Sequence[Readout]]",
    beside: "Mapping[str, Sequence[Sequence[Readout]]]",
    into: int | None = None,
) -> Cost:
    """The most that `knock` takes (layers may be of unequal width); each text is a forward pass."""
    into = layers_to_enter(layers, into)
    own, all_lengths = _lengths([readouts]), _lengths([readouts, *beside.values()])
    entering = sum(sorted(1 + 2 * layer.experts for layer in layers)[-into:])
    screening = sum(1 + len(_blocks(layer)) for layer in layers) if into < len(layers) else 0
    return Cost(
        entering + screening,
        entering * len(all_lengths) + screening * len(own),
        entering * sum(all_lengths) + screening * sum(own),
        into,
    )


def layers_to_enter(layers: Sequence[LayerShape], into: int | None) -> int:
    """How many layers are gone into; MoesteerError where the caller asks for none or too many."""
    if into is None:
        into = max(1, MANY_EXPERTS // max(layer.experts for layer in layers))
        return len(layers) if sum(layer.experts for layer in layers) <= MANY_EXPERTS else into
    if not 1 <= into <= len(layers):
        raise MoesteerError(f"{into} layers are to be gone into; the model has {len(layers)}.")
    return into


def knock(
    engine: "Engine",
    readouts: "Sequence[Sequence[Readout]]",
    *,
    beside: "Mapping[str, Sequence[Sequence[Readout]]] | None" = None,
    into: int | None = None,
    run: "Run | None" = None,
    progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Knock every expert out and in, and measure what that does to the pairs and beside them.

    The readouts of a pair are added up; `beside` holds others of the same kind by name. `into` says
    how many layers are gone into after screening; without it all are, or as many as have 1,000
    experts together. A `run` keeps each finished layer, and is taken up from there. `progress` is
    told how many texts were read, and how many are to be.

    Raises MoesteerError where there is nothing to read.
    """
    others = beside or {}
    if not readouts or not all(map(all, (readouts, *others.values()))):
        raise MoesteerError("there are no pairs to measure the effect of an expert on.")
    shapes = engine.facts.layers
    total, seen = knocking_cost(shapes, readouts, others, into).texts, [0]

    def read(texts: int) -> None:
        seen[0] += texts
        if progress is not None:
            progress(seen[0], total)

    into = layers_to_enter(shapes, into)
    entered = list(shapes)
    if into < len(shapes):
        strength = _screened(engine, readouts, run, read)
        strongest = sorted(shapes, key=lambda shape: -strength[shape.layer])[:into]
        entered = [shape for shape in shapes if shape in strongest]
    done = {record["layer"]: record for record in run.lines("knocking")} if run else {}
    for shape in entered:
        if shape.layer in done:
            read((1 + 2 * shape.experts) * len(_lengths([readouts, *others.values()])))
            continue
        done[shape.layer] = _knock_layer(engine, shape, readouts, others, read)
        if run:
            run.add("knocking", [done[shape.layer]])
    return _assembled(shapes, len(readouts), list(others), done)


def _knock_layer(
    engine: "Engine",
    shape: LayerShape,
    readouts: "Sequence[Sequence[Readout]]",
    beside: "Mapping[str, Sequence[Sequence[Readout]]]",
    read: Read,
) -> dict[str, Any]:
    """One finished layer, as a record: scores of each pair and expert, mean changes beside."""
    places = [(shape.layer, expert) for expert in range(shape.experts)]
    profiles = [Profile(deactivated=(place,), name=f"without {place}") for place in places]
    profiles += [Profile(activated=(place,), name=f"with {place}") for place in places]
    out, into = np.split(_changes(engine, profiles, readouts, beside, read), 2)
    edges = np.cumsum([0, len(readouts), *map(len, beside.values())])
    means = {
        name: [change[:, start:end].mean(1).tolist() for change in (out, into)]
        for name, start, end in zip(beside, edges[1:], edges[2:], strict=False)
    }
    own = slice(0, len(readouts))
    return {
        "layer": shape.layer,
        "knock_out": (-out[:, own]).T.tolist(),
        "knock_in": into[:, own].T.tolist(),
        "beside": means,
    }


def _screened(
    engine: "Engine", readouts: "Sequence[Sequence[Readout]]", run: "Run | None", read: Read
) -> dict[int, float]:
    """The largest mean effect of a block of experts, by layer."""
    found = {record["layer"]: record["effect"] for record in run.lines("screening")} if run else {}
    for shape in engine.facts.layers:
        profiles = _blocks(shape)
        if shape.layer in found:
            read((1 + len(profiles)) * len(_lengths([readouts])))
            continue
        changes = _changes(engine, profiles, readouts, {}, read)
        found[shape.layer] = float(np.abs(changes.mean(1)).max())
        if run:
            run.add("screening", [{"layer": shape.layer, "effect": found[shape.layer]}])
    return found


def _blocks(shape: LayerShape) -> list[Profile]:
    """Blocks of neighbouring experts, each deactivated; k experts always stay."""
    size = max(1, min(-(-shape.experts // BLOCKS), shape.experts - shape.top_k))
    blocks = [range(i, min(i + size, shape.experts)) for i in range(0, shape.experts, size)]
    return [Profile(deactivated=tuple((shape.layer, e) for e in block)) for block in blocks]


def _changes(
    engine: "Engine",
    profiles: Sequence[Profile],
    readouts: "Sequence[Sequence[Readout]]",
    beside: "Mapping[str, Sequence[Sequence[Readout]]]",
    read: Read,
) -> Float[np.ndarray, "profile pair"]:
    """What each profile changes, of the pairs and then of those beside."""
    pairs = [pair for group in (readouts, *beside.values()) for pair in group]
    flat = [readout for pair in pairs for readout in pair]
    values = summed_by_pair(engine.read(flat, [None, *profiles], progress=read), pairs)
    return values[1:] - values[:1]


def _lengths(groups: "Sequence[Sequence[Sequence[Readout]]]") -> list[int]:
    """Tokens to be read for each readout: those before the last one it asks for."""
    return [
        max((term.position for term in readout.terms), default=0)
        for group in groups
        for pair in group
        for readout in pair
    ]


def _assembled(
    shapes: Sequence[LayerShape], pairs: int, beside: Sequence[str], done: Mapping[int, Any]
) -> Effects:
    widest = max(shape.experts for shape in shapes)
    out, into = (np.zeros((pairs, len(shapes), widest)) for _ in range(2))
    others = {name: np.zeros((2, len(shapes), widest)) for name in beside}
    for row, shape in enumerate(shapes):
        experts = slice(0, shape.experts)
        record = done.get(shape.layer)
        out[:, row, experts] = record["knock_out"] if record else np.nan
        into[:, row, experts] = record["knock_in"] if record else np.nan
        for name, table in others.items():
            table[:, row, experts] = record["beside"][name] if record else np.nan
    return Effects(out, into, others)
