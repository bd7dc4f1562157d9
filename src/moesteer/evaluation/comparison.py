"""From judged replies to shares and differences, each with its uncertainty.

A task's value is the share of its judged replies that are the task's outcome. Arms answer the same
prompts, so differences are paired: item by item, then averaged. A pool of control arms (three
random seeds, say) counts as one: an item's value in it is the mean over the seeds.

    share        Wilson's score interval (1927)
    difference   percentile bootstrap over items (Efron & Tibshirani 1993, chapter 13)
    p            exact conditional test of one arm against s matched ones (Miettinen 1969): had the
                 arms been exchangeable, an item with t hits among its 1 + s replies would show one
                 of them in the single arm with probability t / (1 + s). With s = 1 it is McNemar's
                 exact test on the discordant pairs.
    holm         p adjusted over the tasks of one comparison (Holm 1979)

All of it speaks of items: of other prompts of this kind, not of other random seeds. How far seeds
lie apart is seen in the arms' own shares; the verdict asks for more than that. With 20 items and a
rare outcome the bootstrap holds the truth some 90 % of the time, with 60 about 95 %.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moesteer.errors import MoesteerError
from moesteer.statistics.intervals import mean_interval, wilson_interval
from moesteer.statistics.paired import holm, matched_p
from moesteer.summaries import as_json, from_json

SUMMARY_SCHEMA = 1

UNSTEERED, STEERED = "unsteered", "steered"
UNGATED = "ungated"
"""The arm of a profile whose gate was taken off: what it does to every request."""


@dataclass(frozen=True)
class TaskFacts:
    """What was asked: `items` prompts, judged for the share of `outcome` among `outcomes`.

    `check` says how the judge stood on replies of known outcome, or that it was never checked;
    `agreement` how often several judges differ. Replies of a task that is not `harmless` are not to
    be shown.
    """

    name: str
    title: str
    outcome: str
    outcomes: tuple[str, ...]
    role: Literal["target", "price"]
    harmless: bool
    items: int
    check: str
    agreement: str = ""


@dataclass(frozen=True)
class ArmFacts:
    """What an arm steers, as (layer, expert), and that it did: `tokens` ran under it.

    `obeyed`: every token selected each activated expert and no deactivated one, and the stream
    moved as far along each direction as it should; also where no prompt opened the arm's gate, and
    no token ran under it. `directions` say what each does, in words,
    `note` what the arm could not do as it should.
    """

    name: str
    activated: tuple[tuple[int, int], ...] = ()
    deactivated: tuple[tuple[int, int], ...] = ()
    tokens: int = 0
    obeyed: bool = True
    note: str = ""
    directions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """`count` of `n` judged replies of an arm are the task's outcome; `low` and `high`: Wilson.

    `share` is None where no reply could be judged. `outcomes` counts all of them by name.
    """

    task: str
    arm: str
    n: int
    count: int
    share: float | None
    low: float
    high: float
    unjudged: int
    outcomes: dict[str, int]


@dataclass(frozen=True)
class Difference:
    """Mean over `n` items of the share in `arm` minus that in `against`, from −1 to 1.

    Both name an arm or a pool of arms ("random" for "random 0", "random 1", …). An item counts
    where both sides have a judged reply; without any, all values are None.
    """

    task: str
    arm: str
    against: str
    n: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    holm: float | None


@dataclass(frozen=True)
class Drift:
    """How far an arm moved from the unsteered model on a task: see `moesteer.evaluation.drift`.

    `kl` in nats a token, `routing` from 0 to 1; None where there was nothing to measure on.
    """

    task: str
    arm: str
    kl: float | None
    routing: float | None


@dataclass(frozen=True)
class Gated:
    """Of a profile with a gate: `opened` of a task's `prompts` opened it and were steered in `arm`,
    with Wilson's interval. The others were left alone."""

    task: str
    arm: str
    opened: int
    prompts: int
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A profile beside its controls: everything that `summary.json` holds."""

    model: str
    profile: str
    split: str
    seed: int
    tasks: tuple[TaskFacts, ...]
    arms: tuple[ArmFacts, ...]
    shares: tuple[Share, ...]
    differences: tuple[Difference, ...]
    drifts: tuple[Drift, ...] = ()
    notes: tuple[str, ...] = ()
    gates: tuple[Gated, ...] = ()

    def share(self, task: str, arm: str) -> Share:
        """The share of one task in one arm; KeyError where there is none."""
        found = {(share.task, share.arm): share for share in self.shares}
        return found[task, arm]

    def difference(self, task: str, arm: str, against: str) -> Difference:
        """One difference; KeyError where there is none."""
        found = {(d.task, d.arm, d.against): d for d in self.differences}
        return found[task, arm, against]

    def to_json(self) -> str:
        """The comparison as one JSON object, with the schema's number."""
        return as_json(self, SUMMARY_SCHEMA)

    @classmethod
    def from_json(cls, text: str, where: str | Path = "summary.json") -> "Comparison":
        """Read what `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        read = from_json(cls, text, where, SUMMARY_SCHEMA, "a comparison")
        read.check_whole(where)
        return read

    def check_whole(self, where: str | Path) -> None:
        """MoesteerError, beginning with `where`, unless all tasks, arms and pools are there."""
        arms = [arm.name for arm in self.arms]
        shares = {(share.task, share.arm) for share in self.shares}
        differences = {(d.task, d.arm, d.against) for d in self.differences}
        whole = {UNSTEERED, STEERED} <= set(arms) and all(
            {(task.name, arm) for arm in arms} <= shares
            and {(task.name, *pair) for pair in compared(arms)} <= differences
            for task in self.tasks
        )
        if not whole or not self.tasks:
            raise MoesteerError(
                f"{where} does not hold every task, arm and difference; delete it and run the"
                " command again, which makes it from the replies."
            )


def pool_of(arm: str) -> str:
    """The pool an arm belongs to: "random" for "random 2"; other arms are their own."""
    name, _, seed = arm.rpartition(" ")
    return name if name and seed.isdigit() else arm


def compared(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Which pool is compared with which: every one with unsteered, steered with every other."""
    pools = list(dict.fromkeys(pool_of(arm) for arm in arms))
    pairs = [(pool, UNSTEERED) for pool in pools if pool != UNSTEERED]
    return pairs + [(STEERED, pool) for pool in pools if pool not in (UNSTEERED, STEERED)]


