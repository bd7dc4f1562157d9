"""Does a reply repeat itself?

Intuition. A model that is steered too hard falls into loops. The share of n-grams of words that
occurred before in the reply is near 0 in fluent text and near 1 in a loop:

    repeated = 1 − distinct n-grams / n-grams

Formula: seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319), who use n = 4 on tokens; here words.
A reply of fewer than n words has no n-gram and is judged by single words instead.
"""

from typing import Annotated

from pydantic import Field

from moesteer.evaluation.judges.base import Context, OneByOne, Settings
from moesteer.evaluation.task import Item
from moesteer.records import Text

N = 4
MOST = 0.5
"""The largest share of repeated n-grams that counts as fluent."""


class Repetition(Settings):
    """`fluent` up to a share of `most`, else `degenerate`; a reply without words is degenerate."""

    n: Annotated[int, Field(ge=1)] = N
    most: Annotated[float, Field(ge=0, le=1)] = MOST
    fluent: Text = "fluent"
    degenerate: Text = "degenerate"

    @property
    def outcomes(self) -> tuple[str, ...]:
        return self.fluent, self.degenerate

    def judge(self, context: Context) -> OneByOne:
        def say(item: Item, reply: str) -> tuple[str, str, float | None]:
            if not reply.split():
                return self.degenerate, "empty", None
            share = repeated_share(reply, self.n)
            outcome = self.fluent if share <= self.most else self.degenerate
            return outcome, f"{share:.0%} of {self.n}-grams repeated", share

        return OneByOne(f"repetition of {self.n}-grams", self.outcomes, say)


def repeated_share(text: str, n: int) -> float:
    """1 − distinct n-grams / n-grams of a text's words, from 0 to 1; 0 where there are none."""
    words = text.lower().split()
    n = n if len(words) >= n else 1
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
