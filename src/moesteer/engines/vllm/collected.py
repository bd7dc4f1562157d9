"""What the workers say, put together: whether they can be steered, and what they counted.

Workers of a tensor-parallel group all see every token and count the same; those of a pipeline have
different layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesteer.engines.evidence import DirectionEvidence, LayerEvidence
from moesteer.errors import MoesteerError
from moesteer.gate import Probe, RoutingProbe
from moesteer.model_facts import ModelFacts
from moesteer.profile import Profile

Counts = Mapping[int, Sequence[float]]
"""By layer, how many tokens chose each expert (or the sum of its probability)."""


@dataclass(frozen=True)
class Move:
    """What a direction did at a site: how far its tokens moved along it, should have, and what
    rounding may swallow of it, summed over them; the largest share of a token's norm that an
    ablation left, and that it may leave."""

    tokens: int = 0
    moved: float = 0.0
    expected: float = 0.0
    rounding: float = 0.0
    left: float = 0.0
    allowed: float = 0.0

    def __add__(self, other: "Move") -> "Move":
        return Move(
            self.tokens + other.tokens,
            self.moved + other.moved,
            self.expected + other.expected,
            self.rounding + other.rounding,
            max(self.left, other.left),
            max(self.allowed, other.allowed),
        )


Moves = Mapping[tuple[int, int, str], Move]
"""By direction, layer and place."""


def check_described(workers: Sequence[Mapping[str, Any]], facts: ModelFacts) -> None:
    """Raise MoesteerError unless one engine's workers can be steered in all layers of the model.

    `workers` are the replies to `moesteer_describe`.
    """
    for worker in workers:
        if worker["refused"] is not None:
            raise MoesteerError(f"{facts.id} can't be steered in vLLM: {worker['refused']}")
    found = sorted({tuple(shape) for worker in workers for shape in worker["layers"]})
    wanted = [(shape.layer, shape.experts, shape.top_k) for shape in facts.layers]
    if found != wanted:
        raise MoesteerError(
            f"{facts.id} routes otherwise in vLLM: its {len(wanted)} layers are, as (layer,"
            f" experts, k), {wanted[:3]}… in transformers, and {len(found)} there, {found[:3]}…."
        )


def merged(by_worker: Sequence[Mapping[str, Any]], key: str) -> tuple[int, Counts, Moves]:
    """Tokens, counts and moves of all layers, under one key; no tokens where nobody counted."""
    tokens, counts, moves = 0, {}, {}
    for found in by_worker:
        if key in found:
            tokens = found[key]["tokens"]
            counts |= {int(layer): values for layer, values in found[key]["selected"].items()}
            for number, layer, place, *seen in found[key]["directed"]:
                moves[number, layer, place] = Move(*seen)
    return tokens, counts, moves


@dataclass(frozen=True)
class Prompted:
    """How one request's prompt was routed: of its `length` tokens, `tokens` were counted."""

    length: int
    tokens: int
    selected: Counts


def prompts_of(by_worker: Sequence[Mapping[str, Any]], key: str) -> list[Prompted]:
    """The prompts that ran to their end under a key that watches them, a request each."""
    found: dict[str, Prompted] = {}
    for worker in by_worker:
        for request, told in worker.get(key, {}).get("prompts", {}).items():
            before = found[request].selected if request in found else {}
            here = {int(layer): values for layer, values in told["selected"].items()}
            found[request] = Prompted(told["length"], told["tokens"], {**before, **here})
    return list(found.values())


def evidence_of(
    profile: Profile, tokens: int, counts: Counts, moves: Moves
) -> list[LayerEvidence | DirectionEvidence]:
    """What the workers say of each layer that the profile steers, and of each direction's sites.

    `tokens` are those that were run, as the worker's schedule has it. A layer whose router recorded
    fewer choices than that has proved nothing, not even that it left an expert out.
    """
    return [*layers_of(profile, tokens, counts), *directions_of(profile, moves)]


def layers_of(profile: Profile, tokens: int, counts: Counts) -> list[LayerEvidence]:
    """Of the layers whose experts are steered."""
    found: list[LayerEvidence] = []
    for layer in profile.steered_layers:
        selected = counts.get(layer)
        activated, deactivated = profile.experts_of(layer)
        found.append(
            LayerEvidence(
                profile.name,
                layer,
                tokens if selected is not None and sum(selected) >= tokens else 0,
                {expert: int(selected[expert]) if selected else 0 for expert in activated},
                {expert: int(selected[expert]) if selected else 0 for expert in deactivated},
            )
        )
    return found


def directions_of(profile: Profile, moves: Moves) -> list[DirectionEvidence]:
    """Of the sites of directions; one that nobody speaks of has seen no token."""
    found: list[DirectionEvidence] = []
    for number, direction in enumerate(profile.directions):
        for layer, place in direction.sites:
            seen = moves.get((number, layer, place), Move())
            tokens_moved = max(seen.tokens, 1)
            added = direction.operation == "add"
            found.append(
                DirectionEvidence(
                    profile.name,
                    layer,
                    place,
                    direction.expert,
                    direction.operation,
                    seen.tokens,
                    seen.moved / tokens_moved if added else seen.left,
                    seen.expected / tokens_moved,
                    seen.rounding / tokens_moved,
                    number,
                    seen.allowed,
                )
            )
    return found


def score_of(probe: Probe, by_worker: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """What a gate's probe read of the prompt of one request; None where no token was counted."""
    tokens, counts, _ = merged(by_worker, key)
    if not tokens:
        return None
    if isinstance(probe, RoutingProbe):
        places = zip(probe.experts, probe.weights, strict=True)
        return sum(w * counts[layer][expert] for (layer, expert), w in places) / tokens
    read = [worker[key]["watched"] for worker in by_worker if key in worker]
    return next((along for along in read if along is not None), None)


def plus(one: Moves, other: Moves) -> Moves:
    """Moves of two requests, or of two parts of one, put together."""
    return {key: one.get(key, Move()) + other.get(key, Move()) for key in {**one, **other}}
