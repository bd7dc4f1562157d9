"""What the workers say, put together: whether they can be steered, and what they counted.

Workers of a tensor-parallel group all see every token and count the same; those of a pipeline have
different layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moesteer.engines.evidence import LayerEvidence
from moesteer.errors import MoesteerError
from moesteer.profile import ModelFacts, Profile

Counts = Mapping[int, Sequence[float]]
"""By layer, how many tokens chose each expert (or the sum of its probability)."""


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


def merged(by_worker: Sequence[Mapping[str, Any]], key: str) -> tuple[int, Counts]:
    """Tokens, and counts of all layers, under one key; no tokens where nobody counted."""
    tokens, counts = 0, {}
    for found in by_worker:
        if key in found:
            tokens = found[key]["tokens"]
            counts |= {int(layer): values for layer, values in found[key]["selected"].items()}
    return tokens, counts


def evidence_of(profile: Profile, tokens: int, counts: Counts) -> list[LayerEvidence]:
    """What the counts say of each layer that the profile steers.

    `tokens` are those that were run, as the worker's schedule has it. A layer whose router recorded
    fewer choices than that has proved nothing, not even that it left an expert out.
    """
    found = []
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
