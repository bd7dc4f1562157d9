"""Routing held: while a text changes, each of its tokens keeps the experts that it had.

The selection is taken down in one forward pass and put back in others, in place of what the
router's top-k finds; the weights of the experts selected are those that the router gives them in
that pass. A router whose top-k stands elsewhere (DBRX, Phi-3.5-MoE) has its weights held, too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from moesteer.engines.transformers.routers import MoELayer, selection, top_k_scores
from moesteer.engines.transformers.seam import Undo, intercept

Held = Mapping[int, tuple[Tensor, ...]]
"""By layer: the selection [row, position, k], and where weights are held those."""


@contextmanager
def taken_down(layers: Sequence[MoELayer], rows: int) -> Iterator[dict[int, tuple[Tensor, ...]]]:
    """Take down what the tokens of a batch select in one forward pass."""
    found: dict[int, tuple[Tensor, ...]] = {}

    def by_row(values: Tensor) -> Tensor:
        return values.detach().reshape(rows, -1, values.shape[-1])

    with ExitStack() as stack:
        for layer in layers:
            if layer.guarded:

                def top_k(
                    func: Callable, args: tuple, kwargs: dict, layer: MoELayer = layer
                ) -> Any:
                    result = func(*args, **kwargs)
                    if top_k_scores(args, kwargs).shape[-1] == layer.num_experts:
                        found[layer.layer] = (by_row(result[1]),)
                    return result

                stack.callback(intercept(layer, lambda logits: logits, top_k))
            else:

                def see(
                    _module: object, args: tuple, kwargs: dict, layer: MoELayer = layer
                ) -> None:
                    chosen = selection(args, kwargs)
                    assert chosen is not None
                    found[layer.layer] = tuple(map(by_row, chosen))

                stack.callback(_before_experts(layer, see))
        yield found


@contextmanager
def held(layers: Sequence[MoELayer], selected: Held) -> Iterator[None]:
    """Route a batch as was taken down."""
    with ExitStack() as stack:
        for layer in layers:
            kept = [values.flatten(0, 1) for values in selected[layer.layer]]
            if layer.guarded:

                def top_k(
                    func: Callable,
                    args: tuple,
                    kwargs: dict,
                    layer: MoELayer = layer,
                    kept: list[Tensor] = kept,
                ) -> Any:
                    scores = top_k_scores(args, kwargs)
                    if scores.shape[-1] != layer.num_experts:
                        return func(*args, **kwargs)
                    index = kept[0].view(*scores.shape[:-1], -1)
                    return torch.return_types.topk((scores.gather(-1, index), index))

                stack.callback(intercept(layer, lambda logits: logits, top_k))
            else:

                def put(
                    _module: object, args: tuple, kwargs: dict, kept: list[Tensor] = kept
                ) -> tuple[tuple, dict]:
                    chosen = selection(args, kwargs)
                    assert chosen is not None
                    places = {own.data_ptr(): new for own, new in zip(chosen, kept, strict=True)}

                    def replaced(value: Any) -> Any:
                        new = places.get(value.data_ptr()) if isinstance(value, Tensor) else None
                        return value if new is None else new.view_as(value)

                    return tuple(map(replaced, args)), {k: replaced(v) for k, v in kwargs.items()}

                stack.callback(_before_experts(layer, put))
        yield


def _before_experts(layer: MoELayer, hook: Callable) -> Undo:
    assert layer.experts is not None, f"layer {layer.layer}: no top-k, and no experts to be seen"
    return layer.experts.register_forward_pre_hook(hook, with_kwargs=True).remove
