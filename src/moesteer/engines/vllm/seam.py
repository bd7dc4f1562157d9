"""The seam of vLLM: the one place where a routed layer's logits are rewritten and its choice read.

    MoERunner._maybe_dispatch(hidden, logits)   `steer`: logits of this rank's tokens, before they
                                                travel to other ranks; every kernel comes after
    BaseRouter._compute_routing → weights, ids  `guard` where lifted logits alone don't decide, then
                                                `record`: logical ids, before any load balancing

Where Dynamo traces the block (on a CPU; on GPUs it lies inside vLLM's own opaque operators) both
become operators of ours, opaque too, so that one graph serves every batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesteer.engines.vllm.guarded_selection import Selection
from moesteer.engines.vllm.tables import Tables
from moesteer.model_facts import LayerShape
from moesteer.rules import rewritten_logits


class RoutedLayer:
    """One routed layer of this worker, `number` among them; reads and writes the shared tables."""

    def __init__(
        self, number: int, shape: LayerShape, tables: Tables, selection: Selection | None
    ) -> None:
        self.number = number
        self.shape = shape
        self.tables = tables
        self.selection = selection
        self.activated = tables.activated[number, :, : shape.experts]
        self.deactivated = tables.deactivated[number, :, : shape.experts]
        self.chosen = tables.chosen[number, :, : shape.top_k]
        self.weights = tables.weights[number, :, : shape.top_k]
        self.probability = tables.probability[:, number, : shape.experts]
        # Where tokens of other ranks came along: their masks, and which tokens are this rank's.
        self.gathered: tuple[Tensor, Tensor] | None = None
        self.own = slice(None)
        fused = tables.static and tables.tokens.device.type != "cpu"
        self.rewrite = fused_rewrite() if fused else rewrite
        # Takes the router's own logits, where directions of experts are weighted by them.
        self.weigh: Callable[[Tensor], None] | None = None
        self.key = len(_LAYERS)
        _LAYERS.append(self)

    def steer(self, logits: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """The logits that the router goes on with."""
        tables = self.tables
        width = self.shape.experts
        # Beyond the experts, some routers score shared ones.
        routed = logits if logits.shape[-1] == width else logits[:, :width]
        if tables.any_probability:
            counting = tables.counting_rows[: logits.shape[0]]
            self.probability.index_add_(0, counting, routed.float().softmax(-1))
        if self.weigh is not None:
            self.weigh(routed)
        lifts = tables.static or self.number in tables.lifted_layers
        lowers = tables.static or self.number in tables.lowered_layers
        if not (lifts or lowers):
            return logits
        rows = tables.steering_rows[: logits.shape[0]]
        steered = self.rewrite(
            routed,
            rows,
            self.activated if lifts else None,
            self.deactivated if lowers else None,
            tables.paper if tables.static or tables.any_paper else None,
            tables.dose if tables.static or tables.any_partial else None,
        )
        return steered if routed is logits else torch.cat((steered, logits[:, width:]), dim=-1)

    def masks(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Experts that the guard forces and forbids, [token, expert] each."""
        rows = self.tables.steering_rows[:tokens]
        promised = self.tables.promised[rows]
        return self.activated[rows] & promised, self.deactivated[rows] & promised

    def choose(
        self,
        weights: Float[Tensor, "token k"],
        ids: Int[Tensor, "token k"],
        logits: Float[Tensor, "token width"],
    ) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        """What the router chose, guarded, and recorded on the way."""
        tables = self.tables
        if self.selection is not None and (
            tables.static
            or self.number in tables.lifted_layers | tables.lowered_layers
            or self.gathered is not None
        ):
            forced, forbidden = self.gathered or self.masks(ids.shape[0])
            ours, index = self.selection.select(logits[:, : self.shape.experts], forced, forbidden)
            touched = (forced | forbidden).any(-1, keepdim=True)
            weights = torch.where(touched, ours.to(weights.dtype), weights)
            ids = torch.where(touched, index.to(ids.dtype), ids)
        self.record(weights, ids)
        return weights, ids

    def record(self, weights: Tensor, ids: Tensor) -> None:
        """Keep the choice of this rank's tokens until the step is counted."""
        if not self.tables.static and not self.tables.any_counted:
            return
        own = ids[self.own]
        self.chosen[: own.shape[0]].copy_(own)
        self.weights[: own.shape[0]].copy_(weights[self.own])


