"""Directions in the residual stream: added, or projected out, at three places of a decoder layer.

    input       what enters the layer (vLLM keeps the stream as the sum of two tensors, x = h + r)
    attention   what its attention writes to the stream
    moe         what its Mixture-of-Experts block writes to it, shared experts included

With c·v added and r̂ projected out, a tensor h that is a part of x becomes

    h + c·v − r̂ (r̂ᵀx)                    x = h but for the input of a layer

The seam is put in only where an engine was started for it (`settings.directions`): its tables take
2 × 3 × layers × rows × hidden numbers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moesteer.errors import MoesteerError

Place = Literal["input", "attention", "moe"]
Operation = Literal["add", "ablate"]
Window = Literal["prompt", "generation", "all"]


@dataclass(frozen=True)
class Direction:
    """A vector of the stream's width, where it is used, and how; ablation is by its unit vector."""

    layer: int
    place: Place
    operation: Operation
    vector: tuple[float, ...]
    coefficient: float = 1.0


@dataclass(frozen=True, eq=False)
class Site:
    """A module whose input or output is changed; `key` is its number among all sites."""

    layer: int
    place: Place
    module: nn.Module


class Directed:
    """The sites of a worker's model, and what each row does at each of them."""

    def __init__(
        self, sites: Sequence[Site], rows: int, tokens: int, hidden: int, device: torch.device
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.sites = list(sites)
        self.hidden = hidden
        self.rows = zeros(tokens, dtype=torch.int64)
        self.added = zeros(len(sites), rows, hidden)
        self.ablated = zeros(len(sites), rows, hidden)
        self.used = zeros(len(sites), rows, 1, dtype=torch.bool)
        self.passed = zeros(rows, len(sites), dtype=torch.int32)

    def check(self, directions: Sequence[Direction]) -> None:
        """Raise MoesteerError for a direction that has no place here, or another width."""
        places = {(site.layer, site.place) for site in self.sites}
        ablated = [(d.layer, d.place) for d in directions if d.operation == "ablate"]
        for direction in directions:
            if (direction.layer, direction.place) not in places:
                raise MoesteerError(
                    f"there is no {direction.place} of layer {direction.layer} in this model."
                )
            if len(direction.vector) != self.hidden:
                raise MoesteerError(
                    f"a direction of layer {direction.layer} has {len(direction.vector)} numbers;"
                    f" the model's hidden states have {self.hidden}."
                )
            if ablated.count((direction.layer, direction.place)) > 1:
                raise MoesteerError(
                    f"two directions are ablated at the {direction.place} of layer"
                    f" {direction.layer}; one at a place."
                )

    def write(self, row: int, directions: Sequence[Direction]) -> None:
        """Let a row do this, and nothing else; several at one site add up."""
        for table in (self.added, self.ablated, self.used):
            table[:, row].zero_()
        numbers = {(site.layer, site.place): n for n, site in enumerate(self.sites)}
        for direction in directions:
            site = numbers[direction.layer, direction.place]
            vector = torch.tensor(direction.vector)
            if direction.operation == "add":
                self.added[site, row] += (direction.coefficient * vector).to(self.added.device)
            else:
                self.ablated[site, row].copy_(vector / vector.norm())
            self.used[site, row] = True

    def change(
        self,
        site: int,
        part: Float[Tensor, "token hidden"],
        rest: Float[Tensor, "token hidden"] | None,
    ) -> Float[Tensor, "token hidden"]:
        """`part` of the stream `part + rest`, changed as each token's row says."""
        rows = self.rows[: part.shape[0]]
        stream = part.float() if rest is None else part.float() + rest.float()
        ablated = self.ablated[site][rows]
        along = (stream * ablated).sum(-1, keepdim=True)
        changed = part.float() + self.added[site][rows] - along * ablated
        used = self.used[site][rows]
        self.passed[:, site].index_add_(0, rows, used.squeeze(-1).to(torch.int32))
        return torch.where(used, changed.to(part.dtype), part)


def find_sites(model: nn.Module) -> list[Site]:
    """Places in each decoder layer; a layer without experts has no `moe`."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    sites = []
    for name, layer in model.named_modules():
        number = re.search(r"(?:^|\.)layers\.(\d+)$", name)
        if number is None or not list(layer.children()):
            continue
        sites.append(Site(int(number[1]), "input", layer))
        for child in layer.children():
            held = list(child.modules())
            if any(isinstance(module, MoERunner) for module in held):
                sites.append(Site(int(number[1]), "moe", child))
            elif any(isinstance(module, AttentionLayerBase) for module in held):
                sites.append(Site(int(number[1]), "attention", child))
    if not sites:
        raise MoesteerError(f"{type(model).__name__} has no decoder layers that can be found.")
    return sites


def attach_directions(directed: Directed) -> None:
    """Put each site under its tables."""
    _DIRECTED.append(directed)
    which = len(_DIRECTED) - 1
    for number, site in enumerate(directed.sites):
        if site.place == "input":
            site.module.register_forward_pre_hook(_input_hook(which, number), with_kwargs=True)
        else:
            site.module.register_forward_hook(_output_hook(which, number))


def _input_hook(which: int, site: int) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # vLLM's layers are called with (positions, hidden_states, residual), by place or by name.
        if "hidden_states" in kwargs:
            rest = kwargs.get("residual")
            changed = _change(kwargs["hidden_states"], rest, which, site)
            return args, {**kwargs, "hidden_states": changed}
        positions, part, *others = args
        rest = others[0] if others else kwargs.get("residual")
        return (positions, _change(part, rest, which, site), *others), kwargs

    return hook


def _output_hook(which: int, site: int) -> Any:
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_change(output[0], None, which, site), *output[1:])
        return _change(output, None, which, site)

    return hook


def _change(part: Tensor, rest: Tensor | None, which: int, site: int) -> Tensor:
    return torch.ops.moesteer.change(part, rest, which, site)


# -- operators for graphs ------------------------------------------------------------------------

_DIRECTED: list[Directed] = []

_LIBRARY = torch.library.Library("moesteer", "FRAGMENT")
_LIBRARY.define("change(Tensor part, Tensor? rest, int which, int site) -> Tensor")
_LIBRARY.impl(
    "change",
    lambda part, rest, which, site: _DIRECTED[which].change(site, part, rest),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "moesteer::change", lambda part, rest, which, site: torch.empty_like(part)
)
