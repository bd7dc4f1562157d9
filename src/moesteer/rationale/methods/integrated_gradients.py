"""Integrated gradients: what each token added on the way from no embeddings to the text.

    score_t = e_t · ∫₀¹ ∂R/∂e_t (α · e) dα,      Σ_t score_t = R(x) − R(x')

(Sundararajan, Taly and Yan 2017, arXiv 1703.01365). Only the texts' own words go: in x' their
embeddings are 0, and the template stays. How the way is gone, with the routing held where the model
has experts: `engines/transformers/integrated.py`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from moesteer.engines.readouts import Readout
from moesteer.rationale.layout import Laid

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.profile import Profile

TOLERANCE = 0.01
"""The share of R(x) − R(x') that the scores may miss."""


def integrated_gradients(
    engine: "Engine",
    laid: Sequence[Laid],
    readouts: Sequence[Readout],
    profile: "Profile | None" = None,
    *,
    checkpointing: bool = False,
) -> "Iterator[tuple[int, Float[np.ndarray, ' token'], float]]":
    """Each instance's number, its scores by token, in nats, and which share of R(x) − R(x')
    they miss, in any order."""
    positions = [sorted(token for unit in one.units for token in unit.tokens) for one in laid]
    for number, scores, gap in engine.integrated_gradients(
        readouts, positions, profile, tolerance=TOLERANCE, checkpointing=checkpointing
    ):
        yield number, scores.numpy(), gap


def gap_note(sources: Sequence[str], gaps: Sequence[float | None]) -> str | None:
    """What to say where scores miss too much of what they should sum to; None where none do.

    A source and a gap for each reading, None where the method did not run.
    """
    run = [(gap, source) for source, gap in zip(sources, gaps, strict=True) if gap is not None]
    wide = [(gap, source) for gap, source in run if gap > TOLERANCE]
    if not wide:
        return None
    widest, source = max(wide, key=lambda of: of[0])
    return (
        f"integrated gradients of {len(wide)} of {len(run)} readings miss more than"
        f" {TOLERANCE:.0%} of what they should sum to, at most {widest:.1%} ({source})."
    )
