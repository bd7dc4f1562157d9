"""Contrast pairs: two conversations that differ in one behaviour, and the characters that count.

A detector compares how a model routes two texts, and only the tokens of a *target span* may count:
the reply, the question, a phrase. Here a pair is read and checked, and its target becomes
characters of a message's content; `moesteer.chat` turns these into tokens.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moesteer.errors import MoesteerError
from moesteer.records import Record, Text, check_record, read_records, shorten


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (exclusive) of the content of message number `message`.

    It begins and ends with a visible character.
    """

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Conversation:
    """Messages, and the characters of them whose tokens count.

    `target` names the rule that gave the `spans`: "reply", "prompt", "last_user", "text" (a
    literal text) or "last" (the last occurrence of a text).
    """

    messages: tuple[Message, ...]
    target: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class ContrastPair:
    """A shows the behaviour, B does not. `source` says where it was read: "pairs.jsonl:3"."""

    a: Conversation
    b: Conversation
    source: str


def read_pairs(source: str | Path) -> list[ContrastPair]:
    """Read contrast pairs from a JSONL or CSV file, or from a data set.

    `source` is an existing `.jsonl` or `.csv` file, a data set as `ORG/NAME` or `ORG/NAME:split`,
    which needs the extra `data`, or a built-in set as `testbed:BEHAVIOUR` (its fit split) or
    `testbed:BEHAVIOUR:SPLIT`. See `parse_pair` for what a line holds; a CSV
    file has the columns prompt, a, b and may have system and target.

    Raises MoesteerError, with file and line, for anything that cannot be used.
    """
    if str(source).startswith("testbed:"):
        from moesteer.testbed.data import built_in_pairs

        records = built_in_pairs(str(source))
    else:
        records = read_records(source, required=("prompt", "a", "b"), optional=("system", "target"))
    return [parse_pair(record, where) for where, record in records]


def parse_pair(record: Mapping[str, object], source: str) -> ContrastPair:
    """Check one record and find its target spans; `source` stands before every error.

    A record has one of two forms:

    - `{"prompt": …, "a": reply, "b": reply}`, with an optional `"system"` text;
    - `{"a": [messages], "b": [messages]}`, each message `{"role": …, "content": …}`.

    Either may have a `"target"`, which says which characters count on each side:

    - `"reply"` (the default): the content of the last message, which must be the assistant's. The
      end-of-turn marker does not count.
    - `"prompt"`: the contents of all messages before that reply, or of all messages where there
      is none. The template's own words do not count.
    - `"last_user"`: the content of the last user message.
    - any other text: that text, which must occur exactly once in the contents of each side.
    - `{"a": text, "b": text}`: the same, with a text (never a rule's name) for each side.
    - `{"last": text}`: the last place where that text occurs on each side.

    White space around a target never counts. Raises MoesteerError where the record is malformed,
    where a target cannot be found, and where both sides are the same up to the end of the target:
    a model that reads from left to right would route both alike.
    """
    # Replies without their prompt are meant to be this form, too: the error then names the prompt.
    if "prompt" in record or any(isinstance(record.get(side), str) for side in ("a", "b")):
        short = check_record(_PromptAndReplies, record, source)
        opening = [] if short.system is None else [Message("system", short.system)]
        opening.append(Message("user", short.prompt))
        target = short.target
        sides = {
            side: (*opening, Message("assistant", reply))
            for side, reply in (("a", short.a), ("b", short.b))
        }
    else:
        full = check_record(_TwoConversations, record, source)
        target = full.target
        sides = {
            side: tuple(Message(turn.role, turn.content) for turn in turns)
            for side, turns in (("a", full.a), ("b", full.b))
        }

    def conversation(side: Literal["a", "b"]) -> Conversation:
        rule, text = _target_rule(target, side)
        with located(f"{source}: side {side}"):
            return Conversation(sides[side], rule, _target_spans(sides[side], rule, text))

    a, b = conversation("a"), conversation("b")
    if (a.messages, a.spans) == (b.messages, b.spans):
        raise MoesteerError(f"{source}: a and b are the same, so there is no contrast")
    if _read_by_the_end_of_target(a) == _read_by_the_end_of_target(b):
        raise MoesteerError(
            f"{source}: a and b are the same up to the end of the target ({a.target}), so no "
            "routing can differ there; choose a target that comes after the difference"
        )
    return ContrastPair(a, b, source)


