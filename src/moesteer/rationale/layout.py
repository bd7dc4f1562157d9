"""Where an instance's words are among the tokens of its prompt.

A rationale is made of units: words (`words.py`), or tokens. Each token belongs to the word with
which it shares the most visible characters, the first of equals, so that no token counts twice. The
texts are found in the rendered prompt by `moesteer.chat`, which proves where they stand.
"""

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moesteer.chat import NO_OPTIONS, Encoded, check_covered, check_offsets, encode
from moesteer.contrast import Conversation, Message, Span, located
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.rationale.instances import Instance, filled
from moesteer.rationale.words import word_spans
from moesteer.records import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UnitKind = Literal["word", "token"]
"""What a rationale is made of."""


@dataclass(frozen=True)
class Unit:
    """A word, or a token, of one of the instance's texts.

    `start` and `end`: its characters in that text; `tokens`: its positions among the prompt's
    tokens, of which each belongs to one unit at most; `human`: whether people marked it.
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]
    human: bool


@dataclass(frozen=True)
class Laid:
    """An instance as the model reads it: the tokens of its prompt, up to where the reply begins.

    `labels`: the tokens of each label's words as they would follow. `units` in reading order.
    """

    instance: Instance
    ids: tuple[int, ...]
    units: tuple[Unit, ...]
    labels: dict[str, tuple[int, ...]]

    @property
    def human(self) -> tuple[int, ...]:
        """The numbers of the units that people marked."""
        return tuple(number for number, unit in enumerate(self.units) if unit.human)


def lay_out(
    instances: Sequence[Instance],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    unit: UnitKind = "word",
    plain: bool = False,
    chat_options: Mapping[str, object] = NO_OPTIONS,
    max_tokens: int | None = None,
) -> list[Laid]:
    """Render and tokenise the instances' prompts, and find their units and label words in them.

    The prompt goes through the chat template, or as it is if `plain` (base models), with the
    special tokens that the tokenizer begins a text with; label words then follow after a space.
    A unit is human if people marked one of its visible characters.

    Raises MoesteerError, with the instance's source, where the template is missing or does not
    keep a text, where the tokenizer can't say which characters a token covers, where the tokens of
    one label begin with those of another, where no unit is marked, and where prompt and longest
    label have more than `max_tokens` tokens. Warns of words that have no token of their own, which
    are no units.
    """
    check_offsets(tokenizer)
    if plain:
        prompts = [_plain(instance, tokenizer) for instance in instances]
    else:
        asked = [(instance.source, _conversation(instance)) for instance in instances]
        prompts = encode(asked, tokenizer, chat_options, add_generation_prompt=True)
    laid, lost = [], 0
    for instance, prompt in zip(instances, prompts, strict=True):
        with located(instance.source):
            units, without = _units(instance, prompt, unit)
            labels = _labels(instance, prompt, tokenizer, plain)
            _check_length(len(prompt.ids), labels, max_tokens)
        laid.append(Laid(instance, prompt.ids, units, labels))
        lost += without
    if lost:
        warnings.warn(
            f"{lost} words have no token of their own, as the tokenizer joins them with a longer"
            " neighbour: they are left out of the units; with tokens as units nothing is.",
            MoesteerWarning,
            stacklevel=2,
        )
    return laid


# -- the prompt and its labels -------------------------------------------------------------------


def _conversation(instance: Instance) -> Conversation:
    """What the user says, with a span over each text's visible part."""
    prompt, places = filled(instance)
    spans = []
    for name, place in places.items():
        lead, end = _visible(instance.texts[name])
        spans.append(Span(0, place + lead, place + end))
    return Conversation((Message("user", prompt),), "texts", tuple(spans))


