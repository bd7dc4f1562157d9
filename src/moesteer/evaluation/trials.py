"""One choice of experts, measured on the dev prompts: what a search makes many of.

A trial asks every task's prompts under the choice and takes the shares of their outcomes, and how
far the model diverges from the unsteered one on what it should still do. Limits on the price say
whether the choice is allowed; the best of the allowed ones moves the target furthest, and of equal
ones steers the fewest experts. Trials are written as they come, and never measured twice.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from moesteer.chat import TokenisedConversation
from moesteer.detection.selecting import select_experts
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.evaluation.drift import as_conversations, divergence
from moesteer.evaluation.evaluate import Asked
from moesteer.evaluation.judging import judge_replies
from moesteer.profile import Profile, Side
from moesteer.runs import Run

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

DOSES = (0.25, 0.5, 0.75, 1, 1.5, 2)
"""Points of the dose curve, in multiples of the numbers found."""

Optimiser = Literal["grid", "optuna"]


@dataclass(frozen=True)
class Trial:
    """One choice of experts, measured on the dev prompts.

    `stage` is "unsteered", "search" or "dose"; `control` is "random" in the search-matched control
    of `seed`, else None. `values` are the shares of the target's and the prices' outcomes, `kl` the
    mean divergence from the unsteered model on the prices' prompts (without any, on the target's).
    `objective`: the target's share, or, where a limit is broken, by how much, negative.
    """

    stage: str
    control: str | None
    seed: int
    detector: str
    activate: int
    deactivate: int
    toward: Side
    values: dict[str, float]
    kl: float
    allowed: bool
    objective: float


@dataclass(frozen=True)
class Plan:
    """What decides a search: the side, the least share of each price, the largest KL, and how many
    choices are proposed how. `seeds` is how many controls there are, `seed` the optimiser's.
    """

    toward: Side
    prices: dict[str, float]
    max_kl: float | None
    optimiser: Optimiser
    budget: int
    seeds: int
    seed: int

    @property
    def trials(self) -> int:
        """At most so many, those of the controls, the dose curve and the unsteered model too."""
        return self.budget * (1 + self.seeds) + len(DOSES) + 1

    def broken(self, values: Mapping[str, float], kl: float) -> float:
        """By how much the limits are broken, added up; 0: not at all."""
        short = sum(max(0.0, least - values[task]) for task, least in self.prices.items())
        over = 0.0 if self.max_kl is None else max(0.0, kl - self.max_kl)
        return short + over


@dataclass(frozen=True)
class Bench:
    """What every trial is measured on: the tasks, the target first, and the plan.

    `unsteered` holds, by task, the unsteered model's replies that KL is measured on, `known` the
    trials that the run has already; `told` is called at each trial.
    """

    engine: "Engine"
    run: Run
    tasks: Sequence[Asked]
    plan: Plan
    batch_size: int
    unsteered: dict[str, list[TokenisedConversation]]
    known: dict[tuple, Trial]
    told: Callable[[], None]


# -- measuring -----------------------------------------------------------------------------------


def measure_unsteered(bench: Bench) -> Trial:
    """The unsteered model on the same prompts; MoesteerError where it breaks the limits itself."""
    there = {(r["task"], r["item"]): r["reply"] for r in bench.run.lines("unsteered")}
    for task in bench.tasks:
        name = task.card.name
        missing = [(name, i) for i in range(len(task.items)) if (name, i) not in there]
        if missing:
            replies = _replies(bench, task, None)
            bench.run.add(
                "unsteered",
                [{"task": name, "item": i, "reply": replies[i]} for _, i in missing],
            )
            there |= {(name, i): replies[i] for _, i in missing}
    replies = {
        task.card.name: [there[task.card.name, i] for i in range(len(task.items))]
        for task in bench.tasks
    }
    values = {task.card.name: _share(task, replies[task.card.name]) for task in bench.tasks}
    for task in bench.tasks[1:] or bench.tasks[:1]:
        bench.unsteered[task.card.name] = as_conversations(
            bench.engine.tokenizer, task.prompts, replies[task.card.name]
        )
    broken = {
        name: share for name, share in values.items() if share < bench.plan.prices.get(name, 0)
    }
    for name, share in broken.items():
        raise MoesteerError(
            f"the unsteered model itself has {share:.3f} on {name}, and at least"
            f" {bench.plan.prices[name]:g} is asked for. Lower --prices, with another --out."
        )
    target = bench.tasks[0].card.name
    return _kept(
        bench,
        Trial("unsteered", None, 0, "", 0, 0, bench.plan.toward, values, 0.0, True, values[target]),
    )


def measure(
    bench: Bench,
    ranking: Profile,
    label: str,
    numbers: tuple[int, int],
    stage: Literal["search", "dose"],
    control: int | None,
) -> Trial:
    """One choice on the dev prompts; taken from the run where it is there."""
    activate, deactivate = numbers
    kind = None if control is None else "random"
    blank = Trial(
        stage,
        kind,
        control or 0,
        label,
        activate,
        deactivate,
        bench.plan.toward,
        {},
        0.0,
        True,
        0.0,
    )
    found = bench.known.get(key_of(blank))
    if found is None:
        profile = _select(ranking, numbers, bench.plan.toward)
        values = {
            task.card.name: _share(task, _replies(bench, task, profile)) for task in bench.tasks
        }
        kl = _kl(bench, profile)
        broken = bench.plan.broken(values, kl)
        target = values[bench.tasks[0].card.name]
        found = replace(
            blank, values=values, kl=kl, allowed=not broken, objective=-broken if broken else target
        )
    return _kept(bench, replace(found, stage=stage))


def _kept(bench: Bench, trial: Trial) -> Trial:
    """The trial, written to the run unless it is there."""
    if key_of(trial) not in bench.known:
        bench.known[key_of(trial)] = trial
        bench.run.add("trials", [asdict(trial)])
    bench.told()
    return trial


def _replies(bench: Bench, task: Asked, profile: Profile | None) -> list[str]:
    return bench.engine.generate(
        task.prompts,
        profile,
        max_new_tokens=task.max_new_tokens,
        batch_size=bench.batch_size,
    ).replies


def _share(task: Asked, replies: Sequence[str]) -> float:
    """Share of the task's outcome among the replies that could be judged."""
    judged = judge_replies(task.card, task.judges, task.items, replies)
    outcomes = [one.outcome for one in judged if one.outcome is not None]
    if not outcomes:
        why = judged[0].verdicts[0].note if judged else "there are none"
        raise MoesteerError(f"none of the replies to {task.card.name} could be judged: {why}")
    return sum(outcome == task.card.outcome for outcome in outcomes) / len(outcomes)


