"""The detectors, the numbers and the experts that should not matter: one task, four counts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from moesteer.evaluation.comparison import STEERED, Comparison
from moesteer.model_facts import ModelFacts
from moesteer.profile import Profile
from moesteer.reproduce.comparing import Estimate, hits, paired
from moesteer.reproduce.steermoe.detection import scores_of
from moesteer.reproduce.steermoe.numbers import as_published, is_of_the_paper
from moesteer.reproduce.steermoe.outcomes import evaluated
from moesteer.reproduce.steermoe.plan import PAPER, Aim, Work, first_here, lacks
from moesteer.reproduce.steps import Context, Step

FOLDER = "detectors-and-counts"

Ranked = tuple[str, int]
"""A detector, and how many experts are deactivated by its ranking."""


@dataclass(frozen=True)
class Ablated:
    """One task under each detector and count: `arms` names them, `main` is the steered one.

    `apart`: by count, risk difference less log-odds on the same prompts. `same_model`: the paper's
    model and so its counts; `of_paper`: its task, too.
    """

    task: str
    outcome: str
    comparison: Comparison
    counts: tuple[int, ...]
    main: Ranked
    arms: Mapping[Ranked, str]
    apart: Mapping[int, Estimate | None]
    same_model: bool
    of_paper: bool


def ablation(work: Work) -> Step:
    aim = work.aim("faithful")
    task = first_here(work, aim)
    return Step(
        "detectors, counts and selection",
        f"{task}: risk difference against log-odds at four counts of deactivated experts, and"
        " random and bottom-ranked ones",
        partial(_ablate, work, aim),
        lacks(work, aim.behaviour, aim.targets),
        (FOLDER,),
    )


def counts_for(facts: ModelFacts, of_paper: bool) -> tuple[int, ...]:
    """The paper's counts of deactivated experts; of other models the same shares of all experts."""
    ablation = PAPER.ablation
    assert ablation is not None
    if of_paper:
        return ablation.deactivated
    model = PAPER.model_of(ablation.model)
    assert model is not None
    assert model.layers is not None
    assert model.experts is not None
    every, of_theirs = sum(s.experts for s in facts.layers), model.layers * model.experts
    return tuple(sorted({max(1, round(n * every / of_theirs)) for n in ablation.deactivated}))


def _ablate(work: Work, aim: Aim, context: Context) -> Iterator[object]:
    ablation, facts = PAPER.ablation, context.engine.facts
    assert ablation is not None
    name = first_here(work, aim)
    same_model = is_of_the_paper(work.known, facts)
    same_model &= work.known is not None and work.known.name == ablation.model
    counts = counts_for(facts, same_model)
    profiles: dict[Ranked, Profile] = {}
    # The testbed's experts were planted for A: losing them takes the behaviour away.
    toward = "b" if work.bundled else aim.toward
    for detector in ablation.shares:
        scores = scores_of(work, aim.behaviour, detector, context)
        for count in counts:
            profiles[detector, count] = as_published(scores, 0, count, toward).profile
    # The paper's own number of this model is the third.
    main = ("risk-difference", counts[min(2, len(counts) - 1)])
    cards = [*work.tasks.of([name], "target"), *work.tasks.of(aim.prices[:1], "price")]
    folder = context.out / FOLDER
    comparison = evaluated(
        work,
        profiles[main],
        cards,
        folder,
        context,
        beside={_arm(*key): profile for key, profile in profiles.items() if key != main},
    )
    outcome = cards[0].outcome
    arms = {key: STEERED if key == main else _arm(*key) for key in profiles}
    apart = {
        count: paired(*(hits(folder, name, arms[d, count], outcome) for d in ablation.shares))
        for count in counts
    }
    of_paper = same_model and name == ablation.task
    yield Ablated(name, outcome, comparison, counts, main, arms, apart, same_model, of_paper)


def _arm(detector: str, count: int) -> str:
    return f"{detector}, {count} deactivated"  # a name must not end in a number, as seeds do
