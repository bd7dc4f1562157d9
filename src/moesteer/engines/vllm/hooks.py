"""The hooks that put the parts of a model's stream under the tables of directions.

Where Dynamo traces the model they become an operator of ours, opaque, as in the seam.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesteer.engines.vllm.directions import Directed
from moesteer.engines.vllm.seam import RoutedLayer


def attach_directions(directed: Directed, layers: Sequence[RoutedLayer]) -> None:
    """Put each part under its tables; routed layers leave the weights of experts' directions."""
    _DIRECTED.append(directed)
    which = len(_DIRECTED) - 1
    for number, part in enumerate(directed.parts):
        if part.site[1] == "input":
            hook = _input_hook(part.module, part.carried, which, number)
            part.module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            part.module.register_forward_hook(_output_hook(which, number))
    for layer in layers:
        for number in directed.numbers.get((layer.shape.layer, "mlp"), ())[:1]:
            layer.weigh = functools.partial(directed.weigh, number)


def _input_hook(layer: nn.Module, carried: bool, which: int, number: int) -> Any:
    names = list(inspect.signature(layer.forward).parameters)
    stream = names.index("hidden_states")
    beside = names.index("residual") if carried else None

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        rest = None
        if beside is not None:
            rest = args[beside] if beside < len(args) else kwargs.get("residual")
        if stream < len(args):
            changed = _change(args[stream], rest, which, number)
            return (*args[:stream], changed, *args[stream + 1 :]), kwargs
        changed = _change(kwargs["hidden_states"], rest, which, number)
        return args, {**kwargs, "hidden_states": changed}

    return hook


def _output_hook(which: int, number: int) -> Any:
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_change(output[0], None, which, number), *output[1:])
        return _change(output, None, which, number)

    return hook


def _change(part: Tensor, rest: Tensor | None, which: int, number: int) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.moesteer.change(part, rest, which, number)
    return _DIRECTED[which].change(number, part, rest)


# -- operators for graphs ------------------------------------------------------------------------

_DIRECTED: list[Directed] = []


def known_streams() -> int:
    """How many models this process has put under directions."""
    return len(_DIRECTED)


def _changed(part: Tensor, rest: Tensor | None, which: int, number: int) -> Tensor:
    changed = _DIRECTED[which].change(number, part, rest)
    return changed.clone() if changed is part else changed  # an operator returns no input


_LIBRARY = torch.library.Library("moesteer", "FRAGMENT")
_LIBRARY.define("change(Tensor part, Tensor? rest, int which, int number) -> Tensor")
_LIBRARY.impl("change", _changed, "CompositeExplicitAutograd")
torch.library.register_fake(
    "moesteer::change", lambda part, rest, which, number: torch.empty_like(part)
)
