"""What judges share: the settings that a card gives them, and judges that read a reply alone."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from moesteer.evaluation.task import Item, Judge, Verdict
from moesteer.records import Record

if TYPE_CHECKING:
    from moesteer.engines.base import Engine


@dataclass(frozen=True)
class Context:
    """What a judge may need besides its settings: the model that is judged, and its chat options.

    `engine` is None where no model is at hand; a judge that needs one then raises MoesteerError.
    """

    engine: "Engine | None" = None
    chat_options: Mapping[str, object] = field(default_factory=dict)


class Settings(Record):
    """One `[[judges]]` table of a card, without its kind; each judge's file has its own."""

    needs_engine: ClassVar[bool] = False

    @property
    @abstractmethod
    def outcomes(self) -> tuple[str, ...]:
        """All outcomes that the judge can give."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of an item that the judge reads."""
        return ()

    @abstractmethod
    def judge(self, context: Context) -> Judge:
        """The judge; MoesteerError where it can't be had."""


@dataclass(frozen=True)
class OneByOne:
    """A judge that says of each item and reply alone: an outcome, a note, a score."""

    name: str
    outcomes: tuple[str, ...]
    say: Callable[[Item, str], tuple[str | None, str, float | None]]

    def __call__(self, items: Sequence[Item], replies: Sequence[str]) -> list[Verdict]:
        return [
            Verdict(self.name, *self.say(item, reply))
            for item, reply in zip(items, replies, strict=True)
        ]


def normalised(text: str) -> str:
    """Lower case, plain apostrophes, single spaces."""
    return " ".join(text.lower().replace("’", "'").replace("‘", "'").split())
