"""Detection against the forward pass that it can't do without, and against a simple pipeline."""

from collections.abc import Sequence

import numpy as np
import torch
from models import all_conversations, conversations, random_model, testbed
from paired import Figure, Ratio, Work, relative_speed
from straightforward import detect_straightforwardly
from torch import Tensor

from moesteer.chat import TokenisedConversation, TokenisedPair
from moesteer.detection.counts import BATCH_TOKENS, batches_by_length, count_routing
from moesteer.engines.transformers_engine import TransformersEngine

SECTION = "Detection"


def figures() -> list[Figure]:
    few = conversations("refusal")[:32]
    return [
        Figure(
            SECTION,
            "testbed: speed in units of the bare forward pass",
            against_bare_forward(testbed(), all_conversations(), rounds=15),
            bar=0.90,
        ),
        Figure(
            SECTION,
            "16 × 64 random: speed in units of the bare forward pass",
            against_bare_forward(random_model(), few, rounds=5),
        ),
        Figure(
            SECTION,
            "testbed: speed in units of the straightforward pipeline",
            against_straightforward(testbed(), conversations("refusal"), rounds=5),
            bar=5,
        ),
        Figure(
            SECTION,
            "16 × 64 random: speed in units of the straightforward pipeline",
            against_straightforward(random_model(), few, rounds=3),
            note=f"{len(few)} texts",
        ),
    ]


def against_bare_forward(
    engine: TransformersEngine, texts: Sequence[TokenisedConversation], rounds: int
) -> Ratio:
    """Batch by batch, the same padded tensors through the decoder, without LM head."""
    ours: list[Work] = []
    bare: list[Work] = []
    for batch in batches_by_length([len(text.ids) for text in texts], BATCH_TOKENS):
        chosen = [texts[i] for i in batch]
        ids, attention = _padded(chosen)
        ours.append(lambda chosen=chosen: engine.count_selections(chosen))
        bare.append(lambda ids=ids, attention=attention: _bare_forward(engine, ids, attention))
    return relative_speed(ours, bare, rounds)


def against_straightforward(
    engine: TransformersEngine, texts: Sequence[TokenisedConversation], rounds: int
) -> Ratio:
    pairs = [TokenisedPair(a, b, "") for a, b in zip(texts[::2], texts[1::2], strict=True)]
    _check_agreement(count_routing(engine, pairs).selected, detect_straightforwardly(engine, texts))
    return relative_speed(
        [lambda: count_routing(engine, pairs)],
        [lambda: detect_straightforwardly(engine, texts)],
        rounds,
        warm_up=0,  # the check was one
    )


def _check_agreement(ours: np.ndarray, theirs: np.ndarray) -> None:
    """A contestant that computes something else is none. (bf16 rounds a few near-ties apart.)"""
    apart = np.abs(ours.reshape(theirs.shape) - theirs).sum() / (2 * theirs.sum())
    if ours.sum() != theirs.sum() or apart > 0.02:
        raise RuntimeError(f"the two pipelines differ in {apart:.1%} of the selections")


def _padded(texts: Sequence[TokenisedConversation]) -> tuple[Tensor, Tensor]:
    longest = max(len(text.ids) for text in texts)
    rows = [[*text.ids, *[0] * (longest - len(text.ids))] for text in texts]
    present = [[1] * len(text.ids) + [0] * (longest - len(text.ids)) for text in texts]
    return torch.tensor(rows), torch.tensor(present)


@torch.inference_mode()
def _bare_forward(engine: TransformersEngine, ids: Tensor, attention: Tensor) -> None:
    engine.model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
