"""The seam: the one place where routing is read and rewritten.

Reading: a pre-hook on the experts sees which experts each token was sent to, after everything the
router did; that is the truth, whatever the family. Rewriting: the router's own forward runs under a
torch-function mode that replaces the one logits tensor by steered logits (`moesteer.rules`) and
guards the one top-k, so that the model's softmax, bias, groups and normalisation stay the model's.

Both count by slot: a batch row belongs to a slot (a profile when steering, an example when
detecting), and `SelectionCounts` holds how often each slot's tokens selected each expert.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moesteer.engines.routers import (
    LINEAR_MAPS,
    TOP_K,
    MoELayer,
    dense_selection,
    selection,
    top_k_scores,
    wrap_forward,
)
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.rules import guarded_scores, rewritten_logits

Undo = Callable[[], None]


class Rows:
    """Which slot each row of the running batch belongs to; None: all to slot 0."""

    def __init__(self) -> None:
        self.slots: Int[Tensor, " row"] | None = None

    def watch(self, decoder: nn.Module) -> Undo:
        """Refuse each batch that has another number of rows, or a multiple of it (beams)."""

        def check(_module: object, args: tuple, kwargs: dict) -> None:
            inputs = args[0] if args else kwargs.get("input_ids")
            if inputs is None:
                inputs = kwargs.get("inputs_embeds")
            if self.slots is None or inputs is None:
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

    def add(
        self,
        index: Int[Tensor, "token k"],
        weights: Tensor,
        slots: Int[Tensor, " token"] | None,
    ) -> None:
        """Count one batch; without `slots` all tokens belong to slot 0."""
        chosen = (weights != 0).to(torch.int64)
        if slots is None:
            self.selected.scatter_add_(0, index.reshape(-1), chosen.reshape(-1))
            self.tokens += index.shape[0]
        else:
            cell = index + (slots * self.num_experts).unsqueeze(-1)
            self.selected.scatter_add_(0, cell.reshape(-1), chosen.reshape(-1))
            self.tokens.scatter_add_(0, slots, torch.ones_like(slots))

    def zero(self) -> None:
        self.selected.zero_()
        self.tokens.zero_()

    def table(self) -> Int[Tensor, "slot expert"]:
        return self.selected.view(-1, self.num_experts)


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
        self.forced: Bool[Tensor, "slot expert"] = table(layer.num_experts)
        self.forbidden: Bool[Tensor, "slot expert"] = table(layer.num_experts)
        self.paper: Bool[Tensor, "slot 1"] = table(1)
        self.dose: Float[Tensor, "slot 1"] = torch.ones(slots, 1, device=layer.device)
        self.evidence = SelectionCounts(layer, slots)
        self.any_paper = self.any_partial = self.any_guarded = False

    def write(self, profiles: list[Profile]) -> None:
        """Fill the tables, one profile a slot, and start the evidence anew."""
        for slot, profile in enumerate(profiles):
            activated, deactivated = profile.experts_of(self.layer.layer)
            for table, experts, applies in (
                (self.activated, activated, True),
                (self.deactivated, deactivated, True),
                (self.forced, activated, is_guarded(profile)),
                (self.forbidden, deactivated, is_guarded(profile)),
            ):
                row = torch.zeros(table.shape[1], dtype=torch.bool)
                row[experts] = applies
                table[slot].copy_(row)
            self.paper[slot] = profile.rule == "paper"
            self.dose[slot] = profile.dose
        self.any_paper = any(profile.rule == "paper" for profile in profiles)
        self.any_partial = any(profile.dose != 1 for profile in profiles)
        self.any_guarded = self.layer.guarded and any(map(is_guarded, profiles))
        self.evidence.zero()

    def rewrite(self, logits: Tensor, rows: Rows) -> Tensor:
        """Steered router logits of one batch, shape as given."""
        flat = logits.reshape(-1, logits.shape[-1])
        slots = rows.of_tokens(flat.shape[0], flat.device)
        routed = flat[:, : self.layer.num_experts]  # columns beyond belong to shared experts
        steered = rewritten_logits(
            routed,
            _of(self.activated, slots),
            _of(self.deactivated, slots),
            paper=_of(self.paper, slots) if self.any_paper else None,
            dose=_of(self.dose, slots).to(flat.dtype) if self.any_partial else None,
        )
        if routed.shape != flat.shape:
            steered = torch.cat((steered, flat[:, self.layer.num_experts :]), dim=-1)
        return steered.view_as(logits)

    def guard(self, scores: Tensor, rows: Rows) -> Tensor:
        """What the top-k should sort instead of `scores`, shape as given."""
        flat = scores.reshape(-1, scores.shape[-1])
        slots = rows.of_tokens(flat.shape[0], flat.device)
        guarded = guarded_scores(flat, _of(self.forced, slots), _of(self.forbidden, slots))
        return guarded.view_as(scores)

    def attach(self, rows: Rows) -> Undo:
        """Put the layer under its tables; the undo restores it exactly."""

        def see(index: Tensor, weights: Tensor) -> None:
            self.evidence.add(index, weights, rows.of_tokens(index.shape[0], index.device))

        undo_forward = wrap_forward(self.layer.module, lambda: _Rewriting(self, rows))
        undo_observer = observe(self.layer, see)

        def undo() -> None:
            undo_observer()
            undo_forward()

        return undo


class _Rewriting(TorchFunctionMode):
    """Replaces the router's logits, and what its last top-k sorts, during one forward."""

    def __init__(self, steered: SteeredLayer, rows: Rows) -> None:
        self.steered = steered
        self.rows = rows
        self.linear_calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in LINEAR_MAPS:
            self.linear_calls += 1
            logits = func(*args, **kwargs)
            if self.linear_calls == self.steered.layer.logits_call:
                return self.steered.rewrite(logits, self.rows)
            return logits
        if func in TOP_K and self.steered.any_guarded:
            scores = top_k_scores(args, kwargs)
            if scores.shape[-1] == self.steered.layer.num_experts:
                options = {key: value for key, value in kwargs.items() if key != "input"}
                _, index = func(self.steered.guard(scores, self.rows), *args[1:], **options)
                return torch.return_types.topk((scores.gather(-1, index), index))
        return func(*args, **kwargs)


def is_guarded(profile: Profile) -> bool:
    """Whether a profile promises the selection itself: the exact rule at full dose."""
    return profile.rule == "exact" and profile.dose == 1


def _of(table: Tensor, slots: Tensor | None) -> Tensor:
    """The table's row of each token; the one row there is, to be broadcast, without slots."""
    return table if slots is None else table[slots]
