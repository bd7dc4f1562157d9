"""Choices of direction, measured on the dev prompts in two stages.

Stage 1 reads the mean refusal score of the target's prompts under every choice. Stage 2 goes from
the best score downwards, leaves out what moves the next token of other prompts by more than a KL,
and judges the replies of the rest, as many as the budget allows. What is measured is written as it
comes, and never measured twice.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moesteer.directions.prompts import AskedPrompt
from moesteer.directions.refusal import refusal_scores, refusal_tokens_of
from moesteer.directions.selection import mean_kl
from moesteer.errors import MoesteerError
from moesteer.evaluation.direction_choices import Choice, DirectionPlan, steered_by
from moesteer.evaluation.evaluate import Asked
from moesteer.evaluation.judging import judge_replies
from moesteer.profile import Profile
from moesteer.runs import Run

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

TOGETHER = 64
"""Choices whose scores are read, and written, together."""

FILES = {"scores": "score", "kl": "kl", "judged": "outcomes"}
"""The run's files, and the key in a line of each that is not the choice's."""


@dataclass(frozen=True)
class DirectionTrial:
    """A choice and what is known of it; None: the unsteered model.

    `score` is the mean refusal score of the target's prompts, `kl` the mean divergence from the
    unsteered model of the token after the prices' prompts (without any, the target's), None where
    it was not measured. `outcomes` counts the judged replies by task and outcome, empty before
    stage 2. `objective` is the target's share there, or, where a limit is broken, by how much,
    negative; None before.
    """

    choice: Choice | None
    score: float
    kl: float | None = None
    outcomes: dict[str, dict[str, int]] | None = None
    allowed: bool = True
    objective: float | None = None


class Bench:
    """What every choice is measured on, and what the run knows already.

    The target is the first of the tasks; KL is measured on the others, or else on it.
    """

    def __init__(
        self,
        engine: "Engine",
        run: Run,
        tasks: Sequence[Asked],
        source: Profile,
        plan: DirectionPlan,
        batch_size: int,
        told: Callable[[int], None],
    ) -> None:
        self.engine, self.run, self.tasks, self.source = engine, run, tasks, source
        self.plan, self.batch_size, self.told = plan, batch_size, told
        self.tokens = refusal_tokens_of(source)
        self.prompts = _prompts(engine, tasks[0])
        self.beside = [prompt for task in tasks[1:] for prompt in _prompts(engine, task)]
        self.scores, self.kl, self.judged = (_known(run, name) for name in FILES)


def _prompts(engine: "Engine", task: Asked) -> list[AskedPrompt]:
    encoded = [engine.tokenizer(p, add_special_tokens=False)["input_ids"] for p in task.prompts]
    return [
        AskedPrompt(prompt, tuple(ids), 0, item.source)
        for prompt, ids, item in zip(task.prompts, encoded, task.items, strict=True)
    ]


# -- the stages ----------------------------------------------------------------------------------


def search_among(bench: Bench, tried: Sequence[Choice]) -> list[DirectionTrial]:
    """Both stages; the judged trials, the best score first."""
    _read_scores(bench, tried)
    sign = 1 if bench.plan.toward == "a" else -1
    ranked = sorted(tried, key=lambda choice: -sign * bench.scores[choice])
    found = []
    for choice in ranked:
        if len(found) == bench.plan.budget:
            break
        if _kl(bench, choice) <= bench.plan.max_kl:
            found.append(_judge(bench, choice))
            bench.told(1)
    bench.told(bench.plan.budget - len(found))
    return found


def _read_scores(bench: Bench, tried: Sequence[Choice]) -> None:
    """Stage 1 for what the run does not hold, some choices at a time."""
    for start in range(0, len(tried), TOGETHER):
        some = tried[start : start + TOGETHER]
        missing = [choice for choice in some if choice not in bench.scores]
        if missing:
            profiles = [steered_by(bench.source, choice) for choice in some]
            read = refusal_scores(bench.engine, bench.prompts, bench.tokens, profiles).mean(-1)
            by_choice = dict(zip(some, map(float, read), strict=True))
            _add(bench.run, "scores", {choice: by_choice[choice] for choice in missing})
            bench.scores |= {choice: by_choice[choice] for choice in missing}
        bench.told(len(some))


def _kl(bench: Bench, choice: Choice) -> float:
    if choice not in bench.kl:
        found = mean_kl(
            bench.engine, bench.beside or bench.prompts, steered_by(bench.source, choice)
        )
        _add(bench.run, "kl", {choice: found})
        bench.kl[choice] = found
    return bench.kl[choice]


def _judge(bench: Bench, choice: Choice | None) -> DirectionTrial:
    """Stage 2: the judged replies to all tasks; of None, those of the unsteered model."""
    if choice not in bench.judged:
        profile = None if choice is None else steered_by(bench.source, choice)
        outcomes = {task.card.name: _outcomes(bench, task, profile) for task in bench.tasks}
        _add(bench.run, "judged", {choice: outcomes})
        bench.judged[choice] = outcomes
    outcomes = bench.judged[choice]
    target = bench.tasks[0].card
    broken = sum(
        max(0.0, least - share_of(outcomes[task.card.name], task.card.outcome))
        for task in bench.tasks[1:]
        for least in [bench.plan.prices[task.card.name]]
    )
    share = share_of(outcomes[target.name], target.outcome)
    kl = 0.0 if choice is None else bench.kl[choice]
    objective = -broken if broken else share
    return DirectionTrial(choice, bench.scores[choice], kl, outcomes, not broken, objective)


def _outcomes(bench: Bench, task: Asked, profile: Profile | None) -> dict[str, int]:
    """How many replies have which outcome, all of the card's first; unjudged ones are left out."""
    replies = bench.engine.generate(
        task.prompts,
        profile,
        max_new_tokens=task.max_new_tokens,
        batch_size=bench.batch_size,
    ).replies
    judged = judge_replies(task.card, task.judges, task.items, replies)
    counted = Counter(one.outcome for one in judged if one.outcome is not None)
    if not counted:
        why = judged[0].verdicts[0].note if judged else "there are none"
        raise MoesteerError(f"none of the replies to {task.card.name} could be judged: {why}")
    return {name: counted[name] for name in dict.fromkeys((*task.card.outcomes, *counted))}


