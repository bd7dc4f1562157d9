"""From readings to tables: alignment and faithfulness of every method, each with its uncertainty.

Accuracy and the balance of labels stand first: where a model guesses, or says one label always, a
flip means little, and `doubtful` says so. Every method stands beside random units of its count, and
is compared with every other, faithfulness at equal counts only: at different ones it is confounded
(arXiv 2601.03089). Arms are compared instance by instance, faithfulness at equal counts here, too.

    accuracy            Wilson's score interval (1927)
    mean, difference    percentile bootstrap over instances, see `resampling`
    p                   sign-flip test of the differences by instance
    holm                p adjusted (Holm 1979) over the methods, or the pairs of them, of one
                        measure and arm; for changes over the methods of one measure

Where arms are compared, "random 0", "random 1", … are one: the mean of each instance over them.
Arms of several runs are compared within their run, and with the first run.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np

from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import (
    STEERED,
    UNSTEERED,
    compared,
)
from moesteer.rationale.measures import (
    ACCURACY,
    RANDOM,
    Column,
    Columns,
    Key,
    arm_pool,
    baseline_of,
    columns_of,
    control_of,
    methods_of,
    pooled,
)
from moesteer.rationale.prompting import ONE_TURN
from moesteer.rationale.reading import Reading
from moesteer.rationale.resampling import bootstrap_intervals, counts_and_means, sign_flip_p
from moesteer.statistics.intervals import wilson_interval
from moesteer.statistics.paired import holm
from moesteer.summaries import as_json, from_json

SUMMARY_SCHEMA = 1

COMPARED = (
    "f1",
    "auprc",
    "flip",
    "comprehensiveness",
    "sufficiency",
    "comprehensiveness_area",
    "sufficiency_area",
)
"""The measures by which methods are compared."""
AT_EQUAL_COUNTS = ("flip", "comprehensiveness", "sufficiency")
"""Those that compare nothing, methods or arms, unless about equally many tokens of each instance
were masked."""
CHANGED = (ACCURACY, "tokens", *COMPARED)
"""The measures by which arms are compared, beside every `in:TEXT`."""
MEANT = 0.01
"""Labels that are less probable than this, all together, are not what the model would say."""
COLLAPSED, BALANCED = 0.9, 0.8
"""A label that takes this share of the predictions, and less than that of what is right, has taken
over."""


@dataclass(frozen=True)
class ArmFacts:
    """How an arm labels `n` instances, `right` of them as people do; `low`, `high`: Wilson.

    `gold` and `predicted` count the instances by label, in the same order of labels; `majority` is
    the share of the commonest gold label: what saying it always would reach. `mass`: how probable
    all labels' words are together as the reply, the median over instances: a model that would say
    something else chooses among words that it does not mean.
    """

    name: str
    n: int
    right: int
    accuracy: float
    low: float
    high: float
    majority: float
    gold: dict[str, int]
    predicted: dict[str, int]
    mass: float

    @property
    def doubt(self) -> str | None:
        """Why the arm's flip rates mean little; None where they mean something."""
        return doubtful(self)


@dataclass(frozen=True)
class Mean:
    """Mean of a measure over the `n` instances that have it, with its bootstrap interval.

    `share`: the share of the units that were masked, for a point of a curve; else None.
    """

    arm: str
    method: str
    measure: str
    n: int
    value: float
    low: float
    high: float
    share: float | None = None


@dataclass(frozen=True)
class Difference:
    """Mean over `n` instances of `method`'s value minus that of `against`, in one arm.

    `against` is another method, or the random units of as many tokens (`baseline_of`). Faithfulness
    of two methods is compared only where both were to choose as many tokens of each instance.
    """

    arm: str
    measure: str
    method: str
    against: str
    n: int
    difference: float
    low: float
    high: float
    p: float
    holm: float


@dataclass(frozen=True)
class Change:
    """Mean over `n` instances of a method's value under `arm` minus that under `against`.

    Of `accuracy` too, with an empty `method`. Faithfulness only where the method was to
    choose as many tokens of each instance under both.
    """

    measure: str
    method: str
    arm: str
    against: str
    n: int
    difference: float
    low: float
    high: float
    p: float
    holm: float


