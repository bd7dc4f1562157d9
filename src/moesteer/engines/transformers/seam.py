"""The seam: the one place where routing is read and rewritten.

Reading: a pre-hook on the experts sees which experts each token was sent to, after everything the
router did; that is the truth, whatever the family. Rewriting: in the router's own forward the one
tensor of logits is replaced by steered logits (`moesteer.rules`) and the one top-k guarded, so that
softmax, bias, groups and normalisation stay the model's. Most routers are a few operations, which
are written down once with the two calls put in (`straight.py`); the others run under a
torch-function mode.

Both count by slot: a batch row belongs to a slot (a profile when steering, an example when
detecting), and `SelectionCounts` holds how often each slot's tokens selected each expert.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moesteer.engines.evidence import is_guarded
from moesteer.engines.transformers.routers import (
    LINEAR_MAPS,
    TOP_K,
    MoELayer,
    dense_selection,
    replace_forward,
    selection,
    top_k_scores,
    wrap_forward,
)
from moesteer.engines.transformers.straight import StraightRouter
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.rules import guard_bounds, rewritten_logits

Undo = Callable[[], None]
Rewrite = Callable[[Tensor], Tensor]
TopK = Callable[[Callable, tuple, dict], Any]


class Rows:
    """Which slot each row of the running batch belongs to; None: all to slot 0.

    And which of its tokens are a prompt's: those before `prompts` of their row, or, where that is
    None, those of the first forward pass, before anything is cached.
    """

    def __init__(self, prompts: Sequence[int] | None = None) -> None:
        self.slots: Int[Tensor, " row"] | None = None
        self.prompts = None if prompts is None else torch.tensor(prompts)
        self._start = self._columns = 0

    def watch(self, decoder: nn.Module) -> Undo:
        """Refuse each batch that has another number of rows, or a multiple of it (beams)."""

        def check(_module: object, args: tuple, kwargs: dict) -> None:
            inputs = args[0] if args else kwargs.get("input_ids")
            if inputs is None:
                inputs = kwargs.get("inputs_embeds")
            if inputs is None:
                return
            self._start, self._columns = _cached(kwargs), inputs.shape[1]
            if self.slots is None:
                return
            if not len(self.slots) or inputs.shape[0] % len(self.slots):
                raise MoesteerError(
                    f"{len(self.slots)} rows have a profile each, but the batch has"
                    f" {inputs.shape[0]}: give one profile for each row of the batch that runs."
                )

        return decoder.register_forward_pre_hook(check, with_kwargs=True).remove

    def of_tokens(self, tokens: int, device: torch.device) -> Int[Tensor, " token"] | None:
        """The slot of each of the batch's tokens (rows × positions, row by row).

        Raises MoesteerError where the tokens can't be told apart by row.
        """
        if self.slots is None:
            return None
        rows = self.slots.shape[0]
        if tokens % rows:
            raise MoesteerError(
                f"{rows} rows have a profile each, but the batch has {tokens} tokens, which is not"
                " a multiple: give one profile for each row of the batch that runs."
            )
        return self.slots.to(device).repeat_interleave(tokens // rows)

    def generated(self, tokens: int, device: torch.device) -> Bool[Tensor, " token"]:
        """Which of the batch's tokens (rows × positions, row by row) stand after their prompt."""
        if self.prompts is None:
            return torch.full((tokens,), self._start > 0, device=device)
        places = self._start + torch.arange(self._columns)
        return (places >= self.prompts[:, None]).flatten().to(device)


def _cached(kwargs: dict) -> int:
    """How many positions a forward pass takes from its cache."""
    length = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
    return 0 if length is None else int(length())


def observe(layer: MoELayer, see: Callable[[Tensor, Tensor], None]) -> Undo:
    """Call `see(index, weights)`, both [token, k], for each batch that the layer routes."""
    if layer.experts is None:  # a router whose dense scores say who was selected

        def see_router(_module: object, _args: object, output: object) -> None:
            see(*dense_selection(output, layer.top_k))

        return layer.module.register_forward_hook(see_router).remove

    def see_experts(_module: object, args: tuple, kwargs: dict) -> None:
        chosen = selection(args, kwargs)
        assert chosen is not None, f"layer {layer.layer}: the experts were called without an index"
        see(*chosen)

    return layer.experts.register_forward_pre_hook(see_experts, with_kwargs=True).remove


def observe_logits(layer: MoELayer, see: Callable[[Tensor], None]) -> Undo:
    """Call `see(logits)`, [token, expert], for each batch that the layer's router scores.

    They are the router's own, before any steering.
    """

    def seen(logits: Tensor) -> Tensor:
        see(logits.reshape(-1, logits.shape[-1])[:, : layer.num_experts])  # beyond: shared experts
        return logits

    return intercept(layer, seen, lambda func, args, kwargs: func(*args, **kwargs))