def _kl(bench: Bench, profile: Profile) -> float:
    by_task = [
        divergence(bench.engine, conversations, profile, bench.batch_size)
        for conversations in bench.unsteered.values()
    ]
    return float(np.mean([kl for kl in by_task if kl is not None] or [0.0]))


# -- choosing ------------------------------------------------------------------------------------


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The allowed trial with the largest target share, of equal ones that with the fewest experts.

    None where no trial is allowed.
    """
    allowed = [trial for trial in trials if trial.allowed]
    return max(
        allowed,
        key=lambda t: (t.objective, -(t.activate + t.deactivate), -t.kl),
        default=None,
    )


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other equals in every task's share and beats in one.

    Of several with the same shares, the one with the fewest experts.
    """

    def beats(one: Trial, other: Trial) -> bool:
        pairs = [(share, other.values[task]) for task, share in one.values.items()]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    fewest: dict[tuple, Trial] = {}
    for trial in sorted(trials, key=lambda t: (t.activate + t.deactivate, t.kl)):
        fewest.setdefault(tuple(sorted(trial.values.items())), trial)
    left = list(fewest.values())
    return [trial for trial in left if not any(beats(other, trial) for other in left)]


def best_or_error(trials: Sequence[Trial]) -> Trial:
    best = best_of(trials)
    if best is None:
        nearest = max(trials, key=lambda trial: trial.objective)
        raise MoesteerError(
            f"none of {len(trials)} choices keeps to the limits; the nearest ({words(nearest)})"
            f" gives {nearest.values}, KL {nearest.kl:.3g}. Loosen --prices or --max-kl, or give"
            " another ranking, with another --out."
        )
    return best


def chosen_by(rankings: Mapping[str, Profile], trial: Trial) -> Profile:
    return _select(rankings[trial.detector], (trial.activate, trial.deactivate), trial.toward)


def _select(ranking: Profile, numbers: tuple[int, int], toward: Side) -> Profile:
    activate, deactivate = numbers
    with warnings.catch_warnings():
        # Equal or uncertain scores are no matter here: a choice is judged by what it does on dev.
        warnings.simplefilter("ignore", MoesteerWarning)
        return select_experts(ranking, activate=activate, deactivate=deactivate, toward=toward)


def key_of(trial: Trial) -> tuple:
    """What decides a trial's values, whatever it was tried for."""
    chosen = (trial.control, trial.seed, trial.detector, trial.activate, trial.deactivate)
    return (trial.stage == "unsteered", *chosen)


def words(trial: Trial) -> str:
    return f"{trial.activate} activated, {trial.deactivate} deactivated by {trial.detector}"
