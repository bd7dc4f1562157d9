"""Detection, from contrast pairs to a profile that holds every expert's score and interval."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.chat import tokenise_pairs
from moesteer.contrast import pairs_hash
from moesteer.detection.counts import Progress, count_routing
from moesteer.detection.risk_difference import risk_difference, selection_rates
from moesteer.detection.significance import LEVEL, RESAMPLES, bootstrap_interval
from moesteer.errors import MoesteerError
from moesteer.profile import Evidence, Profile, Scores

if TYPE_CHECKING:
    from moesteer.contrast import ContrastPair
    from moesteer.engines.base import Counted, Engine


def detect(
    engine: "Engine",
    pairs: "Sequence[ContrastPair]",
    *,
    counted: "Counted" = "top-k",
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    source: str = "pairs",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    command: str = "",
) -> Profile:
    """Score every expert by its risk difference between the pairs' sides.

    The profile selects nothing yet: see `select_experts`. Raises MoesteerError where a pair's
    target span can't be found or doesn't fit into the context.
    """
    if not pairs:
        raise MoesteerError("there are no contrast pairs to detect from.")
    options = dict(chat_options or {})
    tokenised = tokenise_pairs(
        pairs, engine.tokenizer, chat_options=options, max_tokens=engine.max_tokens
    )
    data_hash = pairs_hash(pairs)
    facts = engine.facts
    identity = asdict(facts)
    counts = count_routing(
        engine,
        tokenised,
        counted,
        checkpoint=checkpoint,
        identity=json.dumps([identity, data_hash, options, counted]),
        progress=progress,
    )
    low, high = bootstrap_interval(counts, seed=seed)
    rate_a, rate_b = selection_rates(counts)
    tokens_a, tokens_b = map(int, counts.tokens.sum(0))
    return Profile(
        model=facts,
        evidence=Evidence(
            detector="risk difference",
            counted=counted,
            pairs=len(pairs),
            source=source,
            data_hash=data_hash,
            target=", ".join(dict.fromkeys(side.target for p in pairs for side in (p.a, p.b))),
            tokens_a=tokens_a,
            tokens_b=tokens_b,
            seed=seed,
            interval=(
                f"{LEVEL:.0%} percentile bootstrap over pairs, {RESAMPLES} resamples"
                if len(pairs) > 1
                else "none: one pair can't be resampled"
            ),
            versions=installed_versions(),
            command=command,
        ),
        chat_options=options,
        scores=Scores(risk_difference(counts), low, high, rate_a, rate_b),
        name=source,
    )


def installed_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("moesteer", "torch", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