def rewrite(
    logits: Float[Tensor, "token expert"],
    rows: Int[Tensor, " token"],
    activated: Bool[Tensor, "row expert"] | None,
    deactivated: Bool[Tensor, "row expert"] | None,
    paper: Bool[Tensor, "row 1"] | None,
    dose: Float[Tensor, "row 1"] | None,
) -> Float[Tensor, "token expert"]:
    """`rewritten_logits` with each token's masks taken from its row; None names no expert."""
    return rewritten_logits(
        logits,
        None if activated is None else activated[rows],
        None if deactivated is None else deactivated[rows],
        paper=None if paper is None else paper[rows],
        dose=None if dose is None else dose[rows].to(logits.dtype),
    )


@functools.cache
def fused_rewrite() -> Any:
    """`rewrite` as one or two kernels, for graphs: there it always does everything, a kernel each.

    Compiled when vLLM warms the model up, before it captures, as vLLM's own `grouped_topk` is.
    Half precision is rounded after each operation, as without compiling.
    """
    return torch.compile(rewrite, dynamic=True, options={"emulate_precision_casts": True})


def steered_dispatch(original: Any, runner: Any, hidden: Tensor, logits: Tensor) -> Any:
    """`MoERunner._maybe_dispatch` with steered logits.

    Where it gathers tokens of several ranks, the guard's masks travel with the logits.
    """
    layer: RoutedLayer | None = runner.__dict__.get("moesteer_layer")
    if layer is None:
        return original(runner, hidden, logits)
    if torch.compiler.is_compiling():
        return original(runner, hidden, torch.ops.moesteer.steer(logits, layer.key))
    logits = layer.steer(logits)
    if not runner.do_naive_dispatch_combine:
        return original(runner, hidden, logits)
    forced, forbidden = layer.masks(logits.shape[0])
    marks = forced.to(logits.dtype) - forbidden.to(logits.dtype)
    hidden, both = original(runner, hidden, torch.cat((logits, marks), dim=-1))
    logits, marks = both.split((logits.shape[-1], marks.shape[-1]), dim=-1)
    layer.gathered = (marks > 0, marks < 0)
    layer.own = own_tokens(logits.shape[0], forced.shape[0])
    return hidden, logits.contiguous()


def own_tokens(gathered: int, own: int) -> slice:
    """Which of the gathered tokens are this rank's: they stand in the order of the ranks."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().dp_metadata
    if gathered == own or metadata is None:
        return slice(0, own)
    from vllm.distributed import get_dp_group

    counts = metadata.num_tokens_across_dp_cpu.tolist()
    start = sum(counts[: get_dp_group().rank_in_group])
    return slice(start, start + own)


def guarded_routing(original: Any, layer: RoutedLayer) -> Any:
    """A router's `_compute_routing` with its choice guarded and recorded."""

    def compute(hidden: Tensor, logits: Tensor, indices_type: Any, **options: Any) -> Any:
        weights, ids = original(hidden, logits, indices_type, **options)
        if torch.compiler.is_compiling():
            return torch.ops.moesteer.choose(weights, ids, logits, layer.key)
        return layer.choose(weights, ids, logits)

    return compute


# -- operators for graphs ------------------------------------------------------------------------

_LAYERS: list[RoutedLayer] = []


def known_layers() -> int:
    """How many layers this process has put under the seam."""
    return len(_LAYERS)


_LIBRARY = torch.library.Library("moesteer", "FRAGMENT")
_LIBRARY.define("steer(Tensor logits, int layer) -> Tensor")
_LIBRARY.define("choose(Tensor weights, Tensor ids, Tensor logits, int layer) -> (Tensor, Tensor)")


def _steer(logits: Tensor, layer: int) -> Tensor:
    steered = _LAYERS[layer].steer(logits)
    return steered.clone() if steered is logits else steered  # an operator returns no input


def _choose(weights: Tensor, ids: Tensor, logits: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    chosen, index = _LAYERS[layer].choose(weights, ids, logits)
    return (
        weights.clone() if chosen is weights else chosen,
        ids.clone() if index is ids else index,
    )


_LIBRARY.impl("steer", _steer, "CompositeExplicitAutograd")
_LIBRARY.impl("choose", _choose, "CompositeExplicitAutograd")
torch.library.register_fake("moesteer::steer", lambda logits, layer: torch.empty_like(logits))
torch.library.register_fake(
    "moesteer::choose",
    lambda weights, ids, logits, layer: (torch.empty_like(weights), torch.empty_like(ids)),
)
