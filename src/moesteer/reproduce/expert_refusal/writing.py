"""Who writes the refusal direction: what attention and the experts write along it."""

from collections.abc import Iterator
from dataclasses import dataclass

from moesteer.directions.writers import Writers, find_writers
from moesteer.reproduce.expert_refusal.direction import direction_of
from moesteer.reproduce.expert_refusal.plan import DATA, SEED, Work
from moesteer.reproduce.steps import Context

WRITERS = "writers"


@dataclass(frozen=True)
class Written:
    """What each part writes along the direction, and what is left without it."""

    writers: Writers


def find_who_writes(work: Work, context: Context) -> Iterator[object]:
    direction = direction_of(work, context)
    restricted, harmless = (list(work.kept_back[side])[: work.sizes.limit] for side in DATA)
    with context.stage("writers", "prompts") as progress:
        found = find_writers(
            context.engine,
            direction,
            restricted,
            harmless,
            out=context.out / WRITERS,
            batch_size=context.batch_size,
            seed=SEED,
            command=context.command,
            progress=progress,
        )
    yield Written(found)
