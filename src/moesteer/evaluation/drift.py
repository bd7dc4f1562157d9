"""How far steering moved a model on a task, whatever the outcome: in its words and in its routing.

KL: how differently the steered model would go on, token by token, along the unsteered model's own
replies: the mean over tokens of KL(unsteered ‖ steered), in nats, then over replies. 0: not at all.

Routing: how differently the replies are routed by the unsteered model, which hears in them what
steering did to the text. Of the unsteered and of the steered replies, each layer gives a
distribution of selections over its experts, pooled over reply tokens; the drift is the total
variation distance ½ Σ|p − q|, averaged over layers. 0: alike, 1: no expert in common. That steered
experts are selected more or less often while steering is not in it: it is so by construction.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Num

from moesteer.chat import TokenisedConversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moesteer.engines.base import Engine
    from moesteer.profile import Profile


def as_conversations(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], replies: Sequence[str]
) -> list[TokenisedConversation]:
    """Rendered prompts with their replies, whose tokens are the target; empty replies are left out.

    The two are tokenised apart, as they were when the reply was generated.
    """
    found = []
    for prompt, reply in zip(prompts, replies, strict=True):
        asked, said = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (prompt, reply)
        )
        if said:
            target = (False,) * len(asked) + (True,) * len(said)
            found.append(TokenisedConversation(asked + said, target))
    return found


def divergence(
    engine: "Engine",
    unsteered: Sequence[TokenisedConversation],
    profile: "Profile",
    batch_size: int,
) -> float | None:
    """Mean KL to the unsteered model along its own replies, in nats; None without replies."""
    if not unsteered:
        return None
    by_reply = [
        engine.divergence(unsteered[start : start + batch_size], profile)
        for start in range(0, len(unsteered), batch_size)
    ]
    return float(np.concatenate(by_reply).mean())


def selections(
    engine: "Engine", conversations: Sequence[TokenisedConversation], batch_size: int
) -> Num[np.ndarray, "layer expert"] | None:
    """How many reply tokens the unsteered model sends to each expert.

    None without replies, and of a dense model, which routes nothing.
    """
    if not conversations or not engine.facts.layers:
        return None
    return np.sum(
        [
            engine.count_selections(conversations[start : start + batch_size], "top-k").sum(0)
            for start in range(0, len(conversations), batch_size)
        ],
        axis=0,
    )


def routing_drift(
    before: Num[np.ndarray, "layer expert"] | None, after: Num[np.ndarray, "layer expert"] | None
) -> float | None:
    """Mean over layers of the total variation distance of two tables of selections, 0 to 1."""
    if before is None or after is None:
        return None
    p, q = (table / table.sum(-1, keepdims=True) for table in (before, after))
    return float(np.abs(p - q).sum(-1).mean() / 2)
