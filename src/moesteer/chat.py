"""Conversations through the model's own chat template, and the tokens of their target spans.

Finding the span in the rendered text is the delicate step, for its words may occur elsewhere (in
the question, in the template itself) and a template may trim or rewrite what it is given. Nothing
is searched for. The conversation is rendered a second time with one character that occurs nowhere
else in place of the span:

    rendered   <|user|>Say hi.<|assistant|>hi<|end|>
    marked     <|user|>Say hi.<|assistant|>X<|end|>

What stands left and right of the mark is what stands left and right of the span. This is proved,
not assumed: left + span + right must be the rendered text exactly, or the pair is refused.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moesteer.contrast import ContrastPair, Conversation, Message, located
from moesteer.errors import MoesteerError
from moesteer.options import parse_options
from moesteer.records import first_line, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_OPTIONS: Mapping[str, object] = MappingProxyType({})


def parse_chat_options(pairs: Sequence[str]) -> dict[str, bool | int | float | str]:
    """KEY=VALUE texts as options of a chat template: true, false and numbers get their type."""
    return parse_options(pairs, "chat option", "enable_thinking=false")


@dataclass(frozen=True)
class TokenisedConversation:
    """Token ids, and for each whether it belongs to the target span (same length)."""

    ids: tuple[int, ...]
    target: tuple[bool, ...]


@dataclass(frozen=True)
class Encoded:
    """A rendered conversation: its text, the characters (start, end) of each target span in it,
    its tokens, and the characters of each token."""

    text: str
    ranges: tuple[tuple[int, int], ...]
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenisedPair:
    a: TokenisedConversation
    b: TokenisedConversation
    source: str


def render_prompt(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    chat_options: Mapping[str, object] = NO_OPTIONS,
) -> str:
    """The chat template's text up to where the model's reply begins, for generation.

    It holds the template's special tokens, so tokenise it with `add_special_tokens=False`.
    Raises MoesteerError where there is no chat template or it refuses the messages.
    """
    return _render(messages, tokenizer, chat_options, add_generation_prompt=True)


def tokenise_pairs(
    pairs: Sequence[ContrastPair],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_options: Mapping[str, object] = NO_OPTIONS,
    max_tokens: int | None = None,
) -> list[TokenisedPair]:
    """Render each side with the chat template and mark the tokens of its target span.

    A token counts if it overlaps the span by at least one character. As a span begins and ends
    with a visible character, a token that straddles a border counts only for the sake of a visible
    one (" Sure" for "Sure", but not the line break before it), and white space within the span
    counts. Where one character takes several tokens, all of them count.

    `chat_options` go to the chat template (`enable_thinking`, `reasoning_effort`, …);
    `chat_template` replaces the template itself. Of a side longer than `max_tokens` only the first
    `max_tokens` tokens are kept.

    Raises MoesteerError, with the pair's source and side, where the template is missing, fails,
    leaves out or rewrites the target, where `max_tokens` cuts into it, and where the tokenizer
    drops characters.
    """
    sides = [
        (f"{pair.source}: side {name}", conversation)
        for pair in pairs
        for name, conversation in (("a", pair.a), ("b", pair.b))
    ]
    tokenised = tokenise(sides, tokenizer, chat_options=chat_options, max_tokens=max_tokens)
    halves = zip(pairs, tokenised[::2], tokenised[1::2], strict=True)
    return [TokenisedPair(a, b, pair.source) for pair, a, b in halves]


def tokenise(
    conversations: Sequence[tuple[str, Conversation]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_options: Mapping[str, object] = NO_OPTIONS,
    max_tokens: int | None = None,
    add_generation_prompt: bool = False,
) -> list[TokenisedConversation]:
    """As `tokenise_pairs`, of single conversations, each with the place that its errors name.

    With `add_generation_prompt`, up to where the model's reply begins.
    """
    return [
        _with_target(encoded, source, max_tokens)
        for encoded, (source, _) in zip(
            encode(conversations, tokenizer, chat_options, add_generation_prompt),
            conversations,
            strict=True,
        )
    ]


def encode(
    conversations: Sequence[tuple[str, Conversation]],
    tokenizer: "PreTrainedTokenizerBase",
    chat_options: Mapping[str, object] = NO_OPTIONS,
    add_generation_prompt: bool = False,
) -> Iterator[Encoded]:
    """Conversations, each with the place that its errors name, as text and as tokens.

    Raises MoesteerError as `tokenise` does.
    """
    check_offsets(tokenizer)
    batch_size = 512  # keeps the offsets, as Python objects, from piling up
    for first in range(0, len(conversations), batch_size):
        batch = conversations[first : first + batch_size]
        rendered: list[tuple[str, list[tuple[int, int]]]] = []
        for source, conversation in batch:
            with located(source):
                rendered.append(
                    _render_with_target(
                        conversation, tokenizer, chat_options, add_generation_prompt
                    )
                )
        encoded = tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids: Any = encoded["input_ids"]
        offsets: Any = encoded["offset_mapping"]
        for i, (source, _) in enumerate(batch):
            text, ranges = rendered[i]
            with located(source):
                check_covered(text, offsets[i])
            yield Encoded(text, tuple(ranges), tuple(ids[i]), tuple(offsets[i]))


def check_offsets(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise MoesteerError where the tokenizer cannot say which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise MoesteerError(
            f"{type(tokenizer).__name__} cannot say which characters a token covers; load the fast "
            "tokenizer (a tokenizer.json, use_fast=True)"
        )


def check_covered(rendered: str, offsets: Sequence[tuple[int, int]]) -> None:
    """Raise MoesteerError where a tokenizer drops characters: its offsets then count without them
    and point elsewhere."""
    # One that composes characters, NFC, gives an accent's place to its letter: that is no loss.
    missed, covered = "", 0
    for start, end in offsets:
        missed += rendered[covered:start]
        covered = max(covered, end)
    missed = "".join((missed + rendered[covered:]).split())
    if missed and unicodedata.is_normalized("NFC", rendered):
        raise MoesteerError(
            f"the tokenizer drops characters, so which token stands for which is unknown (no token "
            f"for {shorten(missed)}); use the model's own tokenizer or remove such characters"
        )


def _with_target(encoded: Encoded, source: str, max_tokens: int | None) -> TokenisedConversation:
    with located(source):
        target = _target_tokens(encoded)
        _check_length(target, max_tokens)
    return TokenisedConversation(encoded.ids[:max_tokens], tuple(target[:max_tokens]))


def _render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    chat_options: Mapping[str, object],
    *,
    add_generation_prompt: bool = False,
) -> str:
    ours = {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}
    if clash := ours.intersection(chat_options):
        raise MoesteerError(f"the chat option {min(clash)!r} is set by moesteer; leave it out")
    if tokenizer.chat_template is None and chat_options.get("chat_template") is None:
        raise MoesteerError(
            "the tokenizer has no chat template (a base model?); give one with the option "
            "chat_template (--chat-template FILE)"
        )
    options: dict[str, Any] = dict(chat_options)
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
    except Exception as error:  # a template is a program of somebody's: it may raise anything
        raise MoesteerError(
            f"the chat template refuses this conversation: {first_line(error)}"
        ) from error
    assert isinstance(rendered, str)
    return rendered


def _render_with_target(
    conversation: Conversation,
    tokenizer: "PreTrainedTokenizerBase",
    chat_options: Mapping[str, object],
    add_generation_prompt: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the ranges of its characters that the target takes."""
    messages = list(conversation.messages)

    def render(messages: Sequence[Message]) -> str:
        return _render(
            messages, tokenizer, chat_options, add_generation_prompt=add_generation_prompt
        )

    rendered = render(messages)
    # A private-use character that occurs nowhere, so that one place is the place.
    mark = next(chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in rendered)
    ranges: list[tuple[int, int]] = []
    for span in conversation.spans:
        message = messages[span.message]
        text = message.content[span.start : span.end]
        content = message.content[: span.start] + mark + message.content[span.end :]
        marked = render(
            [
                *messages[: span.message],
                Message(message.role, content),
                *messages[span.message + 1 :],
            ]
        )
        left, *rest = marked.split(mark)
        if len(rest) != 1 or left + text + rest[0] != rendered:
            how = (
                f"repeats it {len(rest)} times" if len(rest) > 1 else "leaves it out or changes it"
            )
            raise MoesteerError(
                f"the target {shorten(text)} does not stand as given, and once, in the rendered "
                f"conversation: the chat template {how} (message {span.message + 1}, "
                f"{message.role}); choose a target that the template keeps"
            )
        ranges.append((len(left), len(left) + len(text)))
    return rendered, ranges


def _target_tokens(encoded: Encoded) -> list[bool]:
    target = [False] * len(encoded.offsets)
    for first, last in encoded.ranges:
        inside = [
            i for i, (start, end) in enumerate(encoded.offsets) if start < last and end > first
        ]
        if not inside:
            raise MoesteerError(
                f"the tokenizer gives no token to the target {shorten(encoded.text[first:last])}; "
                "choose a longer one"
            )
        for token in inside:
            target[token] = True
    return target


def _check_length(target: Sequence[bool], max_tokens: int | None) -> None:
    if max_tokens is not None and any(target[max_tokens:]):
        needed = len(target) - target[::-1].index(True)
        raise MoesteerError(
            f"the target ends at token {needed}, beyond the limit of {max_tokens} tokens; shorten "
            "the text or raise the limit"
        )
