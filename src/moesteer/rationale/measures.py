"""What is measured of a method's rationale of an instance: as numbers, in columns by instance.

"random 0", "random 1", … are one method, `RANDOM`: an instance's value is the mean over the seeds.
The random units of as many tokens as a prompted method named are a method too, see `control_of`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from moesteer.evaluation.comparison import pool_of
from moesteer.rationale.alignment import auprc, f1, iou, precision, recall
from moesteer.rationale.reading import Choice, Masked, Reading
from moesteer.rationale.resampling import counts_and_means

RANDOM = "random"
ALIGNMENT = ("f1", "precision", "recall", "iou", "auprc")
FAITHFULNESS = (
    "flip",
    "flip_right",
    "flip_wrong",
    "comprehensiveness",
    "sufficiency",
    "comprehensiveness_area",
    "sufficiency_area",
)
MEASURES = ("tokens", *ALIGNMENT, *FAITHFULNESS)
"""What is measured of a method's rationales. `tokens`: how many; the alignment with people, of
which `f1` is the primary one (all count tokens); `flip`: how often another label is predicted
without them, over all instances, those predicted rightly and those wrongly;
`comprehensiveness` and `sufficiency`: changes of the predicted label's probability, and their
means over the shares of the curve (`_area`). With several texts an `in:TEXT` each: the share of
the rationale's tokens that lie in it."""
ACCURACY = "accuracy"
"""The measure of a `Change` that speaks of the model, not of a method (its `method` is "")."""


def baseline_of(method: str, methods: Sequence[str]) -> str:
    """The random units that a method stands beside: of as many tokens as people marked, or as it
    named."""
    own = control_of(method)
    return own if own in methods else RANDOM


def control_of(method: str) -> str:
    """The name in a summary of the random units of as many tokens as a prompted method named."""
    return f"{RANDOM} for {method}"


def methods_of(readings: Iterable[Reading]) -> tuple[str, ...]:
    """The methods as a summary names them, each prompted one before its random units."""
    found: dict[str, None] = {}
    for reading in readings:
        for method in reading.choices:
            found[pool_of(method)] = None
            if method in reading.controls:
                found[control_of(method)] = None
    return tuple(found)


class Key(NamedTuple):
    """What a column holds; `share`: the share of the units that are masked, None for the choice."""

    arm: str
    method: str
    measure: str
    share: float | None


Column = Float[np.ndarray, " item"]
"""A measure of every instance, NaN where it has none."""
Columns = dict[Key, Column]


def columns_of(readings: Sequence[Reading]) -> Columns:
    """All measures of each arm; of the seeds of one method, the mean of each instance."""
    found: dict[Key, dict[int, list[float]]] = {}
    for reading in readings:
        for method, measure, share, value in _measured(reading):
            key = Key(reading.arm, method, measure, share)
            found.setdefault(key, {}).setdefault(reading.item, []).append(value)
    items = {item: row for row, item in enumerate(sorted({r.item for r in readings}))}
    columns: Columns = {}
    for key, by_item in found.items():
        columns[key] = np.full(len(items), np.nan)
        for item, values in by_item.items():
            columns[key][items[item]] = sum(values) / len(values)
    return columns


def arm_pool(arm: str) -> str:
    """The arm that stands for it where arms are compared: one for all controls of a run."""
    pool = pool_of(arm)
    # A run may be named "epoch 1".
    return pool if pool == RANDOM or pool.endswith(f": {RANDOM}") else arm


def pooled(columns: Columns) -> Columns:
    """The columns of "random 0", "random 1", … as one arm's: the mean over those that have it."""
    found: dict[Key, list[Column]] = {}
    for key, column in columns.items():
        found.setdefault(key._replace(arm=arm_pool(key.arm)), []).append(column)
    return {key: counts_and_means(np.stack(same))[1] for key, same in found.items()}


def _measured(reading: Reading) -> Iterator[tuple[str, str, float | None, float]]:
    """(method, measure, share, value) of all that is measured of one reading."""
    yield "", ACCURACY, None, float(reading.predicted == reading.label)
    choices = [(pool_of(method), choice) for method, choice in reading.choices.items()]
    controls = [
        (control_of(method), choice)
        for method, drawn in reading.controls.items()
        for choice in drawn
    ]
    for method, choice in choices + controls:
        for measure, value in _of_choice(choice, reading):
            yield method, measure, None, value
    for method, scores in reading.scores.items():
        yield pool_of(method), "auprc", None, auprc(scores, reading.human, reading.tokens)
    for name, curve in reading.curve.items():
        method, points = pool_of(name), [_of_masked(masked) for masked in curve]
        for share, point in zip(reading.shares, points, strict=True):
            for measure, value in point.items():
                yield method, measure, share, value
        for measure in ("comprehensiveness", "sufficiency") if points else ():
            area = sum(point[measure] for point in points) / len(points)
            yield method, f"{measure}_area", None, area


def _of_choice(choice: Choice, reading: Reading) -> Iterator[tuple[str, float]]:
    tokens = sum(reading.tokens[unit] for unit in choice.units)
    yield "tokens", tokens
    for measure, function in _AGREEMENT.items():
        yield measure, function(choice.units, reading.human, reading.tokens)
    yield from _of_masked(choice.masked).items()
    right = reading.predicted == reading.label
    yield "flip_right" if right else "flip_wrong", choice.masked.flipped
    if len(reading.texts) > 1 and tokens:
        for text in reading.texts:
            inside = (unit for unit in choice.units if reading.units[unit][0] == text)
            yield f"in:{text}", sum(reading.tokens[unit] for unit in inside) / tokens


_AGREEMENT = {"f1": f1, "precision": precision, "recall": recall, "iou": iou}


def _of_masked(masked: Masked) -> dict[str, float]:
    return {
        "flip": masked.flipped,
        "comprehensiveness": masked.comprehensiveness,
        "sufficiency": masked.sufficiency,
    }
