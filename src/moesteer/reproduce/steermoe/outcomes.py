"""What steering does, and what it costs: an evaluation an aim, on its targets and its prices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import Card
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison
from moesteer.evaluation.evaluate import evaluate
from moesteer.profile import Profile
from moesteer.reproduce.comparing import Estimate, rating
from moesteer.reproduce.steermoe.plan import Aim, Work, lacks
from moesteer.reproduce.steps import Context, Step

RATED = "fluency"
"""The task whose replies are rated from 1 to 5."""


@dataclass(frozen=True)
class Steered:
    """An aim's comparison; `ratings`: by arm, the paper's mean of ratings of fluency."""

    aim: Aim
    comparison: Comparison
    ratings: Mapping[str, Estimate | None]


def steering(work: Work, aim: Aim) -> Step:
    here = [card.name for card in work.tasks.of((*aim.targets, *aim.prices), "target")]
    return Step(
        aim.title,
        f"{', '.join(here)}: steered, unsteered and under controls",
        partial(_steer, work, aim),
        lacks(work, aim.behaviour, aim.targets),
        (aim.folder,),
    )


def _steer(work: Work, aim: Aim, context: Context) -> Iterator[object]:
    file = context.out / f"{aim.folder}.safetensors"
    if not file.is_file():
        raise MoesteerError("no numbers of experts were found to steer by.")
    cards = work.tasks.of(aim.targets, "target") + work.tasks.of(aim.prices, "price")
    folder, profile = context.out / aim.folder, Profile.load(file)
    numbers = f"{len(profile.activated)} activated, {len(profile.deactivated)} deactivated"
    comparison = evaluated(work, replace(profile, name=numbers), cards, folder, context)
    rated = any(task.name == RATED for task in comparison.tasks)
    arms = (UNSTEERED, STEERED) if rated else ()
    yield Steered(aim, comparison, {arm: rating(folder, RATED, arm) for arm in arms})


def evaluated(
    work: Work,
    profile: Profile,
    cards: Sequence[Card],
    folder: Path,
    context: Context,
    beside: Mapping[str, Profile] | None = None,
    seeds: int | None = None,
) -> Comparison:
    with context.stage(folder.name, "replies") as progress:
        return evaluate(
            context.engine,
            profile,
            cards,
            out=folder,
            data=work.tasks.data_of(cards),
            seeds=work.sizes.seeds if seeds is None else seeds,
            batch_size=context.batch_size,
            limit=work.sizes.limit,
            chat_options=context.chat_options,
            beside=beside,
            say=context.say,
            progress=progress,
            command=context.command,
        )