Values = Mapping[str, Mapping[int, bool]]
"""By arm and item: whether the reply is the task's outcome; unjudged items are left out."""


def compare(
    tasks: Sequence[TaskFacts], arms: Sequence[str], records: Iterable[Mapping[str, Any]], seed: int
) -> tuple[list[Share], list[Difference]]:
    """Shares of every task and arm, and all differences with Holm's p over the tasks.

    `records` hold task, arm, item and outcome (None: unjudged). Every pool is compared with the
    unsteered arm, and the steered arm with every other pool.
    """
    outcomes: dict[tuple[str, str], dict[int, str | None]] = {}
    for record in records:
        outcomes.setdefault((record["task"], record["arm"]), {})[record["item"]] = record["outcome"]
    shares: list[Share] = []
    differences: list[Difference] = []
    pairs = compared(arms)
    for task in tasks:
        by_arm = {arm: outcomes.get((task.name, arm), {}) for arm in arms}
        shares += [_share(task, arm, found) for arm, found in by_arm.items()]
        hits = {
            arm: {item: said == task.outcome for item, said in found.items() if said is not None}
            for arm, found in by_arm.items()
        }
        differences += [_difference(task.name, hits, *pair, seed) for pair in pairs]
    return shares, _with_holm(differences, pairs)


def _share(task: TaskFacts, arm: str, outcomes: Mapping[int, str | None]) -> Share:
    said = Counter(outcome for outcome in outcomes.values() if outcome is not None)
    n, count = said.total(), said[task.outcome]
    low, high = wilson_interval(count, n)
    named = {name: said[name] for name in dict.fromkeys((*task.outcomes, *sorted(said)))}
    share = count / n if n else None
    return Share(task.name, arm, n, count, share, low, high, len(outcomes) - n, named)


def _difference(task: str, hits: Values, arm: str, against: str, seed: int) -> Difference:
    ours, theirs = (_pooled(hits, pool) for pool in (arm, against))
    items = sorted(ours.keys() & theirs.keys())
    if not items:
        return Difference(task, arm, against, 0, None, None, None, None, None)
    by_item = np.array([np.mean(ours[i]) - np.mean(theirs[i]) for i in items])
    low, high = mean_interval(by_item, seed=seed)
    # One of the two is a single arm always: it stands against the other's seeds.
    one, many = (theirs, ours) if against == UNSTEERED else (ours, theirs)
    p = matched_p([one[i][0] for i in items], [many[i] for i in items])
    return Difference(task, arm, against, len(items), float(by_item.mean()), low, high, p, None)


def _pooled(hits: Values, pool: str) -> dict[int, list[bool]]:
    """By item, the judged replies of a pool's arms."""
    found: dict[int, list[bool]] = {}
    for arm, by_item in hits.items():
        if pool_of(arm) == pool:
            for item, hit in by_item.items():
                found.setdefault(item, []).append(hit)
    return found


def _with_holm(
    differences: Sequence[Difference], pairs: Sequence[tuple[str, str]]
) -> list[Difference]:
    adjusted: dict[int, float] = {}
    for pair in pairs:
        family = {
            place: d.p
            for place, d in enumerate(differences)
            if (d.arm, d.against) == pair and d.p is not None
        }
        adjusted |= dict(zip(family, holm(list(family.values())), strict=True))
    return [
        Difference(**{**vars(d), "holm": adjusted.get(place)})
        for place, d in enumerate(differences)
    ]
