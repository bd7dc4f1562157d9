"""The routing of a model without weights, traced as that of a loaded one is.

`trace_layers` runs a model once and reads off what its routers do; none of that depends on the
values of the weights. So the same pass runs on the meta device, where tensors have a shape and
nothing else, and a model of any size is traced within a second or two.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moesteer.engines.transformers.routers import (
    MoELayer,
    describe,
    find_routers,
    replace_forward,
    trace_layers,
)
from moesteer.errors import MoesteerError
from moesteer.records import first_line


def trace_without_weights(model: PreTrainedModel) -> list[MoELayer]:
    """The routed layers of a model on the meta device, as `trace_layers` finds them when loaded.

    Raises MoesteerError where `trace_layers` does, and where the model's forward pass needs values.
    """
    try:
        with _shapes_only(model):
            return trace_layers(model)
    except MoesteerError:
        raise
    except Exception as error:  # whatever somebody else's forward pass does without values
        raise MoesteerError(
            f"the routing of {describe(model)} can't be read without its weights:"
            f" {first_line(error)}"
        ) from error


class _EveryValueIsTrue(TorchFunctionMode):
    """Answers what a forward pass asks of values that are not there.

    What it asks is whether anything is masked, and where; each token counts, so all is true.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is Tensor.__bool__:
                return True
            if func in (torch.nonzero, Tensor.nonzero):
                found: Any = torch.ones(args[0].shape).nonzero(**(kwargs or {}))
                return found.to("meta") if isinstance(found, Tensor) else tuple(map(_meta, found))
        return func(*args, **(kwargs or {}))


@contextmanager
def _shapes_only(model: PreTrainedModel) -> Iterator[None]:
    """Let a model run on the meta device; experts, which sort tokens by value, pass them on."""

    def inputs_to_meta(_module, args, kwargs):
        return tuple(map(_meta, args)), {key: _meta(value) for key, value in kwargs.items()}

    def pass_on(hidden, *_args, **_kwargs):
        return hidden

    # Layers whose router transformers does not name have experts too.
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    experts += [router.experts for router in find_routers(model) if router.experts is not None]
    with ExitStack() as stack:
        for module in {id(module): module for module in experts}.values():
            stack.callback(replace_forward(module, pass_on))
        hook = model.base_model.register_forward_pre_hook(inputs_to_meta, with_kwargs=True)
        stack.callback(hook.remove)
        stack.enter_context(_EveryValueIsTrue())
        yield


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
