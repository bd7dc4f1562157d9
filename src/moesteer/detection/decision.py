"""What a contrast pair decides: the log-odds of its two sides, as readouts of an engine.

`decision`: the sides say the same up to some token and then part, one with A's token, the other
with B's. There the behaviour is chosen, and the readout is

    log P(A's token | what stands before) − log P(B's token | what stands before).

`span`: the sides have no such place, because their prompts differ. The readout is how probable each
side's own target is to the model,

    mean log P(A's target tokens) − mean log P(B's target tokens).

Both are in nats, and positive where the model goes with A.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from moesteer.chat import TokenisedConversation, TokenisedPair
from moesteer.engines.readouts import Readout, Term, mean_log_probability
from moesteer.errors import MoesteerError

Over = Literal["decision", "span"]


def pair_readouts(pair: TokenisedPair, over: Over = "decision") -> tuple[Readout, ...]:
    """The readouts whose sum says how much the model goes with A: one (decision) or two (span).

    Raises MoesteerError, with the pair's source, where the sides don't part within their targets.
    """
    if over == "decision":
        return (_decision(pair),)
    return side_readout(pair, "a"), side_readout(pair, "b", -1.0)


def side_readout(pair: TokenisedPair, side: Literal["a", "b"], weight: float = 1.0) -> Readout:
    """`weight` × mean log P of one side's target tokens."""
    try:
        return mean_log_probability(pair.a if side == "a" else pair.b, weight)
    except MoesteerError as error:
        raise MoesteerError(f"{pair.source}: side {side}: {error}") from None


def summed_by_pair(
    values: Float[np.ndarray, "*some readout"], readouts: Sequence[Sequence[Readout]]
) -> Float[np.ndarray, "*some pair"]:
    """Values of all pairs' readouts, one after the other, added up by pair."""
    starts = np.cumsum([0, *(len(of_pair) for of_pair in readouts)])[:-1]
    return np.add.reduceat(values, starts, axis=-1)


def _decision(pair: TokenisedPair) -> Readout:
    a, b = pair.a, pair.b
    shorter = min(len(a.ids), len(b.ids))
    parting = next((i for i in range(shorter) if a.ids[i] != b.ids[i]), shorter)
    if parting == shorter:
        raise MoesteerError(
            f"{pair.source}: one side's tokens are the beginning of the other's, so they part in no"
            f" token. {REMEDY}"
        )
    # Where one reply is the beginning of the other, it ends there: with a token of the template.
    chosen = a.target[parting] or b.target[parting]
    if not (chosen and parting and _begun(a, parting) and _begun(b, parting)):
        raise MoesteerError(
            f"{pair.source}: the sides part at token {parting + 1}, before their targets begin (at"
            f" {_first(a) + 1} in A and {_first(b) + 1} in B): no common context comes before a"
            f" decision. {REMEDY}"
        )
    terms = (Term(parting, a.ids[parting], 1.0), Term(parting, b.ids[parting], -1.0))
    return Readout(a.ids[:parting], terms)


REMEDY = "Compare the probabilities of the whole targets instead: --over span."


def _first(side: TokenisedConversation) -> int:
    """Where the target begins."""
    return side.target.index(True)


def _begun(side: TokenisedConversation, place: int) -> bool:
    return _first(side) <= place
