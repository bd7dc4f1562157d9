"""Matched spans: as many target tokens on either side, at the same relative positions.

Where the sides' targets differ in length (a refusal is shorter than an answer), a difference in
routing may be one of length and position: routing changes along a text. Of the longer side only n
tokens are kept, n the length of the shorter one; the j-th of them stands at the relative position
(j + ½) / n of its span. What differs then is at least not how many tokens there are, nor where.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

from moesteer.chat import TokenisedConversation, TokenisedPair
from moesteer.errors import MoesteerWarning

UNEQUAL = 2
"""How many times longer one side's targets may be before we warn."""


def match_spans(pair: TokenisedPair) -> TokenisedPair:
    """The pair with equally many target tokens a side; the texts stay whole."""
    n = min(sum(pair.a.target), sum(pair.b.target))
    return replace(pair, a=_thinned(pair.a, n), b=_thinned(pair.b, n))


def warn_of_unequal_spans(pairs: Sequence[TokenisedPair]) -> None:
    """A MoesteerWarning where one side's targets are more than twice as long in all."""
    a = sum(sum(pair.a.target) for pair in pairs)
    b = sum(sum(pair.b.target) for pair in pairs)
    if max(a, b) > UNEQUAL * min(a, b):
        warnings.warn(
            f"the targets are {a:,} tokens of A and {b:,} of B: scores may show a difference in"
            " length or position. --match-spans (match_spans=True) counts equally many of either"
            " side, at the same relative positions.",
            MoesteerWarning,
            stacklevel=3,
        )


def _thinned(side: TokenisedConversation, n: int) -> TokenisedConversation:
    inside = [position for position, target in enumerate(side.target) if target]
    kept = {inside[(2 * j + 1) * len(inside) // (2 * n)] for j in range(n)}
    return replace(side, target=tuple(position in kept for position in range(len(side.ids))))
