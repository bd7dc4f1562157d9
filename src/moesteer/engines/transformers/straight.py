"""A router's forward as straight-line code, with steering put in at two places.

A torch-function mode sees every call of a router and pays a Python call for each, which on a small
model costs as much as the rewriting itself. Nearly all routers are a few tensor operations without
branches, so `torch.fx` can write them down once; steering is then a call in that code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from moesteer.engines.transformers.routers import LINEAR_MAPS, TOP_K, Router

_LINEAR_METHODS = {function.__name__ for function in LINEAR_MAPS}


class StraightRouter:
    """The forward of a router with `rewrite` after its logits and `top_k` for torch.topk.

    Both are set when steering is put on. Raises ValueError where the router can't be written down:
    it branches on tensors, or runs under somebody else's forward.
    """

    def __init__(self, router: Router, logits_call: int) -> None:
        module = router.module
        self.rewrite: Callable[[Tensor], Tensor]
        self.top_k: Callable[[Callable, tuple, dict], Any]
        if module.training or "forward" in module.__dict__:
            raise ValueError("not as its class wrote it")
        before = dict(module.__dict__)
        try:
            graph = fx.Tracer().trace(module)
            self._put_in(graph, module, logits_call)
            self._code = fx.GraphModule(module, graph)
        except Exception as error:  # whatever a router does with a stand-in for a tensor
            raise ValueError(str(error)) from None
        finally:
            module.__dict__.clear()
            module.__dict__.update(before)  # the tracer notes constants in it
        self._module = module
        self.forward = self._code.forward

    @property
    def is_current(self) -> bool:
        """Whether the router still has the tensors and the mode it was written down with."""
        now = self._module
        theirs = dict((*now.named_parameters(), *now.named_buffers(), *now.named_modules()))
        noted = (*self._code.named_parameters(), *self._code.named_buffers())
        noted += tuple((n, m) for n, m in self._code.named_modules() if type(m) is not nn.Module)
        same = all(theirs.get(name) is what for name, what in noted if name)
        return same and not now.training

    def _put_in(self, graph: fx.Graph, module: nn.Module, logits_call: int) -> None:
        logits = [node for node in graph.nodes if _is_linear(module, node)][logits_call - 1]
        with graph.inserting_after(logits):
            steered = graph.call_function(self._rewrite, (logits,))
        logits.replace_all_uses_with(steered, delete_user_cb=lambda user: user is not steered)
        for node in graph.nodes:
            if node.target in TOP_K or (node.op == "call_method" and node.target == "topk"):
                node.op, node.target = "call_function", self._top_k

    def _rewrite(self, logits: Tensor) -> Tensor:
        return self.rewrite(logits)

    def _top_k(self, *args: Any, **kwargs: Any) -> Any:
        return self.top_k(torch.topk, args, kwargs)


def _is_linear(module: nn.Module, node: fx.Node) -> bool:
    match node.op:
        case "call_function":
            return node.target in LINEAR_MAPS
        case "call_method":
            return node.target in _LINEAR_METHODS
        case "call_module":
            return isinstance(module.get_submodule(str(node.target)), nn.Linear)
    return False
