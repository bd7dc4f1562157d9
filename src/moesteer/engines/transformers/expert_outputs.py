"""What single experts put out, and what a layer writes while one of them is forced.

A layer's experts come stacked in one module, called as `experts(hidden, index, weights)`, which
returns the weighted sum over each token's k experts. Called with one expert a token and weight 1 it
returns that expert's own output y_e, whatever kernel computes it:

    y = experts(h repeated k times, index [token·k, 1], ones),    Σ_e w_e y_e = the block's output

An expert is forced by the exact rule (`moesteer.rules`): it joins the token's k, the others are
selected and weighted as the model does. What the layer then writes differs from what it wrote
before in its experts only, so that nothing below them runs again: expert-aware refusal steering
(Marbut, Olson, Wheeler 2026, arXiv 2606.04160).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesteer.engines.transformers.directing import first_argument
from moesteer.engines.transformers.reading import BATCH_TOKENS
from moesteer.engines.transformers.replay import Replay
from moesteer.engines.transformers.residuals import last_tokens
from moesteer.engines.transformers.routers import (
    MoELayer,
    dense_selection,
    describe,
    input_device,
    selection,
)
from moesteer.engines.transformers.seam import Undo
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers.stream import Stream, first_tensor
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

ROUNDINGS = 16
"""By how many roundings of the model's dtype a block that runs on its own may be off."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts padded on the right, and where the last tokens of each stand."""

    ids: Int[Tensor, "text token"]
    attention: Int[Tensor, "text token"]
    last: Int[Tensor, "text position"]

    @property
    def tokens(self) -> Int[Tensor, " place"]:
        """Where they stand among all tokens of the batch, text by text."""
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None] * self.ids.shape[1]
        return (rows + self.last).flatten()

    def repeated(self, copies: int) -> "Batch":
        return Batch(*(part.repeat(copies, 1) for part in (self.ids, self.attention, self.last)))


def batch_of(model: PreTrainedModel, texts: Sequence[Sequence[int]], last: int) -> Batch:
    """One batch of texts; MoesteerError where one has fewer than `last` tokens."""
    return Batch(*last_tokens(texts, last, input_device(model)))


# -- outputs of single experts -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ExpertCall:
    """What a layer's experts were given in a batch, `index` and `weights` [token, k].

    `own(tokens)` is what the experts of some of the tokens put out, unweighted; [token, k, width].
    """

    index: Int[Tensor, "token k"]
    weights: Float[Tensor, "token k"]
    own: Callable[[Tensor], Tensor]


def observe_experts(
    model: PreTrainedModel, layer: MoELayer, see: Callable[[ExpertCall, Tensor], Tensor | None]
) -> Undo:
    """Call `see(call, output)` for each batch of the layer's experts.

    What it returns, if anything, goes on in place of the output.
    """
    if layer.experts is None:
        return _observe_dense(model, layer, see)

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        chosen = selection(args, kwargs)
        assert chosen is not None, f"layer {layer.layer}: the experts were called without an index"
        index, weights = chosen
        hidden = _flat(first_argument(args, kwargs))

        def own(tokens: Tensor) -> Tensor:
            k = index.shape[-1]
            tokens = tokens.to(index.device)
            repeated = hidden[tokens].repeat_interleave(k, 0)
            put_out = own_output(module, repeated, index[tokens].flatten(), weights.dtype)
            return put_out.view(len(tokens), k, -1)

        return see(ExpertCall(index, weights, own), output)

    return layer.experts.register_forward_hook(hook, with_kwargs=True).remove


def own_output(
    experts: nn.Module,
    hidden: Float[Tensor, "token width"],
    expert: Int[Tensor, " token"],
    dtype: torch.dtype,
) -> Float[Tensor, "token width"]:
    """What each token's one expert puts out; `dtype` is that of the weights it is given."""
    if not len(hidden):
        return hidden
    # Not the module itself, whose hooks see what the model routes.
    forward: Any = experts.forward
    index = expert.unsqueeze(-1)
    one = torch.ones_like(index, dtype=dtype)
    try:
        output = forward(hidden, index, one)
    except ValueError:  # a loop over experts that takes a single column for none
        both = torch.cat((one, torch.zeros_like(one)), -1)
        output = forward(hidden, index.expand(-1, 2), both)
    return _flat(output)


