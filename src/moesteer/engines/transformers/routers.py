"""Where a transformers model routes, and how: found and measured, not looked up by name.

Every MoE class of transformers 5 says in `_can_record_outputs["router_logits"]` which of its
modules computes router logits. That registry finds the routers (`find_routers`), also of models
newer than this file. What a router does is then read off one short forward pass (`trace_layers`):
which linear map makes the logits, what the top-k sorts, what the experts receive. The experts are
the router's sibling module `experts`, called as `experts(hidden, index, weights)`.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moesteer.errors import MoesteerError

LINEAR_MAPS = (F.linear, torch.mm, torch.matmul, torch.addmm, Tensor.mm, Tensor.matmul)
TOP_K = (torch.topk, Tensor.topk)
SCORE_FUNCTIONS = ("softmax", "sigmoid", "softplus", "max")


@dataclass(frozen=True, eq=False)
class Router:
    """One routed layer: `layer` is the decoder layer's own number, dense layers counted too."""

    layer: int
    name: str
    module: nn.Module
    experts: nn.Module | None


@dataclass(frozen=True, eq=False)
class MoELayer(Router):
    """A router and what one forward pass showed of it.

    `num_experts` is what the top-k chooses from; `logits_width` may be larger where the same linear
    map scores shared experts too; `logits_call` counts the router's linear maps up to the one that
    makes the logits; `guarded` says whether a top-k inside the router can be guarded.
    """

    num_experts: int
    top_k: int
    family: str
    logits_width: int
    logits_call: int
    guarded: bool
    device: torch.device


def find_routers(model: PreTrainedModel) -> list[Router]:
    """The routers of a model in layer order; MoesteerError where it has none or several a layer."""
    recorders = _recorders(model)
    routers = [
        Router(_layer_number(name), name, module, _experts_beside(model, name))
        for name, module in model.named_modules()
        if any(_matches(name, module, recorder) for recorder in recorders)
    ]
    if not routers:
        raise MoesteerError(
            f"{describe(model)} is not a Mixture-of-Experts model that transformers can read: none"
            " of its classes records router logits. Give an MoE model such as OLMoE or Qwen3-MoE;"
            " dense ones have directions (moesteer direction) and rationales (moesteer rationale)."
        )
    layers = [router.layer for router in routers]
    if len(set(layers)) < len(layers):
        raise MoesteerError(
            f"{describe(model)} routes more than once in a layer; a profile names one router a"
            " layer, so this architecture is not supported."
        )
    return sorted(routers, key=lambda router: router.layer)


def is_dense(model: PreTrainedModel) -> bool:
    """Whether no class of the model records router logits."""
    return not _recorders(model)


def describe(model: PreTrainedModel) -> str:
    """The model's class and type, for messages."""
    return f"{type(model).__name__} (model type {model.config.model_type!r})"


def trace_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The routed layers of a model, measured in one forward pass of a few tokens.

    Raises MoesteerError where a router is bypassed (a quantised or kernel-replaced block), or where
    its logits or its selection can't be told apart.
    """
    routers = find_routers(model)
    traces = [_Trace() for _ in routers]
    with ExitStack() as stack:
        for router, trace in zip(routers, traces, strict=True):
            stack.enter_context(_traced(router, trace))
        forward_dummy(model)
    layers = []
    for router, trace in zip(routers, traces, strict=True):
        try:
            layers.append(_read_trace(router, trace))
        except ValueError as reason:
            raise MoesteerError(
                f"{describe(model)}, layer {router.layer} ({router.name}): {reason}"
            ) from None
    return layers


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: to the CPU for offloaded weights ("meta"), whose hooks move them on."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def dummy_tokens(model: PreTrainedModel, tokens: int = 16) -> Tensor:
    """Token ids [1, tokens] that any model accepts, the same at every call."""
    vocabulary = model.get_input_embeddings().num_embeddings  # pyright: ignore
    ids = torch.arange(1, tokens + 1).mul(7919).remainder(min(int(vocabulary), 1000))  # pyright: ignore
    return ids.unsqueeze(0).to(input_device(model))


def forward_dummy(model: PreTrainedModel) -> None:
    """One forward pass of `dummy_tokens` through the decoder, without the LM head."""
    ids = dummy_tokens(model)
    with torch.no_grad():
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def selection(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | None:
    """Index [token, k] and weights [token, k] among the arguments of an experts call, if there."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    for position, index in enumerate(tensors):
        if not index.dtype.is_floating_point and index.dtype != torch.bool:
            weights = [t for t in tensors[position + 1 :] if t.shape == index.shape]
            return (_by_token(index), _by_token(weights[0])) if weights else None
    return None


def _by_token(values: Tensor) -> Tensor:
    return values if values.dim() == 2 else values.flatten(0, -2)


def dense_selection(output: object, top_k: int) -> tuple[Tensor, Tensor]:
    """Index and weights of a router that returns scores [token, expert], zero if unselected."""
    scores = output[0] if isinstance(output, tuple) else output
    assert isinstance(scores, Tensor)
    weights, index = scores.topk(top_k, dim=-1)
    return index, weights


# -- finding -------------------------------------------------------------------------------------


def _recorders(model: PreTrainedModel) -> list:
    found = []
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) or {}
        entry = recorded.get("router_logits", [])
        found += entry if isinstance(entry, list) else [entry]
    return found


def _matches(name: str, module: nn.Module, recorder) -> bool:
    if isinstance(recorder, type):
        return isinstance(module, recorder)
    if recorder.layer_name is not None and not name.endswith(recorder.layer_name):
        return False
    if recorder.target_class is not None:
        return isinstance(module, recorder.target_class)
    return type(module).__name__.endswith(recorder.class_name)


