"""Judges that compare a reply with a text: exact, containing, first word, regular expression.

Intuition. Where the right answer is known, a program can look for it. Exact match is strict and
misses answers in other words; a containing match is lenient and is taken in by a reply that names
several answers. Case, white space and a final full stop don't count.

What is looked for stands in a column of the item (a column that held a list has a line for each
accepted answer, and any of them counts) or on the card as `phrases`.
"""

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from moesteer.evaluation.judges.base import Context, OneByOne, Settings, normalised
from moesteer.evaluation.task import Item
from moesteer.records import Text


class Matching(Settings):
    """`outcome` where the reply matches, else `otherwise`."""

    column: Text | None = None
    phrases: list[Text] = Field(default_factory=list, validate_default=True)
    outcome: Text = "right"
    otherwise: Text = "wrong"

    @field_validator("phrases")
    @classmethod
    def _column_or_phrases(cls, phrases: list[str], others: ValidationInfo) -> list[str]:
        if (others.data.get("column") is None) == (not phrases):
            raise ValueError("or a column say what to look for; give one of them")
        return phrases

    @property
    def outcomes(self) -> tuple[str, ...]:
        return self.outcome, self.otherwise

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    def wanted(self, item: Item) -> list[str]:
        """The accepted texts, normalised."""
        texts = self.phrases if self.column is None else item.columns[self.column].split("\n")
        return [plain for text in texts if (plain := _plain(text))]

    def by(self, name: str, matches: Callable[[str, str], bool]) -> OneByOne:
        """A judge by `matches(reply, wanted)`, both normalised."""

        def say(item: Item, reply: str) -> tuple[str, str, None]:
            for text in self.wanted(item):
                if matches(_plain(reply), text):
                    return self.outcome, f"matches {text}", None
            return self.otherwise, "", None

        return OneByOne(f"{name} {self.column or 'phrases'}", self.outcomes, say)


class Exact(Matching):
    """The reply is the text."""

    def judge(self, context: Context) -> OneByOne:
        return self.by("exact", lambda reply, wanted: reply == wanted)


class Contains(Matching):
    """The text stands in the reply, as whole words."""

    def judge(self, context: Context) -> OneByOne:
        return self.by("contains", lambda reply, wanted: bool(_as_words(wanted).search(reply)))


class First(Matching):
    """The reply begins with the text, as whole words; brackets and asterisks before it are passed.

    For a choice, such as a letter or yes and no, given at once.
    """

    def judge(self, context: Context) -> OneByOne:
        def begins(reply: str, wanted: str) -> bool:
            return bool(_as_words(wanted).match(reply.lstrip("([*_\"' ")))

        return self.by("first", begins)


def _a_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return text


class Pattern(Settings):
    """`outcome` where the regular expression is found in the reply, else `otherwise`."""

    pattern: Annotated[str, AfterValidator(_a_pattern)]
    outcome: Text = "right"
    otherwise: Text = "wrong"
    case: Literal["matters", "ignored"] = "ignored"

    @property
    def outcomes(self) -> tuple[str, ...]:
        return self.outcome, self.otherwise

    def judge(self, context: Context) -> OneByOne:
        pattern = re.compile(self.pattern, re.IGNORECASE if self.case == "ignored" else 0)

        def say(item: Item, reply: str) -> tuple[str, str, None]:
            if found := pattern.search(reply):
                return self.outcome, f"finds {found[0]!r}", None
            return self.otherwise, "", None

        return OneByOne(f"pattern {self.pattern}", self.outcomes, say)


def _plain(text: str) -> str:
    return normalised(text).rstrip(" .")


def _as_words(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
