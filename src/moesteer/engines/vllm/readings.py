"""Final hidden states that a request asked to be kept, and log-probabilities read off them.

A log-probability needs one row of logits, a divergence two; both are computed here, where the LM
head is, from the hidden state that predicts a position (the one before it), so that no vocabulary
of logits travels to the frontend.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BATCH_LOGITS = 2**27
"""Logits that are computed at a time (positions × vocabulary): half a gigabyte in fp32."""


class Readings:
    """Hidden states of this worker's model by key and position; empty where it has no LM head."""

    def __init__(self, model: Any, vocabulary: int) -> None:
        self._model = model
        self._batch = max(1, BATCH_LOGITS // vocabulary)
        self._hidden: dict[str, dict[int, Tensor]] = {}

    def keep(self, key: str, position: int, hidden: Tensor) -> None:
        """The state that predicts `position` of the text under `key`."""
        self._hidden.setdefault(key, {})[position] = hidden.clone()

    @torch.inference_mode()
    def log_probabilities(self, asked: Sequence[tuple[str, int, int]]) -> list[float] | None:
        """log P in nats of each (key, position, token), in fp32; None without states."""
        if not self._hidden:
            return None
        found: list[float] = []
        for part in _parts(asked, self._batch):
            logs = self._logs([(key, position) for key, position, _ in part])
            if logs is None:
                continue
            tokens = torch.tensor([token for *_, token in part], device=logs.device)
            found += logs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
        return found or None

    @torch.inference_mode()
    def divergences(self, asked: Sequence[tuple[str, str, int]]) -> list[float] | None:
        """KL(p ‖ q) in nats of each (key of p, key of q, position); None without states."""
        if not self._hidden:
            return None
        found: list[float] = []
        for part in _parts(asked, max(1, self._batch // 2)):
            p = self._logs([(key, position) for key, _, position in part])
            q = self._logs([(key, position) for _, key, position in part])
            if p is None or q is None:
                continue
            # Words that the model itself rules out have log-probability −inf on both sides.
            terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)
            found += terms.clamp(min=0).tolist()
        return found or None

    def drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._hidden.pop(key, None)

    def _logs(self, places: Sequence[tuple[str, int]]) -> Tensor | None:
        """Log-probabilities [place, word]; None on a rank to which vLLM gives no logits."""
        hidden = torch.stack([self._hidden[key][position] for key, position in places])
        logits = self._model.compute_logits(hidden)
        return None if logits is None else logits.float().log_softmax(-1)


def _parts(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
