"""What an engine can do: the only words in which the rest of moesteer speaks of a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from jaxtyping import Float, Int, Num

from moesteer.engines.evidence import DirectionEvidence, LayerEvidence
from moesteer.engines.readouts import Readout

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from moesteer.chat import TokenisedConversation
    from moesteer.model_facts import ModelFacts
    from moesteer.profile import Profile

Counted = Literal["top-k", "top-1", "probability"]
"""What counts on a target token: that the expert is among its k, that it has the largest weight, or
how probable it is (softmax of the router's logits over all experts, whatever the router does)."""


@dataclass(frozen=True)
class Generation:
    """Replies in the order of their prompts, and what the profiles did on the way.

    `steered` says of each prompt whether a profile steered it; None where no profile has a gate,
    and so each did.
    """

    replies: list[str]
    evidence: "list[LayerEvidence | DirectionEvidence]"
    steered: list[bool] | None = None


@dataclass(frozen=True, eq=False)
class Contributions:
    """How far along a unit vector each writer moved the residual stream at texts' last tokens.

    `rest` is what the feed-forward part writes beside its routed experts: shared experts, or all
    of a dense MLP. `stream` is what enters each layer, and at last leaves the highest: the
    embedding and everything written below.
    """

    embedding: Float[np.ndarray, "text position"]
    attention: Float[np.ndarray, "text layer position"]
    rest: Float[np.ndarray, "text layer position"]
    experts: Float[np.ndarray, "text layer expert position"]
    stream: Float[np.ndarray, "text layers position"]


@dataclass(frozen=True, eq=False)
class TokenGradient:
    """A readout's derivative by each token's embedding, and the embedding itself, in fp32 on the
    CPU.

    `gates`: the derivative by a gate, at 1, on the weights of all experts that a token selects, in
    all layers; None where it was not asked for.
    """

    gradient: 'Float[Tensor, "token hidden"]'
    embedding: 'Float[Tensor, "token hidden"]'
    gates: 'Float[Tensor, " token"] | None' = None


class Engine(Protocol):
    """A loaded MoE model that can be observed and steered."""

    facts: "ModelFacts"
    tokenizer: "PreTrainedTokenizerBase"
    max_tokens: int | None
    """The context length in tokens, None where the model names none."""

    def count_selections(
        self, conversations: "Sequence[TokenisedConversation]", counted: Counted
    ) -> "Num[np.ndarray, 'conversation layer expert']":
        """How many target tokens of each conversation selected each expert.

        With "probability", the sum of each expert's probability over the target tokens, before any
        steering.

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

        Temperature 0 is greedy. A profile with a gate steers the prompts that open it. Raises
        DidNotFire where a profile is not proved to have steered.
        """
        ...

    def read(
        self,
        readouts: Sequence[Readout],
        profiles: "Sequence[Profile | None]" = (None,),
        *,
        progress: Callable[[int], None] | None = None,
    ) -> "Float[np.ndarray, 'profile readout']":
        """Each readout's value, in nats, under each profile (None: unsteered).

        Log-probabilities are computed in fp32; a readout without terms is 0. Of a text under a
        profile with a gate, what stands before its first term is the prompt that opens it, or not;
        MoesteerError where that is no prompt, as the text is read from its beginning on.
        `progress` is called with how many (profile, readout) pairs were read since the last call.
        Raises DidNotFire where a profile is not proved to have steered.
        """
        ...

    def gate_gradients(
        self, readouts: Sequence[Readout]
    ) -> "Float[np.ndarray, 'readout layer expert']":
        """Derivative of each readout by each expert's gate, at 1, summed over tokens.

        The gate multiplies the weight that the router gives the expert; an expert that no token
        selects has derivative 0. Raises MoesteerError where experts let no gradients through.
        """
        ...

    def divergence(
        self,
        conversations: "Sequence[TokenisedConversation]",
        profile: "Profile",
    ) -> "Float[np.ndarray, ' conversation']":
        """Mean KL(unsteered ‖ steered) in nats of the distributions that predict target tokens.

        A text's very first token is predicted by nothing and left out; MoesteerError where no other
        is in the target. What stands before it is the prompt that opens the profile's gate, or not;
        0 where it does not, and MoesteerError where nothing does.
        """
        ...

    def residuals(
        self, texts: Sequence[Sequence[int]], last: int
    ) -> "Float[np.ndarray, 'text layer position hidden']":
        """What enters each decoder layer at the last `last` tokens of each text, in fp32.

        Positions in the order of the text. One batch, one forward pass without the LM head. Raises
        MoesteerError where a text is shorter than that.
        """
        ...

    def project(
        self, texts: Sequence[Sequence[int]], layer: int, position: int, vector: Sequence[float]
    ) -> "Float[np.ndarray, ' text']":
        """How far what enters a decoder layer lies along a vector at one token of each text.

        `position` is counted from the text's end, −1 being its last token. One batch, in fp32.
        Raises MoesteerError for a shorter text, a layer that there is not, or another width.
        """
        ...

    def forced_outputs(
        self, texts: Sequence[Sequence[int]], layer: int, last: int
    ) -> "Float[np.ndarray, 'text expert position hidden']":
        """What a layer's feed-forward part writes at the last tokens, for each expert activated.

        The others are selected as they are without it (the exact rule of `moesteer.rules`).
        """
        ...

    def own_outputs(
        self, texts: Sequence[Sequence[int]], layer: int, last: int
    ) -> "tuple[Float[np.ndarray, 'text expert hidden'], Int[np.ndarray, 'text expert']]":
        """Each expert's own output, unweighted, summed over those of the last tokens that selected
        it; and how many these are."""
        ...

    def contributions(
        self, texts: Sequence[Sequence[int]], last: int, vector: Sequence[float]
    ) -> Contributions:
        """Who wrote what is along a vector in the stream at the last tokens of texts."""
        ...

    def token_gradients(
        self,
        readouts: Sequence[Readout],
        profile: "Profile | None" = None,
        *,
        gates: bool = False,
        checkpointing: bool = False,
    ) -> Iterator[tuple[int, TokenGradient]]:
        """Each readout's number, from 0, and its gradient by the embeddings of its text's tokens.

        In any order: texts of similar length share a batch. `gates` asks for those, too, and needs
        a routed model. `checkpointing` computes each layer twice and holds less. Raises
        MoesteerError for a readout without terms, and for a text that doesn't fit into memory;
        DidNotFire where the profile is not proved to have steered.
        """
        ...

    def attention_maps(
        self, readouts: Sequence[Readout], profile: "Profile | None" = None
    ) -> 'Iterator[tuple[int, Float[Tensor, "layer token token"]]]':
        """Each readout's number, from 0, and who attends to whom in its text, in any order.

        The mean over heads in fp32 on the CPU; a row, the token that attends, sums to 1. Raises
        MoesteerError for a readout without terms, and where a layer has no attention weights.
        """
        ...

    def integrated_gradients(
        self,
        readouts: Sequence[Readout],
        positions: Sequence[Sequence[int]],
        profile: "Profile | None" = None,
        *,
        steps: int = 64,
        tolerance: float = 0.01,
        checkpointing: bool = False,
    ) -> 'Iterator[tuple[int, Float[Tensor, " token"], float]]':
        """Each readout's number, from 0, integrated gradients of its tokens, and their gap.

        From a text whose embeddings at `positions` are 0 to the text itself; tokens elsewhere have
        score 0. Steps are added until the scores sum to the difference of the readout within
        `tolerance` of it; the gap is what share of it is still missing.
        """
        ...

    def weigh_selections(
        self,
        texts: Sequence[Sequence[int]],
        table: Float[np.ndarray, "layer expert"],
        profile: "Profile | None" = None,
    ) -> 'list[Float[np.ndarray, " token"]]':
        """For each token the table's numbers of the experts that it selected, summed over layers.

        Layers in the order of `facts.layers`.
        """
        ...
