"""Who writes a direction: how far each part of a model moves the residual stream along it.

The stream is a sum, so its projection on a unit vector v̂ is one, too:

    v̂ᵀ x_l = v̂ᵀ embedding + Σ over layers below l of v̂ᵀ attention + v̂ᵀ feed-forward

and what a feed-forward part writes is the sum of its routed experts' weighted outputs w_e y_e, sent
through whatever linear map stands behind them (a scale, a projection back to full width), and a
rest: shared experts, a dense MLP. That map is not looked up but differentiated: an expert's part is
gᵀ w_e y_e, where g is the gradient of v̂ᵀ(what is written) by the experts' summed output. A norm
behind them divides by a number of the whole token; each part is scaled by what the norm did at that
token, so that the parts still add up (as in direct logit attribution, Elhage et al. 2021, A
Mathematical Framework for Transformer Circuits). Anything else behind them that is not linear, or
that mixes tokens, has no such parts and is refused.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesteer.engines.base import Contributions
from moesteer.engines.transformers.backward import constant_weights
from moesteer.engines.transformers.expert_outputs import (
    Batch,
    ExpertCall,
    batch_of,
    observe_experts,
)
from moesteer.engines.transformers.routers import MoELayer, describe, replace_forward
from moesteer.engines.transformers.seam import Undo
from moesteer.engines.transformers.stream import Stream
from moesteer.errors import MoesteerError


def contributions(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    stream: Stream,
    texts: Sequence[Sequence[int]],
    last: int,
    vector: Sequence[float],
) -> Contributions:
    """See `Engine.contributions`.

    Raises MoesteerError where a layer's experts have no part of their own in what it writes.
    """
    batch = batch_of(model, texts, last)
    along = torch.tensor(vector, dtype=torch.float64)
    table = _Table(batch, along / along.norm(), len(stream.decoder), layers)
    routed = {layer.layer: layer for layer in layers}
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(constant_weights(model))
        for number, module in enumerate(stream.decoder):
            stack.callback(table.enter(number, module))
            for part in stream.writes.get((number, "attention"), ()):
                stack.callback(table.collect(table.attention[number], part))
            if number in routed:
                watched = _RoutedLayer(model, routed[number], table)
                stack.callback(watched.attach(module))
                for part in stream.writes[number, "mlp"]:
                    stack.callback(watched.collect(part))
                stack.callback(module.register_forward_hook(watched.check).remove)
            else:
                for part in stream.writes.get((number, "mlp"), ()):
                    stack.callback(table.collect(table.rest[number], part))
        stack.callback(table.leave(stream.decoder[-1]))
        model.base_model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
    return table.result()


class _Table:
    """What was seen so far: projections [layer, text·position] in fp64."""

    def __init__(
        self, batch: Batch, unit: Tensor, decoder: int, layers: Sequence[MoELayer]
    ) -> None:
        self.shape = tuple(batch.last.shape)
        self.tokens = batch.tokens
        self.total = batch.ids.numel()
        self.unit = unit
        widest = max((layer.num_experts for layer in layers), default=0)
        places = len(batch.tokens)
        self.attention = torch.zeros(decoder, places, dtype=torch.float64)
        self.rest = torch.zeros(decoder, places, dtype=torch.float64)
        self.experts = torch.zeros(decoder, places, widest, dtype=torch.float64)
        self.stream = torch.zeros(decoder + 1, places, dtype=torch.float64)

    def along(self, hidden: Tensor) -> Float[Tensor, " place"]:
        """Projections at the last tokens, as a graph on the device of `hidden`."""
        at = hidden.reshape(self.total, -1)[self.tokens.to(hidden.device)]
        return at.double() @ self.unit.to(hidden.device)

    def enter(self, number: int, module: nn.Module) -> Undo:
        def hook(_module: object, args: tuple, kwargs: dict) -> None:
            self.stream[number] = self.along(args[0] if args else kwargs["hidden_states"]).cpu()

        return module.register_forward_pre_hook(hook, with_kwargs=True).remove

    def leave(self, module: nn.Module) -> Undo:
        def hook(_module: object, _args: object, output: Any) -> None:
            self.stream[-1] = self.along(_first(output)).cpu()

        return module.register_forward_hook(hook).remove

    def collect(self, row: Tensor, part: nn.Module) -> Undo:
        def hook(_module: object, _args: object, output: Any) -> None:
            row.add_(self.along(_first(output)).detach().cpu())

        return part.register_forward_hook(hook).remove

    def result(self) -> Contributions:
        texts, positions = self.shape

        def by_text(table: Tensor) -> np.ndarray:
            """[layer, text·position, …] as [text, layer, …, position]."""
            split = table.view(len(table), texts, positions, *table.shape[2:])
            return split.movedim(1, 0).movedim(2, -1).contiguous().numpy()

        stream = by_text(self.stream)
        return Contributions(
            stream[:, 0],
            by_text(self.attention),
            by_text(self.rest),
            by_text(self.experts),
            stream,
        )


class _RoutedLayer:
    """One layer whose experts' summed output is followed to where the layer writes it."""

    def __init__(self, model: PreTrainedModel, layer: MoELayer, table: _Table) -> None:
        self.model = model
        self.layer = layer
        self.table = table
        self.call: ExpertCall | None = None
        self.source: Tensor | None = None
        self.gradient: Tensor | None = None

    def attach(self, decoder_layer: nn.Module) -> Undo:
        undo = [observe_experts(self.model, self.layer, self.start)]
        undo += [
            replace_forward(module, self.rescaling(module.forward))
            for module in decoder_layer.modules()
            if type(module).__name__.endswith("Norm") and not list(module.children())
        ]

        def restore() -> None:
            for one in reversed(undo):
                one()

        return restore

    def start(self, call: ExpertCall, output: Tensor) -> Tensor:
        """Follow the experts' output from here."""
        where = self.table.tokens
        index, weights = (t[where.to(t.device)] for t in (call.index, call.weights))
        own = call.own(where).detach()
        self.call = ExpertCall(index, weights, lambda _tokens: own)
        self.source = output.detach().requires_grad_()
        return self.source.clone()  # blocks add to it in place

    def collect(self, part: nn.Module) -> Undo:
        """Note what a part writes, and what of it comes from the experts."""

        def hook(_module: object, _args: object, output: Any) -> Any:
            written = _first(output)
            along = self.table.along(written)
            self.table.rest[self.layer.layer] += along.detach().cpu()
            if not written.requires_grad:
                return None
            assert self.source is not None
            # A gradient that has a graph itself is not constant: the way there is not linear.
            (found,) = torch.autograd.grad(along.sum(), self.source, create_graph=True)
            if found.requires_grad:
                raise self.refused("is changed non-linearly on its way to the stream")
            self.gradient = found if self.gradient is None else self.gradient + found
            return _replaced(output, written.detach())

        return part.register_forward_hook(hook).remove

    def check(self, _module: object, _args: object, _output: object) -> None:
        """Share out among the experts what came from them, once the layer is through."""
        if self.gradient is None:
            raise self.refused("is not seen to reach the residual stream")
        assert self.call is not None
        assert self.source is not None
        # Experts that all run on all tokens stand one after another, and their gradients are alike.
        own = self.call.own(self.call.index)
        gradient = self.gradient.reshape(-1, self.table.total, own.shape[-1])[0]
        where = self.table.tokens.to(gradient.device)
        elsewhere = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
        elsewhere[where] = False
        if gradient[elsewhere].any():
            raise self.refused("is mixed with that of other tokens on its way to the stream")
        along = (own.double() * gradient[where].double().unsqueeze(1)).sum(-1)
        parts = (self.call.weights.double() * along).cpu()
        number = self.layer.layer
        self.table.experts[number].scatter_add_(1, self.call.index.cpu().long(), parts)
        self.table.rest[number] -= parts.sum(-1)
        self.call = self.source = self.gradient = None

    def rescaling(self, norm: Callable[..., Any]) -> Callable[..., Any]:
        """A norm that takes its token's scale as given where the experts' output passes it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, *others = (*args, *kwargs.values())
            if not hidden.requires_grad:
                return norm(*args, **kwargs)
            fixed = hidden.detach()
            signs = torch.ones_like(fixed)
            signs[..., ::2] = -1
            normed, flipped = (norm(x, *others).detach() for x in (fixed, fixed * signs))
            off = (flipped - normed * signs).abs().max()
            # The squares are the same, so that a norm that only divides gives the same.
            if off > torch.finfo(normed.dtype).eps * normed.abs().max():
                raise self.refused("passes a norm that does more than rescale it (a mean, a bias)")
            scale = torch.where(fixed == 0, 0.0, normed / fixed)
            return normed + (hidden - fixed) * scale

        return forward

    def refused(self, why: str) -> MoesteerError:
        return MoesteerError(
            f"{describe(self.model)}: the output of the experts of layer {self.layer.layer} {why},"
            " so that what single experts contribute to the stream can't be told."
        )


def _first(output: Any) -> Tensor:
    while isinstance(output, (tuple, list)):
        output = output[0]
    return output


def _replaced(output: Any, first: Tensor) -> Any:
    """The output with its first tensor replaced."""
    if isinstance(output, (tuple, list)):
        return type(output)((_replaced(output[0], first), *output[1:]))
    return first
