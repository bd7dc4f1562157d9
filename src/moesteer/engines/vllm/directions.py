"""Directions on vLLM: what each row of the tables does to the residual stream at each of its parts.

A tensor h that is a part of the stream x = h + rest (an output of attention or of the feed-forward
part stands alone: x = h) becomes

    h − r̂ (r̂ᵀx) + c·v + Σ_e c_e·p_e(t)·v_e

the formula of `moesteer.direction`. Each row has room for a few vectors; tables of numbers say by
part and row which of them is projected out (one unit vector) and which are added: in column 0 the
sum of what is added as it is, then one column for each direction of an expert, weighted by p_e(t),
which the router's seam leaves here. A row has two phases, its prompt's tokens and its generated
ones, so that each direction keeps to its window.

The seam is put in only where an engine was started with room for vectors (`settings.directions`):
its tables take rows × vectors × hidden numbers.

What happened is measured on the device, by row: tokens, how far what was written moved along each
column's vector, and what is left of the line that was projected out. A row may also *watch* a line
and change nothing: then r̂ᵀx is all that is measured.
"""

import functools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesteer.direction import Direction, Site, Window
from moesteer.engines.evidence import LEFT_OVER, left_over, rounding_share
from moesteer.engines.vllm.stream import Stream
from moesteer.engines.vllm.tables import Tables
from moesteer.errors import MoesteerError
from moesteer.gate import DirectionProbe
from moesteer.profile import Profile

VECTORS = 8
"""Room that an engine is started with where profiles with directions are expected."""

PHASES: dict[Window, tuple[int, ...]] = {"prompt": (0,), "generation": (1,), "all": (0, 1)}


@dataclass(frozen=True)
class Use:
    """What a profile does at a site in a phase, by the numbers of its directions: what is added as
    it is, what is added weighted by an expert's probability, and what is projected out."""

    added: tuple[int, ...]
    weighted: tuple[int, ...]
    ablated: int | None

    @property
    def columns(self) -> list[Hashable]:
        """What is added in each column, by a name for its vector."""
        return [("added", self.added), *(("weighted", number) for number in self.weighted)]


def uses_of(directions: Sequence[Direction]) -> dict[tuple[Site, int], Use]:
    """By site and phase."""
    found: dict[tuple[Site, int], list[int]] = {}
    for number, direction in enumerate(directions):
        for site in direction.sites:
            for phase in PHASES[direction.window]:
                found.setdefault((site, phase), []).append(number)
    return {
        where: Use(
            tuple(n for n in numbers if _kind(directions[n]) == "added"),
            tuple(n for n in numbers if _kind(directions[n]) == "weighted"),
            next((n for n in numbers if _kind(directions[n]) == "ablated"), None),
        )
        for where, numbers in found.items()
    }


def vectors_of(directions: Sequence[Direction]) -> dict[Hashable, Float[Tensor, " hidden"]]:
    """Every vector that a row needs, in fp64 and by name: sums, c_e·v_e, and unit vectors."""
    vectors = [torch.tensor(d.vector, dtype=torch.float64) for d in directions]
    needed: dict[Hashable, Tensor] = {}
    for use in uses_of(directions).values():
        if use.added:
            total = sum(directions[n].coefficient * vectors[n] for n in use.added)
            needed["added", use.added] = torch.as_tensor(total)
        for n in use.weighted:
            needed["weighted", n] = directions[n].coefficient * vectors[n]
        if use.ablated is not None:
            needed["ablated", use.ablated] = vectors[use.ablated] / vectors[use.ablated].norm()
    return needed


def room_for(profiles: Iterable[Profile]) -> int:
    """How many vectors an engine needs room for to run these profiles; 0 where none has directions.

    Raises MoesteerError for what vLLM can't do.
    """
    needed = [0]
    for profile in profiles:
        check_possible(profile)
        if profile.gate is not None and isinstance(profile.gate.probe, DirectionProbe):
            needed.append(VECTORS)  # it reads the stream where directions are measured
        if profile.directions or profile.candidates is not None:  # they become directions
            needed.append(max(VECTORS, len(vectors_of(profile.directions))))
    return max(needed)


