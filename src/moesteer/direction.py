"""A direction: a vector of the residual stream, and where, how and how strongly it is used.

Every part of a decoder layer adds what it writes to one vector a token, the residual stream x. A
behaviour may lie along a direction v of that space (Arditi et al. 2024, arXiv 2406.11717). At each
of its sites a direction is added, times its coefficient, or its line is projected out:

    add       h ← h + c·v                 at an expert:   h ← h + c·p_e(t)·v
    ablate    h ← h − r̂ (r̂ᵀh),  r̂ = v/‖v‖                  y_e ← y_e − r̂ (r̂ᵀy_e)

h is what enters a layer, or what its attention or its feed-forward part writes to the stream. With
an expert, the addition at the feed-forward part is weighted by the router's probability p_e(t)
(softmax over all experts) of that expert, and the ablation is of that expert's own output y_e
(Marbut, Olson, Wheeler 2026, arXiv 2606.04160). Where both are asked for at one site, the line is
projected out first, and then added along.

Sign: v is a mean over prompts of side A less a mean over prompts of side B, so a positive
coefficient steers towards A.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from moesteer.errors import MoesteerError

Place = Literal["input", "attention", "mlp"]
"""What enters a decoder layer; what its attention (or what stands in its place) writes to the
stream; what its feed-forward part writes, all experts and shared ones included, or a dense MLP."""

Site = tuple[int, Place]
"""(decoder layer, place)."""

Operation = Literal["add", "ablate"]

Window = Literal["prompt", "generation", "all"]
"""Which tokens: those of the prompt, which decide the first token of the reply too; those of the
reply; all."""


LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Direction:
    """A vector as wide as the stream, used at `sites` on the tokens of `window`.

    `expert` is the number of an expert of the one layer that its one site, `mlp`, belongs to.
    """

    vector: tuple[float, ...]
    sites: tuple[Site, ...]
    operation: Operation = "add"
    coefficient: float = 1.0
    window: Window = "all"
    expert: int | None = None

    def __post_init__(self) -> None:
        for what, value, known in (
            ("operation", self.operation, get_args(Operation)),
            ("window", self.window, get_args(Window)),
            *(("place", place, get_args(Place)) for _, place in self.sites),
        ):
            if value not in known:
                raise MoesteerError(f"a direction's {what} is {value!r}; it is one of {known}.")
        if wrong := [i for i, number in enumerate(self.vector) if not math.isfinite(number)]:
            raise MoesteerError(
                f"a direction holds {self.vector[wrong[0]]} at place {wrong[0]}, {len(wrong)} such"
                f" numbers of {len(self.vector)}; it must be finite."
            )
        if not self.norm > 0:
            raise MoesteerError(
                f"a direction of {len(self.vector)} numbers has norm 0: it points nowhere. Were"
                " both sets of prompts the same?"
            )
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise MoesteerError(f"a direction has sites {self.sites}; it needs some, each once.")
        if not math.isfinite(self.coefficient) or self.coefficient == 0:
            raise MoesteerError(f"a direction's coefficient is {self.coefficient}; not 0, finite.")
        if not abs(self.coefficient) * self.norm <= LARGEST:
            raise MoesteerError(
                f"a direction of norm {self.norm:.4g} has coefficient {self.coefficient:g}:"
                f" together more than fp32 holds ({LARGEST:.3g})."
            )
        if self.operation == "ablate" and self.coefficient != 1:
            raise MoesteerError(
                f"a direction is ablated with coefficient {self.coefficient}; ablation has none."
            )
        if self.expert is not None and (len(self.sites) != 1 or self.sites[0][1] != "mlp"):
            raise MoesteerError(
                f"a direction of expert {self.expert} is used at {self.sites}; an expert has one"
                " site, the mlp of its layer."
            )

    @property
    def norm(self) -> float:
        return math.sqrt(sum(number * number for number in self.vector))

    @property
    def words(self) -> str:
        """What it does, in a line."""
        layers = sorted({layer for layer, _ in self.sites})
        places = [place for place in get_args(Place) if place in {p for _, p in self.sites}]
        named = str(layers[0]) if len(layers) == 1 else f"{layers[0]}…{layers[-1]}"
        where = f"{' + '.join(places)} of layer{'s' * (len(layers) > 1)} {named}"
        if self.expert is not None:
            where = f"expert {self.expert} of layer {named}"
        does = "ablated at" if self.operation == "ablate" else f"{self.coefficient:+g}× at"
        tokens = {"all": "all tokens", "prompt": "prompt", "generation": "generated tokens"}
        return f"{does} {where}, {tokens[self.window]} (norm {self.norm:.4g})"

    def reversed(self) -> "Direction":
        """The same the other way round; MoesteerError for an ablation, which has no other way."""
        if self.operation == "ablate":
            raise MoesteerError("an ablated direction has no sign to be reversed.")
        return replace(self, coefficient=-self.coefficient)


Kind = Literal["residual", "forced", "own"]
"""Difference of the means of: what enters a layer; what the feed-forward part writes while an
expert is forced; what an expert puts out for the tokens that are routed to it."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Directions that were measured, to choose from, and what is known of each.

    `layer` and `position` (−1: the prompt's last token; 0: a mean over positions) say where a
    vector was read, `expert` (−1: none) whose it is. `scores` by name, one number a candidate.
    """

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True}

    kind: Kind
    layer: Int[np.ndarray, " candidate"]
    position: Int[np.ndarray, " candidate"]
    expert: Int[np.ndarray, " candidate"]
    vector: Float[np.ndarray, "candidate hidden"]
    scores: dict[str, Float[np.ndarray, " candidate"]]

    def __len__(self) -> int:
        return len(self.layer)

    def find(self, layer: int, position: int, expert: int = -1) -> int:
        """The number of a candidate; MoesteerError, with what there is, where there is none."""
        found = np.flatnonzero(
            (self.layer == layer) & (self.position == position) & (self.expert == expert)
        )
        if not len(found):
            whose = "" if expert < 0 else f" of expert {expert}"
            there = [
                f"{name}s {sorted(set(column.tolist()))}"
                for name, column in (("layer", self.layer), ("position", self.position))
            ]
            here = (self.layer == layer) & (self.position == position)
            if expert >= 0 and here.any():
                there = [f"experts {sorted(set(self.expert[here].tolist()))}"]
            raise MoesteerError(
                f"there is no direction of layer {layer}, position {position}{whose}; there are"
                f" {' and '.join(there)}."
            )
        return int(found[0])

    def of_vector(self, vector: Sequence[float]) -> list[int]:
        """The numbers of the candidates that a direction with this vector came from."""
        if len(vector) != self.vector.shape[1]:
            return []
        same = self.vector == np.array(vector, dtype=np.float32)
        return np.flatnonzero(same.all(1)).tolist()

    def vector_of(self, number: int) -> tuple[float, ...]:
        return tuple(float(x) for x in self.vector[number])