def pairs_hash(pairs: Iterable[ContrastPair]) -> str:
    """SHA-256 (hex) of what the pairs say, in their order: roles, contents and target spans.

    It does not depend on where the pairs were read or how their targets were named.
    """

    def content(conversation: Conversation) -> list[object]:
        return [
            [[message.role, message.content] for message in conversation.messages],
            [[span.message, span.start, span.end] for span in conversation.spans],
        ]

    canonical = json.dumps([[content(pair.a), content(pair.b)] for pair in pairs])
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextmanager
def located(source: str) -> Iterator[None]:
    """Puts where a text was read before an error."""
    try:
        yield
    except MoesteerError as error:
        raise MoesteerError(f"{source}: {error}") from error.__cause__


# --- the forms of a record --------------------------------------------------------------------


class Turn(Record):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text


class _SideTexts(Record):
    a: Text
    b: Text


class _LastText(Record):
    last: Text


_Target = Text | _SideTexts | _LastText


class _PromptAndReplies(Record):
    prompt: Text
    a: Text
    b: Text
    system: Text | None = None
    target: _Target = "reply"


class _TwoConversations(Record):
    a: Annotated[list[Turn], Field(min_length=1)]
    b: Annotated[list[Turn], Field(min_length=1)]
    target: _Target = "reply"


# --- targets -------------------------------------------------------------------------------------


def _target_rule(target: str | _SideTexts | _LastText, side: Literal["a", "b"]) -> tuple[str, str]:
    """A side's rule, and the text it looks for where it looks for one."""
    if isinstance(target, _LastText):
        return "last", target.last
    if isinstance(target, _SideTexts):
        return "text", target.a if side == "a" else target.b
    return (target, "") if target in ("reply", "prompt", "last_user") else ("text", target)


def _target_spans(messages: Sequence[Message], rule: str, text: str) -> tuple[Span, ...]:
    def whole(number: int) -> Span:
        return _trimmed(messages, number, 0, len(messages[number].content))

    replied = messages[-1].role == "assistant"
    match rule:
        case "reply":
            if not replied:
                raise MoesteerError(
                    "the target is the reply, but the last message is not the assistant's; "
                    "add the reply or choose another target, such as last_user"
                )
            return (whole(len(messages) - 1),)
        case "prompt":
            before = range(len(messages) - 1 if replied else len(messages))
            if not before:
                raise MoesteerError("the target is the prompt, but nothing stands before the reply")
            return tuple(whole(number) for number in before)
        case "last_user":
            asked = [n for n, message in enumerate(messages) if message.role == "user"]
            if not asked:
                raise MoesteerError("the target is the last user message, but there is none")
            return (whole(asked[-1]),)
        case _:
            return (_find_text(messages, text, last=rule == "last"),)


def _find_text(messages: Sequence[Message], text: str, *, last: bool) -> Span:
    places = [
        (number, found.start())
        for number, message in enumerate(messages)
        # Looking ahead finds occurrences that overlap, too.
        for found in re.finditer(f"(?={re.escape(text)})", message.content)
    ]
    if not places:
        raise MoesteerError(
            f"the target text {shorten(text)} does not occur (it is compared letter by letter; "
            "the rules' names are reply, prompt and last_user)"
        )
    if len(places) > 1 and not last:
        raise MoesteerError(
            f"the target text {shorten(text)} occurs {len(places)} times; give a longer text that "
            'occurs once, or {"last": text} for its last place'
        )
    number, start = places[-1]
    return _trimmed(messages, number, start, start + len(text))


def _trimmed(messages: Sequence[Message], number: int, start: int, end: int) -> Span:
    text = messages[number].content[start:end]
    start += len(text) - len(text.lstrip())
    return Span(number, start, start + len(text.strip()))


def _read_by_the_end_of_target(conversation: Conversation) -> tuple[object, ...]:
    end = conversation.spans[-1]
    message = conversation.messages[end.message]
    before = conversation.messages[: end.message]
    return before, message.role, message.content[: end.end], conversation.spans
