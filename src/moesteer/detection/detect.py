"""Detection, from contrast pairs to a profile: every expert's score, and how sure it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from moesteer.chat import tokenise_pairs
from moesteer.contrast import pairs_hash
from moesteer.detection.counts import Progress, RoutingCounts, count_routing
from moesteer.detection.detectors import Detector, detector_named
from moesteer.detection.matching import match_spans as matched
from moesteer.detection.matching import warn_of_unequal_spans
from moesteer.detection.risk_difference import selection_rates
from moesteer.detection.significance import (
    false_discovery_rate,
    permutation_test,
    split_half_stability,
)
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.profile import Evidence, Profile, Scores
from moesteer.provenance import installed_versions

if TYPE_CHECKING:
    from moesteer.contrast import ContrastPair
    from moesteer.engines.base import Engine


def detect(
    engine: "Engine",
    pairs: "Sequence[ContrastPair]",
    detector: str = "risk-difference",
    *,
    match_spans: bool = False,
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    source: str = "pairs",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    command: str = "",
) -> Profile:
    """Score every expert by what a detector (see `DETECTORS`) makes of its routing counts.

    With `match_spans` equally many target tokens count on either side of a pair; without it,
    pooled targets of very unequal length are a MoesteerWarning. The profile selects nothing yet:
    see `select_experts`. Raises MoesteerError where there is no such detector, and where a pair's
    target span can't be found or doesn't fit into the context.
    """
    chosen = detector_named(detector)
    if not pairs:
        raise MoesteerError("there are no contrast pairs to detect from.")
    options = dict(chat_options or {})
    tokenised = tokenise_pairs(
        pairs, engine.tokenizer, chat_options=options, max_tokens=engine.max_tokens
    )
    if match_spans:
        tokenised = [matched(pair) for pair in tokenised]
    else:
        warn_of_unequal_spans(tokenised)
    spans = "matched" if match_spans else "as given"
    data_hash = pairs_hash(pairs)
    facts = engine.facts
    counts = count_routing(
        engine,
        tokenised,
        chosen.counted,
        checkpoint=checkpoint,
        identity=json.dumps([asdict(facts), data_hash, options, chosen.counted, spans]),
        progress=progress,
    )
    scores, interval, stability = score_experts(chosen, counts, facts.layers, seed=seed)
    tokens_a, tokens_b = map(int, counts.tokens.sum(0))
    return Profile(
        model=facts,
        evidence=Evidence(
            detector=detector,
            counted=chosen.counted,
            pairs=len(pairs),
            source=source,
            data_hash=data_hash,
            target=", ".join(dict.fromkeys(side.target for p in pairs for side in (p.a, p.b))),
            tokens_a=tokens_a,
            tokens_b=tokens_b,
            seed=seed,
            interval=interval,
            spans=spans,
            stability=stability,
            versions=installed_versions(),
            command=command,
        ),
        chat_options=options,
        scores=scores,
        name=source,
    )


def score_experts(
    detector: Detector, counts: RoutingCounts, layers: Sequence[LayerShape], *, seed: int
) -> tuple[Scores, str, float | None]:
    """Scores with intervals, p and q; what the interval is; and the split-half stability."""
    exists = existing_experts(layers)
    estimate = detector.estimate(detector.parts, detector.score, counts, seed=seed)
    p = permutation_test(counts, seed=seed)
    q = false_discovery_rate(p, exists)
    rate_a, rate_b = selection_rates(counts)
    stability = split_half_stability(detector.parts, detector.score, counts, exists, seed=seed)
    scores = Scores(estimate.value, estimate.low, estimate.high, p, q, rate_a, rate_b)
    return scores, estimate.interval, stability


def existing_experts(layers: Sequence[LayerShape]) -> Bool[np.ndarray, "layer expert"]:
    """Which cells of a table of scores are experts; layers may be of unequal width."""
    widths = np.array([layer.experts for layer in layers])
    return np.arange(widths.max()) < widths[:, None]
