"""Which label a model chooses: how probable each label's words are as its reply.

The score of a label is the log-probability of its words as the reply begins, all tokens together,
in nats. The model's label is the one of the highest score; the softmax of the scores is how
probable it is among the labels.

Words differ in how likely they are whatever is asked. Calibration (Zhao et al. 2021, arXiv
2102.09690) takes this away: each label's score for the same prompt with "N/A" in place of every
text is subtracted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from moesteer.chat import NO_OPTIONS
from moesteer.engines.readouts import Readout, Term
from moesteer.errors import MoesteerError
from moesteer.rationale.instances import TextSpan
from moesteer.rationale.layout import Laid, lay_out

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.profile import Profile

CONTENT_FREE = "N/A"


@dataclass(frozen=True)
class Decision:
    """The label that a model chooses, the next best, and how probable each is; they sum to 1."""

    label: str
    runner_up: str
    probabilities: dict[str, float]


def label_readouts(laid: Laid, ids: Sequence[int]) -> list[Readout]:
    """The log-probability of each label's words after `ids`, in the order of the labels."""
    return [
        Readout(
            (*ids, *tokens[:-1]),
            tuple(Term(len(ids) + at, token, 1.0) for at, token in enumerate(tokens)),
        )
        for tokens in laid.labels.values()
    ]


def score_labels(
    engine: "Engine",
    asked: Sequence[tuple[Laid, Sequence[int]]],
    profile: "Profile | None" = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> "list[Float[np.ndarray, ' label']]":
    """The score of each label, in nats, after each prompt: an instance's, whole or masked.

    Equal prompts are read once. `progress` is called with how many scores were found since the last
    call, of as many as there are labels, prompt by prompt. Raises MoesteerError where a prompt's
    scores are NaN or all −∞.
    """
    readouts: list[Readout] = []
    places: dict[object, slice] = {}
    found = []
    for laid, ids in asked:
        key = (tuple(ids), tuple(laid.labels.values()))
        if key not in places:
            places[key] = slice(len(readouts), len(readouts) + len(laid.labels))
            readouts += label_readouts(laid, ids)
        found.append(places[key])
    if progress is not None:
        progress(sum(len(laid.labels) for laid, _ in asked) - len(readouts))
    values = engine.read(readouts, [profile], progress=progress)[0]
    for (laid, _), place in zip(asked, found, strict=True):
        if not np.isfinite(values[place].max()):
            raise MoesteerError(
                f"{laid.instance.source}: the log-probabilities of the labels are"
                f" {values[place].tolist()}, which decide nothing; load the model in another dtype"
                " (--dtype float32 or bfloat16)."
            )
    return [values[place] for place in found]


def decide(
    laid: Laid,
    scores: Float[np.ndarray, " label"],
    offsets: Float[np.ndarray, " label"] | None = None,
) -> Decision:
    """The label of the highest score, the first of equals; `offsets` are subtracted first."""
    # Differences are what counts: with the best at 0 nothing overflows.
    scores = scores if offsets is None else scores - offsets
    weights = np.exp(scores - scores.max())
    names = list(laid.labels)
    first, second = np.argsort(-scores, kind="stable")[:2]
    shares = (weights / weights.sum()).tolist()
    return Decision(names[first], names[second], dict(zip(names, shares, strict=True)))


def calibration(
    engine: "Engine",
    laid: Sequence[Laid],
    profile: "Profile | None" = None,
    *,
    plain: bool = False,
    chat_options: Mapping[str, object] = NO_OPTIONS,
) -> "list[Float[np.ndarray, ' label']]":
    """Each instance's label scores where its texts say nothing, for `decide` to subtract.

    `plain` and `chat_options` as the instances were laid out with.
    """
    empty = [
        replace(
            item.instance,
            texts=dict.fromkeys(item.instance.texts, CONTENT_FREE),
            rationale=tuple(TextSpan(name, 0, len(CONTENT_FREE)) for name in item.instance.texts),
        )
        for item in laid
    ]
    asked = lay_out(empty, engine.tokenizer, unit="token", plain=plain, chat_options=chat_options)
    return score_labels(engine, [(item, item.ids) for item in asked], profile)


def decision_readout(laid: Laid, decision: Decision) -> Readout:
    """How much more probable the chosen label is than the next, where their words part.

    log P(its token) − log P(the other's token), after what both begin with: the difference of two
    logits. This is what is attributed to the prompt's words.
    """
    chosen, other = laid.labels[decision.label], laid.labels[decision.runner_up]
    same = next(at for at, (a, b) in enumerate(zip(chosen, other, strict=False)) if a != b)
    end = len(laid.ids) + same
    # A term of no weight says where the reply begins, which matters to steering of replies only.
    begins = (Term(len(laid.ids), chosen[0], 0.0),) if same else ()
    return Readout(
        (*laid.ids, *chosen[:same]),
        (*begins, Term(end, chosen[same], 1.0), Term(end, other[same], -1.0)),
    )