class SelectionCounts:
    """How often tokens of each slot selected each expert of one layer, kept on its device.

    An expert that is in the top-k with weight 0 contributes nothing and does not count.
    """

    def __init__(self, layer: MoELayer, slots: int) -> None:
        self.num_experts = layer.num_experts
        self.selected = torch.zeros(
            slots * layer.num_experts, dtype=torch.int64, device=layer.device
        )
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=layer.device)
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(
        self,
        index: Int[Tensor, "token k"],
        weights: Tensor,
        slots: Int[Tensor, " token"] | None,
    ) -> None:
        """Count one batch; without `slots` all tokens belong to slot 0."""
        chosen = (weights != 0).to(torch.int64)
        if slots is None:
            self.selected.put_(index, chosen, accumulate=True)
            self.tokens += index.shape[0]
        else:
            cell = index + (slots * self.num_experts).unsqueeze(-1)
            self.selected.put_(cell, chosen, accumulate=True)
            self.tokens.scatter_add_(0, slots, torch.ones_like(slots))

    def add_later(
        self,
        index: Int[Tensor, "token k"],
        weights: Tensor,
        slots: Int[Tensor, " token"] | None,
    ) -> None:
        """Count a batch; small ones (decoding) are kept, and counted 64 at a time by `settle`."""
        if torch.compiler.is_compiling() or slots is not None or index.shape[0] > 64:
            self.add(index, weights, slots)
            return
        self.waiting.append((index.clone(), weights.detach().clone()))
        if len(self.waiting) == 64:
            self.settle()

    def settle(self) -> None:
        """Count what is waiting; done before anything is read."""
        if self.waiting:
            index, weights = zip(*self.waiting, strict=True)
            self.waiting.clear()
            self.add(torch.cat(index), torch.cat(weights), None)

    def zero(self) -> None:
        self.waiting.clear()
        self.selected.zero_()
        self.tokens.zero_()

    def table(self) -> Int[Tensor, "slot expert"]:
        self.settle()
        return self.selected.view(-1, self.num_experts)


class ProbabilitySums:
    """How probable each expert of one layer was to tokens of each slot, summed over them.

    A softmax of the router's logits over all experts, in fp32, whatever the router makes of them.
    """

    def __init__(self, layer: MoELayer, slots: int) -> None:
        self.sums = torch.zeros(slots, layer.num_experts, device=layer.device)

    def add(self, logits: Float[Tensor, "token expert"], slots: Int[Tensor, " token"]) -> None:
        self.sums.index_add_(0, slots, logits.float().softmax(-1))

    def table(self) -> Float[Tensor, "slot expert"]:
        return self.sums


