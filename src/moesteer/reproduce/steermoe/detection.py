"""Which experts: the risk difference of every expert on contrast pairs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from moesteer.evaluation.search import detected_beside
from moesteer.profile import Profile
from moesteer.reproduce.steermoe.plan import Work, lacks
from moesteer.reproduce.steps import Context, Step


@dataclass(frozen=True)
class Detected:
    """The scores of all experts for a behaviour; `source`: their file."""

    behaviour: str
    scores: Profile
    source: str


def detection(work: Work, behaviour: str) -> Step:
    return Step(
        f"experts of {behaviour}",
        f"risk difference of every expert on contrast pairs of {behaviour}",
        partial(_detect, work, behaviour),
        lacks(work, behaviour),
    )


def _detect(work: Work, behaviour: str, context: Context) -> Iterator[object]:
    scores = scores_of(work, behaviour, "risk-difference", context)
    yield Detected(behaviour, scores, f"{behaviour}.risk-difference.safetensors")


def scores_of(work: Work, behaviour: str, detector: str, context: Context) -> Profile:
    """All experts' scores, detected once, under the paper's rule."""
    with context.stage("detect", "tokens") as progress:
        found = detected_beside(
            context.engine,
            work.pairs[behaviour],
            detector,
            out=context.out / behaviour,
            source=work.sources[behaviour],
            chat_options=context.chat_options,
            command=context.command,
            progress=progress,
        )
    return replace(found, rule="paper")
