"""Refusal-specific routing, and every expert's direction."""

from collections.abc import Iterator
from dataclasses import dataclass

from moesteer.directions.experts import find_expert_directions
from moesteer.directions.prompts import positions_of
from moesteer.files import sole_writer
from moesteer.profile import Expert, Profile
from moesteer.reproduce.expert_refusal.direction import prepared
from moesteer.reproduce.expert_refusal.plan import PAPER, SEED, Work
from moesteer.reproduce.steps import Context

EXPERTS = "experts.safetensors"


@dataclass(frozen=True)
class Routed:
    """Every expert's routing and directions; `threshold`, in percentage points, keeps experts."""

    profile: Profile
    threshold: float


def expert_directions(work: Work, context: Context) -> Profile:
    """Every expert's direction, found once, and taken up after a kill."""
    file = context.out / EXPERTS
    checkpoint = file.parent / f".{file.name}.experts.partial"
    with sole_writer(file):
        if not file.exists():
            sets = prepared(work, context)
            with context.stage("directions of experts", "prompts") as progress:
                find_expert_directions(
                    context.engine,
                    sets,
                    last=positions_of(sets, PAPER.number("last_tokens")),
                    threshold=work.threshold,
                    kind="forced",
                    seed=SEED,
                    batch_size=context.batch_size,
                    source="restricted and harmless prompts",
                    command=context.command,
                    checkpoint=checkpoint,
                    progress=progress,
                ).save(file)
            checkpoint.unlink(missing_ok=True)
    return Profile.load(file)


def routing_of(profile: Profile, score: str = "routing") -> dict[Expert, float]:
    """A score of the candidates by expert, the same at all of its positions."""
    candidates = profile.candidates
    assert candidates is not None
    columns = (candidates.layer, candidates.expert, candidates.scores[score])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(layer, expert): value for layer, expert, value in rows}


def route(work: Work, context: Context) -> Iterator[object]:
    yield Routed(expert_directions(work, context), work.threshold)
