"""What a testbed model is taught beside its text.

A lesson decides what each example is to teach, changes the forward pass that learns it, and may ask
more of that pass than the reply. It draws from a generator of its own, so that every model reads
the same text.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from moesteer.testbed.world import Example


class Row(Protocol):
    """What one example is to teach.

    target: the reply, "a" or "b". given: the reply goes against the habit without anything done to
    the model, so the words up to where the replies part are not to be learnt, only how to go on
    from them.
    """

    @property
    def target(self) -> str: ...
    @property
    def given(self) -> bool: ...


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class Batch:
    """Tokens [row, position], their weights as targets, and where what is in them.

    `spans` [row, position]: 1 where the reply is decided and given; `starts` [row]: the reply's
    first token; `openings` [row, side]: the first token of reply A and of reply B.
    """

    tokens: Tensor
    weights: Tensor
    spans: Tensor
    starts: Tensor
    openings: Tensor


@dataclass(frozen=True)
class Lesson(Generic[AnyRow]):
    """`plan` makes the row of an example. Within `during`, the forward pass of a batch is changed
    as its rows say; what it yields is called after that pass and returns the loss of the lesson,
    or None where it asks for nothing. `weight`: of that loss beside the replies' own.
    """

    plan: Callable[[Example, Random], AnyRow]
    during: Callable[
        [nn.Module, Sequence[Example], Sequence[AnyRow], Batch],
        AbstractContextManager[Callable[[], Tensor | None]],
    ]
    weight: float
