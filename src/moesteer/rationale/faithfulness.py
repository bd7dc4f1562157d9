"""Is a rationale what the model's label rests on? Mask it and see whether the label goes.

    flipped             1 where another label is predicted without the rationale, else 0
    comprehensiveness   p(ŷ | x) − p(ŷ | x without r): high where it was needed
    sufficiency         p(ŷ | x) − p(ŷ | r alone): low where it is enough

ŷ is what the model predicts of the whole input, right or wrong. Flips: Fayyaz et al. 2024 (arXiv
2407.00219); the two changes of probability: DeYoung et al. 2020 (arXiv 1911.03429), with their mean
over the shares of a curve (their AOPC; Samek et al. 2017). What is masked grows with the number of
tokens, and so does all of this: compare methods at equal counts, with random units beside them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from moesteer.rationale.labels import Decision, decide, score_labels
from moesteer.rationale.layout import Laid
from moesteer.rationale.masking import Mask, only, without
from moesteer.rationale.reading import Masked

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.profile import Profile

SHARES = (0.05, 0.1, 0.2, 0.5)
"""Of an instance's tokens, for the curves: DeYoung's, less the smallest, which is rarely a word."""


@dataclass(frozen=True, eq=False)
class Question:
    """What becomes of the decision about an instance when `units`, by number, are masked?

    `offsets`: what was subtracted from its label scores, see `decide`.
    """

    laid: Laid
    decision: Decision
    units: tuple[int, ...]
    offsets: Float[np.ndarray, " label"] | None = None


def measure(
    engine: "Engine",
    questions: Sequence[Question],
    mask: Mask,
    profile: "Profile | None" = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Masked]:
    """What masking does, question by question, all in one reading in which equal prompts are one.

    An input that masking leaves whole is not read again. `progress`: see `score_labels`.
    """
    pairs = [(without(q.laid, q.units, mask), only(q.laid, q.units, mask)) for q in questions]
    asked = [
        (question, ids)
        for question, pair in zip(questions, pairs, strict=True)
        for ids in pair
        if ids != question.laid.ids
    ]
    scores = iter(
        score_labels(engine, [(q.laid, ids) for q, ids in asked], profile, progress=progress)
    )
    found = []
    for question, pair in zip(questions, pairs, strict=True):
        left, alone = (
            question.decision
            if ids == question.laid.ids
            else decide(question.laid, next(scores), question.offsets)
            for ids in pair
        )
        label, whole = question.decision.label, question.decision.probabilities
        found.append(
            Masked(
                float(left.label != label),
                whole[label] - left.probabilities[label],
                whole[label] - alone.probabilities[label],
            )
        )
    return found


def counts(tokens: int, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """How many of so many tokens each share is: rounded up, so that it is one at least.

    A share a hair above a whole number, as 0.07 · 100 is, is that number.
    """
    return tuple(math.ceil(round(share * tokens, 9)) for share in shares)