@dataclass(frozen=True)
class Prompted:
    """What an arm said in `replies` replies to one way of asking.

    `empty` of them named no word of the instance. Over all replies: `words` named, of which
    `absent` are not in the texts, `inflected` were found by their stem only and `surplus` went
    beyond the number asked for. `cut` replies are as long as they were allowed to be. `otherwise`:
    of a one-turn way, those that open with another label than the predicted one, or with none.
    """

    arm: str
    method: str
    replies: int
    empty: int
    words: int
    absent: int
    inflected: int
    surplus: int
    cut: int
    otherwise: int


@dataclass(frozen=True)
class Summary:
    """Everything that `summary.json` holds. Arms and methods in the order of the readings.

    `means` hold every (arm, method, measure) that some instance has; `curves` those of flip,
    comprehensiveness and sufficiency at each of the `shares`. `changes` are of every arm from the
    unsteered one and of the steered arm from its controls, where there are such arms.
    """

    seed: int
    arms: tuple[ArmFacts, ...]
    methods: tuple[str, ...]
    shares: tuple[float, ...]
    means: tuple[Mean, ...]
    curves: tuple[Mean, ...]
    differences: tuple[Difference, ...]
    changes: tuple[Change, ...]
    prompted: tuple[Prompted, ...]

    def arm(self, name: str) -> ArmFacts:
        """An arm's facts; KeyError where there is no such arm."""
        return {arm.name: arm for arm in self.arms}[name]

    def mean(self, arm: str, method: str, measure: str) -> Mean | None:
        """One mean; None where no instance of the arm has this measure of the method."""
        found = (m for m in self.means if (m.arm, m.method, m.measure) == (arm, method, measure))
        return next(found, None)

    def curve(self, arm: str, method: str, measure: str) -> tuple[Mean, ...]:
        """A curve's points in the order of `shares`; empty where the method has none."""
        return tuple(
            m for m in self.curves if (m.arm, m.method, m.measure) == (arm, method, measure)
        )

    def difference(self, arm: str, measure: str, method: str, against: str) -> Difference | None:
        """One difference; None where these two are not compared."""
        wanted = (arm, measure, method, against)
        found = (d for d in self.differences if (d.arm, d.measure, d.method, d.against) == wanted)
        return next(found, None)

    def change(self, measure: str, method: str, arm: str, against: str) -> Change | None:
        """One change between arms; None where it is not known."""
        wanted = (measure, method, arm, against)
        found = (c for c in self.changes if (c.measure, c.method, c.arm, c.against) == wanted)
        return next(found, None)

    def to_json(self) -> str:
        """The summary as one JSON object, with the schema's number."""
        return as_json(self, SUMMARY_SCHEMA)

    @classmethod
    def from_json(cls, text: str, where: str | Path = "summary.json") -> "Summary":
        """Read what `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        return from_json(cls, text, where, SUMMARY_SCHEMA, "a summary of rationales")


def doubtful(arm: ArmFacts) -> str | None:
    """Why flips of an arm's labels mean little, as a clause; None where they mean something.

    Either its accuracy's interval reaches down to what saying the commonest label always would, or
    one label has at least `COLLAPSED` of the predictions and less than `BALANCED` of the instances,
    or all labels together are less probable than `MEANT`.
    """
    commonest = max(arm.gold, key=lambda label: arm.gold[label])
    if arm.low <= arm.majority:
        return (
            f"{arm.right} of {arm.n} instances are labelled rightly ({arm.accuracy:.0%}, interval"
            f" {arm.low:.0%} to {arm.high:.0%}), where always saying “{commonest}” would reach"
            f" {arm.majority:.0%}"
        )
    said = max(arm.predicted, key=lambda label: arm.predicted[label])
    predicted, right = arm.predicted[said] / arm.n, arm.gold[said] / arm.n
    if predicted >= COLLAPSED and right < BALANCED:
        return f"“{said}” takes {predicted:.0%} of the predictions, but is right for {right:.0%}"
    if arm.mass < MEANT:
        return (
            f"the labels' words have {arm.mass:.2g} of the probability of all replies together"
            " (median): the model would say something else"
        )
    return None


def summarise(readings: Sequence[Reading], seed: int = 0) -> Summary:
    """Tables of readings, at most one of each instance and arm; `seed` draws the resamples.

    Raises MoesteerError where there is no reading.
    """
    if not readings:
        raise MoesteerError("there are no readings to summarise; the run has read no instance.")
    arms = _arms(readings)
    methods = methods_of(readings)
    columns = columns_of(readings)
    differences = [row for arm in arms for row in _differences(columns, arm, methods, seed)]
    return Summary(
        seed,
        tuple(_facts(name, [r for r in readings if r.arm == name]) for name in arms),
        methods,
        max((reading.shares for reading in readings), key=len),
        tuple(_means(columns, arms, lambda key: key.share is None and key.method != "", seed)),
        tuple(_means(columns, arms, lambda key: key.share is not None, seed)),
        tuple(differences),
        tuple(_changes(pooled(columns), arms, seed)),
        tuple(_prompted(readings, arms)),
    )


def _arms(readings: Iterable[Reading]) -> tuple[str, ...]:
    """The arms, the unsteered and the steered one before their controls."""
    found = dict.fromkeys(reading.arm for reading in readings)
    first = [arm for arm in (UNSTEERED, STEERED) if arm in found]
    return tuple(dict.fromkeys((*first, *found)))


def _facts(arm: str, readings: Sequence[Reading]) -> ArmFacts:
    labels = tuple(dict.fromkeys(label for r in readings for label in r.probabilities))
    gold = Counter(reading.label for reading in readings)
    predicted = Counter(reading.predicted for reading in readings)
    right = sum(reading.predicted == reading.label for reading in readings)
    n = len(readings)
    return ArmFacts(
        arm,
        n,
        right,
        right / n,
        *wilson_interval(right, n),
        max(gold.values()) / n,
        {label: gold[label] for label in labels},
        {label: predicted[label] for label in labels},
        median(reading.mass for reading in readings),
    )


# -- tables --------------------------------------------------------------------------------------


def _means(
    columns: Columns, arms: Sequence[str], wanted: Callable[[Key], bool], seed: int
) -> Iterator[Mean]:
    for arm in arms:
        chosen = {key: column for key, column in columns.items() if key.arm == arm and wanted(key)}
        for key, (n, value, low, high) in _with_intervals(chosen, seed).items():
            yield Mean(arm, key.method, key.measure, n, value, low, high, key.share)


def _differences(
    columns: Columns, arm: str, methods: Sequence[str], seed: int
) -> Iterator[Difference]:
    """Each method against its random units, and each against every later one."""
    chosen = [method for method in methods if method.split()[0] != RANDOM]
    families = {
        "random": [(method, baseline_of(method, methods)) for method in chosen],
        "pairs": list(combinations(chosen, 2)),
    }
    found: dict[tuple[str, str, str, str], Column] = {}
    for family, pairs in families.items():
        for measure in COMPARED:
            for method, against in pairs:
                one, other = (
                    columns.get(Key(arm, name, measure, None)) for name in (method, against)
                )
                if one is None or other is None or np.isnan(one - other).all():
                    continue
                if measure in AT_EQUAL_COUNTS and not (
                    against == baseline_of(method, methods)
                    or _equal_counts(columns, (arm, method), (arm, against))
                ):
                    continue
                found[measure, family, method, against] = one - other
    tested = _tested(found, lambda key: key[:2], seed)
    for (measure, _, method, against), numbers in tested.items():
        yield Difference(arm, measure, method, against, *numbers)


def _equal_counts(columns: Columns, *two: tuple[str, str]) -> bool:
    """Whether two methods, each in its arm, were to choose as many tokens of each instance: as many
    as people marked, or as it happens (prompted methods choose as many as the model named)."""
    controls = {key.method for key in columns if key.method.startswith(f"{RANDOM} ")}
    if not any(method in controls or control_of(method) in controls for _, method in two):
        return True
    one, other = (columns[Key(arm, method, "tokens", None)] for arm, method in two)
    return bool(((one == other) | np.isnan(one - other)).all())


def _between_runs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Each arm of several runs, `RUN` or `RUN: ARM`, with the first of its own run and with the
    same one of the first run."""
    pools = list(dict.fromkeys(map(arm_pool, arms)))
    run = {arm: arm.rpartition(": ")[0] for arm in pools}
    name = {arm: arm.rpartition(": ")[2] for arm in pools}
    found: dict[tuple[str, str], None] = {}
    for arm in pools:
        alike = [other for other in pools if run[other] == run[arm]]
        same = [other for other in pools if name[other] == name[arm] or not run[other]]
        for against in (alike[0], same[0]):
            if against != arm:
                found[arm, against] = None
    return list(found)


