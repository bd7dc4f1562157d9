"""A task: prompts, how they are asked, who judges the replies, and which outcome counts.

Its card is a TOML file (`tasks/`, or the user's own); its prompts are the user's, or the testbed's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from moesteer.contrast import Message


@dataclass(frozen=True)
class Item:
    """One prompt of a task, and the columns of its record, which judges may read."""

    messages: tuple[Message, ...]
    columns: Mapping[str, str]
    source: str

    @property
    def prompt(self) -> str:
        """What was asked last."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one reply; an outcome of None: it could not say, and why.

    `score` is the number behind the outcome, where there is one: a share, a perplexity, a rating.
    """

    judge: str
    outcome: str | None
    note: str = ""
    score: float | None = None


class Judge(Protocol):
    """Says for each reply which outcome it is, one of `outcomes`."""

    @property
    def name(self) -> str: ...

    @property
    def outcomes(self) -> tuple[str, ...]: ...

    def __call__(self, items: Sequence[Item], replies: Sequence[str]) -> list[Verdict]: ...


@dataclass(frozen=True)
class Cost:
    """What judging took, where a judge counts it."""

    calls: int = 0
    tokens: int = 0
