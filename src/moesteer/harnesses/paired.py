"""What a harness found of several arms, compared document by document.

A harness gives each arm a number for each metric, with a standard error. The arms answered the same
documents, so that the difference of two is far more certain than both errors together say: it is
resampled by document, as `evaluation.comparison` does.

lm-eval keeps what every document contributes: a number x, or for texts of unequal length a pair
(x, w). Its metrics are nearly all one of these functions of them:

    mean          Σx / Σw        (w = 1)
    perplexity    exp(−Σx / Σw)
    bits          −Σx / (Σw · ln 2)

Which one is not looked up but proved: it must give the number that lm-eval reported. Of a metric
that none of them gives (F1, BLEU) the values are shown and no difference is claimed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import (
    UNSTEERED,
    ArmFacts,
    compared,
    pool_of,
)
from moesteer.statistics.intervals import mean_interval, percentile_interval
from moesteer.statistics.paired import holm, matched_p
from moesteer.summaries import as_json, from_json

SUMMARY_SCHEMA = 1
RESAMPLES = 2000
SEED = 0

FORMS: dict[str, Callable[[float], float]] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: math.exp(-ratio),
    "bits": lambda ratio: -ratio / math.log(2),
}
"""What becomes of Σx / Σw."""

Table = Float[np.ndarray, "document 2"]
"""x and w of each document."""

Documents = Mapping[tuple[str, int], tuple[float, float]]
"""What each document (task, number) contributes: x and w."""


@dataclass(frozen=True)
class Measure:
    """A metric of a task or of a group of tasks, under one of the filters that replies went
    through; `higher_is_better` is None where the harness does not say."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None


@dataclass(frozen=True)
class Value:
    """What the harness says of an arm, with its own standard error (None: it has none) of `n`
    documents."""

    measure: Measure
    arm: str
    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Gap:
    """`arm` less `against`, over `n` documents that both answered, with a 95 % interval.

    Both name an arm or a pool of arms, whose values are averaged. All None where the harness's
    number does not come out of its samples. `p` is exact, of documents that are right or wrong
    (McNemar's test, against a pool its generalisation); None of other metrics. `holm`: adjusted
    over all measures of a comparison.
    """

    measure: Measure
    arm: str
    against: str
    n: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    holm: float | None


@dataclass(frozen=True)
class SuiteComparison:
    """A profile beside its controls on a harness's tasks: everything that `summary.json` holds."""

    model: str
    profile: str
    harness: str
    measures: tuple[Measure, ...]
    arms: tuple[ArmFacts, ...]
    values: tuple[Value, ...]
    differences: tuple[Gap, ...]
    notes: tuple[str, ...] = ()

    def value(self, task: str, metric: str, arm: str, filter: str = "none") -> Value:
        """One arm's value; KeyError where there is none."""
        found = {(*_key(v.measure), v.arm): v for v in self.values}
        return found[task, metric, filter, arm]

    def difference(
        self, task: str, metric: str, arm: str, against: str, filter: str = "none"
    ) -> Gap:
        """One difference; KeyError where there is none."""
        found = {(*_key(d.measure), d.arm, d.against): d for d in self.differences}
        return found[task, metric, filter, arm, against]

    def to_json(self) -> str:
        """The comparison as one JSON object, with the schema's number."""
        return as_json(self, SUMMARY_SCHEMA)

    @classmethod
    def from_json(cls, text: str, where: str | Path = "summary.json") -> "SuiteComparison":
        """Read what `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        return from_json(cls, text, where, SUMMARY_SCHEMA, "a comparison on a harness's tasks")


def compare(
    by_arm: Mapping[str, Mapping[str, Any]], where: str | Path
) -> tuple[list[Measure], list[Value], list[Gap]]:
    """Measures, values and differences of lm-eval's results by arm, the unsteered among them.

    Raises MoesteerError, beginning with `where`, unless all arms answered the same prompts.
    """
    _check_same_prompts(by_arm, where)
    unsteered = by_arm[UNSTEERED]
    measures = list(_measures(unsteered))
    values = [_value(m, arm, found) for m in measures for arm, found in by_arm.items()]
    pairs = compared(list(by_arm))
    gaps = []
    for measure in measures:
        mine = {v.arm: v for v in values if v.measure == measure}
        documents = {arm: _documents(measure, found) for arm, found in by_arm.items()}
        form = _form(mine, documents)
        gaps += [_gap(measure, documents, form, *pair) for pair in pairs]
    return measures, values, _with_holm(gaps, pairs)


def _measures(found: Mapping[str, Any]) -> Iterator[Measure]:
    """Every number of the results: tasks and groups, metrics, filters."""
    results = found["results"] | found.get("groups", {})
    for task, told in results.items():
        for key, value in told.items():
            metric, comma, name = key.partition(",")
            if comma and not metric.endswith("_stderr") and _is_number(value):
                better = found["higher_is_better"].get(task, {}).get(metric)
                yield Measure(task, metric, name, better)


def _value(measure: Measure, arm: str, found: Mapping[str, Any]) -> Value:
    told = (found["results"] | found.get("groups", {}))[measure.task]
    error = told.get(f"{measure.metric}_stderr,{measure.filter}")
    n = sum(found["n-samples"][task]["effective"] for task in _leaves(measure.task, found))
    value = told[f"{measure.metric},{measure.filter}"]
    return Value(measure, arm, float(value), float(error) if _is_number(error) else None, n)


def _leaves(task: str, found: Mapping[str, Any]) -> list[str]:
    """The tasks of a group and of the groups in it; of a task, itself."""
    inner = found.get("group_subtasks", {}).get(task)
    return [leaf for name in inner for leaf in _leaves(name, found)] if inner else [task]


def _documents(measure: Measure, found: Mapping[str, Any]) -> Documents | None:
    """What each document contributes to a measure; None where that is neither number nor pair."""
    parts = {}
    for task in _leaves(measure.task, found):
        for sample in found["samples"][task]:
            if sample["filter"] == measure.filter and measure.metric in sample:
                part = sample[measure.metric]
                x, w = (part, 1.0) if _is_number(part) else part if _is_pair(part) else (None, 0)
                if x is None:
                    return None
                parts[task, sample["doc_id"]] = (float(x), float(w))
    return parts or None


def _form(
    values: Mapping[str, Value], documents: Mapping[str, Documents | None]
) -> Callable[[float], float] | None:
    """The function that makes each arm's reported value of its documents; None if there is none."""
    for form in FORMS.values():
        if all(
            parts is not None
            and math.isclose(_reported(form, parts), values[arm].value, rel_tol=1e-9, abs_tol=1e-12)
            for arm, parts in documents.items()
        ):
            return form
    return None