def _changes(columns: Columns, arms: Sequence[str], seed: int) -> Iterator[Change]:
    found: dict[tuple[str, str, str, str], Column] = {}
    pairs = compared(arms) if UNSTEERED in arms else _between_runs(arms)
    for arm, against in pairs:
        for key in columns:
            changed = key.measure in CHANGED or key.measure.startswith("in:")
            other = columns.get(key._replace(arm=against))
            if key.arm == arm and key.share is None and changed and other is not None:
                if key.measure in AT_EQUAL_COUNTS and not _equal_counts(
                    columns, (arm, key.method), (against, key.method)
                ):
                    continue
                difference = columns[key] - other
                if not np.isnan(difference).all():
                    found[key.measure, arm, against, key.method] = difference
    tested = _tested(found, lambda key: key[:3], seed)
    for (measure, arm, against, method), numbers in tested.items():
        yield Change(measure, method, arm, against, *numbers)


K = TypeVar("K", bound=Hashable)


def _with_intervals(
    columns: Mapping[K, Column], seed: int
) -> dict[K, tuple[int, float, float, float]]:
    """By column: over how many instances, their mean, and its interval."""
    if not columns:
        return {}
    table = np.stack(list(columns.values()), axis=1)
    n, means = counts_and_means(table)
    low, high = bootstrap_intervals(table, seed)
    rows = zip(n.tolist(), means.tolist(), low.tolist(), high.tolist(), strict=True)
    return dict(zip(columns, rows, strict=True))


