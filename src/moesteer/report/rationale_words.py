"""What rationales are called on every page: measures, and methods in their order."""

from collections.abc import Iterator

from moesteer.evaluation.comparison import STEERED, UNSTEERED, pool_of
from moesteer.rationale.measures import (
    ACCURACY,
    ALIGNMENT,
    FAITHFULNESS,
    RANDOM,
    baseline_of,
    control_of,
)
from moesteer.rationale.summary import Mean, Summary
from moesteer.report.blocks import NARROW, Cell, percent, signs, text

NAMES = {
    ACCURACY: "accuracy",
    "tokens": "tokens",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "iou": "IoU",
    "auprc": "AUPRC",
    "flip": "flip rate",
    "flip_right": "where right",
    "flip_wrong": "where wrong",
    "comprehensiveness": "comprehensiveness",
    "sufficiency": "sufficiency",
    "comprehensiveness_area": "compr. area",
    "sufficiency_area": "suff. area",
}
MEANT = {
    ACCURACY: "share of instances",
    "f1": "agreement with people's words",
    "flip": "share of instances",
    "comprehensiveness": "less probable without them",
    "sufficiency": "less probable with them alone",
}
"""What a figure says of the measures that it shows."""
ALIGNED = ("tokens", *ALIGNMENT)
FAITHFUL = ("tokens", *FAITHFULNESS)
FLIPS = ("flip", "flip_right", "flip_wrong")
INSIDE = "in:"
"""How the measure of what lies in one of several texts begins."""
TO = f"{NARROW}…{NARROW}"
"""Between the ends of an interval."""


def name_of(measure: str) -> str:
    """A measure as it stands over a column."""
    if measure.startswith(INSIDE):
        return f"in {measure.removeprefix(INSIDE)}"
    return NAMES[measure]


def is_share(measure: str) -> bool:
    """Whether it is a share, of instances or of a rationale's tokens: written in percent."""
    return measure in (ACCURACY, *FLIPS) or measure.startswith(INSIDE)


def chosen_methods(summary: Summary) -> list[str]:
    """The methods that choose as many tokens as people marked, random units left out."""
    prompted = prompted_methods(summary)
    return [m for m in summary.methods if not m.startswith(RANDOM) and m not in prompted]


def prompted_methods(summary: Summary) -> list[str]:
    """The methods by which the model was asked; they choose what it named."""
    return list(dict.fromkeys(found.method for found in summary.prompted))


def groups(summary: Summary) -> Iterator[tuple[list[str], list[str]]]:
    """Methods that choose as many tokens, each time with the random units beside them."""
    if methods := chosen_methods(summary):
        yield methods, _there(summary, RANDOM)
    for method in prompted_methods(summary):
        if method in summary.methods:
            yield [method], _there(summary, control_of(method))


def _there(summary: Summary, method: str) -> list[str]:
    return [method] if method in summary.methods else []


def shown_arms(summary: Summary) -> list[str]:
    """The unsteered and the steered arm where there are both, else all; controls have changes."""
    names = [arm.name for arm in summary.arms]
    both = [UNSTEERED, STEERED]
    return both if set(both) <= set(names) else names


def measured(summary: Summary, arm: str, measures: tuple[str, ...]) -> list[str]:
    """Those of the measures that some method has in this arm."""
    there = {mean.measure for mean in summary.means if mean.arm == arm}
    return [measure for measure in measures if measure in there]


def texts_measured(summary: Summary) -> tuple[str, ...]:
    """The measures of where the rationales lie, one a text; none where there is one text."""
    inside = (m.measure for m in summary.means if m.measure.startswith(INSIDE))
    return tuple(dict.fromkeys(inside))


def best(summary: Summary, arm: str, measure: str) -> Mean | None:
    """The highest mean among the methods that choose as many tokens as people marked."""
    found = [summary.mean(arm, method, measure) for method in chosen_methods(summary)]
    return max(filter(None, found), key=lambda mean: mean.value, default=None)


def against_random(summary: Summary, method: str) -> str:
    """The random units that a method is compared with."""
    return baseline_of(method, summary.methods)


def greyed(summary: Summary, *arms: str) -> frozenset[str]:
    """The measures that mean little in one of these arms, or pools of arms."""
    doubted = {
        name
        for arm in summary.arms
        if arm.doubt is not None
        for name in (arm.name, pool_of(arm.name))
    }
    return frozenset(FLIPS if doubted & set(arms) else ())


def doubts(summary: Summary) -> Iterator[str]:
    """A sentence for each arm that is shown and whose flip rates mean little: why."""
    for name in shown_arms(summary):
        doubt = summary.arm(name).doubt
        if doubt is not None:
            yield f"{name}: flip rates mean little and are greyed: {doubt}."


def value_words(mean: Mean) -> str:
    """A mean with its interval: 0.52 (0.48 … 0.56), or 52 % (48 … 56) of a share."""
    if is_share(mean.measure):
        return f"{percent(mean.value).text} ({100 * mean.low:.0f}{TO}{100 * mean.high:.0f})"
    return signs(f"{mean.value:.2f} ({mean.low:.2f}{TO}{mean.high:.2f})")


def mean_cell(mean: Mean | None, pale: frozenset[str]) -> Cell:
    """A mean with its interval; pale where its measure is."""
    if mean is None:
        return text("–")
    words = f"{mean.value:.1f}" if mean.measure == "tokens" else value_words(mean)
    return Cell(words, mean.value, pale=mean.measure in pale)
