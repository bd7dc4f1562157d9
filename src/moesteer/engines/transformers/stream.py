"""The residual stream of a transformers model: its decoder layers, and what they write into it.

A decoder layer adds to the stream what its attention writes (or what stands in its place), and what
its feed-forward part writes. Which modules' outputs these are (the attention itself, or the norm
behind it; one block, or experts and a dense MLP side by side) is not looked up by name but measured
in one forward pass: of all modules in a layer those whose outputs add up to the difference between
what leaves the layer and what enters it.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesteer.direction import Place, Site
from moesteer.engines.transformers.routers import MoELayer, describe, forward_dummy
from moesteer.errors import MoesteerError

MOST_WRITES = 4
"""Two in most layers; four where a layer holds two attentions and two feed-forward parts."""
EXACT = 2
"""How many roundings of a token's stream the sum may be off by: half a one an addition."""


@dataclass(frozen=True, eq=False)
class Stream:
    """The decoder layers in order, and by site the modules that write there, in order."""

    decoder: tuple[nn.Module, ...]
    writes: Mapping[Site, tuple[nn.Module, ...]]
    hidden: int


def find_decoder(model: PreTrainedModel, layers: Sequence[MoELayer]) -> tuple[nn.Module, ...]:
    """The decoder layers of a model; MoesteerError where they can't be told."""
    if layers:
        parts = layers[0].name.split(".")
        path = ".".join(parts[: parts.index(str(layers[0].layer))])
        return tuple(model.get_submodule(path).children())
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    for modules in lists:
        if len(modules) == wanted:
            return tuple(modules)
    raise MoesteerError(f"the decoder layers of {describe(model)} can't be found.")


def find_stream(model: PreTrainedModel, layers: Sequence[MoELayer]) -> Stream:
    """Measured in one forward pass of a few tokens.

    Raises MoesteerError where a layer's writes don't add up to what it does to the stream:
    hyper-connections, scaled or normalised streams.
    """
    decoder = find_decoder(model, layers)
    routers = {layer.layer: layer.name for layer in layers}
    seen = _watch(model, decoder)
    writes: dict[Site, tuple[nn.Module, ...]] = {}
    hidden = 0
    for number, (module, passed) in enumerate(zip(decoder, seen, strict=True)):
        found = None if passed.unlike else _adding_up(passed)
        if found is None:
            raise MoesteerError(
                f"{describe(model)}: what layer {number} does to the residual stream is not the sum"
                " of what its parts write (hyper-connections, or a stream that is scaled); its"
                " directions can't be steered."
            )
        assert passed.entered is not None
        hidden = passed.entered.shape[-1]
        for name, place in _places(module, found, passed.order, routers.get(number)).items():
            writes[number, place] = (*writes.get((number, place), ()), module.get_submodule(name))
    return Stream(decoder, writes, hidden)


@dataclass(eq=False)
class _Passed:
    """What entered and left a layer in a forward pass, and what its parts put out, in order."""

    entered: Tensor | None = None
    left: Tensor | None = None
    outputs: dict[str, Tensor] | None = None
    order: tuple[str, ...] = ()

    @property
    def unlike(self) -> bool:
        return self.entered is None or self.left is None or self.entered.shape != self.left.shape


def _watch(model: PreTrainedModel, decoder: Sequence[nn.Module]) -> list[_Passed]:
    passed = [_Passed(outputs={}) for _ in decoder]
    with ExitStack() as stack:
        for module, seen in zip(decoder, passed, strict=True):

            def enter(_m: object, args: tuple, kwargs: dict, seen: _Passed = seen) -> None:
                seen.entered = first_tensor(args or kwargs.get("hidden_states"))

            def leave(_m: object, _args: object, output: object, seen: _Passed = seen) -> None:
                seen.left = first_tensor(output)

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            for name, part in module.named_modules():
                if name.count(".") < 2 and name:

                    def put_out(
                        _m: object, _a: object, output: object, name=name, seen: _Passed = seen
                    ) -> None:
                        tensor = first_tensor(output)
                        seen.order = (*seen.order, name)
                        if tensor is not None and seen.outputs is not None:
                            seen.outputs[name] = tensor

                    stack.callback(part.register_forward_hook(put_out).remove)
        forward_dummy(model)
    return passed


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of what a module takes or returns, copied: kernels may write over it."""
    while isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return value.detach().clone() if isinstance(value, Tensor) else None


def _adding_up(passed: _Passed) -> tuple[str, ...] | None:
    """The parts whose outputs add up to what the layer added, in the order that they ran.

    A stream of large norm rounds away much of what is written to it. So sums are made as the model
    makes them, in its dtype and order: then that of the right parts is off by nothing. Where a
    model adds otherwise, those are taken that come nearest, within what rounding may do.
    """
    assert passed.entered is not None
    assert passed.left is not None
    assert passed.outputs is not None
    width = passed.entered.shape[-1]
    entered, left = (t.cpu().reshape(-1, width) for t in (passed.entered, passed.left))
    allowed, nothing = (EXACT * torch.finfo(d).eps for d in (left.dtype, torch.float32))
    candidates = {
        name: passed.outputs[name].cpu().reshape(-1, width)
        for name in dict.fromkeys(passed.order)
        if passed.order.count(name) == 1
        and name in passed.outputs
        and passed.outputs[name].numel() == left.numel()
    }
    for depth in (0, 1):  # the layer's own parts; theirs only where these don't add up
        names = sorted(
            (name for name in candidates if name.count(".") <= depth),
            key=lambda name: name.count("."),  # of equal ones the outermost
        )
        best: tuple[float, tuple[str, ...]] = (allowed, ())
        for number in range(1, MOST_WRITES + 1):
            for chosen in combinations(names, number):
                if any(b.startswith(a + ".") for a in chosen for b in chosen):
                    continue
                written = [candidates[n] for n in sorted(chosen, key=passed.order.index)]
                off = _off(entered, written, left)
                if off < best[0] * (0.5 if best[1] else 1):
                    best = (off, chosen)
            if best[1] and best[0] < nothing / 4:
                break
        if best[1]:
            return best[1]
    return None


def _off(entered: Tensor, written: Sequence[Tensor], left: Tensor) -> float:
    """The largest share of a token's norm by which what left is not the sum of what entered and
    what was written, added one by one in the stream's dtype, or all at once in fp32."""
    one_by_one = entered
    for part in written:
        one_by_one = (one_by_one + part).to(left.dtype)
    at_once = sum((part.float() for part in written), entered.float())
    norm = left.float().norm(dim=-1).clamp(min=1e-30)
    off = ((total.float() - left.float()).norm(dim=-1) / norm for total in (one_by_one, at_once))
    return min(float(shares.max()) for shares in off)


def _places(
    layer: nn.Module, writes: Sequence[str], order: Sequence[str], router: str | None
) -> dict[str, Place]:
    """Which of a layer's writes is attention's: what ran before the routed block, or the first."""
    if router is not None:
        own = re.sub(r"^.*?\.\d+\.", "", router)
        block = own.split(".")[0]
        turn = order.index(block) if block in order else order.index(own)
        return {n: "attention" if order.index(n) < turn else "mlp" for n in writes}
    if len(writes) == 1:
        kind = type(layer.get_submodule(writes[0])).__name__.lower()
        mixes = any(word in kind for word in ("attention", "attn", "mamba", "conv", "delta"))
        return {writes[0]: "attention" if mixes else "mlp"}
    return {name: "mlp" if number else "attention" for number, name in enumerate(writes)}
