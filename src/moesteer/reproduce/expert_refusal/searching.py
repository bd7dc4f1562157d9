"""Directions of experts: searches alone and by layer, beside the direction and beside routing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import STEERED, UNSTEERED
from moesteer.evaluation.direction_choices import Method
from moesteer.evaluation.direction_search import DirectionResult, direction_search
from moesteer.evaluation.direction_trials import DirectionTrial, trials_of
from moesteer.evaluation.evaluate import SUMMARY
from moesteer.profile import Expert, Profile, Side
from moesteer.reproduce.comparing import Estimate, hits, paired, rank_correlation, ratio
from moesteer.reproduce.expert_refusal.direction import ADDED, OUT
from moesteer.reproduce.expert_refusal.plan import METHODS, PAPER, WAYS, Work, folder_of
from moesteer.reproduce.expert_refusal.routing import expert_directions, routing_of
from moesteer.reproduce.expert_refusal.tasks import Asked, asked_of, tasks_of
from moesteer.reproduce.outcome import NotRun
from moesteer.reproduce.steps import Context
from moesteer.runs import read_run

Search = tuple[str, Method]
"""The way that is steered, and the method."""


@dataclass(frozen=True)
class Against:
    """Effects of the refusal direction and of experts on the same prompts, and the share of the
    first that the second is."""

    direction: Estimate | None
    experts: Estimate | None
    share: Estimate | None


@dataclass(frozen=True)
class Response:
    """By expert how far it moves the log-odds alone; `agree`: its rank correlation with routing."""

    effects: Mapping[Expert, float]
    agree: Estimate | None


@dataclass(frozen=True)
class Searched:
    """What was found in each search among the directions of `source`.

    `against` is where the refusal direction was measured, `responses` are by way.
    """

    source: Profile
    found: Mapping[Search, DirectionResult]
    against: Mapping[Search, Against]
    responses: Mapping[str, Response]


def search_all(work: Work, context: Context) -> Iterator[object]:
    source = expert_directions(work, context)
    asked = asked_of(work, context)
    found: dict[Search, DirectionResult] = {}
    for way, toward in WAYS:
        for method in METHODS:
            try:
                found[way, method] = _search(work, source, asked, way, toward, method, context)
            except MoesteerError as error:
                title = f"directions of experts, {words_of(way, method)}"
                yield NotRun(title, str(error), failed=True)
    if not found:
        return
    yield Searched(
        source,
        found,
        dict(_against_the_direction(found, context)),
        dict(_responses(source, found, context)),
    )


def words_of(way: str, method: Method) -> str:
    """A search, in words."""
    return f"{way}, {METHODS[method]}"


def _search(
    work: Work,
    source: Profile,
    asked: Asked,
    way: str,
    toward: Side,
    method: Method,
    context: Context,
) -> DirectionResult:
    """One search: away from refusal on restricted prompts, or towards it on harmless ones.

    KL is measured on the other set, of which no share must be kept: the paper asks for none.
    """
    target, other = tasks_of(asked, toward)
    folder = folder_of(way, method)
    with context.stage(folder, "choices") as progress:
        return direction_search(
            context.engine,
            source,
            target,
            toward=toward,
            out=context.out / folder,
            prices=[(other, 0.0)],
            max_kl=PAPER.number("max_kl"),
            methods=(method,),
            budget=work.sizes.budget,
            others=PAPER.number("control_experts"),
            seeds=work.sizes.seeds,
            data=asked.files,
            limit=work.sizes.limit,
            batch_size=context.batch_size,
            chat_options=context.chat_options,
            say=context.say,
            progress=progress,
            command=context.command,
        )


def _against_the_direction(
    found: Mapping[Search, DirectionResult], context: Context
) -> Iterator[tuple[Search, Against]]:
    """How much of the refusal direction's effect a direction of experts has."""
    for (way, method), result in found.items():
        residual, experts = (
            context.out / (OUT if result.toward == "b" else ADDED),
            context.out / folder_of(way, method) / "test",
        )
        if not (residual / SUMMARY).is_file():
            continue
        theirs, ours = (
            (
                hits(run, result.target, STEERED, result.outcome),
                hits(run, result.target, UNSTEERED, result.outcome),
            )
            for run in (residual, experts)
        )
        yield (way, method), Against(paired(*theirs), paired(*ours), ratio(ours, theirs))


def _responses(
    source: Profile, found: Mapping[Search, DirectionResult], context: Context
) -> Iterator[tuple[str, Response]]:
    """Do the experts whose routing differs more also steer more?"""
    routing = routing_of(source)
    for (way, method), result in found.items():
        if method == "one":
            trials = trials_of(read_run(context.out / folder_of(way, method)))
            effects = effects_of_experts(trials, result)
            agree = rank_correlation([routing[e] for e in effects], list(effects.values()))
            yield way, Response(effects, agree)


def effects_of_experts(
    trials: Sequence[DirectionTrial], result: DirectionResult
) -> dict[Expert, float]:
    """By expert, how far it moves the log-odds the right way when it is steered alone, in nats.

    All at the coefficient of the best choice, each at its best position.
    """
    assert result.best.choice is not None
    sign = 1 if result.toward == "a" else -1
    found: dict[Expert, float] = {}
    for trial in trials:
        choice = trial.choice
        if choice is None or len(choice.experts) != 1:
            continue
        if choice.coefficient == result.best.choice.coefficient:
            expert = choice.layer, choice.experts[0]
            change = sign * (trial.score - result.unsteered.score)
            found[expert] = max(change, found.get(expert, -float("inf")))
    return found
