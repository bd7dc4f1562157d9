"""Two sets of prompts that differ in a behaviour: A calls it forth (restricted), B does not
(harmless).

A direction is fitted on one part of either set and chosen on another (Arditi et al. 2024, arXiv
2406.11717: 128 and 32 prompts a side). What is read is the end of a prompt, where the model has
heard all of it and is about to reply: by default the tokens of the chat template that come after
the instruction, which are the same for all prompts.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.chat import render_prompt, tokenise
from moesteer.contrast import ContrastPair, Conversation, Message, Span
from moesteer.errors import MoesteerError
from moesteer.generate import Prompt, prompt_of_record, read_prompts
from moesteer.records import read_records, shorten

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

FIT, VALIDATE = 128, 32
"""Prompts a side to fit on and to choose on."""
LEAST_FIT, LEAST_VALIDATE = 8, 4
"""With fewer, a mean is one of chances."""


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt as the model reads it, up to where the reply begins.

    The last `after` tokens of `ids` stand after the instruction, the content of its last message.
    """

    text: str
    ids: tuple[int, ...]
    after: int
    source: str


@dataclass(frozen=True)
class Sides:
    """Prompts of A (with the behaviour) and of B (without it)."""

    a: tuple[AskedPrompt, ...]
    b: tuple[AskedPrompt, ...]


@dataclass(frozen=True)
class PromptSets:
    """Prompts to fit directions on and to choose among them on, of both sides.

    `tokens` are those that a reply with the behaviour begins with; empty until they are known (see
    `refusal.py`). `settings` say how many prompts there were and what was done with them, by name;
    `data_hash` is of all prompts that were drawn from.
    """

    fit: Sides
    validation: Sides
    tokens: tuple[int, ...]
    chat_options: dict[str, bool | int | float | str]
    data_hash: str
    settings: dict[str, bool | int | float | str]

    @property
    def parts(self) -> dict[str, tuple[AskedPrompt, ...]]:
        """The four parts by name, as their numbers are named in `settings`."""
        return {
            "fit_a": self.fit.a,
            "fit_b": self.fit.b,
            "validate_a": self.validation.a,
            "validate_b": self.validation.b,
        }

    @property
    def all(self) -> tuple[AskedPrompt, ...]:
        return tuple(prompt for part in self.parts.values() for prompt in part)

    @property
    def after_instruction(self) -> int:
        """How many tokens every prompt has after its instruction."""
        return min(prompt.after for prompt in self.all)


def read_prompt_set(source: str) -> list[Prompt]:
    """Prompts from a file, a data set, or the testbed; each once.

    A file has a prompt a line, or is a .jsonl of {"prompt": …} or {"messages": […]}, or a .csv with
    a column prompt; a data set (ORG/NAME:split) has such a column; the testbed's are
    `testbed:TASK[:SPLIT]`, of the split fit where none is named. Raises MoesteerError, with file
    and line, for what can't be used.
    """
    if source.startswith("testbed:"):
        prompts = _built_in(source)
    elif Path(source).is_file():
        prompts = read_prompts((), source, None)
    else:
        records = read_records(source, required=("prompt",))
        prompts = [prompt_of_record(record, where) for where, record in records]
    return _each_once(prompts)


def prompts_of_pairs(pairs: Sequence[ContrastPair]) -> tuple[list[Prompt], list[Prompt]]:
    """What stands before the replies of contrast pairs, as two sets of prompts.

    Raises MoesteerError where both sides of a pair have the same prompt, or one has none.
    """
    sides: tuple[list[Prompt], list[Prompt]] = [], []
    for pair in pairs:
        for conversation, prompts in zip((pair.a, pair.b), sides, strict=True):
            messages = conversation.messages
            asked = messages[:-1] if messages[-1].role == "assistant" else messages
            if not asked:
                raise MoesteerError(f"{pair.source}: nothing stands before a reply.")
            prompts.append(Prompt(asked, pair.source))
        if _content(sides[0][-1]) == _content(sides[1][-1]):
            raise MoesteerError(
                f"{pair.source}: both sides have the same prompt, so nothing differs before the"
                " reply begins; a direction needs prompts that differ. Give two sets of prompts"
                " instead (--restricted, --harmless), or pairs with a prompt for each side."
            )
    return _each_once(sides[0]), _each_once(sides[1])


def check_sizes(fit: int, validate: int) -> None:
    """MoesteerError where so few prompts a side would be asked for that nothing could be found."""
    for option, asked, least in (
        ("fit", fit, LEAST_FIT),
        ("validate", validate, LEAST_VALIDATE),
    ):
        if asked < least:
            raise MoesteerError(f"--{option} is {asked}; at least {least} prompts a side.")


