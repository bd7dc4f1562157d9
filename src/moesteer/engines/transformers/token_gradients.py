"""Gradients of a readout by what the model's embedding puts out, one for each token of a text.

Saliency is their norm, Input×Gradient their product with the embedding (Simonyan et al. 2014, arXiv
1312.6034; Shrikumar et al. 2016, arXiv 1605.01713). No weight takes part, the LM head is applied
only where a log-probability is read, and texts of similar length share a batch, padded on the
right: padding changes no position, and no token sees what comes after it.

In a routed model the same pass gives the derivative by a gate g = 1 at each token that multiplies
the weight of every expert which the token selects, in every layer,

    ∂R/∂g_t = Σ_layers Σ_experts  w · ∂R/∂w,

how much the readout hangs on what routing gave the token; summed over tokens, that is the sum of
`gate_gradients` over layers and experts. Behind a norm of the experts' sum (Gemma 4) it is 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesteer.engines.base import TokenGradient
from moesteer.engines.readouts import Readout, reaching
from moesteer.engines.transformers.backward import checkpointed, constant_weights
from moesteer.engines.transformers.gates import gate_tokens
from moesteer.engines.transformers.memory import texts_in_batches
from moesteer.engines.transformers.reading import Piece, log_probabilities
from moesteer.engines.transformers.routers import MoELayer, describe, input_device
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers.stream import Stream, find_decoder
from moesteer.errors import MoesteerError
from moesteer.profile import Profile


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its parts, and the profile that it is attributed under, if any."""

    model: PreTrainedModel
    layers: Sequence[MoELayer]
    stream: Stream | None
    profile: Profile | None
    checkpointing: bool

    @property
    def advice(self) -> str:
        """What to do where a text doesn't fit into memory."""
        return "shorten it" if self.checkpointing else "turn on checkpointing, or shorten it"

    def steered(self, pieces: Sequence[Piece]) -> ExitStack:
        """The model under the profile while these run."""
        stack = ExitStack()
        if self.profile is not None:
            goes_on = any(len(piece.ids) > piece.prompt for piece in pieces)
            profile = reaching(self.profile, goes_on)
            prompts = [piece.prompt for piece in pieces]
            stack.enter_context(steer(self.model, profile, self.layers, self.stream, prompts))
        return stack

    def differentiable(self) -> ExitStack:
        """Gradients on, of everything but weights, with layers checkpointed where asked for."""
        stack = ExitStack()
        stack.enter_context(torch.enable_grad())
        stack.enter_context(constant_weights(self.model))
        if self.checkpointing:
            stack.enter_context(checkpointed(find_decoder(self.model, self.layers)))
        return stack


def token_gradients(
    subject: Subject, readouts: Sequence[Readout], *, gates: bool
) -> Iterator[tuple[int, TokenGradient]]:
    """See `Engine.token_gradients`."""
    yield from texts_in_batches(
        pieces_of(readouts),
        input_device(subject.model),
        lambda pieces: _gradients(subject, pieces, gates),
        subject.advice,
    )


def pieces_of(readouts: Sequence[Readout]) -> list[Piece]:
    """Each text whole, with all its terms; MoesteerError where a readout has none."""
    for number, readout in enumerate(readouts, start=1):
        if not readout.terms:
            raise MoesteerError(f"readout {number} has no terms: there is nothing to attribute.")
    return [
        Piece(r.ids, min(t.position for t in r.terms), r.terms, (0,) * len(r.terms))
        for r in readouts
    ]


def whole_prompts(texts: Sequence[Sequence[int]]) -> list[Piece]:
    """Texts of which nothing is read: all of each is prompt."""
    return [Piece(tuple(text), len(text), (), ()) for text in texts]


def values_of(model: PreTrainedModel, pieces: Sequence[Piece]) -> Float[Tensor, " row"]:
    """The value of each row's readout, in fp32."""
    logs = log_probabilities(model, pieces)[0]
    weights = torch.tensor([term.weight for piece in pieces for term in piece.terms])
    rows = torch.tensor([row for row, piece in enumerate(pieces) for _ in piece.terms])
    zeros = torch.zeros(len(pieces), device=logs.device)
    return zeros.index_add(0, rows.to(logs.device), logs * weights.to(logs))


@contextmanager
def embedded(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The decoder gets `change` of what the input embedding puts out, [row, position, hidden]."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)

    def put(_module: object, _args: object, output: Tensor) -> Tensor:
        return change(output)

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def gradient_of(
    model: PreTrainedModel, values: Float[Tensor, " row"], by: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Derivative of each row's value, as rows don't mix, by tensors of all rows.

    Raises MoesteerError where the model lets none through.
    """
    found = (None,)
    if values.requires_grad:
        found = torch.autograd.grad(values.sum(), by, allow_unused=True)
    if any(gradient is None for gradient in found):
        raise MoesteerError(
            f"{describe(model)} lets no gradients through from what it reads to its embeddings; use"
            " occlusion, which needs none."
        )
    return tuple(gradient for gradient in found if gradient is not None)


def _gradients(subject: Subject, pieces: Sequence[Piece], gates: bool) -> Iterator[TokenGradient]:
    model = subject.model
    longest = max(len(piece.ids) for piece in pieces)
    leaves: list[Tensor] = []

    def leaf(output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    with subject.steered(pieces), subject.differentiable() as stack:
        stack.enter_context(embedded(model, leaf))
        gate = None
        if gates:
            gate = torch.ones(len(pieces), longest, requires_grad=True)
            stack.enter_context(gate_tokens(subject.layers, gate))
        values = values_of(model, pieces)
        found = gradient_of(model, values, leaves if gate is None else [*leaves, gate])
    gradient, embedding = found[0].float().cpu(), leaves[0].detach().float().cpu()
    for row, piece in enumerate(pieces):
        length = len(piece.ids)
        yield TokenGradient(
            gradient[row, :length].clone(),
            embedding[row, :length].clone(),
            None if gate is None else found[1][row, :length].float().cpu(),
        )