def _observe_dense(
    model: PreTrainedModel, layer: MoELayer, see: Callable[[ExpertCall, Tensor], Tensor | None]
) -> Undo:
    """Experts that all run on all tokens, whose inputs are weighted: [expert·token, width].

    Their outputs are added up as they are, so that each weight is 1.
    """
    block = model.get_submodule(layer.name.rpartition(".")[0])
    scores: list[object] = []

    def at_router(_module: object, _args: object, output: object) -> None:
        scores[:] = [output]

    def at_experts(_module: object, _args: object, output: Tensor) -> Tensor | None:
        index, weights = dense_selection(scores[0], layer.top_k)
        by_expert = output.view(layer.num_experts, -1, output.shape[-1])

        def own(tokens: Tensor) -> Tensor:
            chosen = index[tokens.to(index.device)]
            return by_expert[chosen, tokens.to(index.device).unsqueeze(-1)]

        return see(ExpertCall(index, (weights != 0).to(output.dtype), own), output)

    undo = [
        layer.module.register_forward_hook(at_router).remove,
        block.get_submodule("experts").register_forward_hook(at_experts).remove,
    ]

    def restore() -> None:
        for one in undo:
            one()

    return restore


@torch.inference_mode()
def own_outputs(
    model: PreTrainedModel,
    layer: MoELayer,
    texts: Sequence[Sequence[int]],
    last: int,
    hidden: int,
) -> tuple[Float[np.ndarray, "text expert hidden"], Int[np.ndarray, "text expert"]]:
    """See `Engine.own_outputs`; before whatever the block does to them afterwards (scales, norms).

    Raises MoesteerError where they are not as wide as the stream, `hidden`.
    """
    batch = batch_of(model, texts, last)
    sums = torch.zeros(len(texts) * layer.num_experts, hidden, dtype=torch.float64)
    counts = torch.zeros(len(texts) * layer.num_experts, dtype=torch.int64)
    text = torch.arange(len(texts)).repeat_interleave(last).unsqueeze(-1) * layer.num_experts

    def see(call: ExpertCall, output: Tensor) -> None:
        if output.shape[-1] != hidden:
            raise MoesteerError(
                f"{describe(model)}: the experts of layer {layer.layer} put out"
                f" {output.shape[-1]} numbers, the residual stream has {hidden}; use forced outputs"
                " instead."
            )
        where = batch.tokens.to(call.index.device)
        cell = (call.index[where].cpu() + text).flatten()
        chosen = (call.weights[where] != 0).cpu().flatten()
        own = call.own(where).flatten(0, 1).cpu().double()
        sums.index_add_(0, cell, own * chosen.unsqueeze(-1))
        counts.index_add_(0, cell, chosen.long())
        raise _Seen

    with ExitStack() as stack:
        stack.callback(observe_experts(model, layer, see))
        _run(model, batch)
    shape = (len(texts), layer.num_experts)
    return sums.view(*shape, hidden).float().numpy(), counts.view(shape).numpy()


# -- one expert forced ---------------------------------------------------------------------------