class SteeredLayer:
    """One layer under profiles: a table row a slot, and the evidence of what the tables did.

    The tables are written in place, so that a compiled graph that reads them stays valid.
    """

    def __init__(self, layer: MoELayer, slots: int) -> None:
        def table(width: int) -> Tensor:
            return torch.zeros(slots, width, dtype=torch.bool, device=layer.device)

        self.layer = layer
        self.activated: Bool[Tensor, "slot expert"] = table(layer.num_experts)
        self.deactivated: Bool[Tensor, "slot expert"] = table(layer.num_experts)
        self.floor, self.ceiling = guard_bounds(self.activated, self.deactivated)
        self.paper: Bool[Tensor, "slot 1"] = table(1)
        self.dose: Float[Tensor, "slot 1"] = torch.ones(slots, 1, device=layer.device)
        self.evidence = SelectionCounts(layer, slots)
        self.any_activated = self.any_deactivated = False
        self.any_paper = self.any_partial = self.any_guarded = False

    def write(self, profiles: list[Profile]) -> None:
        """Fill the tables, one profile a slot, and start the evidence anew."""
        for slot, profile in enumerate(profiles):
            activated, deactivated = profile.experts_of(self.layer.layer)
            up, down = _mask(activated, self.activated), _mask(deactivated, self.deactivated)
            self.activated[slot].copy_(up)
            self.deactivated[slot].copy_(down)
            promised = is_guarded(profile)
            floor, ceiling = guard_bounds(up & promised, down & promised)
            self.floor[slot].copy_(floor)
            self.ceiling[slot].copy_(ceiling)
            self.paper[slot] = profile.rule == "paper"
            self.dose[slot] = profile.dose
        layer = self.layer.layer
        self.any_activated = any(profile.experts_of(layer)[0] for profile in profiles)
        self.any_deactivated = any(profile.experts_of(layer)[1] for profile in profiles)
        self.any_paper = any(profile.rule == "paper" for profile in profiles)
        self.any_partial = any(profile.dose != 1 for profile in profiles)
        self.any_guarded = self.layer.guarded and any(map(is_guarded, profiles))
        self.evidence.zero()

    def rewrite(self, logits: Tensor, rows: Rows) -> Tensor:
        """Steered router logits of one batch, shape as given."""
        flat, slots = _by_token(logits, rows)
        width = self.layer.num_experts
        routed = flat if flat.shape[-1] == width else flat[..., :width]  # beyond: shared experts
        both = torch.compiler.is_compiling()  # so that other profiles need no new graph
        steered = rewritten_logits(
            routed,
            _of(self.activated, slots) if both or self.any_activated else None,
            _of(self.deactivated, slots) if both or self.any_deactivated else None,
            paper=_of(self.paper, slots) if self.any_paper else None,
            dose=_of(self.dose, slots).to(flat.dtype) if self.any_partial else None,
        )
        if routed is not flat:
            steered = torch.cat((steered, flat[..., width:]), dim=-1)
        return steered if slots is None else steered.view_as(logits)

    def guard(self, scores: Tensor, rows: Rows) -> Tensor:
        """What the top-k should sort instead of `scores`, shape as given."""
        flat, slots = _by_token(scores, rows)
        guarded = flat.clamp(_of(self.floor, slots), _of(self.ceiling, slots))
        return guarded if slots is None else guarded.view_as(scores)

    def top_k(self, func: Callable, args: tuple, kwargs: dict, rows: Rows) -> Any:
        """The router's top-k: guarded where it chooses experts, with the real scores as values."""
        scores = top_k_scores(args, kwargs)
        if not self.any_guarded or scores.shape[-1] != self.layer.num_experts:
            return func(*args, **kwargs)
        options = {key: value for key, value in kwargs.items() if key != "input"}
        index = func(self.guard(scores, rows), *args[1:], **options)[1]
        return torch.return_types.topk((scores.gather(-1, index), index))

    def attach(self, rows: Rows) -> Undo:
        """Put the layer under its tables; the undo restores it exactly."""

        def see(index: Tensor, weights: Tensor) -> None:
            self.evidence.add_later(index, weights, rows.of_tokens(index.shape[0], index.device))

        undo_forward = intercept(
            self.layer,
            lambda logits: self.rewrite(logits, rows),
            lambda func, args, kwargs: self.top_k(func, args, kwargs, rows),
        )
        undo_observer = observe(self.layer, see)

        def undo() -> None:
            undo_observer()
            undo_forward()

        return undo


def intercept(layer: MoELayer, rewrite: Rewrite, top_k: TopK) -> Undo:
    """Put `rewrite` after the router's logits and `top_k` in place of its top-k."""
    straight = _straight(layer)
    if straight is None or "forward" in layer.module.__dict__:
        return wrap_forward(layer.module, lambda: _Rewriting(layer, rewrite, top_k))
    straight.rewrite, straight.top_k = rewrite, top_k
    return replace_forward(layer.module, straight.forward)


class _Rewriting(TorchFunctionMode):
    """Replaces the router's logits, and what its last top-k sorts, during one forward."""

    def __init__(self, layer: MoELayer, rewrite: Rewrite, top_k: TopK) -> None:
        self.layer = layer
        self.rewrite = rewrite
        self.top_k = top_k
        self.linear_calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in LINEAR_MAPS:
            self.linear_calls += 1
            logits = func(*args, **kwargs)
            if self.linear_calls == self.layer.logits_call:
                return self.rewrite(logits)
            return logits
        if func in TOP_K:
            return self.top_k(func, args, kwargs)
        return func(*args, **kwargs)


_STRAIGHT: WeakKeyDictionary[MoELayer, StraightRouter | None] = WeakKeyDictionary()


def _straight(layer: MoELayer) -> StraightRouter | None:
    """The layer's router as straight-line code, written anew where it has changed since.

    None where that can't be.
    """
    known = _STRAIGHT.get(layer)
    if layer not in _STRAIGHT or (known is not None and not known.is_current):
        try:
            _STRAIGHT[layer] = StraightRouter(layer, layer.logits_call)
        except ValueError:
            _STRAIGHT[layer] = None
    return _STRAIGHT[layer]


def _mask(experts: list[int], table: Tensor) -> Bool[Tensor, " expert"]:
    row = torch.zeros(table.shape[1], dtype=torch.bool)
    row[experts] = True
    return row


def _of(table: Tensor, slots: Tensor | None) -> Tensor:
    """The table's row of each token; the one row there is, to be broadcast, without slots."""
    return table if slots is None else table[slots]


def _by_token(values: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Values [token, expert] and each token's slot; as they are where one slot is for all."""
    if rows.slots is None:
        return values, None
    flat = values.reshape(-1, values.shape[-1])
    return flat, rows.of_tokens(flat.shape[0], flat.device)
