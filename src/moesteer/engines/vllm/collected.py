"""What the workers counted, put together: from replies to `moesteer_collect` to evidence.

Workers of a tensor-parallel group all see every token and count the same; those of a pipeline have
different layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moesteer.engines.evidence import LayerEvidence
from moesteer.profile import Profile

Counts = Mapping[int, Sequence[float]]
"""By layer, how many tokens chose each expert (or the sum of its probability)."""


def merged(by_worker: Sequence[Mapping[str, Any]], key: str) -> tuple[int, Counts]:
    """Tokens, and counts of all layers, under one key; no tokens where nobody counted."""
    tokens, counts = 0, {}
    for found in by_worker:
        if key in found:
            tokens = found[key]["tokens"]
            counts |= {int(layer): values for layer, values in found[key]["selected"].items()}
    return tokens, counts


def evidence_of(profile: Profile, tokens: int, counts: Counts) -> list[LayerEvidence]:
    """What the counts say of each layer that the profile steers."""
    found = []
    for layer in profile.steered_layers:
        selected = counts.get(layer)
        activated, deactivated = profile.experts_of(layer)
        found.append(
            LayerEvidence(
                profile.name,
                layer,
                tokens if selected is not None else 0,
                {expert: int(selected[expert]) if selected else 0 for expert in activated},
                {expert: int(selected[expert]) if selected else 0 for expert in deactivated},
            )
        )
    return found