@torch.inference_mode()
def forced_outputs(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    stream: Stream,
    replay: Replay,
    layer: MoELayer,
    texts: Sequence[Sequence[int]],
    last: int,
) -> Float[np.ndarray, "text expert position hidden"]:
    """See `Engine.forced_outputs`.

    One forward pass up to the layer. Then its block runs on the last tokens alone, a row of them
    for each text and expert; where the block can't be run on its own (it looks at other tokens, or
    experts and router lie in the layer itself), the layer does, on whole texts.
    """
    batch = batch_of(model, texts, last)
    modules = stream.writes[layer.layer, "mlp"]
    with replay.keep({layer.layer}) as kept, _inputs(modules[0]) as given:
        written = _written(model, batch, stream, layer)
    entered = _entered(given)
    alone = len(modules) == 1 and entered is not None and _holds(modules[0], layer)

    def block(copies: int) -> Tensor:
        assert entered is not None
        rows = torch.arange(len(texts), device=entered.device).unsqueeze(-1)
        hidden = entered[rows, batch.last.to(entered.device)].repeat(copies, 1, 1)
        output = first_tensor(modules[0](hidden))
        assert output is not None
        return output.view(copies * len(texts), last, -1).float().cpu()

    def whole(copies: int) -> Tensor:
        with replay.put(layer.layer, below, copies):
            return _written(model, batch.repeated(copies), stream, layer)

    alone = alone and _agree(block(1), written, model.dtype)
    below = None if alone or not replay.saves(layer.layer) else kept[layer.layer]
    tokens = len(texts) * (last if alone else batch.ids.shape[1])
    copies = max(1, BATCH_TOKENS // tokens)
    parts = []
    for start in range(0, layer.num_experts, copies):
        forced = [
            Profile(((layer.layer, expert),), name=f"expert {expert} forced")
            for expert in range(start, min(start + copies, layer.num_experts))
        ]
        with steer(model, [profile for profile in forced for _ in texts], layers):
            part = (block if alone else whole)(len(forced))
        parts.append(part.view(len(forced), len(texts), last, -1))
    return torch.cat(parts).transpose(0, 1).numpy()


def _written(
    model: PreTrainedModel, batch: Batch, stream: Stream, layer: MoELayer
) -> Float[Tensor, "text position hidden"]:
    """What the layer's feed-forward part writes at the last tokens, in a pass that ends with it."""
    texts = len(batch.ids)
    total = torch.zeros(*batch.last.shape, stream.hidden)

    def see(_module: object, _args: object, output: object) -> None:
        written = first_tensor(output)
        assert written is not None
        rows = torch.arange(texts, device=written.device).unsqueeze(-1)
        at = written.view(texts, -1, stream.hidden)[rows, batch.last.to(written.device)]
        total.add_(at.float().cpu())

    def end(_module: object, _args: object, _output: object) -> None:
        raise _Seen

    with ExitStack() as stack:
        for module in stream.writes[layer.layer, "mlp"]:
            stack.callback(module.register_forward_hook(see).remove)
        stack.callback(stream.decoder[layer.layer].register_forward_hook(end).remove)
        _run(model, batch)
    return total


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    given: list[tuple[tuple, dict]] = []

    def see(_module: object, args: tuple, kwargs: dict) -> None:
        given.append((args, kwargs))

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield given
    finally:
        handle.remove()


def _entered(given: list[tuple[tuple, dict]]) -> Tensor | None:
    """The hidden states a module was called with, [row, position, width]; None where it got more
    than these."""
    if len(given) != 1 or len(given[0][0]) != 1 or any(v is not None for v in given[0][1].values()):
        return None
    hidden = first_tensor(given[0][0][0])
    return hidden if hidden is not None and hidden.dim() == 3 else None


def _holds(module: nn.Module, layer: MoELayer) -> bool:
    """Whether the module holds the layer's router and experts."""
    inside = set(module.modules())
    return layer.module in inside and (layer.experts is None or layer.experts in inside)


def _agree(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same differ by rounding only."""
    return float((one - other).norm()) <= ROUNDINGS * torch.finfo(dtype).eps * float(other.norm())


# -- passes --------------------------------------------------------------------------------------


class _Seen(Exception):  # noqa: N818 - nothing went wrong
    """What was asked for has been seen; the rest of the forward pass is not needed."""


def _run(model: PreTrainedModel, batch: Batch) -> None:
    """A forward pass of a batch that a hook ends with `_Seen`."""
    try:
        model.base_model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
    except _Seen:
        return
    raise AssertionError("the layer did not run")


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])
