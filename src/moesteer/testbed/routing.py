"""Steering for the testbed alone: rewrite the router logits of a Qwen3-MoE, row by row.

The rule: an activated expert gets the largest logit of its token plus epsilon, a deactivated one
the smallest minus epsilon; softmax and top-k then go on as always. This is deliberately a second,
simpler implementation than the library's engines, which are tested against what it measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EPSILON = 0.01


def steer_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Apply the rule to logits [tokens, experts] with a mask of +1, 0 and -1 of the same shape."""
    high = logits.amax(-1, keepdim=True) + EPSILON
    low = logits.amin(-1, keepdim=True) - EPSILON
    return torch.where(mask > 0, high, torch.where(mask < 0, low, logits))


@contextmanager
def steered(model: nn.Module, mask: Tensor) -> Iterator[list[Tensor]]:
    """Steer every token of every forward within; yields the list that router logits are added to.

    mask: [rows, layers, experts] of +1 (activate), 0 and -1 (deactivate), one row for each row of
    the batch, or a single row for all. The recorded logits are those before steering, one entry
    [tokens, experts] for each layer of each forward.
    """
    routers = [layer.mlp.gate for layer in model.model.layers]  # pyright: ignore
    recorded: list[Tensor] = []

    def make(layer: int, router: nn.Module):
        def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = hidden.reshape(-1, hidden.shape[-1])
            # Epsilon is smaller than the precision of bf16: route in fp32, autocast or not.
            with torch.autocast("cpu", enabled=False):
                logits = F.linear(hidden.float(), router.weight.float())  # pyright: ignore
            recorded.append(logits)
            by_token = mask[:, layer].repeat_interleave(len(logits) // len(mask), dim=0)
            chances = steer_logits(logits, by_token).softmax(-1)
            weights, index = chances.topk(router.top_k, dim=-1)  # pyright: ignore
            weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(hidden.dtype), index

        return forward

    try:
        for layer, router in enumerate(routers):
            router.forward = make(layer, router)
        yield recorded
    finally:
        for router in routers:
            del router.forward


def dense_experts(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run all experts on all tokens and weigh most of them with zero.

    Wasteful in arithmetic, yet the fastest here: two large products of fixed shape, where sorting
    tokens by expert makes many small ones whose shapes never repeat.
    hidden [tokens, width], index and weights [tokens, k]; returns [tokens, width].
    """
    up_and_gate: Tensor = experts.gate_up_proj.flatten(0, 1)  # pyright: ignore
    down: Tensor = experts.down_proj.transpose(0, 1).flatten(1)  # pyright: ignore
    every = weights.new_zeros(len(hidden), experts.num_experts).scatter(1, index, weights)  # pyright: ignore
    gate, up = F.linear(hidden, up_and_gate).unflatten(-1, (every.shape[-1], -1)).chunk(2, -1)
    inner = F.silu(gate) * up * every[..., None].to(up.dtype)
    return F.linear(inner.flatten(1), down).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register("testbed_dense", dense_experts)
