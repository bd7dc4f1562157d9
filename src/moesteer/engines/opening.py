"""Which prompts open a profile's gate, and what that means for engines: each of them runs what is
steered under the profile without its gate, and the rest under none."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from moesteer.engines.probing import BATCH, scores
from moesteer.engines.readouts import Readout
from moesteer.errors import MoesteerError
from moesteer.gate import Gate
from moesteer.profile import Profile

if TYPE_CHECKING:
    from moesteer.chat import TokenisedConversation
    from moesteer.engines.base import Engine


def opens(
    engine: "Engine", prompts: Sequence[Sequence[int]], gate: Gate, batch_size: int = BATCH
) -> list[bool]:
    """Whether each prompt, given as token ids, opens the gate.

    Raises MoesteerError where a score is not finite, or a prompt too short for the gate's position.
    """
    found = scores(engine, prompts, gate.probe, batch_size)
    return [gate.opens(float(score)) for score in found]


def has_gate(profiles: Sequence[Profile | None]) -> bool:
    return any(profile is not None and profile.gate is not None for profile in profiles)


def behind_gates(
    engine: "Engine",
    prompts: Sequence[Sequence[int]],
    profiles: Sequence[Profile | None],
    batch_size: int = BATCH,
) -> tuple[list[Profile | None], list[bool] | None]:
    """What each prompt is to run under, none of it with a gate; and whether a profile steers it,
    None where no profile has a gate."""
    decided = list(profiles)
    if not has_gate(profiles):
        return decided, None
    for profile in {id(p): p for p in profiles if p is not None and p.gate is not None}.values():
        assert profile.gate is not None
        mine = [number for number, own in enumerate(profiles) if own is profile]
        plain = profile.ungated
        opened = opens(engine, [prompts[n] for n in mine], profile.gate, batch_size)
        for number, steered in zip(mine, opened, strict=True):
            decided[number] = plain if steered else None
    return decided, [profile is not None and profile.steers for profile in decided]


def read_behind_gates(
    engine: "Engine",
    readouts: Sequence[Readout],
    profiles: Sequence[Profile | None],
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "profile readout"]:
    """`Engine.read` where some profiles have gates: a text's prompt is what stands before its first
    term; one without terms has no value to be read. MoesteerError where a text has no prompt."""
    values = np.zeros((len(profiles), len(readouts)))
    read = [number for number, readout in enumerate(readouts) if readout.terms]
    prompts = [_prompt_of(readouts[number]) for number in read]
    _check_prompts(engine, prompts, read)
    plain = [row for row, profile in enumerate(profiles) if not has_gate([profile])]
    if plain:
        values[plain] = engine.read(readouts, [profiles[row] for row in plain], progress=progress)
    for row, profile in enumerate(profiles):
        if profile is None or row in plain:
            continue
        if progress is not None:
            progress(len(readouts) - len(read))
        decided, _ = behind_gates(engine, prompts, [profile] * len(read))
        for under in {id(p): p for p in decided}.values():
            mine = [n for n, own in zip(read, decided, strict=True) if own is under]
            part = [readouts[number] for number in mine]
            values[row, mine] = engine.read(part, [under], progress=progress)[0]
    return values


def divergence_behind_gate(
    engine: "Engine",
    conversations: "Sequence[TokenisedConversation]",
    profile: Profile,
) -> Float[np.ndarray, " conversation"]:
    """`Engine.divergence` under a profile with a gate: what it leaves alone does not diverge.

    A conversation's prompt is what stands before its target. MoesteerError where it has none.
    """
    found = np.zeros(len(conversations))
    prompts = [text.ids[: text.target.index(True)] for text in conversations]
    _check_prompts(engine, prompts, range(len(prompts)))
    decided, _ = behind_gates(engine, prompts, [profile] * len(prompts))
    mine = [number for number, under in enumerate(decided) if under is not None]
    if mine:
        found[mine] = engine.divergence([conversations[n] for n in mine], profile.ungated)
    return found


def _prompt_of(readout: Readout) -> tuple[int, ...]:
    first = min(term.position for term in readout.terms)
    # Nothing predicts a text's first token: read from the second on, it may be read as a whole.
    return readout.ids[:first] if first > 1 else ()


def _check_prompts(
    engine: "Engine", prompts: Sequence[tuple[int, ...]], numbers: Sequence[int]
) -> None:
    """Nothing is to be steered, or left alone, by the token that begins every text."""
    for number, prompt in zip(numbers, prompts, strict=True):
        if prompt in ((), (engine.tokenizer.bos_token_id,)):
            raise MoesteerError(
                f"text {number + 1} is read from its beginning on: it has no prompt, about which"
                " the profile's gate could be asked. Put a prompt before what is read, or take the"
                " gate off (profile.ungated)."
            )