def share_of(outcomes: Mapping[str, int], outcome: str) -> float:
    return outcomes.get(outcome, 0) / sum(outcomes.values())


def measure_unsteered(bench: Bench) -> DirectionTrial:
    """The unsteered model on the same prompts; MoesteerError where it breaks the limits itself."""
    if None not in bench.scores:
        score = float(refusal_scores(bench.engine, bench.prompts, bench.tokens).mean())
        _add(bench.run, "scores", {None: score})
        bench.scores[None] = score
    trial = _judge(bench, None)
    for task in bench.tasks[1:]:
        name, least = task.card.name, bench.plan.prices[task.card.name]
        share = share_of(bench.judged[None][name], task.card.outcome)
        if share < least:
            raise MoesteerError(
                f"the unsteered model itself has {share:.3f} on {name}, and at least {least:g} is"
                " asked for. Lower --prices, with another --out."
            )
    return trial


# -- the best ------------------------------------------------------------------------------------


def best_of(judged: Sequence[DirectionTrial]) -> DirectionTrial | None:
    """The allowed trial with the largest target share; of equal ones that of the smallest KL."""
    allowed = [trial for trial in judged if trial.allowed]
    return max(allowed, key=lambda t: (t.objective or 0.0, -(t.kl or 0.0)), default=None)


def best_or_error(
    bench: Bench, tried: Sequence[Choice], judged: Sequence[DirectionTrial]
) -> DirectionTrial:
    best = best_of(judged)
    if best is not None:
        return best
    if not judged:
        nearest = min(tried, key=lambda choice: bench.kl[choice])
        raise MoesteerError(
            f"none of {len(tried)} choices keeps KL at {bench.plan.max_kl:g} or less; the nearest"
            f" ({nearest.words}) has {bench.kl[nearest]:.3g}. Raise --max-kl, or give smaller"
            " --coefficients, with another --out."
        )
    nearest = max(judged, key=lambda trial: trial.objective or 0.0)
    assert nearest.choice is not None
    raise MoesteerError(
        f"none of the {len(judged)} judged choices keeps to the limits; the nearest"
        f" ({nearest.choice.words}) gives {nearest.outcomes}. Loosen --prices, judge more"
        " (--budget), or give smaller --coefficients, with another --out."
    )


# -- what the run holds --------------------------------------------------------------------------


def trials_of(run: Run) -> list[DirectionTrial]:
    """All that a run holds of its choices, those of its controls too."""
    scores, kl, judged = (_known(run, name) for name in FILES)
    return [DirectionTrial(c, s, kl.get(c), judged.get(c)) for c, s in scores.items()]


def _known(run: Run, name: str) -> dict[Any, Any]:
    """What a file of the run holds, by choice; None stands for the unsteered model."""
    found: dict[Choice | None, Any] = {}
    for record in run.lines(name, "choice", FILES[name]):
        told = record["choice"]
        try:
            choice = told and Choice(**{**told, "experts": tuple(told["experts"])})
        except (KeyError, TypeError) as error:
            raise MoesteerError(f"{run.folder}: {name}.jsonl: {error}.") from None
        found[choice] = record[FILES[name]]
    return found


def _add(run: Run, name: str, found: Mapping[Any, Any]) -> None:
    run.add(name, [{"choice": c and asdict(c), FILES[name]: value} for c, value in found.items()])
