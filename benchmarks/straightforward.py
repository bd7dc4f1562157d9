"""What one would write first, to be compared with: correct, simple, and without moesteer's care."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesteer.chat import TokenisedConversation
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.profile import Profile


def detect_straightforwardly(
    engine: TransformersEngine, conversations: Sequence[TokenisedConversation]
) -> Int[np.ndarray, "conversation layer expert"]:
    """One text at a time, all router logits kept, then counted."""
    kept: list[Float[np.ndarray, "layer token expert"]] = []
    with torch.inference_mode():
        for conversation in conversations:
            ids = torch.tensor([conversation.ids])
            output: Any = engine.model(ids, output_router_logits=True, use_cache=False)
            kept.append(np.stack([layer.float().numpy() for layer in output.router_logits]))
    top_k = engine.layers[0].top_k
    return np.stack(
        [
            count_token_by_token(logits, np.array(conversation.target), top_k)
            for logits, conversation in zip(kept, conversations, strict=True)
        ]
    )


def count_token_by_token(
    logits: Float[np.ndarray, "layer token expert"], target: np.ndarray, top_k: int
) -> Int[np.ndarray, "layer expert"]:
    counts = np.zeros((logits.shape[0], logits.shape[2]), dtype=np.int64)
    for layer in range(logits.shape[0]):
        for token in np.flatnonzero(target):
            counts[layer, np.argsort(logits[layer, token])[-top_k:]] += 1
    return counts


@contextmanager
def plain_hooks(engine: TransformersEngine, profile: Profile) -> Iterator[None]:
    """Steer a Qwen3-MoE with forward hooks that route anew from rewritten logits.

    No guard, no proof that it fired, and written for this one family of routers.
    """
    handles = []
    for layer in engine.layers:
        activated, deactivated = profile.experts_of(layer.layer)
        if activated or deactivated:
            hook = rerouting(activated, deactivated, layer.top_k)
            handles.append(layer.module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rerouting(activated: list[int], deactivated: list[int], top_k: int):
    def reroute(module: Any, _args: object, output: tuple[Tensor, Tensor, Tensor]):
        logits = output[0].clone()
        highest, lowest = logits.amax(-1, keepdim=True), logits.amin(-1, keepdim=True)
        logits[:, activated] = just_beyond(highest, 1)
        logits[:, deactivated] = just_beyond(lowest, -1)
        weights, index = logits.softmax(-1, dtype=torch.float).topk(top_k, dim=-1)
        if module.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), index

    return reroute


def just_beyond(extreme: Tensor, sign: int) -> Tensor:
    """0.01 further, or two rounding steps: beside a large bf16 logit 0.01 would vanish."""
    step = 2 * torch.finfo(extreme.dtype).eps
    return extreme.add(extreme.abs().clamp(min=0.01 / step), alpha=sign * step)