def _plain(instance: Instance, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """The same without a chat template."""
    said = _conversation(instance)
    prompt = said.messages[0].content
    encoded = tokenizer(
        prompt, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    ids, special, offsets = (
        list[Any](encoded[key]) for key in ("input_ids", "special_tokens_mask", "offset_mapping")
    )
    while special and special[-1]:  # the reply goes on where the prompt ends
        special.pop()
    with located(instance.source):
        check_covered(prompt, offsets)
    ranges = tuple((span.start, span.end) for span in said.spans)
    return Encoded(prompt, ranges, tuple(ids[: len(special)]), tuple(offsets[: len(special)]))


def _labels(
    instance: Instance, prompt: Encoded, tokenizer: "PreTrainedTokenizerBase", plain: bool
) -> dict[str, tuple[int, ...]]:
    """The tokens of each label's words after the prompt."""
    space = " " if plain and not prompt.text[-1].isspace() else ""
    labels: dict[str, tuple[int, ...]] = {}
    for label, words in instance.labels.items():
        ids = _encode(tokenizer, prompt.text + space + words, plain)
        begins = ids[: len(prompt.ids)] == prompt.ids
        tokens = ids[len(prompt.ids) :] if begins else _encode(tokenizer, space + words, False)
        for other, known in labels.items():
            common = min(len(tokens), len(known))
            if tokens[:common] == known[:common]:
                raise MoesteerError(
                    f"the tokens of the label words {shorten(words)} ({label}) and"
                    f" {shorten(instance.labels[other])} ({other}) begin alike up to the end of the"
                    " shorter, so one is never less probable than the other; choose other words"
                )
        labels[label] = tokens
    return labels


def _encode(
    tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool
) -> tuple[int, ...]:
    """The tokens of a text, less special ones that end it."""
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids, special = (list[Any](encoded[key]) for key in ("input_ids", "special_tokens_mask"))
    while add_special_tokens and special and special[-1]:
        special.pop()
    return tuple(ids[: len(special)])


def _check_length(
    prompt: int, labels: Mapping[str, tuple[int, ...]], max_tokens: int | None
) -> None:
    longest = max(map(len, labels.values()))
    if max_tokens is not None and prompt + longest > max_tokens:
        raise MoesteerError(
            f"the prompt has {prompt} tokens and the longest label {longest}, over the model's"
            f" context of {max_tokens}; shorten the texts"
        )


# -- units ---------------------------------------------------------------------------------------


def _units(instance: Instance, prompt: Encoded, kind: UnitKind) -> tuple[tuple[Unit, ...], int]:
    """The units in reading order, and how many words have no token."""
    # A range begins at the first visible character of its text.
    begins = {
        name: start - _visible(instance.texts[name])[0]
        for name, (start, _) in zip(filled(instance)[1], prompt.ranges, strict=True)
    }
    if kind == "word":
        pieces = [
            (name, begin + start, begin + end)
            for name, begin in begins.items()
            for start, end in word_spans(instance.texts[name])
        ]
    else:
        pieces = [(name, *part) for name, part in zip(begins, prompt.ranges, strict=True)]
    owners = _owners(prompt.text, prompt.offsets, [(start, end) for _, start, end in pieces])
    units: list[Unit] = []
    if kind == "word":
        tokens: list[list[int]] = [[] for _ in pieces]
        for token, owner in enumerate(owners):
            if owner is not None:
                tokens[owner].append(token)
        for (name, start, end), own in zip(pieces, tokens, strict=True):
            if own:
                units.append(_unit(instance, name, start - begins[name], end - begins[name], own))
    else:
        for token, owner in enumerate(owners):
            if owner is not None:
                name, *part = pieces[owner]
                covered = prompt.offsets[token]
                start, end = max(part[0], covered[0]), min(part[1], covered[1])
                first, last = _visible(prompt.text[start:end])
                start -= begins[name]
                units.append(_unit(instance, name, start + first, start + last, [token]))
    if not any(unit.human for unit in units):
        raise MoesteerError(
            "the marked characters belong to no unit (are they punctuation?); mark a word"
        )
    return tuple(units), 0 if kind == "token" else len(pieces) - len(units)


def _unit(instance: Instance, name: str, start: int, end: int, tokens: Sequence[int]) -> Unit:
    human = any(
        span.text == name
        and instance.texts[name][max(start, span.start) : min(end, span.end)].strip()
        for span in instance.rationale
    )
    return Unit(name, start, end, tuple(tokens), human)


def _owners(
    text: str, offsets: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]
) -> list[int | None]:
    """For each token the number of the piece that shares most visible characters with it, the
    first of equals; None where no piece does. Pieces in reading order, apart from each other."""
    starts = [start for start, _ in pieces]
    owners: list[int | None] = []
    for start, end in offsets:
        best, most = None, 0
        number = max(0, bisect_right(starts, start) - 1)
        while number < len(pieces) and pieces[number][0] < end:
            first, last = pieces[number]
            shared = sum(not c.isspace() for c in text[max(start, first) : min(end, last)])
            if shared > most:
                best, most = number, shared
            number += 1
        owners.append(best)
    return owners


def _visible(text: str) -> tuple[int, int]:
    """Where a text begins and ends, white space around it aside."""
    return len(text) - len(text.lstrip()), len(text.rstrip())
