"""The threshold of a gate, chosen on dev prompts at a share of false alarms.

A false alarm is a prompt that is to keep the gate shut and opens it. Of n such dev prompts at most
α n may. Among the thresholds that keep to this, the one is taken at which

    J = share opened of those that are to − share opened of those that are not

is largest (Youden 1950), of equal ones that with the widest gap between the scores beside it; it
lies in the middle of that gap. So α is a limit and no aim: where the sides lie apart, nothing is
let in for the mere reason that it may be. Wilson's intervals (1927) say how far other prompts may
differ.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from moesteer.errors import MoesteerError
from moesteer.gate import Opened
from moesteer.statistics.intervals import wilson_interval


def choose_threshold(
    opens: Float[np.ndarray, " opens"], shut: Float[np.ndarray, " shut"], false_alarms: float
) -> float:
    """The threshold by the rule at the head of this file; the highest score where none opens it.

    Raises MoesteerError where `shut` are too few to show that share.
    """
    check_enough(len(shut), false_alarms)
    allowed = math.floor(false_alarms * len(shut) + 1e-9)  # 0.29 · 100 is below 29 in fp64
    places = np.unique(np.concatenate([opens, shut]))
    above = [np.array([(side > place).sum() for place in places]) for side in (opens, shut)]
    j = above[0] / len(opens) - above[1] / len(shut)
    gap = np.append(np.diff(places), 0.0)  # above the highest score there is nothing to open for
    kept = np.flatnonzero(above[1] <= allowed)
    best = max(kept.tolist(), key=lambda place: (round(float(j[place]), 12), gap[place]))
    return float(places[best] + gap[best] / 2)


def check_enough(shut: int, false_alarms: float) -> None:
    """Raise MoesteerError unless `shut` prompts can show a share of this size."""
    if not 0 < false_alarms < 1:
        raise MoesteerError(f"--false-alarms is {false_alarms:g}; it must be above 0 and below 1.")
    least = math.ceil(1 / false_alarms - 1e-9)
    if shut < least:
        raise MoesteerError(
            f"{shut} dev prompts that are to keep the gate shut can't show a share of"
            f" {false_alarms:g} of false alarms: one alone would be {1 / max(shut, 1):.2g}. At"
            f" least {least} are needed; give more prompts (--keeps-shut, --validate), or allow"
            " more (--false-alarms)."
        )


def opened_of(opened: Sequence[bool]) -> Opened:
    """How many of some prompts opened a gate, with Wilson's interval."""
    return Opened(sum(opened), len(opened), *wilson_interval(sum(opened), len(opened)))