def check_possible(profile: Profile) -> None:
    """Raise MoesteerError where a profile asks for what vLLM's kernels don't let out."""
    for direction in profile.directions:
        if direction.expert is not None and direction.operation == "ablate":
            raise MoesteerError(
                f"{profile.name} ablates a direction from the output of expert {direction.expert}"
                f" of layer {direction.sites[0][0]} alone, which vLLM's fused kernels never show."
                " Use --engine transformers, or ablate it at the mlp of the layer."
            )


@dataclass(frozen=True, eq=False)
class Ready:
    """What one profile's directions do in this worker, ready to be a row's.

    The tables count a row's vectors from 1; 0 is none. `parts` are those it uses or watches,
    `weighing` those where experts weigh what is added. A line that is `watched` stands in the table
    of those that are `ablated`, at a part that is not `used`.
    """

    directions: tuple[Direction, ...]
    parts: list[int]
    weighing: frozenset[int]
    vectors: Float[Tensor, "slot hidden"]
    added: Int[Tensor, "part phase column"]
    experts: Int[Tensor, "part phase weighted"]
    ablated: Int[Tensor, "part phase"]
    used: Bool[Tensor, "part phase"]
    watched: Bool[Tensor, "part phase"]


@dataclass
class Seen:
    """What was measured of a profile at the parts it uses, in the order of `Ready.parts`.

    `weights`: summed over tokens, 1 in column 0 (so the tokens themselves), p_e(t) in those of
    experts; `moved`: change times each column's vector; `along`: r̂ᵀx before; `rounding`: how much
    of a change along a line precision may swallow; `left`: the largest |r̂ᵀx|/‖x‖ after.
    """

    ready: Ready
    weights: Float[Tensor, "part phase column"]
    moved: Float[Tensor, "part phase column"]
    along: Float[Tensor, "part phase"]
    rounding: Float[Tensor, "part phase"]
    left: Float[Tensor, "part phase"]

    def add(self, other: "Seen") -> None:
        # Not in place: what was folded in a step is an inference tensor, and RPCs are outside.
        self.weights = self.weights + other.weights
        self.moved = self.moved + other.moved
        self.along = self.along + other.along
        self.rounding = self.rounding + other.rounding
        self.left = torch.maximum(self.left, other.left)


