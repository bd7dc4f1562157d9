"""`moesteer generate`: prompts in, JSON lines out, steered or not, with the proof that it fired."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field

from moesteer.chat import parse_chat_options, render_prompt
from moesteer.contrast import Message, Turn
from moesteer.engines.evidence import summed
from moesteer.errors import MoesteerError
from moesteer.files import growing_lines
from moesteer.profile import Profile
from moesteer.records import Record, Text, check_record, check_text, read_records, read_text

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.engines.evidence import DirectionEvidence, LayerEvidence

GROUP = 8
"""Batches that are asked, and written, together."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for a reply, and where it was read."""

    messages: tuple[Message, ...]
    source: str
    beside: Mapping[str, object] = field(default_factory=dict)
    """What else the record held (an id, a label); it comes back with the reply."""


class _OnePrompt(Record):
    model_config = ConfigDict(extra="ignore", strict=True)  # labels and the like may stand beside
    prompt: Text


class _Messages(Record):
    model_config = ConfigDict(extra="ignore", strict=True)
    messages: Annotated[list[Turn], Field(min_length=1)]


def read_prompts(arguments: Sequence[str], file: str | None, system: str | None) -> list[Prompt]:
    """Prompts from the arguments, else the file, else standard input; MoesteerError if none."""
    if arguments and file:
        raise MoesteerError("give prompts as arguments or with --file, not both.")
    if file is not None and Path(file).suffix.lower() in (".jsonl", ".csv"):
        records = read_records(file, required=("prompt",))
        read = [prompt_of_record(record, where) for where, record in records]
    else:
        name = "prompt" if arguments else (file or "standard input")
        texts = arguments or _lines(file)
        read = [
            Prompt((Message("user", text),), f"{name}{' ' if arguments else ':'}{number}")
            for number, text in enumerate(texts, start=1)
            if arguments or text.strip()
        ]
    if not read or any(not m.content.strip() for prompt in read for m in prompt.messages):
        raise MoesteerError("there is an empty prompt, or none at all; give at least one.")
    for prompt in read:
        for message in prompt.messages:
            check_text(message.content, prompt.source)
    opening = () if system is None else (Message("system", system),)
    return [replace(prompt, messages=opening + prompt.messages) for prompt in read]


def _lines(file: str | None) -> list[str]:
    # Not splitlines(): a prompt may hold U+2028 and the like.
    return (read_text(Path(file)) if file is not None else _standard_input()).split("\n")


def _standard_input() -> str:
    try:
        return "" if sys.stdin is None else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise MoesteerError(f"standard input is not UTF-8: {error}.") from None


def prompt_of_record(record: dict[str, object], where: str) -> Prompt:
    """What a record with a prompt or messages asks; `where` stands before every error."""
    beside = {key: value for key, value in record.items() if key not in ("prompt", "messages")}
    if "messages" not in record:
        text = check_record(_OnePrompt, record, where).prompt
        return Prompt((Message("user", text),), where, beside)
    turns = check_record(_Messages, record, where).messages
    if turns[-1].role == "assistant":
        raise MoesteerError(f"{where}: the last message is the assistant's already.")
    if record.get("prompt", turns[-1].content) != turns[-1].content:
        raise MoesteerError(f"{where}: prompt and the last of messages differ; give one of them.")
    return Prompt(tuple(Message(turn.role, turn.content) for turn in turns), where, beside)


