"""The residual stream of a loaded vLLM model: its decoder layers, and what they write into it.

vLLM keeps the stream x as the sum of two tensors in most models (x = h + r, with the addition left
to the next norm), as one tensor in others. Which it is, and which modules' outputs are added to it
(the attention itself, or the norm behind it), is not looked up by name but measured: each layer is
called alone, with made-up outputs in the place of its attention and its feed-forward part, and what
leaves it must be what entered plus what these parts, or the norms behind them, put out. No kernel
runs but the norms'. A layer that does not add up is refused.
"""

import inspect
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from moesteer.direction import Place, Site
from moesteer.errors import MoesteerError

PROBE_TOKENS = 3
MOST_WRITES = 4
EXACT = 8
"""How many roundings of the stream a layer's sum may be off by."""


@dataclass(frozen=True, eq=False)
class Part:
    """A module whose output is added to the stream; at `input`, the decoder layer itself.

    `carried`: the layer is given the stream as the sum of two tensors. `routed`: it writes after
    the router of its layer has chosen. Several parts may share a site (experts, and a dense block
    beside them); the first of them is where additions are made.
    """

    site: Site
    module: nn.Module
    carried: bool = False
    routed: bool = False


@dataclass(frozen=True, eq=False)
class Stream:
    """The parts of this worker's layers in order, and why a layer is refused, by its number."""

    parts: tuple[Part, ...]
    refused: Mapping[int, str]


def find_stream(model: nn.Module, hidden: int, dtype: torch.dtype) -> Stream:
    """Measure each decoder layer; MoesteerError where these can't be told."""
    parts: list[Part] = []
    refused: dict[int, str] = {}
    for number, layer in _decoder(model).items():
        try:
            parts += _parts(number, layer, hidden, dtype)
        except MoesteerError as reason:
            refused[number] = str(reason)
        except Exception as error:  # whatever a layer says of a call that it does not expect
            refused[number] = f"it can't be run alone ({type(error).__name__}: {error})"
    return Stream(tuple(parts), refused)


def _routes(module: nn.Module) -> bool:
    """Whether a module holds routed experts."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return any(isinstance(inner, MoERunner) for inner in module.modules())


def _mixes(module: nn.Module) -> bool:
    """Whether a module holds attention, or what stands in its place."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return any(isinstance(inner, AttentionLayerBase) for inner in module.modules())


def _feeds(module: nn.Module) -> bool:
    """Whether a module is a feed-forward part."""
    from vllm.model_executor.layers.linear import LinearBase

    has_linear = any(isinstance(inner, LinearBase) for inner in module.modules())
    return not _mixes(module) and (has_linear or _routes(module))


def _decoder(model: nn.Module) -> dict[int, nn.Module]:
    """This worker's decoder layers by number: of all stacks of layers the one with attention."""
    stacks: dict[str, dict[int, nn.Module]] = {}
    for name, module in model.named_modules():
        found = re.fullmatch(r"((?:.*\.)?layers)\.(\d+)", name)
        if found is not None and list(module.children()):  # else another worker's
            stacks.setdefault(found[1], {})[int(found[2])] = module
    decoders = [stack for stack in stacks.values() if any(map(_mixes, stack.values()))]
    if len(decoders) != 1:
        raise MoesteerError(
            f"{type(model).__name__} has {len(decoders)} stacks of decoder layers that can be"
            " found; directions need one."
        )
    return decoders[0]


def _parts(number: int, layer: nn.Module, hidden: int, dtype: torch.dtype) -> list[Part]:
    """What a layer writes to the stream, measured; MoesteerError where it does not add up."""
    entered, left, outputs = _run_alone(layer, hidden, dtype)
    found, carried = None, len(entered) == 2
    if carried:
        found = _adding_up(entered[0] + entered[1], torch.stack(left[:2]).sum(0), outputs, dtype)
    if found is None:
        carried = False
        found = _adding_up(entered[0], left[0], outputs, dtype)
    if found is None:
        raise MoesteerError(
            "what it does to the residual stream is not the sum of what its parts write (a scaled"
            " stream, or hyper-connections)"
        )
    order = list(outputs)
    feeding = [name for name in order if _feeds(layer.get_submodule(name))]
    first = order.index(feeding[0]) if feeding else len(order)
    writes = sorted(found, key=order.index, reverse=True)  # the last has seen the router's choice
    parts = [Part((number, "input"), layer, carried)]
    for name in writes:
        place: Place = "attention" if order.index(name) < first else "mlp"
        routed = place == "mlp" and name == writes[0] and _routes(layer)
        parts.append(Part((number, place), layer.get_submodule(name), routed=routed))
    mixes, feeds = (any(map(kind, layer.children())) for kind in (_mixes, _feeds))
    if {part.site[1] for part in parts} != {"input", *["attention"] * mixes, *["mlp"] * feeds}:
        raise MoesteerError("a part of it writes in place, which can't be changed on its way")
    return parts


@torch.no_grad()
def _run_alone(
    layer: nn.Module, hidden: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """What entered a layer, what left it, and what its children put out, in the order they ran."""
    device = next(layer.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(PROBE_TOKENS, hidden, generator=generator).to(device, dtype)

    children = dict(layer.named_children())
    made_up = {name: draw() for name, child in children.items() if _mixes(child) or _feeds(child)}
    given = {
        "positions": torch.arange(PROBE_TOKENS, device=device),
        "position_ids": torch.arange(PROBE_TOKENS, device=device),
        "hidden_states": draw(),
        "residual": draw(),
    }
    taken = inspect.signature(layer.forward).parameters
    arguments = {name: value for name, value in given.items() if name in taken}
    stream = [name for name in ("hidden_states", "residual") if name in taken]
    entered = [given[name].float().clone() for name in stream]
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: object, _args: object, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.shape == (PROBE_TOKENS, hidden):
                outputs[name] = first.float().clone()  # norms write over what they are given

        return hook

    with ExitStack() as stack:
        for name, child in children.items():
            if name in made_up:
                child.__dict__["forward"] = lambda *_, name=name, **__: made_up[name].clone()
                stack.callback(child.__dict__.pop, "forward")
            stack.callback(child.register_forward_hook(watch(name)).remove)
        output = layer(**arguments)
    whole = output if isinstance(output, tuple) else (output,)
    left = [tensor.float() for tensor in whole if tensor is not None]
    return entered, left, outputs


def _adding_up(
    entered: Tensor, left: Tensor, outputs: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[str, ...] | None:
    """The fewest children whose outputs add up to what the layer added to the stream."""
    allowed = EXACT * torch.finfo(dtype).eps * float(left.norm())
    for number in range(1, MOST_WRITES + 1):
        off = {
            chosen: float((entered + sum(outputs[name] for name in chosen) - left).norm())
            for chosen in combinations(outputs, number)
        }
        best = min(off, key=lambda chosen: off[chosen], default=None)
        if best is not None and off[best] <= allowed:
            return best
    return None
