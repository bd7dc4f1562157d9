"""The refusal direction of dense models: found, projected out, and added."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moesteer.directions.aiming import Aim, aimed
from moesteer.directions.candidates import used
from moesteer.directions.prompts import PromptSets, draw_sets, positions_of
from moesteer.directions.refusal import prepare_sets
from moesteer.directions.residual import find_residual_direction
from moesteer.directions.selection import Thresholds
from moesteer.evaluation.comparison import Comparison
from moesteer.files import sole_writer
from moesteer.profile import Profile
from moesteer.reproduce.expert_refusal.plan import SEED, Work
from moesteer.reproduce.expert_refusal.tasks import asked_of, evaluated, tasks_of
from moesteer.reproduce.steps import Context

DIRECTION = "direction.safetensors"
OUT, ADDED = "projected-out", "added"


@dataclass(frozen=True)
class DirectionFound:
    """The direction, with the candidates that it was chosen from."""

    profile: Profile


@dataclass(frozen=True)
class DirectionSteered:
    """What it does, by what was done with it."""

    comparisons: Mapping[str, Comparison]


def prepared(work: Work, context: Context) -> PromptSets:
    sets = draw_sets(
        context.engine,
        work.found_on["restricted"],
        work.found_on["harmless"],
        fit=work.sizes.fit,
        validate=work.sizes.validate,
        chat_options=context.chat_options,
        seed=SEED,
    )
    with context.stage("filter", "prompts") as progress:
        return prepare_sets(context.engine, sets, batch_size=context.batch_size, progress=progress)


def direction_of(work: Work, context: Context) -> Profile:
    """The refusal direction, found once."""
    file = context.out / DIRECTION
    with sole_writer(file):
        if not file.exists():
            sets = prepared(work, context)
            with context.stage("direction", "prompts") as progress:
                find_residual_direction(
                    context.engine,
                    sets,
                    last=positions_of(sets, None),
                    thresholds=Thresholds(),
                    aim=Aim(),
                    batch_size=context.batch_size,
                    seed=SEED,
                    source="restricted and harmless prompts",
                    command=context.command,
                    progress=progress,
                ).save(file)
    return Profile.load(file)


def steer_direction(work: Work, context: Context) -> Iterator[object]:
    direction = direction_of(work, context)
    yield DirectionFound(direction)
    asked, comparisons = asked_of(work, context), {}
    for folder, profile, cards in (
        (
            OUT,
            aimed(direction, used(direction), Aim("ablate")),
            tasks_of(asked, "b"),
        ),
        (
            ADDED,
            direction,
            tasks_of(asked, "a"),
        ),
    ):
        name = f"refusal direction {folder.replace('-', ' ')}"
        named = replace(profile, name=name)
        comparisons[name] = evaluated(work, named, asked, cards, folder, context)
    yield DirectionSteered(comparisons)
