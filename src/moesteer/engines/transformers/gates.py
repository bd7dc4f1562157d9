"""Gate gradients: how a readout would change if an expert's weight did, for all experts at once.

Intuition: multiply what the router gives expert e, at every token, by a gate g = 1. Switching the
expert off is g = 0. The derivative of a readout R by the gate is the first-order estimate of that,

    R(g = 0) − R(g = 1)  ≈  −∂R/∂g,

and one forward and one backward pass give it for every expert of every layer, which is what a
separate run for each would measure exactly. An expert that no token selects has derivative 0: the
estimate knows nothing of what it would do. First-order attribution of components: Molchanov et
al. 2017 (arXiv 1611.06440), Michel et al. 2019 (arXiv 1905.10650).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from moesteer.engines.readouts import Readout
from moesteer.engines.transformers.backward import constant_weights
from moesteer.engines.transformers.reading import batches, log_probabilities, most_terms, split
from moesteer.engines.transformers.routers import MoELayer, describe, selection
from moesteer.engines.transformers.seam import Undo
from moesteer.errors import MoesteerError

BATCH_TOKENS = 2048
"""Tokens of a batch; what each layer computed is held until the backward pass."""


def gate_gradients(
    model: PreTrainedModel, layers: Sequence[MoELayer], readouts: Sequence[Readout]
) -> Float[np.ndarray, "readout layer expert"]:
    """See `Engine.gate_gradients`; in nats a unit of the gate.

    Raises MoesteerError where a layer's experts don't let gradients through.
    """
    widest = max(layer.num_experts for layer in layers)
    result = np.zeros((len(readouts), len(layers), widest))
    pieces = split(readouts, most_terms(model), merge=False)
    for batch in batches(pieces, most_terms(model), BATCH_TOKENS):
        weights = torch.tensor([term.weight for piece in batch for term in piece.terms])
        with _gated(model, layers, len(batch)) as gates, torch.enable_grad():
            try:
                logs = log_probabilities(model, batch)[0]
                found = torch.autograd.grad((logs * weights.to(logs)).sum(), gates)
            except RuntimeError as error:
                raise MoesteerError(
                    f"{describe(model)}: its experts don't let gradients through ({error});"
                    " use knock-out, which needs none."
                ) from error
        numbers = [piece.numbers[0] for piece in batch]
        for position, gradient in enumerate(found):
            table = gradient.double().cpu().numpy()
            np.add.at(result[:, position, : table.shape[1]], numbers, table)
    return result


@contextmanager
def gate_tokens(layers: Sequence[MoELayer], gate: Float[Tensor, "row position"]) -> Iterator[None]:
    """Each token's gate multiplies the weights of all experts that it selects, in all layers."""
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(
                _attach(
                    layer, lambda tokens, e=layer.num_experts: gate.view(tokens, 1).expand(-1, e)
                )
            )
        yield


@contextmanager
def _gated(model: PreTrainedModel, layers: Sequence[MoELayer], rows: int) -> Iterator[list[Tensor]]:
    """A gate of 1 for each row and expert of each layer; no weight takes part meanwhile."""
    gates = []
    with ExitStack() as stack:
        stack.enter_context(constant_weights(model))
        for layer in layers:
            gate = torch.ones(rows, layer.num_experts, device=layer.device, requires_grad=True)
            stack.callback(_attach(layer, partial(_of_tokens, gate)))
            gates.append(gate)
        yield gates


def _attach(layer: MoELayer, gates: Callable[[int], Float[Tensor, "token expert"]]) -> Undo:
    """Multiply what the router gives by the gates of as many tokens as the batch has."""
    if layer.experts is None:  # a router whose dense scores are the weights

        def at_router(_module: object, _args: object, output: Any) -> Any:
            scores, *others = output if isinstance(output, tuple) else (output,)
            gated = _product(scores, gates(len(scores)).to(scores.device))
            return (gated, *others) if isinstance(output, tuple) else gated

        return layer.module.register_forward_hook(at_router).remove

    def at_experts(_module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        chosen = selection(args, kwargs)
        assert chosen is not None, f"layer {layer.layer}: the experts were called without an index"
        index, weights = chosen
        by_token = gates(len(index)).to(index.device)
        gated = _product(weights, by_token.gather(-1, index.long()))

        def replaced(value: Any) -> Any:
            if isinstance(value, Tensor) and value.data_ptr() == weights.data_ptr():
                return gated.view_as(value)
            return value

        return tuple(map(replaced, args)), {key: replaced(value) for key, value in kwargs.items()}

    return layer.experts.register_forward_pre_hook(at_experts, with_kwargs=True).remove


def _of_tokens(gate: Float[Tensor, "row expert"], tokens: int) -> Float[Tensor, "token expert"]:
    """Each token's gates: rows × positions, row by row."""
    return gate.repeat_interleave(tokens // len(gate), dim=0)


def _product(weights: Tensor, gate: Tensor) -> Tensor:
    """In fp32, so that the gradient is summed over tokens in fp32, whatever the model's dtype."""
    return (weights.float() * gate).to(weights.dtype)
