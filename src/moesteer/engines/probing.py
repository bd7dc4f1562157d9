"""A prompt's score at a gate: how the unsteered model reads it.

Both probes of `moesteer.gate` are words of the engine's: routing counts, and a projection of what
enters a layer. So a gate means the same in every engine.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Num

from moesteer.chat import TokenisedConversation
from moesteer.gate import Probe, RoutingProbe
from moesteer.model_facts import LayerShape

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

BATCH = 32
"""Prompts that are read together."""


def scores(
    engine: "Engine", prompts: Sequence[Sequence[int]], probe: Probe, batch_size: int = BATCH
) -> Float[np.ndarray, " prompt"]:
    """The score of each prompt, given as token ids; prompts of similar length share a batch.

    Raises MoesteerError where a prompt is too short for the probe's position.
    """
    found = np.zeros(len(prompts))
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found[chosen] = _of_batch(engine, [prompts[number] for number in chosen], probe)
    return found


def selection_shares(
    engine: "Engine", prompts: Sequence[Sequence[int]], last: int | None
) -> Float[np.ndarray, "prompt layer expert"]:
    """Which share of each prompt's last tokens selects each expert; of all tokens without `last`.

    Layers in the order of the model's.
    """
    read = [_last_tokens(prompt, last) for prompt in prompts]
    counts = engine.count_selections(read, "top-k")
    tokens = np.array([sum(one.target) for one in read])
    return counts / tokens[:, None, None]


def routing_score(
    shares: Num[np.ndarray, "*prompt layer expert"],
    probe: RoutingProbe,
    layers: Sequence[LayerShape],
) -> Float[np.ndarray, "*prompt"]:
    """Σ_e w_e · (share of the tokens that select e): the mean over tokens of the weights of their
    experts."""
    rows = {shape.layer: row for row, shape in enumerate(layers)}
    where = [rows[layer] for layer, _ in probe.experts], [expert for _, expert in probe.experts]
    return shares[..., where[0], where[1]] @ np.array(probe.weights)


def _of_batch(
    engine: "Engine", prompts: Sequence[Sequence[int]], probe: Probe
) -> Float[np.ndarray, " prompt"]:
    if isinstance(probe, RoutingProbe):
        shares = selection_shares(engine, prompts, probe.last)
        return routing_score(shares, probe, engine.facts.layers)
    return engine.project(prompts, probe.layer, probe.position, probe.vector)


def _last_tokens(prompt: Sequence[int], last: int | None) -> TokenisedConversation:
    read = len(prompt) if last is None else min(last, len(prompt))
    return TokenisedConversation(tuple(prompt), (False,) * (len(prompt) - read) + (True,) * read)