class Directed:
    """The parts of a worker's stream, and what each row does at each of them.

    `room` is how many vectors a row has. Rows of the tables are counted by phase here: row r has
    2r for its prompt and 2r + 1 for what it generates.
    """

    def __init__(self, stream: Stream, tables: Tables, room: int, hidden: int) -> None:
        device, rows = tables.tokens.device, tables.tokens.shape[0]
        parts = len(stream.parts)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tables = tables
        self.parts = stream.parts
        self.refused = stream.refused
        self.hidden = hidden
        self.room = room
        self.numbers: dict[Site, list[int]] = {}
        for number, part in enumerate(self.parts):
            self.numbers.setdefault(part.site, []).append(number)
        columns = 1 + room
        self.columns = [columns if part.routed else 1 for part in self.parts]
        # Which row, by phase, directs each token of the running step; and the weight of each column
        self.rows = zeros(tables.steering_rows.shape[0], dtype=torch.int64)
        self.weights = zeros(tables.steering_rows.shape[0], columns)
        self.weights[:, 0] = 1
        # What each row does. The first vector of a row is zero.
        self.vectors = zeros(rows * columns, hidden)
        self.added = zeros(parts, 2 * rows, columns, dtype=torch.int64)
        self.experts = zeros(parts, 2 * rows, room, dtype=torch.int64)
        self.ablated = zeros(parts, 2 * rows, dtype=torch.int64)
        self.used = zeros(parts, 2 * rows, dtype=torch.bool)
        self.watched = zeros(parts, 2 * rows, dtype=torch.bool)
        self.allowed = LEFT_OVER
        # What was measured, by row
        self.weighed = zeros(parts, 2 * rows, columns)
        self.moved = zeros(parts, 2 * rows, columns)
        self.along = zeros(parts, 2 * rows)
        self.rounding = zeros(parts, 2 * rows)
        self.left = zeros(parts, 2 * rows)
        # Parts that the running batch uses, and those where experts weigh what is added
        self.active: frozenset[int] = frozenset()
        self.weighing: frozenset[int] = frozenset()
        fused = tables.static and device.type != "cpu"
        self._changed = fused_change() if fused else changed

    def check(self, directions: Sequence[Direction]) -> None:
        """Raise MoesteerError for directions without a place here; other workers' layers pass."""
        here = {layer for layer, _ in self.numbers}
        for direction in directions:
            if len(direction.vector) != self.hidden:
                raise MoesteerError(
                    f"a direction has {len(direction.vector)} numbers; the model's hidden states"
                    f" have {self.hidden}."
                )
            for layer, place in direction.sites:
                if layer in self.refused:
                    raise MoesteerError(
                        f"layer {layer} takes no directions in vLLM: {self.refused[layer]}."
                    )
                if layer in here and (layer, place) not in self.numbers:
                    raise MoesteerError(f"layer {layer} of this model has no {place}.")
                if direction.expert is not None and layer in here:
                    part = self.numbers[layer, place][0]
                    if self.columns[part] == 1:
                        raise MoesteerError(f"layer {layer} of this model has no experts.")
        if (needed := len(vectors_of(directions))) > self.room:
            raise MoesteerError(
                f"its directions have {needed} different vectors, and the engine was started with"
                f" room for {self.room}; start it with additional_config="
                f'{{"moesteer": {{"directions": {needed}}}}}.'
            )

    def ready(self, directions: Sequence[Direction]) -> Ready:
        """The tables of a profile, on the device."""
        device = self.vectors.device
        vectors = vectors_of(directions)
        slots = {name: slot for slot, name in enumerate(vectors, start=1)}
        added = torch.zeros(len(self.parts), 2, 1 + self.room, dtype=torch.int64)
        experts = torch.zeros(len(self.parts), 2, self.room, dtype=torch.int64)
        ablated = torch.zeros(len(self.parts), 2, dtype=torch.int64)
        used = torch.zeros(len(self.parts), 2, dtype=torch.bool)
        weighing = set()
        for (site, phase), use in uses_of(directions).items():
            # Where several parts write at a site, the line leaves all; one adds.
            for place, part in enumerate(self.numbers.get(site, ())):
                used[part, phase] = True
                if use.ablated is not None:
                    ablated[part, phase] = slots["ablated", use.ablated]
                for column, name in enumerate(use.columns if not place else ()):
                    added[part, phase, column] = slots.get(name, 0)
                for column, number in enumerate(use.weighted if not place else ()):
                    experts[part, phase, column] = directions[number].expert or 0
                    weighing.add(part)
        stacked = torch.zeros(1 + self.room, self.hidden)
        for name, slot in slots.items():
            stacked[slot] = vectors[name].float()
        parts = used.any(-1).nonzero().flatten().tolist()
        watched = torch.zeros_like(used)
        tables = (t.to(device) for t in (stacked, added, experts, ablated, used, watched))
        return Ready(tuple(directions), parts, frozenset(weighing), *tables)

    def watching(self, layer: int, vector: Sequence[float]) -> Ready:
        """The tables of a row that changes nothing, and measures what enters a layer along a unit
        vector; MoesteerError where that can't be."""
        self.check([Direction(tuple(vector), ((layer, "input"),))])
        ready = self.ready(())
        ready.vectors[1] = torch.as_tensor(vector, dtype=torch.float32)
        parts = self.numbers.get((layer, "input"), [])
        for part in parts:
            ready.ablated[part] = 1
            ready.watched[part] = True
        return replace(ready, parts=list(parts))

    def write(self, row: int, ready: Ready | None) -> None:
        """Let a row do this, and nothing else."""
        phases = slice(2 * row, 2 * row + 2)
        if ready is None:
            self.used[:, phases].zero_()
            self.watched[:, phases].zero_()
            return
        first = row * (1 + self.room)
        self.vectors[first : first + 1 + self.room].copy_(ready.vectors)
        self.added[:, phases].copy_(ready.added).add_(first)
        self.ablated[:, phases].copy_(ready.ablated).add_(first)
        self.experts[:, phases].copy_(ready.experts)
        self.used[:, phases].copy_(ready.used)
        self.watched[:, phases].copy_(ready.watched)

    def use(self, profiles: Iterable[Ready]) -> None:
        """Say whose directions the next step needs."""
        running = list(profiles)
        self.active = frozenset().union(*(ready.parts for ready in running))
        self.weighing = frozenset().union(*(ready.weighing for ready in running))

    def weigh(self, part: int, logits: Float[Tensor, "token expert"]) -> None:
        """Leave each token's probabilities of the experts whose directions it has; before steering.

        `logits` are the router's own.
        """
        if not self.tables.static and part not in self.weighing:
            return
        tokens = logits.shape[0]
        wanted = self.experts[part][self.rows[:tokens]]
        self.weights[:tokens, 1:] = logits.float().softmax(-1).gather(-1, wanted)

    def change(
        self,
        number: int,
        part: Float[Tensor, "token hidden"],
        rest: Float[Tensor, "token hidden"] | None,
    ) -> Float[Tensor, "token hidden"]:
        """`part` of the stream `part + rest`, changed as each token's row says, and measured."""
        static = self.tables.static
        if not static and number not in self.active:
            return part
        columns = self.columns[number] if static or number in self.weighing else 1
        tokens = part.shape[0]
        rows, weights = self.rows[:tokens], self.weights[:tokens, :columns]
        used = self.used[number][rows]
        after, moved, along, rounding, left = self._changed(
            part,
            rest,
            used,
            self.vectors,
            self.added[number, :, :columns][rows],
            self.ablated[number][rows],
            weights,
        )
        self.allowed = left_over(torch.finfo(part.dtype).eps)
        # Tokens that run a second time are not measured again; row 0 is thrown away.
        measured = used | self.watched[number][rows]
        seen = rows * measured * (self.tables.counting_rows[:tokens] > 0)
        self.weighed[number, :, :columns].index_add_(0, seen, weights)
        self.moved[number, :, :columns].index_add_(0, seen, moved)
        self.along[number].index_add_(0, seen, along)
        self.rounding[number].index_add_(0, seen, rounding)
        self.left[number].scatter_reduce_(0, seen, left, "amax")
        return after

    def take(self, row: int, ready: Ready) -> Seen:
        """What was measured of a row, which is measured from zero after that."""
        phases, parts = slice(2 * row, 2 * row + 2), ready.parts
        tables = (self.weighed, self.moved, self.along, self.rounding, self.left)
        taken = [table[parts, phases].double() for table in tables]
        self.clear(row)
        return Seen(ready, *taken)

    def clear(self, row: int) -> None:
        for table in (self.weighed, self.moved, self.along, self.rounding, self.left):
            table[:, 2 * row : 2 * row + 2].zero_()

    def along_watched(self, seen: Seen) -> float | None:
        """r̂ᵀx of the line that is watched, summed over the tokens that count; None without one."""
        if not bool(seen.ready.watched.any()):
            return None
        return float(seen.along.sum())

    def told(self, seen: Seen) -> list[list[Any]]:
        """[direction, layer, place, tokens, moved, expected, rounding, left, allowed] of each
        direction at each of its sites.

        See `moesteer.engines.vllm.collected.Move`.
        """
        directions = seen.ready.directions
        vectors, uses = vectors_of(directions), uses_of(directions)
        places = {part: place for place, part in enumerate(seen.ready.parts)}
        found = []
        for number, direction in enumerate(directions):
            for site in direction.sites:
                parts = [places[part] for part in self.numbers.get(site, ())]
                if not parts:
                    continue
                phases = list(PHASES[direction.window])
                tokens = sum(float(seen.weights[parts[0], phase, 0]) for phase in phases)
                moved = expected = rounding = left = 0.0
                if direction.operation == "ablate":
                    left = float(seen.left[parts][:, phases].max())
                for phase in phases if direction.operation == "add" else ():
                    use = uses[site, phase]
                    shift = _shift(number, direction, use, vectors, seen, parts[0], phase)
                    moved, expected = moved + shift[0], expected + shift[1]
                    rounding += float(seen.rounding[parts[0], phase])
                amounts = [moved, expected, rounding, left, self.allowed]
                found.append([number, *site, round(tokens), *amounts])
        return found


