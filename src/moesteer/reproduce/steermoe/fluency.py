"""Activation against deactivation: fluent replies with as many experts of either."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from moesteer.evaluation.comparison import STEERED, Comparison
from moesteer.profile import Profile, Side
from moesteer.reproduce.comparing import Estimate, hits, paired
from moesteer.reproduce.steermoe.detection import scores_of
from moesteer.reproduce.steermoe.numbers import as_published
from moesteer.reproduce.steermoe.outcomes import evaluated
from moesteer.reproduce.steermoe.plan import Aim, Work, lacks
from moesteer.reproduce.steps import Context, Step

FOLDER = "activation-and-deactivation"
FRACTIONS = (0.25, 0.5, 1.0)
"""Of all experts that can be activated: how many are activated, or deactivated, for fluency."""

WAYS = ("activated", "deactivated")


@dataclass(frozen=True)
class Activated:
    """One task with `numbers` of experts either way, the arms by way and number; `apart`: by
    number, activated less deactivated on the same prompts."""

    task: str
    outcome: str
    comparison: Comparison
    numbers: tuple[int, ...]
    arms: Mapping[tuple[str, int], str]
    apart: Mapping[int, Estimate | None]


def fluency(work: Work) -> Step:
    aim = work.aim("faithful") if "document" in work.sources else work.aim("safe")
    fluent = [card.name for card in work.tasks.of(aim.prices, "price") if "fluency" in card.name]
    missing = lacks(work, aim.behaviour) or (
        "" if fluent else "prompts of the task fluency, as said below."
    )
    return Step(
        "activation against deactivation",
        f"{(fluent or ['fluency'])[0]}: as many experts activated as deactivated, three numbers",
        partial(_activate, work, aim),
        missing,
        (FOLDER,),
    )


def _activate(work: Work, aim: Aim, context: Context) -> Iterator[object]:
    (card,) = [c for c in work.tasks.of(aim.prices, "price") if "fluency" in c.name]
    scores = scores_of(work, aim.behaviour, "risk-difference", context)
    every = sum(shape.experts for shape in context.engine.facts.layers)
    most = min(
        len(as_published(scores, every, 0, aim.toward).profile.activated),
        len(as_published(scores, 0, every, aim.toward).profile.deactivated),
    )
    numbers = sorted({max(1, round(share * most)) for share in FRACTIONS})
    profiles: dict[tuple[str, int], Profile] = {}
    for count in numbers:
        up, down = (_first_fitting(scores, count, aim.toward, up=up) for up in (True, False))
        profiles |= {("activated", count): up, ("deactivated", count): down}
    main = ("activated", numbers[-1])
    arms = {key: STEERED if key == main else f"{key[1]} {key[0]}" for key in profiles}
    folder = context.out / FOLDER
    comparison = evaluated(
        work,
        profiles[main],
        [card],
        folder,
        context,
        beside={arms[key]: profile for key, profile in profiles.items() if key != main},
        seeds=0,
    )
    apart = {
        count: paired(*(hits(folder, card.name, arms[way, count], card.outcome) for way in WAYS))
        for count in numbers
    }
    yield Activated(card.name, card.outcome, comparison, tuple(numbers), arms, apart)


def _first_fitting(scores: Profile, count: int, toward: Side, *, up: bool) -> Profile:
    """The strongest `count` experts that layers have room for."""
    every = sum(shape.experts for shape in scores.model.layers) if scores.model else 0
    numbers = (every, 0) if up else (0, every)
    fitting = as_published(scores, *numbers, toward).profile
    chosen = (fitting.activated or fitting.deactivated)[:count]
    return replace(
        fitting,
        activated=chosen if up else (),
        deactivated=() if up else chosen,
        name=f"{count} {'activated' if up else 'deactivated'}",
    )
