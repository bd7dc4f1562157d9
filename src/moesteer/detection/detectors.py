"""The detectors that need routing counts only: each turns them into one score an expert.

A detector is what is summed over pairs (`parts`), what the sums say (`score`) and how the score and
its interval are estimated from all pairs. Positive scores go with A, and swapping the sides negates
every one. What counts say is not cause: the causal detectors intervene.
"""

from collections.abc import Callable
from dataclasses import dataclass

from moesteer.detection import log_odds, npmi, paired_t, risk_difference
from moesteer.detection.resampling import Estimate, Parts, Score, pooled
from moesteer.detection.significance import bootstrapped
from moesteer.detection.stability import selected_stably
from moesteer.engines.base import Counted
from moesteer.errors import MoesteerError


@dataclass(frozen=True)
class Detector:
    """`estimate(parts, score, counts, seed=…)` gives every expert its score and interval."""

    name: str
    title: str
    counted: Counted
    parts: Parts
    score: Score
    estimate: Callable[..., Estimate] = bootstrapped


DETECTORS = {
    detector.name: detector
    for detector in (
        Detector("risk-difference", "risk difference", "top-k", pooled, risk_difference.score),
        Detector("log-odds", "log-odds ratio", "top-k", pooled, log_odds.score),
        Detector("paired-t", "paired t", "top-k", paired_t.parts, paired_t.score),
        Detector("npmi", "nPMI with A less nPMI with B", "top-k", pooled, npmi.score),
        Detector("top-1", "risk difference", "top-1", pooled, risk_difference.score),
        Detector("probability", "mean difference", "probability", pooled, risk_difference.score),
        Detector(
            "stability",
            "stability selection by risk difference",
            "top-k",
            pooled,
            risk_difference.score,
            selected_stably,
        ),
    )
}


def detector_named(name: str) -> Detector:
    """The detector; MoesteerError lists them where there is none of that name."""
    if name not in DETECTORS:
        raise MoesteerError(f"there is no detector {name!r}; choose from {', '.join(DETECTORS)}.")
    return DETECTORS[name]
