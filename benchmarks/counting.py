"""Counting alone, at the size of a large model: 48 layers × 128 experts, k = 8.

Ours adds up the selections that the router hands to its experts, batch by batch, and keeps one
number an expert. The other keeps all router logits and finds the top-k of each token in numpy.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from models import testbed
from paired import Figure, Ratio, relative_speed
from straightforward import count_token_by_token
from torch import Tensor

from moesteer.engines.transformers.seam import SelectionCounts

LAYERS, EXPERTS, TOP_K = 48, 128, 8
TOKENS, BATCH = 20_000, 2_000
SECTION = "Counting alone, 48 layers × 128 experts"


def figures() -> list[Figure]:
    generator = torch.Generator().manual_seed(0)
    # Each batch passes through all layers; the layers may as well see the same logits.
    batches = [torch.randn(BATCH, EXPERTS, generator=generator) for _ in range(TOKENS // BATCH)]
    routed = [logits.softmax(-1).topk(TOP_K, dim=-1) for logits in batches]
    counts, logits = _count(routed), _keep(batches)
    theirs = count_token_by_token(logits, np.ones(TOKENS, dtype=bool), TOP_K)
    ours = np.stack([layer.table()[0].numpy() for layer in counts])
    if not (ours == theirs).all():
        raise RuntimeError("the two countings differ")
    kept = sum(layer.selected.nbytes + layer.tokens.nbytes for layer in counts)
    a_token = logits.nbytes // TOKENS
    return [
        Figure(
            SECTION,
            f"{TOKENS:,} tokens: speed in units of keeping all logits and counting in numpy",
            relative_speed(
                [lambda: _count(routed)],
                [lambda: count_token_by_token(_keep(batches), np.ones(TOKENS, bool), TOP_K)],
                rounds=3,
                warm_up=0,
            ),
        ),
        Figure(
            SECTION,
            f"{TOKENS:,} tokens: bytes kept in units of all logits",
            Ratio((kept / logits.nbytes,)),
            note=f"{kept:,} against {logits.nbytes:,} bytes; ours is the same for any number of"
            f" tokens, logits take {a_token:,} bytes a token (by arithmetic, not measured:"
            f" {370_000 * a_token / 1e9:.1f} GB for 370,000)",
        ),
    ]


def _count(routed: Sequence[tuple[Tensor, Tensor]]) -> list[SelectionCounts]:
    layer = replace(testbed().layers[0], num_experts=EXPERTS, top_k=TOP_K)
    counts = [SelectionCounts(layer, 1) for _ in range(LAYERS)]
    for weights, index in routed:
        slots = torch.zeros(len(index), dtype=torch.int64)  # as detection does: a slot a text
        for layer_counts in counts:
            layer_counts.add(index, weights, slots)
    return counts


def _keep(batches: list[Tensor]) -> np.ndarray:
    """Logits [layer, token, expert], as the models' `output_router_logits` leaves them."""
    return np.stack([np.concatenate([b.numpy() for b in batches]) for _ in range(LAYERS)])
