"""Directions put into a running model: added to, or projected out of, what passes a site.

A hook on the module of a site changes what passes; a second hook behind it sees what goes on from
there, and notes how far that moved along each direction, or what is left of it. As in the seam,
each row of a batch belongs to a slot (a profile), and tables hold what each slot does.

    h ← h − r̂ (r̂ᵀh) + Σ c·v          an expert's additions are weighted by p_e(t)

The line is projected out of the stream first; what is added along it afterwards stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moesteer.direction import Direction, Site, Window
from moesteer.engines.evidence import LEFT_OVER, DirectionEvidence, left_over, rounding_share
from moesteer.engines.transformers.routers import MoELayer, selection
from moesteer.engines.transformers.seam import Rows, Undo, observe_logits
from moesteer.engines.transformers.stream import Stream
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

WINDOWS: dict[Window, int] = {"prompt": 1, "generation": 2, "all": 3}
"""As bits: the prompt's tokens, and the generated ones."""

SETTLED_AT = 64
"""Tokens that are looked at together."""


@dataclass(eq=False)
class Use:
    """One direction a slot, at one site; slots without one have a vector of zeros.

    What came of it is kept on the device: how many tokens of the window `passed`; sums over them of
    how far they moved along the direction, should have, and what rounding may swallow of that; or
    the largest share of a token's norm that is `left` along it, of which rounding may leave what is
    `allowed`.
    """

    directions: list[Direction | None]
    vector: Float[Tensor, "slot hidden"]
    unit: Float[Tensor, "slot hidden"]
    window: Int[Tensor, " slot"]
    passed: Int[Tensor, " slot"] = field(init=False)
    moved: Float[Tensor, "slot 3"] = field(init=False)
    left: Float[Tensor, " slot"] = field(init=False)
    allowed: float = field(init=False, default=LEFT_OVER)

    def __post_init__(self) -> None:
        self.always = all(d is not None and d.window == "all" for d in self.directions)
        self.experts = torch.tensor(
            [-1 if d is None or d.expert is None else d.expert for d in self.directions],
            device=self.vector.device,
        )
        self.weighted = bool((self.experts >= 0).any())
        self.zero()

    def to(self, device: torch.device) -> None:
        """Where the site's tensors are, which offloaded modules don't say beforehand."""
        if self.vector.device != device:
            for name in ("vector", "unit", "window", "experts", "passed", "moved", "left"):
                setattr(self, name, getattr(self, name).to(device))

    def zero(self) -> None:
        slots, device = len(self.directions), self.vector.device
        self.passed = torch.zeros(slots, dtype=torch.int64, device=device)
        self.moved = torch.zeros(slots, 3, device=device)
        self.left = torch.zeros(slots, device=device)


Tables = dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]]
"""Vector, unit vector and window of each slot, by its direction's identity: a line that is to leave
every write is written down once for all sites."""


def use_of(
    directions: Sequence[Direction | None], known: Tables, device: torch.device, hidden: int
) -> Use:
    key = tuple(map(id, directions))
    if key not in known:
        known[key] = _tables(directions, hidden)
    return Use(list(directions), *(table.to(device) for table in known[key]))