def _shift(
    number: int,
    direction: Direction,
    use: Use,
    vectors: dict[Hashable, Tensor],
    seen: Seen,
    part: int,
    phase: int,
) -> tuple[float, float]:
    """How far a phase's tokens moved along a direction, and should have, summed over tokens.

    What should have been follows from the profile's own vectors, not from those in the tables.
    """
    column = 0 if direction.expert is None else 1 + use.weighted.index(number)
    names = use.columns
    zero = torch.zeros(len(direction.vector), dtype=torch.float64)
    added = [vectors.get(name, zero) for name in names]
    own = added[column]
    length = float(own.norm())
    if not length:  # additions that cancel
        return 0.0, 0.0
    weights = seen.weights[part, phase].tolist()
    wanted = torch.stack([w * v for w, v in zip(weights, added, strict=False)]).sum(0)
    if use.ablated is not None:
        wanted = wanted - float(seen.along[part, phase]) * vectors["ablated", use.ablated]
    vector = direction.coefficient * torch.tensor(direction.vector, dtype=torch.float64)
    share = float(own @ vector) / (length * float(vector.norm()))  # 1 where it is added alone
    moved = float(seen.moved[part, phase, column]) / length
    return share * moved, share * float(wanted @ own) / length


def _kind(direction: Direction) -> str:
    if direction.operation == "ablate":
        return "ablated"
    return "added" if direction.expert is None else "weighted"


