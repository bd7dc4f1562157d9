"""What an engine can do: the only words in which the rest of moesteer speaks of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from jaxtyping import Int

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from moesteer.chat import TokenisedConversation
    from moesteer.profile import ModelFacts, Profile

Counted = Literal["top-k", "top-1"]
"""Which selections count: all k experts of a token, or the one with the largest weight."""


@dataclass(frozen=True)
class LayerEvidence:
    """What one profile did in one layer: how many of its tokens selected each steered expert."""

    profile: str
    layer: int
    tokens: int
    activated: dict[int, int]
    deactivated: dict[int, int]

    @property
    def obeyed(self) -> bool:
        """Each activated expert selected by all tokens, each deactivated one by none."""
        return all(n == self.tokens for n in self.activated.values()) and not any(
            self.deactivated.values()
        )


@dataclass(frozen=True)
class Generation:
    """Replies in the order of their prompts, and what the profiles did on the way."""

    replies: list[str]
    evidence: list[LayerEvidence]


class Engine(Protocol):
    """A loaded MoE model that can be observed and steered."""

    facts: "ModelFacts"
    tokenizer: "PreTrainedTokenizerBase"
    max_tokens: int | None
    """The context length in tokens, None where the model names none."""

    def count_selections(
        self, conversations: "Sequence[TokenisedConversation]", counted: Counted
    ) -> "Int[np.ndarray, 'conversation layer expert']":
        """How many target tokens of each conversation selected each expert.

        Layers in the order of `facts.layers`; all conversations go through in one batch.
        """
        ...

    def generate(
        self,
        prompts: Sequence[str],
        profiles: "Profile | Sequence[Profile | None] | None" = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> Generation:
        """Replies to rendered prompts, steered by one profile, or each prompt by its own.

        Temperature 0 is greedy. Raises DidNotFire where a profile is not proved to have steered.
        """
        ...


def summed(evidence: Sequence[LayerEvidence]) -> list[LayerEvidence]:
    """Evidence of several batches, added up by profile and layer; profiles may share a name."""
    total: dict[tuple, LayerEvidence] = {}
    for seen in evidence:
        key = (seen.profile, seen.layer, tuple(seen.activated), tuple(seen.deactivated))
        before = total.get(key)
        if before is not None:
            seen = LayerEvidence(
                seen.profile,
                seen.layer,
                seen.tokens + before.tokens,
                {e: n + before.activated[e] for e, n in seen.activated.items()},
                {e: n + before.deactivated[e] for e, n in seen.deactivated.items()},
            )
        total[key] = seen
    return list(total.values())
