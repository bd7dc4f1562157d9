"""Behaviour-specific routing: which experts read the end of A's prompts more often than of B's.

    Δ[l, e] = share of A's last n tokens whose largest weight is e's − the same share of B's

as in expert-aware refusal steering, which keeps the experts of Δ ≥ 15 percentage points (Marbut,
Olson, Wheeler 2026, arXiv 2606.04160). "top-k" counts all of a token's experts instead.

Scores, intervals and tests are the detectors' own, which resample contrast pairs. Here a pair is
the i-th prompt of A beside the i-th of B: they were drawn independently of each other, so that any
pairing is as good, and drawing pairs draws either side. What one set has more of is left out.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from moesteer.chat import TokenisedConversation, TokenisedPair
from moesteer.detection.counts import count_routing
from moesteer.detection.detect import score_experts
from moesteer.detection.detectors import DETECTORS
from moesteer.detection.risk_difference import selection_rates
from moesteer.model_facts import LayerShape
from moesteer.profile import Expert, Scores

if TYPE_CHECKING:
    from moesteer.directions.prompts import AskedPrompt, Sides
    from moesteer.engines.base import Engine

THRESHOLD = 15.0
"""Percentage points."""

DETECTOR_OF = {"top-1": "top-1", "top-k": "risk-difference", "probability": "probability"}
"""The detector that scores a count."""


def routing_scores(
    engine: "Engine",
    sides: "Sides",
    last: int,
    *,
    counted: Literal["top-1", "top-k"] = "top-1",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Scores, str, float | None]:
    """Every expert's Δ over the prompts' last tokens, what its interval is, and its stability.

    `progress` is told how many tokens were read, of how many.
    """
    counts = count_routing(engine, paired(sides, last), counted, progress=progress)
    detector = DETECTORS[DETECTOR_OF[counted]]
    return score_experts(detector, counts, engine.facts.layers, seed=seed)


def rates(
    engine: "Engine", sides: "Sides", last: int, counted: Literal["top-k", "probability"]
) -> tuple[dict[Expert, float], dict[Expert, float]]:
    """How many of the last tokens of A's prompts, and of B's, select each expert; or how probable
    it is to them, on average."""
    counts = count_routing(engine, paired(sides, last), counted)
    a, b = (by_expert(rates, engine.facts.layers) for rates in selection_rates(counts))
    return a, b


def over_threshold(scores: Scores, layers: Sequence[LayerShape], threshold: float) -> set[Expert]:
    """The experts whose Δ is at least so many percentage points, as far as fp64 can tell."""
    value = by_expert(scores.value, layers)
    return {expert for expert, score in value.items() if score * 100 >= threshold - 1e-9}


def by_expert(table: np.ndarray, layers: Sequence[LayerShape]) -> dict[Expert, float]:
    """A table [layer, expert] by the layers' own numbers, of the experts that exist."""
    rows = zip(layers, table, strict=True)
    return {(shape.layer, e): float(row[e]) for shape, row in rows for e in range(shape.experts)}


def paired(sides: "Sides", last: int) -> list[TokenisedPair]:
    """The i-th prompts of both sides, their last tokens the target."""
    return [
        TokenisedPair(_last_tokens(a, last), _last_tokens(b, last), f"{a.source} and {b.source}")
        for a, b in zip(sides.a, sides.b, strict=False)
    ]


def _last_tokens(prompt: "AskedPrompt", last: int) -> TokenisedConversation:
    before = len(prompt.ids) - last
    return TokenisedConversation(prompt.ids, (False,) * before + (True,) * last)
