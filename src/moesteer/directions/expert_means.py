"""Means over prompts of what single experts put out, as they come (see `means.py`).

Layer by layer, for a layer's experts take as much memory as all of the stream, and a measurement
that is killed goes on with the layer that it was at.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

from moesteer.detection.counts import CHECKPOINT_SECONDS
from moesteer.directions.means import RunningMean
from moesteer.errors import MoesteerError
from moesteer.files import write_atomically
from moesteer.tally import tally

if TYPE_CHECKING:
    from moesteer.directions.prompts import AskedPrompt, Sides
    from moesteer.engines.base import Engine

Kind = Literal["forced", "own"]
"""What is averaged: what the feed-forward part writes while an expert is forced; what the expert
puts out, unweighted, for the tokens that are routed to it."""


def mean_differences(
    engine: "Engine",
    sides: "Sides",
    layers: Sequence[int],
    last: int,
    kind: Kind,
    *,
    batch_size: int,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Float[np.ndarray, "expert position hidden"]]:
    """By layer, every expert's mean over A less that over B; zero where a side has no token.

    With a `checkpoint` file the layers that are through are kept there every half minute and on
    Ctrl-C, taken up from there, and the file is left for the caller to remove. `progress` is told
    how many prompts were read, once for each layer, of how many.
    """
    mean = mean_forced if kind == "forced" else mean_own
    ids = [[prompt.ids for prompt in side] for side in (sides.a, sides.b)]
    measured = _Measured(checkpoint, json.dumps([asdict(engine.facts), ids, kind, last]))
    prompts = len(sides.a) + len(sides.b)
    told = tally(progress, len(layers) * prompts)
    try:
        for layer in layers:
            if layer in measured.differences:
                told(prompts)
                continue
            a, b = (
                mean(engine, side, layer, last, batch_size=batch_size, progress=told)
                for side in (sides.a, sides.b)
            )
            difference = (a - b).astype(np.float32)
            measured.differences[layer] = np.where(np.isfinite(difference), difference, 0.0)
            if time.monotonic() - measured.saved > CHECKPOINT_SECONDS:
                measured.save()
    except BaseException:  # whatever stops the run, what was measured is kept
        measured.save()
        raise
    return measured.differences


def mean_forced(
    engine: "Engine",
    prompts: "Sequence[AskedPrompt]",
    layer: int,
    last: int,
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "expert position hidden"]:
    """The mean over prompts of what a layer's feed-forward part writes, each expert forced."""
    mean = RunningMean()
    for batch in _batches(prompts, batch_size):
        read = engine.forced_outputs([prompt.ids for prompt in batch], layer, last)
        _check_finite(engine, batch, layer, read)
        mean.add(read)
        if progress is not None:
            progress(len(batch))
    return mean.value


def mean_own(
    engine: "Engine",
    prompts: "Sequence[AskedPrompt]",
    layer: int,
    last: int,
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "expert 1 hidden"]:
    """The mean of each expert's own output over all tokens routed to it; NaN of no token."""
    total, tokens = np.zeros(()), np.zeros(())
    for batch in _batches(prompts, batch_size):
        sums, counts = engine.own_outputs([prompt.ids for prompt in batch], layer, last)
        _check_finite(engine, batch, layer, sums)
        total, tokens = total + sums.sum(0, dtype=np.float64), tokens + counts.sum(0)
        if progress is not None:
            progress(len(batch))
    with np.errstate(invalid="ignore"):
        return (total / tokens[:, None])[:, None]


def _batches(
    prompts: "Sequence[AskedPrompt]", batch_size: int
) -> "Iterator[Sequence[AskedPrompt]]":
    """Prompts of similar length together, the longest first."""
    order = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _check_finite(
    engine: "Engine", batch: "Sequence[AskedPrompt]", layer: int, read: np.ndarray
) -> None:
    if not np.isfinite(read).all():
        text, expert = (int(n) for n in np.argwhere(~np.isfinite(read))[0][:2])
        raise MoesteerError(
            f"{batch[text].source}: expert {expert} of layer {layer} of {engine.facts.id} puts out"
            " NaN or infinite numbers; load the model in another dtype (--dtype float32 or"
            " bfloat16)."
        )


class _Measured:
    """Differences of means [expert, position, hidden] of the layers that are through, by layer;
    kept in a file, if there is one, of the same `identity`."""

    def __init__(self, checkpoint: Path | None, identity: str) -> None:
        self.checkpoint = checkpoint
        self.identity = hashlib.sha256(identity.encode()).hexdigest()
        self.differences = self._read()
        self.saved = time.monotonic()

    def _read(self) -> dict[int, Float[np.ndarray, "expert position hidden"]]:
        from safetensors import SafetensorError, safe_open

        if self.checkpoint is None or not self.checkpoint.is_file():
            return {}
        try:
            with safe_open(self.checkpoint, framework="numpy") as file:
                if (file.metadata() or {}).get("identity") != self.identity:
                    return {}  # of other prompts or another model: measure anew
                return {int(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError:
            return {}  # not ours to repair: measure anew

    def save(self) -> None:
        from safetensors.numpy import save_file

        if self.checkpoint is not None:
            arrays = {str(layer): table for layer, table in self.differences.items()}
            metadata = {"identity": self.identity}
            write_atomically(self.checkpoint, lambda file: save_file(arrays, file, metadata))
            self.saved = time.monotonic()
