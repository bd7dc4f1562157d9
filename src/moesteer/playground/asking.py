"""A question to both sides: the model as it is, and under the draft's profile."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.generate import merged_options
from moesteer.playground.conversation import Turn, rendered
from moesteer.playground.editing import Draft, made
from moesteer.playground.streaming import Replies, Sampling, stream_replies
from moesteer.profile import Profile
from moesteer.report.terminal import evidence_lines, gate_lines

EVERY = 0.1
"""Seconds between two looks at growing replies."""


@dataclass(frozen=True)
class Played:
    """What is played with: a model, profiles to begin with, options of the chat template, and the
    command that is written into saved profiles."""

    engine: TransformersEngine
    profiles: Sequence[Profile] = ()
    chat_options: Sequence[str] = ()
    command: str = "moesteer play"


@dataclass(frozen=True)
class Step:
    """How far the replies are: None while the model is busy with others; at the end the turn that
    came of them, and what proves that it was steered."""

    profile: Profile
    replies: Replies | None = None
    turn: Turn | None = None
    proof: tuple[str, ...] = ()


def ask(
    played: Played,
    turns: Sequence[Turn],
    draft: Draft,
    name: str,
    asked: str,
    sampling: Sampling,
    *,
    stop: threading.Event,
    alone: threading.Lock,
) -> Iterator[Step]:
    """Ask both sides, each with the conversation that it has had; see `stream_replies`.

    MoesteerError where the draft can't be applied or the prompt not be asked, DidNotFire where
    nothing proves that the steered side was: then there is no turn.
    """
    engine, profile = played.engine, made(draft, name)
    options = merged_options(profile, played.chat_options)
    prompts, room = rendered(engine, turns, asked, options, sampling.max_new_tokens)
    yield Step(profile)
    shown = 0.0
    for replies in stream_replies(
        engine,
        prompts,
        [None, profile if profile.steers else None],
        Sampling(room, sampling.temperature, sampling.seed),
        watched=(*profile.activated, *profile.deactivated),
        stop=stop,
        alone=alone,
    ):
        if replies.evidence is not None:
            unsteered, steered = replies.texts
            turn = Turn(asked, (unsteered, steered), steering(profile))
            yield Step(profile, replies, turn, proof(profile, replies))
        elif time.monotonic() - shown >= EVERY:
            shown = time.monotonic()
            yield Step(profile, replies)


def proof(profile: Profile, replies: Replies) -> tuple[str, ...]:
    """What was counted at the experts' input and measured in the stream, in lines."""
    if not profile.steers:
        return ("Nothing is steered yet: both sides are the model as it is.",)
    gate = gate_lines(replies.steered[-1:]) if replies.steered else []
    return (*gate, *evidence_lines(replies.evidence or ()))


def steering(profile: Profile) -> str:
    """What a profile does, in a few words."""
    parts = [
        f"{number} {what}"
        for number, what in (
            (len(profile.activated), "activated"),
            (len(profile.deactivated), "deactivated"),
            (len(profile.directions), f"direction{'s' * (len(profile.directions) > 1)}"),
        )
        if number
    ]
    return f"{profile.name}: {', '.join(parts) or 'nothing steered'}"