# -- by token ------------------------------------------------------------------------------------


def changed(
    part: Float[Tensor, "token hidden"],
    rest: Float[Tensor, "token hidden"] | None,
    used: Bool[Tensor, " token"],
    vectors: Float[Tensor, "slot hidden"],
    added: Int[Tensor, "token column"],
    ablated: Int[Tensor, " token"],
    weights: Float[Tensor, "token column"],
) -> tuple[
    Float[Tensor, "token hidden"],
    Float[Tensor, "token column"],
    Float[Tensor, " token"],
    Float[Tensor, " token"],
    Float[Tensor, " token"],
]:
    """The formula at the head of this file, in fp32; and what came of it, seen in the result.

    That is how far it moved times each column's vector, r̂ᵀx before, what rounding may swallow of a
    change along a line, and |r̂ᵀx|/‖x‖ after, but for what was added along the line.
    """
    before = part.float()
    other = torch.zeros_like(before) if rest is None else rest.float()
    line = vectors[ablated]
    along = ((before + other) * line).sum(-1)
    shift = torch.zeros_like(before)
    for column in range(added.shape[-1]):
        shift = shift + weights[:, column, None] * vectors[added[:, column]]
    written = (before - along.unsqueeze(-1) * line + shift).to(part.dtype)
    after = torch.where(used.unsqueeze(-1), written, part)
    change, stream = after.float() - before, after.float() + other
    moved = [(change * vectors[added[:, column]]).sum(-1) for column in range(added.shape[-1])]
    share = rounding_share(torch.finfo(part.dtype).eps, part.shape[-1])
    rounding = share * after.float().norm(dim=-1)
    left = ((stream - shift) * line).sum(-1).abs() / stream.norm(dim=-1).clamp(min=1e-30)
    return after, torch.stack(moved, dim=-1), along, rounding, left


@functools.cache
def fused_change() -> Any:
    """`changed` as a few kernels, for graphs: there it always does everything."""
    return torch.compile(changed, dynamic=True)