def _tested(
    columns: Mapping[K, Column], family_of: Callable[[K], Hashable], seed: int
) -> dict[K, tuple[int, float, float, float, float, float]]:
    """By column of differences: n, mean, interval, p, and Holm's p among those of its family."""
    if not columns:
        return {}
    p = sign_flip_p(np.stack(list(columns.values()), axis=1), seed).tolist()
    families: dict[Hashable, dict[K, float]] = {}
    for key, value in zip(columns, p, strict=True):
        families.setdefault(family_of(key), {})[key] = value
    adjusted: dict[K, float] = {}
    for family in families.values():
        adjusted |= zip(family, holm(list(family.values())), strict=True)
    with_intervals = _with_intervals(columns, seed)
    return {
        key: (*with_intervals[key], value, adjusted[key])
        for key, value in zip(columns, p, strict=True)
    }


def _prompted(readings: Sequence[Reading], arms: Sequence[str]) -> Iterator[Prompted]:
    methods = dict.fromkeys(method for reading in readings for method in reading.named)
    for arm in arms:
        for method in methods:
            asked = [r for r in readings if r.arm == arm and method in r.named]
            named = [reading.named[method] for reading in asked]
            if named:
                yield Prompted(
                    arm,
                    method,
                    len(named),
                    sum(not reading.choices[method].units for reading in asked),
                    sum(reply.words for reply in named),
                    sum(len(reply.absent) for reply in named),
                    sum(reply.inflected for reply in named),
                    sum(reply.surplus for reply in named),
                    sum(reply.cut for reply in named),
                    sum(r.named[method].label != r.predicted for r in asked if method in ONE_TURN),
                )