def _layer_number(name: str) -> int:
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    if match is None:
        raise MoesteerError(f"router {name!r} is not inside a numbered layer; not supported.")
    return int(match[1])


def _experts_beside(model: PreTrainedModel, name: str) -> nn.Module | None:
    """The module `experts` of the block that holds the router, or of its decoder layer."""
    parent = name
    while not parent.rpartition(".")[2].isdigit():
        parent = parent.rpartition(".")[0]
        experts = getattr(model.get_submodule(parent), "experts", None)
        if isinstance(experts, nn.Module):
            return experts
    return None


# -- tracing -------------------------------------------------------------------------------------


@dataclass
class _Trace:
    """What was seen of one router: its deciding calls in order, and the k its experts received."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    device: torch.device | None = None
    top_k: int | None = None
    output: object = None


class _Tracing(TorchFunctionMode):
    """Notes every call that decides the routing: linear maps, score functions, biases, top-k."""

    def __init__(self, trace: _Trace) -> None:
        self.trace = trace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if func in LINEAR_MAPS:
            self.trace.calls.append(("linear", result.shape[-1]))
            self.trace.device = result.device
        elif func in TOP_K:
            self.trace.calls.append(("topk", top_k_scores(args, kwargs).shape[-1]))
        elif name in SCORE_FUNCTIONS:
            self.trace.calls.append((name, args[0].shape[-1]))
        elif name == "add" and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
            self.trace.calls.append(("bias", result.shape[-1]))
        return result


def top_k_scores(args: tuple, kwargs: dict | None) -> Tensor:
    """The tensor that a call of topk sorts."""
    return args[0] if args else (kwargs or {})["input"]


@contextmanager
def _traced(router: Router, trace: _Trace) -> Iterator[None]:
    def see_experts(_module, args, kwargs):
        chosen = selection(args, kwargs)
        if chosen is not None:
            trace.top_k = chosen[0].shape[-1]

    def see_output(_module, _args, output):
        trace.output = output

    undo = wrap_forward(router.module, lambda: _Tracing(trace))
    handles = [router.module.register_forward_hook(see_output)]
    if router.experts is not None:
        handles.append(router.experts.register_forward_pre_hook(see_experts, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        undo()


def wrap_forward(module: nn.Module, mode: Callable[[], TorchFunctionMode]) -> Callable[[], None]:
    """Run each forward of the module under a new torch-function mode; returns the exact undo."""
    inner = module.forward

    def forward(*args, **kwargs):
        with mode():
            return inner(*args, **kwargs)

    return replace_forward(module, forward)


def replace_forward(module: nn.Module, other: Callable) -> Callable[[], None]:
    """Run another forward in place of the module's; returns the exact undo.

    A forward that somebody else set on the instance (accelerate does) is put back. One that wraps
    ours meanwhile stays, and ours only passes on from then.
    """
    own = module.__dict__.get("forward")
    inner = module.forward
    active = True

    def forward(*args, **kwargs):
        return (other if active else inner)(*args, **kwargs)

    def undo() -> None:
        nonlocal active
        active = False
        if module.__dict__.get("forward") is not forward:
            return
        if own is not None:
            module.forward = own
        else:
            module.__dict__.pop("forward", None)

    module.forward = forward
    return undo


def _read_trace(router: Router, trace: _Trace) -> MoELayer:
    """What the calls say of the layer; ValueError with the reason where they don't say enough."""
    if trace.device is None:
        raise ValueError(
            "a forward pass does not call its router. A quantised or kernel-replaced block routes"
            " on its own; load the model without quantisation and without hub kernels."
        )
    names = [name for name, _ in trace.calls]
    before_top_k = trace.calls[: names.index("topk")] if "topk" in names else trace.calls
    linear_widths = [width for name, width in before_top_k if name == "linear"]
    sorted_widths = [width for name, width in trace.calls if name == "topk"]
    if not linear_widths:
        raise ValueError("its router has no linear map before the top-k; not supported.")
    num_experts = sorted_widths[-1] if sorted_widths else linear_widths[-1]
    if num_experts > linear_widths[-1]:
        raise ValueError(
            f"its top-k sorts {num_experts} scores made of {linear_widths[-1]} logits"
            " (product keys): no logit belongs to one expert; not supported."
        )
    top_k = trace.top_k
    if top_k is None:
        top_k = getattr(router.module, "top_k", None)
        dense = trace.output[0] if isinstance(trace.output, tuple) else None
        if not (isinstance(top_k, int) and isinstance(dense, Tensor)) or (
            dense.shape[-1] != num_experts
        ):
            raise ValueError("its experts don't show which of them were selected; not supported.")
    return MoELayer(
        router.layer,
        router.name,
        router.module,
        router.experts if trace.top_k is not None else None,
        num_experts=num_experts,
        top_k=top_k,
        family=_family(trace.calls, num_experts),
        logits_width=linear_widths[-1],
        logits_call=len(linear_widths),
        guarded=bool(sorted_widths),
        device=trace.device,
    )


def _family(calls: list[tuple[str, int]], num_experts: int) -> str:
    """How the router scores and selects, in words: "sigmoid + selection bias, groups → top-k"."""
    names = [name for name, _ in calls]
    scorers = [name for name in names if name in SCORE_FUNCTIONS and name != "max"]
    scorer = scorers[0] if scorers else "logits"
    if "topk" not in names:
        return "sparsemixer" if "max" in names else "top-k outside the router"
    last = len(names) - 1 - names[::-1].index("topk")
    bias = " + selection bias" if ("bias", num_experts) in calls[:last] else ""
    groups = ", groups" if any(n == "topk" and w != num_experts for n, w in calls) else ""
    if scorer in names[:last]:
        return f"{scorer}{bias}{groups} → top-k"
    return f"top-k{bias}{groups} → {scorer}"