def _tables(directions: Sequence[Direction | None], hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """An addition's vector is multiplied by its coefficient."""
    vector = torch.zeros(len(directions), hidden, dtype=torch.float64)
    window = torch.zeros(len(directions), dtype=torch.int64)
    for slot, direction in enumerate(directions):
        if direction is not None:
            vector[slot] = torch.tensor(direction.vector, dtype=torch.float64)
            vector[slot] *= direction.coefficient
            window[slot] = WINDOWS[direction.window]
    length = vector.norm(dim=-1, keepdim=True)
    unit = torch.where(length > 0, vector / length.clamp(min=1e-300), 0.0)
    return vector.float(), unit.float(), window


class DirectedSite:
    """One site under profiles: at most one projection a slot, and any number of additions."""

    def __init__(
        self,
        site: Site,
        modules: Sequence[nn.Module],
        layer: MoELayer | None,
        profiles: Sequence[Profile],
        known: Tables,
        hidden: int,
    ) -> None:
        self.site = site
        self.modules = modules
        self.layer = layer
        here = [[d for d in p.directions if site in d.sites] for p in profiles]
        device = _device(modules[0])

        def uses(operation: str, own: bool) -> list[Use]:
            """The directions of each slot, the first of each together, the second, and so on."""
            chosen = [
                [d for d in of if d.operation == operation and (d.expert is not None) == own]
                for of in here
            ]
            return [
                use_of([of[n] if n < len(of) else None for of in chosen], known, device, hidden)
                for n in range(max(map(len, chosen)))
            ]

        self.ablated = uses("ablate", own=False)
        self.added = uses("add", own=False) + uses("add", own=True)
        self.of_experts = uses("ablate", own=True)
        # Decoding under an ablation passes three sites a layer, so its common case is kept short.
        self.line_alone = len(self.ablated) == 1 and not self.added and self.ablated[0].always
        self.waiting: list[Tensor] = []
        self.probabilities: Float[Tensor, "token expert"] | None = None
        self.before: Tensor | None = None
        self.wanted: Tensor | None = None

    def attach(self, rows: Rows) -> Undo:
        """Put the site under its tables; the undo restores it exactly."""
        undo: list[Undo] = []
        if any(use.weighted for use in self.added):
            assert self.layer is not None

            def score(logits: Float[Tensor, "token expert"]) -> None:
                self.probabilities = logits.float().softmax(-1)

            undo.append(observe_logits(self.layer, score))
        if self.of_experts:
            assert self.layer is not None
            undo.append(self._attach_to_experts(self.layer, rows))
        if self.ablated or self.added:
            place = self.site[1]
            for number, module in enumerate(self.modules):
                # Where several modules write at a place, the line leaves all; one adds.
                adds = number == 0
                if place == "input":
                    undo += _on_input(module, rows, self._change, self._see, adds)
                else:
                    undo += _on_output(module, rows, self._change, self._see, adds)

        def restore() -> None:
            for one in reversed(undo):
                one()

        return restore

    def _change(self, hidden: Tensor, rows: Rows, adds: bool) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        slots = rows.of_tokens(len(flat), flat.device)
        for use in (*self.ablated, *self.added):
            use.to(flat.device)
        x = flat.float()
        if self.line_alone and slots is None:
            unit = self.ablated[0].unit[0]
            self.before = x.detach()
            return torch.addr(x, x @ unit, unit, alpha=-1).to(hidden.dtype).view_as(hidden)
        change = None
        for use in self.ablated:
            unit = _of(use.unit, slots)
            along = (x * unit).sum(-1, keepdim=True)
            change = _plus(change, _within(-along * unit, use, rows, slots, len(flat)))
        for use in self.added if adds else ():
            moved = _of(use.vector, slots)
            if use.weighted:
                assert self.probabilities is not None
                moved = moved * self._weight(use, slots)
            change = _plus(change, _within(moved, use, rows, slots, len(flat)))
        if change is None:
            return hidden
        self.before, self.wanted = x.detach(), change.detach()
        return (x + change).to(hidden.dtype).view_as(hidden)

    def _weight(self, use: Use, slots: Tensor | None) -> Float[Tensor, "token 1"]:
        """The router's probability of each token's expert; 1 of a direction that has none."""
        assert self.probabilities is not None
        experts = _of(use.experts, slots).expand(len(self.probabilities))
        chosen = self.probabilities.gather(-1, experts.clamp(min=0).unsqueeze(-1))
        return torch.where(experts.unsqueeze(-1) >= 0, chosen, 1.0)

    def _see(self, hidden: Tensor, rows: Rows, adds: bool) -> None:
        """What goes on from the site, against what came to it."""
        if self.before is None:
            return
        y = hidden.detach().reshape(-1, hidden.shape[-1]).float()
        slots = rows.of_tokens(len(y), y.device)
        if self.wanted is None:
            self.ablated[0].allowed = left_over(torch.finfo(hidden.dtype).eps)
            self._see_later(y)
            return
        if self.added and adds:
            share = rounding_share(torch.finfo(hidden.dtype).eps, y.shape[-1])
            lost = share * y.norm(dim=-1)
            moved = y - self.before
            for use in self.added:
                unit = _of(use.unit, slots)
                along, wanted = (moved * unit).sum(-1), (self.wanted * unit).sum(-1)
                _note(use, rows, slots, torch.stack((along, wanted.expand_as(along), lost), -1))
        for use in self.ablated:
            unit = _of(use.unit, slots)
            # What was added along the line afterwards is meant to be there.
            added = self.wanted + (self.before * unit).sum(-1, keepdim=True) * unit
            left = ((y - added) * unit).sum(-1).abs() / _length(y)
            use.allowed = left_over(torch.finfo(hidden.dtype).eps)
            _note_largest(use, rows, slots, left)
        self.before = self.wanted = None

    def _see_later(self, passed: Float[Tensor, "token hidden"]) -> None:
        """What is left of a line; of few tokens (decoding) it is seen when there are more."""
        self.before = None
        self.waiting.append(passed.clone())
        waiting = sum(map(len, self.waiting))
        if waiting >= SETTLED_AT or torch.compiler.is_compiling():
            self._settle()

    def _settle(self) -> None:
        if self.waiting:
            passed, use = torch.cat(self.waiting), self.ablated[0]
            self.waiting.clear()
            left = (passed @ use.unit[0]).abs() / _length(passed)
            _note_largest(use, None, None, left)

    def _attach_to_experts(self, layer: MoELayer, rows: Rows) -> Undo:
        experts = layer.experts
        if experts is None:
            raise MoesteerError(
                f"the experts of layer {layer.layer} are computed together, so that one expert's"
                " own output can't be changed; ablate at the mlp of the layer."
            )

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            chosen = selection(args, kwargs)
            assert chosen is not None
            hidden = first_argument(args, kwargs)
            x = output.reshape(-1, output.shape[-1]).float()
            change = torch.zeros_like(x)
            for use in self.of_experts:
                token, along = self._along_own(module, hidden, *chosen, use, rows)
                change.index_add_(0, token, -along)
            self.before, self.wanted = x.detach(), change.detach()
            return (x + change).to(output.dtype).view_as(output)

        def watch(_module: object, _args: object, output: Tensor) -> None:
            if self.before is None or self.wanted is None:
                return
            y = output.detach().reshape(-1, output.shape[-1]).float()
            slots = rows.of_tokens(len(y), y.device)
            off = y - self.before - self.wanted
            for use in self.of_experts:
                left = (off * _of(use.unit, slots)).sum(-1).abs() / _length(y)
                use.allowed = left_over(torch.finfo(output.dtype).eps)
                _note_largest(use, rows, slots, left)
            self.before = self.wanted = None

        undo = [
            experts.register_forward_hook(leave, with_kwargs=True).remove,
            experts.register_forward_hook(watch).remove,
        ]

        def restore() -> None:
            for one in undo:
                one()

        return restore

    def _along_own(
        self,
        experts: nn.Module,
        hidden: Tensor,
        index: Int[Tensor, "token k"],
        weights: Tensor,
        use: Use,
        rows: Rows,
    ) -> tuple[Int[Tensor, " hit"], Float[Tensor, "hit hidden"]]:
        """The tokens of the window that select the slot's expert, and what its weighted output has
        along the direction in each."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        use.to(flat.device)
        slots = rows.of_tokens(len(flat), flat.device)
        wanted = _of(use.experts, slots).expand(len(flat))
        hit = (index == wanted.unsqueeze(-1)) & _in_window(use, rows, slots, len(flat))
        token, place = hit.nonzero(as_tuple=True)
        unit = _of(use.unit, slots).expand(len(flat), -1)[token]
        if not len(token):
            return token, unit
        # Not the module itself, whose hooks see what the model routes.
        own = experts.forward(flat[token], index[token, place, None], weights[token, place, None])
        own = own.reshape(-1, own.shape[-1]).float()
        return token, (own * unit).sum(-1, keepdim=True) * unit

    def evidence(self, profiles: Sequence[Profile]) -> list[tuple[Profile, DirectionEvidence]]:
        """What each slot's directions did here since they were put in place."""
        self._settle()
        found = []
        for use in (*self.ablated, *self.added, *self.of_experts):
            for slot, direction in enumerate(use.directions):
                if direction is None:
                    continue
                tokens = int(use.passed[slot])
                mean = (use.moved[slot] / max(tokens, 1)).tolist()
                ablates = direction.operation == "ablate"
                seen = DirectionEvidence(
                    profiles[slot].name,
                    *self.site,
                    direction.expert,
                    direction.operation,
                    tokens,
                    *((float(use.left[slot]), 0.0, 0.0) if ablates else mean),
                    number=_number(profiles[slot], direction),
                    allowed=use.allowed,
                )
                found.append((profiles[slot], seen))
        return found


def directed_sites(
    stream: Stream, layers: Sequence[MoELayer], profiles: Sequence[Profile]
) -> list[DirectedSite]:
    """The sites that the profiles use; MoesteerError where the model has no such site."""
    routed = {layer.layer: layer for layer in layers}
    wanted = dict.fromkeys(s for p in profiles for d in p.directions for s in d.sites)
    for profile in profiles:
        for direction in profile.directions:
            if len(direction.vector) != stream.hidden:
                raise MoesteerError(
                    f"{profile.name}: a direction has {len(direction.vector)} numbers; the model's"
                    f" hidden states have {stream.hidden}."
                )
            if direction.expert is not None and direction.sites[0][0] not in routed:
                raise MoesteerError(
                    f"{profile.name}: layer {direction.sites[0][0]} has no experts, but a direction"
                    f" names expert {direction.expert} of it."
                )
    sites, known = [], Tables()
    for site in sorted(wanted):
        layer, place = site
        if not 0 <= layer < len(stream.decoder):
            raise MoesteerError(
                f"there is no layer {layer}: the model has layers 0–{len(stream.decoder) - 1}."
            )
        modules = (stream.decoder[layer],) if place == "input" else stream.writes.get(site, ())
        if not modules and any(
            _needs(direction, site) for p in profiles for direction in p.directions
        ):
            raise MoesteerError(f"layer {layer} of this model has no {place}.")
        if not modules:
            continue
        layer_of = routed.get(layer)
        sites.append(DirectedSite(site, modules, layer_of, profiles, known, stream.hidden))
    return sites


def _needs(direction: Direction, site: Site) -> bool:
    """Whether the site must be there. A line that is to leave every write leaves those there are:
    layers of hybrid models are attention or a feed-forward part alone."""
    return site in direction.sites and (direction.operation == "add" or len(direction.sites) == 1)


def _number(profile: Profile, direction: Direction) -> int:
    return next(n for n, own in enumerate(profile.directions) if own is direction)


def first_argument(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states among a module's arguments."""
    return args[0] if args else kwargs["hidden_states"]


# -- hooks ---------------------------------------------------------------------------------------

Change = Callable[[Tensor, Rows, bool], Tensor]
See = Callable[[Tensor, Rows, bool], None]


def _on_input(module: nn.Module, rows: Rows, change: Change, see: See, adds: bool) -> list[Undo]:
    def enter(_module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0], rows, adds), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"], rows, adds)}

    def watch(_module: object, args: tuple, kwargs: dict) -> None:
        see(first_argument(args, kwargs), rows, adds)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True).remove,
        module.register_forward_pre_hook(watch, with_kwargs=True).remove,
    ]


