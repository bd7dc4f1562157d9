"""`moesteer generate`: prompts in, JSON lines out, steered or not, with the proof that it fired."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.chat import parse_chat_options, render_prompt
from moesteer.contrast import Message, Turn
from moesteer.errors import MoesteerError
from moesteer.files import write_text
from moesteer.profile import Profile
from moesteer.records import Record, Text, check_record, read_records, read_text

if TYPE_CHECKING:
    from moesteer.engines.base import Engine, LayerEvidence


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for a reply, and where it was read."""

    messages: tuple[Message, ...]
    source: str


class _OnePrompt(Record):
    prompt: Text


class _Messages(Record):
    messages: list[Turn]


def read_prompts(arguments: Sequence[str], file: str | None, system: str | None) -> list[Prompt]:
    """Prompts from the arguments, else the file, else standard input; MoesteerError if none."""
    if arguments and file:
        raise MoesteerError("give prompts as arguments or with --file, not both.")
    if arguments:
        read = [
            ([Message("user", text)], f"prompt {number}")
            for number, text in enumerate(arguments, start=1)
        ]
    elif file is not None and Path(file).suffix.lower() == ".jsonl":
        read = [_from_record(record, where) for where, record in read_records(file, required=())]
    else:
        text = read_text(Path(file)) if file is not None else sys.stdin.read()
        read = [
            ([Message("user", line)], f"{file or 'standard input'}:{number}")
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip()
        ]
    if not read or any(not m.content.strip() for messages, _ in read for m in messages):
        raise MoesteerError("there is an empty prompt, or none at all; give at least one.")
    opening = [] if system is None else [Message("system", system)]
    return [Prompt((*opening, *messages), where) for messages, where in read]


def _from_record(record: dict[str, object], where: str) -> tuple[list[Message], str]:
    if "messages" in record:
        turns = check_record(_Messages, record, where).messages
        return [Message(turn.role, turn.content) for turn in turns], where
    return [Message("user", check_record(_OnePrompt, record, where).prompt)], where


def generate_records(
    engine: "Engine",
    prompts: Sequence[Prompt],
    profile: Profile | None,
    *,
    options: Sequence[str] = (),
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> "tuple[list[dict[str, object]], list[LayerEvidence]]":
    """A record a prompt (prompt, reply, profile), and the proof that the profile fired."""
    check_limits(max_new_tokens, temperature, batch_size)
    chat_options = merged_options(profile, options)
    rendered = []
    for prompt in prompts:
        try:
            rendered.append(render_prompt(prompt.messages, engine.tokenizer, chat_options))
        except MoesteerError as error:
            raise MoesteerError(f"{prompt.source}: {error}") from None
    generated = engine.generate(
        rendered,
        profile,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )
    records: list[dict[str, object]] = [
        {
            "prompt": prompt.messages[-1].content,
            "reply": reply,
            "profile": None if profile is None else profile.name,
        }
        for prompt, reply in zip(prompts, generated.replies, strict=True)
    ]
    return records, generated.evidence


def check_limits(max_new_tokens: int, temperature: float, batch_size: int = 1) -> None:
    """MoesteerError where a number of the command line is too small."""
    for name, value, least in (
        ("max-new-tokens", max_new_tokens, 1),
        ("temperature", temperature, 0),
        ("batch-size", batch_size, 1),
    ):
        if not value >= least:
            raise MoesteerError(f"--{name} is {value}; it must be at least {least}.")


def merged_options(
    profile: Profile | None, options: Sequence[str]
) -> dict[str, bool | int | float | str]:
    """The chat options a profile was made with, overridden by those of the command line."""
    made_with = profile.evidence.chat_options if profile and profile.evidence else {}
    return made_with | parse_chat_options(options)


def write_records(records: Iterable[dict[str, object]], out: str | None) -> None:
    """One JSON object a line, to standard output or atomically to a file."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    if out is None:
        print("\n".join(lines))
    else:
        write_text(Path(out), "\n".join(lines) + "\n")