def generate_to(
    out: str | None,
    engine: "Engine",
    prompts: Sequence[Prompt],
    profile: Profile | None,
    *,
    options: Sequence[str] = (),
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> "tuple[list[LayerEvidence | DirectionEvidence], list[bool] | None]":
    """Write a JSON line a prompt: prompt, reply, profile, and what gives them again.

    Returns the proof that the profile fired, and whether each prompt opened its gate, None where it
    has none; a line then says `steered`, too. MoesteerError where it would steer nothing.

    Without `out`, lines are printed as they come. With it, an interrupted run is taken up where it
    stopped, and the proof covers the prompts asked now. Prompts are asked in groups of `GROUP`
    batches, each with a seed of its own, so that the replies don't depend on interruptions.
    """
    check_limits(max_new_tokens, temperature, batch_size, seed)
    check_steers(profile)
    chat_options = merged_options(profile, options)
    rendered = _rendered(engine, prompts, chat_options, max_new_tokens)
    made = {
        "profile": None if profile is None else profile.name,
        "profile_hash": None if profile is None else _hash(profile.to_json()),
        "model": engine.facts.id,
        "revision": engine.facts.revision,
        "chat_options": chat_options,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "batch_size": batch_size,
        "seed": seed,
    }
    group = GROUP * batch_size
    evidence: list[LayerEvidence | DirectionEvidence] = []
    opened: list[bool] = []
    told = progress or (lambda done, total: None)

    def lines(start: int) -> list[str]:
        chosen = slice(start, start + group)
        generated = engine.generate(
            rendered[chosen],
            profile,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            seed=seed + start,
        )
        evidence.extend(generated.evidence)
        steered = generated.steered
        opened.extend(steered or ())
        told(min(start + group, len(prompts)), len(prompts))
        return [
            json.dumps(
                {**prompt.beside, "prompt": prompt.messages[-1].content, "reply": reply}
                | ({} if len(prompt.messages) == 1 else {"messages": _as_dicts(prompt.messages)})
                | made
                | ({} if steered is None else {"steered": steered[number]}),
                ensure_ascii=False,
            )
            for number, (prompt, reply) in enumerate(
                zip(prompts[chosen], generated.replies, strict=True)
            )
        ]

    if out is None:
        told(0, len(prompts))
        for start in range(0, len(prompts), group):
            print("\n".join(lines(start)), flush=True)
    else:
        text = json.dumps([rendered, made, asdict(engine.facts)], sort_keys=True)
        identity = _hash(text)
        with growing_lines(Path(out), identity) as (done, add):
            told(done, len(prompts))
            for start in range(done // group * group, len(prompts), group):
                add(lines(start)[max(0, done - start) :])
    gated = profile is not None and profile.gate is not None
    return summed(evidence), opened if gated else None


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [asdict(message) for message in messages]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rendered(
    engine: "Engine", prompts: Sequence[Prompt], options: Mapping[str, object], max_new_tokens: int
) -> list[str]:
    """The prompts as the model reads them; each is checked before the first is asked."""
    rendered = []
    for prompt in prompts:
        try:
            rendered.append(render_prompt(prompt.messages, engine.tokenizer, options))
        except MoesteerError as error:
            raise MoesteerError(f"{prompt.source}: {error}") from None
        check_length(engine, rendered[-1], max_new_tokens, prompt.source)
    return rendered


def check_length(engine: "Engine", rendered: str, max_new_tokens: int, source: str) -> None:
    """MoesteerError, beginning with `source`, where prompt and reply exceed the context."""
    length = len(engine.tokenizer(rendered, add_special_tokens=False)["input_ids"])
    if engine.max_tokens is not None and length + max_new_tokens > engine.max_tokens:
        raise MoesteerError(
            f"{source}: {length} tokens; with {max_new_tokens} new ones that is over the model's"
            f" context of {engine.max_tokens}. Shorten it, or lower --max-new-tokens."
        )


def check_limits(
    max_new_tokens: int, temperature: float, batch_size: int = 1, seed: int = 0
) -> None:
    """MoesteerError where a number of the command line is out of range."""
    for name, value, least in (
        ("max-new-tokens", max_new_tokens, 1),
        ("temperature", temperature, 0),
        ("batch-size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if not least <= value < 2**62:
            raise MoesteerError(f"--{name} is {value}; it must be at least {least}, and finite.")


def check_steers(profile: Profile | None) -> None:
    """MoesteerError for a profile that would leave the model as it is."""
    if profile is None or profile.steers:
        return
    if profile.candidates is not None:
        raise MoesteerError(
            f"{profile.name} steers nothing: it holds directions to choose from, but none is"
            " chosen. Choose one with `moesteer aim` or `moesteer search`."
        )
    raise MoesteerError(
        f"{profile.name} steers nothing: it holds scores, but no experts are chosen."
        " Choose some with `moesteer select`."
    )


def merged_options(
    profile: Profile | None, options: Sequence[str]
) -> dict[str, bool | int | float | str]:
    """The chat options a profile was made with, overridden by those of the command line."""
    made_with = profile.chat_options if profile else {}
    return made_with | parse_chat_options(options)