def draw_sets(
    engine: "Engine",
    a: Sequence[Prompt],
    b: Sequence[Prompt],
    *,
    fit: int = FIT,
    validate: int = VALIDATE,
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    seed: int = 0,
) -> PromptSets:
    """`fit` and `validate` prompts of each side, drawn by the seed, as the model reads them.

    Where a side has fewer, they are divided in the same proportion. Raises MoesteerError where they
    are too few, where a prompt is in both sets, or where one does not fit into the context.
    """
    check_sizes(fit, validate)
    check_apart(a, b)
    drawn = {}
    settings: dict[str, bool | int | float | str] = {}
    for side, prompts in (("a", a), ("b", b)):
        chosen = random.Random(seed).sample(list(prompts), min(len(prompts), fit + validate))
        if len(chosen) < LEAST_FIT + LEAST_VALIDATE:
            raise MoesteerError(
                f"side {side.upper()} has too few prompts: {len(chosen)}. At least"
                f" {LEAST_FIT + LEAST_VALIDATE} are needed: {LEAST_FIT} to fit on and"
                f" {LEAST_VALIDATE} to choose on."
            )
        share = round(len(chosen) * validate / (fit + validate))
        kept_back = min(max(share, LEAST_VALIDATE), len(chosen) - LEAST_FIT)
        asked = [as_read(engine, prompt, chat_options or {}) for prompt in chosen]
        drawn[side] = tuple(asked[kept_back:]), tuple(asked[:kept_back])
        settings[f"prompts_{side}"] = len(prompts)
        settings[f"fit_{side}"] = len(chosen) - kept_back
        settings[f"validate_{side}"] = kept_back
    return PromptSets(
        Sides(drawn["a"][0], drawn["b"][0]),
        Sides(drawn["a"][1], drawn["b"][1]),
        (),
        dict(chat_options or {}),
        _hash(a, b),
        settings,
    )


def check_apart(a: Sequence[Prompt], b: Sequence[Prompt]) -> None:
    """Raise MoesteerError, with both places, where a prompt is in both sets."""
    places = {_content(prompt): prompt.source for prompt in a}
    both = [prompt for prompt in b if _content(prompt) in places]
    if both:
        first = both[0]
        raise MoesteerError(
            f"the prompt {shorten(first.messages[-1].content)} stands in both sets:"
            f" {places[_content(first)]} and {first.source}"
            f" ({len(both)} such of {len(a)} and {len(b)}). Take it out of one of them."
        )


def positions_of(sets: PromptSets, asked: int | None) -> int:
    """How many of the last tokens of each prompt are read: as many as asked for, or else all that
    come after the instruction.

    Raises MoesteerError where there are none, or where a prompt is shorter.
    """
    if asked is None:
        if not sets.after_instruction:
            first = min(sets.all, key=lambda prompt: prompt.after)
            raise MoesteerError(
                f"{first.source}: the chat template has 0 tokens after the instruction, so say how"
                " many of a prompt's last tokens to read: --positions."
            )
        return sets.after_instruction
    shortest = min(sets.all, key=lambda prompt: len(prompt.ids))
    if not 1 <= asked <= len(shortest.ids):
        raise MoesteerError(
            f"--positions is {asked}, but {shortest.source} has {len(shortest.ids)} tokens with its"
            f" template, {sets.after_instruction} of them after the instruction; give 1 to"
            f" {len(shortest.ids)}."
        )
    return asked


def as_read(engine: "Engine", prompt: Prompt, chat_options: Mapping[str, object]) -> AskedPrompt:
    last = prompt.messages[-1].content
    start = len(last) - len(last.lstrip())
    span = Span(len(prompt.messages) - 1, start, start + len(last.strip()))
    conversation = Conversation(prompt.messages, "last message", (span,))
    (read,) = tokenise(
        [(prompt.source, conversation)],
        engine.tokenizer,
        chat_options=chat_options,
        add_generation_prompt=True,
    )
    if engine.max_tokens is not None and len(read.ids) >= engine.max_tokens:
        raise MoesteerError(
            f"{prompt.source}: {len(read.ids)} tokens, which leaves no room for a reply in the"
            f" model's context of {engine.max_tokens}; shorten it."
        )
    text = render_prompt(prompt.messages, engine.tokenizer, chat_options)
    return AskedPrompt(text, read.ids, read.target[::-1].index(True), prompt.source)


def _built_in(name: str) -> list[Prompt]:
    from moesteer.testbed.world import SPLITS, TASKS, probes

    task, _, split = name.removeprefix("testbed:").partition(":")
    split = split or "fit"
    if task not in TASKS or split not in SPLITS:
        raise MoesteerError(
            f"there are no built-in prompts {name!r}; they are testbed:TASK or testbed:TASK:SPLIT,"
            f" with {', '.join(TASKS)} and {', '.join(SPLITS)}."
        )
    return [
        Prompt((Message("user", probe.prompt),), f"testbed:{task}:{split}:{number}")
        for number, probe in enumerate(probes(task, split), start=1)
    ]


def _content(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """What is asked, whatever the white space."""
    return tuple((message.role, " ".join(message.content.split())) for message in prompt.messages)


def _each_once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of equal ones: one that stood twice could be fitted on and chosen on."""
    found: dict[object, Prompt] = {}
    for prompt in prompts:
        found.setdefault(_content(prompt), prompt)
    return list(found.values())


def _hash(*sides: Sequence[Prompt]) -> str:
    contents = [[_content(prompt) for prompt in side] for side in sides]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
