"""Routing counts: how often each expert was selected on target tokens, kept per example.

Everything that is said of experts later (scores, intervals, tests) is computed from these counts,
so they are kept per pair and side: tokens of one text are not independent of each other, pairs are.
Memory grows with pairs × layers × experts, not with tokens. A counting that is killed goes on from
its last checkpoint.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int, Num

from moesteer.errors import MoesteerError
from moesteer.files import write_atomically

if TYPE_CHECKING:
    from moesteer.chat import TokenisedConversation, TokenisedPair
    from moesteer.engines.base import Counted, Engine

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""
CHECKPOINT_SECONDS = 30.0
ROUNDING = 1e-3
"""By how much the probabilities of a token may miss a sum of 1."""

Progress = Callable[[int, int], None]
"""Called with the tokens read so far (padding not counted), and all that are to be read."""


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """Selections on target tokens of pair i, side s (0 = A, 1 = B).

    `selected[i, s, l, e]` target tokens selected expert e of the l-th routed layer, of
    `tokens[i, s]` target tokens in all. Where probabilities are counted, it is their sum.
    """

    selected: Num[np.ndarray, "pair 2 layer expert"]
    tokens: Int[np.ndarray, "pair 2"]


def count_routing(
    engine: "Engine",
    pairs: "Sequence[TokenisedPair]",
    counted: "Counted" = "top-k",
    *,
    checkpoint: Path | None = None,
    identity: str = "",
    progress: Progress | None = None,
) -> RoutingCounts:
    """Count routing on the target tokens of all pairs: see `count_conversations`."""
    conversations = [side for pair in pairs for side in (pair.a, pair.b)]
    selected = count_conversations(
        engine,
        conversations,
        counted,
        checkpoint=checkpoint,
        identity=identity,
        progress=progress,
    )
    tokens = np.array([sum(c.target) for c in conversations], dtype=np.int64)
    return RoutingCounts(
        selected.reshape(len(pairs), 2, *selected.shape[1:]), tokens.reshape(-1, 2)
    )


def count_conversations(
    engine: "Engine",
    conversations: "Sequence[TokenisedConversation]",
    counted: "Counted" = "top-k",
    *,
    checkpoint: Path | None = None,
    identity: str = "",
    progress: Progress | None = None,
) -> Num[np.ndarray, "conversation layer expert"]:
    """Count routing on the target tokens of each conversation, in batches of similar length.

    With a `checkpoint` file the counts are saved every half minute and on Ctrl-C, taken up from
    there if that file is of the same `identity` (a text that says what is counted), and the file is
    left for the caller to remove.
    """
    state = _resume(checkpoint, identity) or _State.new(engine, len(conversations), counted)
    lengths = [len(conversation.ids) for conversation in conversations]
    total, read = sum(lengths), sum(n for n, done in zip(lengths, state.done, strict=True) if done)
    saved = time.monotonic()
    if progress is not None:
        progress(read, total)
    try:
        for batch in batches_by_length(lengths, BATCH_TOKENS):
            waiting = [i for i in batch if not state.done[i]]
            if not waiting:
                continue
            chosen = [conversations[i] for i in waiting]
            state.selected[waiting] = engine.count_selections(chosen, counted)
            state.done[waiting] = True
            read += sum(lengths[i] for i in waiting)
            if progress is not None:
                progress(read, total)
            if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                state.save(checkpoint, identity)
                saved = time.monotonic()
    except BaseException:  # whatever stops the run, what was counted is kept
        if checkpoint is not None:
            state.save(checkpoint, identity)
        raise
    _check_conserved(engine, conversations, state.selected, counted)
    return state.selected


def batches_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions in batches of similar length, longest first; longest × rows stays in the budget.

    Longest first, so that a batch that does not fit into memory fails at the start.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@dataclass(eq=False)
class _State:
    selected: Num[np.ndarray, "conversation layer expert"]
    done: Bool[np.ndarray, " conversation"]

    @classmethod
    def new(cls, engine: "Engine", conversations: int, counted: "Counted") -> "_State":
        layers = engine.facts.layers
        shape = (conversations, len(layers), max(layer.experts for layer in layers))
        dtype = np.float32 if counted == "probability" else np.int32
        return cls(np.zeros(shape, dtype=dtype), np.zeros(conversations, dtype=bool))

    def save(self, path: Path, identity: str) -> None:
        from safetensors.numpy import save_file

        metadata = {"identity": identity}
        write_atomically(path, lambda file: save_file(vars(self), file, metadata=metadata))


def _resume(checkpoint: Path | None, identity: str) -> _State | None:
    from safetensors import SafetensorError, safe_open

    if checkpoint is None or not checkpoint.is_file():
        return None
    try:
        with safe_open(checkpoint, framework="numpy") as file:
            if (file.metadata() or {}).get("identity") != identity:
                return None  # of other pairs or another model: count anew
            return _State(file.get_tensor("selected"), file.get_tensor("done"))
    except SafetensorError:
        return None  # not ours to repair: count anew


def _check_conserved(
    engine: "Engine",
    conversations: "Sequence[TokenisedConversation]",
    selected: Num[np.ndarray, "conversation layer expert"],
    counted: "Counted",
) -> None:
    """Each target token selects at most k experts a layer, and somebody in every layer.

    Its probabilities sum to 1, but for rounding.
    """
    tokens = np.array([sum(c.target) for c in conversations])
    for position, layer in enumerate(engine.facts.layers):
        most = tokens * {"top-k": layer.top_k, "top-1": 1, "probability": 1 + ROUNDING}[counted]
        seen = selected[:, position].sum(-1)
        least = tokens * (1 - ROUNDING) if counted == "probability" else np.zeros_like(tokens)
        if (seen > most).any() or (seen < least).any() or not seen.any():
            raise MoesteerError(
                f"layer {layer.layer} of {engine.facts.id}: {seen.sum():.10g} selections were"
                f" counted on {int(tokens.sum())} target tokens; at most {most.sum():.10g} are"
                " possible, and none means that its experts were not observed."
            )