def _on_output(module: nn.Module, rows: Rows, change: Change, see: See, adds: bool) -> list[Undo]:
    def leave(_module: object, _args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0], rows, adds), *output[1:])
        return change(output, rows, adds)

    def watch(_module: object, _args: object, output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output, rows, adds)

    return [
        module.register_forward_hook(leave).remove,
        module.register_forward_hook(watch).remove,
    ]


# -- by token ------------------------------------------------------------------------------------


def _of(table: Tensor, slots: Tensor | None) -> Tensor:
    """The table's row of each token; the one row there is, to be broadcast, without slots."""
    return table[:1] if slots is None else table[slots]


def _length(hidden: Float[Tensor, "token hidden"]) -> Float[Tensor, " token"]:
    return hidden.norm(dim=-1).clamp(min=1e-30)


def _plus(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one + other


def _in_window(use: Use, rows: Rows, slots: Tensor | None, tokens: int) -> Bool[Tensor, "token 1"]:
    """Which tokens lie in their slot's window."""
    window = _of(use.window, slots).expand(tokens)
    generated = rows.generated(tokens, use.window.device)
    return ((window >> generated.to(window.dtype)) & 1).bool().unsqueeze(-1)


def _within(
    change: Tensor, use: Use, rows: Rows, slots: Tensor | None, tokens: int
) -> Float[Tensor, "token hidden"]:
    if use.always:
        return change
    return torch.where(_in_window(use, rows, slots, tokens), change, 0.0)


def _counts(use: Use, rows: Rows | None, slots: Tensor | None, tokens: int) -> Tensor | None:
    """1 for tokens in the window; None: all are, which needs no rows."""
    if use.always or rows is None:
        return None
    return _in_window(use, rows, slots, tokens).squeeze(-1)


def _note(use: Use, rows: Rows, slots: Tensor | None, moved: Float[Tensor, "token 3"]) -> None:
    counts = _counts(use, rows, slots, len(moved))
    if counts is not None:
        moved = moved * counts.unsqueeze(-1)
    if slots is None:
        use.passed += len(moved) if counts is None else counts.sum()
        use.moved += moved.sum(0)
        return
    ones = torch.ones_like(slots) if counts is None else counts.to(slots.dtype)
    use.passed.index_add_(0, slots, ones)
    use.moved.index_add_(0, slots, moved)


def _note_largest(use: Use, rows: Rows | None, slots: Tensor | None, left: Tensor) -> None:
    counts = _counts(use, rows, slots, len(left))
    if counts is not None:
        left = left * counts
    if slots is None:
        use.passed += len(left) if counts is None else counts.sum()
        torch.maximum(use.left, left.max(), out=use.left)
        return
    ones = torch.ones_like(slots) if counts is None else counts.to(slots.dtype)
    use.passed.index_add_(0, slots, ones)
    use.left.scatter_reduce_(0, slots, left, "amax")


def _device(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    devices = [t.device for t in tensors if not t.is_meta]
    return devices[0] if devices else torch.device("cpu")