def _reported(form: Callable[[float], float], parts: Documents) -> float:
    try:
        return form(_ratio(np.array(list(parts.values()))))
    except (OverflowError, ZeroDivisionError):
        return math.nan


def _ratio(table: Table) -> float:
    x, w = table.sum(0)
    return float(x / w)


def _gap(
    measure: Measure,
    documents: Mapping[str, Documents | None],
    form: Callable[[float], float] | None,
    arm: str,
    against: str,
) -> Gap:
    if form is None:
        return Gap(measure, arm, against, 0, None, None, None, None, None)
    sides = [
        [parts for name, parts in documents.items() if pool_of(name) == pool and parts]
        for pool in (arm, against)
    ]
    keys = sorted(set.intersection(*(set(parts) for side in sides for parts in side)))
    ours, theirs = ([np.array([parts[key] for key in keys]) for parts in side] for side in sides)
    difference, low, high = _interval(ours, theirs, form)
    one, many = (theirs, ours) if against == UNSTEERED else (ours, theirs)
    return Gap(measure, arm, against, len(keys), difference, low, high, _exact_p(one, many), None)


def _interval(
    ours: Sequence[Table], theirs: Sequence[Table], form: Callable[[float], float]
) -> tuple[float, float, float]:
    """The difference of both sides' mean values, and its percentile interval over documents."""
    everything = np.arange(len(ours[0]))

    def gap(chosen: np.ndarray) -> float:
        sides = [
            np.mean([form(_ratio(table[chosen])) for table in side]) for side in (ours, theirs)
        ]
        return float(sides[0] - sides[1])

    if form is FORMS["mean"] and all((table[:, 1] == 1).all() for table in (*ours, *theirs)):
        by_item = np.mean([t[:, 0] for t in ours], axis=0) - np.mean([t[:, 0] for t in theirs], 0)
        return gap(everything), *mean_interval(by_item, seed=SEED)
    generator = np.random.default_rng(SEED)
    gaps = [
        gap(generator.integers(len(everything), size=len(everything))) for _ in range(RESAMPLES)
    ]
    low, high = percentile_interval(np.array(gaps))
    return gap(everything), float(low), float(high)


def _exact_p(one: Sequence[Table], many: Sequence[Table]) -> float | None:
    """p that a single arm is right as often as the others; None unless each is right or wrong."""
    if not all(np.isin(table, (0, 1)).all() and table[:, 1].all() for table in (*one, *many)):
        return None
    hits = np.stack([table[:, 0] for table in many], axis=1).astype(bool)
    return matched_p(one[0][:, 0].astype(bool).tolist(), hits.tolist())


def _with_holm(gaps: Sequence[Gap], pairs: Sequence[tuple[str, str]]) -> list[Gap]:
    adjusted: dict[int, float] = {}
    for pair in pairs:
        family = {
            place: gap.p
            for place, gap in enumerate(gaps)
            if (gap.arm, gap.against) == pair and gap.p is not None
        }
        adjusted |= dict(zip(family, holm(list(family.values())), strict=True))
    return [replace(gap, holm=adjusted.get(place)) for place, gap in enumerate(gaps)]


def _check_same_prompts(by_arm: Mapping[str, Mapping[str, Any]], where: str | Path) -> None:
    """An arm that was run before its task's file was changed answered other prompts."""

    def prompts(arm: str, task: str) -> list[tuple]:
        keys = ("doc_id", "filter", "doc_hash", "prompt_hash", "target_hash")
        return [tuple(s[key] for key in keys) for s in by_arm[arm]["samples"].get(task, [])]

    for task in by_arm[UNSTEERED]["samples"]:
        for arm in by_arm:
            if prompts(arm, task) != prompts(UNSTEERED, task):
                raise MoesteerError(
                    f"{where}: the arm {arm} answered other prompts of {task} than {UNSTEERED} did:"
                    " the task or its data changed meanwhile. Give another folder."
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))


def _key(measure: Measure) -> tuple[str, str, str]:
    return measure.task, measure.metric, measure.filter
