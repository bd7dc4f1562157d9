"""The profile: what to steer, how, where, on which model, from which evidence.

The file that it is kept in: `profile_file.py`; which model it fits: `profile_fit.py`.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float

from moesteer.direction import Candidates, Direction
from moesteer.errors import MoesteerError
from moesteer.gate import Gate
from moesteer.model_facts import ModelFacts
from moesteer.profile_fit import check_directions, check_fits, check_gate

Expert = tuple[int, int]
"""(layer, expert): the decoder layer's own number and the expert's index in it, both from 0."""

Side = Literal["a", "b"]

Rule = Literal["exact", "paper"]
"""How logits are rewritten: see `moesteer.rules`."""


@dataclass(frozen=True)
class Evidence:
    """Where the scores come from: data, span, detector, and how to get them again.

    `counted` is what the detector counts on target tokens, None where it counts nothing (causal
    detectors). `spans` are the targets as given, or matched in length and position. `stability` is
    the mean rank correlation of the scores from two random halves of the pairs, None where there
    are no halves to compare. `settings` are what else decided the result, by name.
    """

    detector: str
    counted: Literal["top-k", "top-1", "probability"] | None
    pairs: int
    source: str
    data_hash: str
    target: str
    tokens_a: int
    tokens_b: int
    seed: int
    interval: str
    spans: Literal["as given", "matched"]
    stability: float | None
    versions: dict[str, str]
    command: str
    settings: dict[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Scores:
    """One score an expert, rows in the order of `ModelFacts.layers`; positive means more in A.

    `low` and `high` are the ends of the score's interval. `p` tests whether the expert differs
    between the sides of a pair at all, `q` is its false discovery rate among all experts; both are
    1 where nothing can be tested. `rate_a` and `rate_b` are the shares of target tokens that
    selected the expert, or its mean probability. Of experts that a layer lacks (layers of unequal
    width) nothing is said.
    """

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True}

    value: Float[np.ndarray, "layer expert"]
    low: Float[np.ndarray, "layer expert"]
    high: Float[np.ndarray, "layer expert"]
    p: Float[np.ndarray, "layer expert"]
    q: Float[np.ndarray, "layer expert"]
    rate_a: Float[np.ndarray, "layer expert"]
    rate_b: Float[np.ndarray, "layer expert"]


@dataclass(frozen=True)
class Profile:
    """Experts to activate and deactivate, by which rule; directions to add or project out; on
    which requests; and where that comes from.

    With a `gate`, it steers those requests whose prompts open it, and no others. A profile made by
    hand needs no model and no evidence: `Profile(activated=((2, 5),))`.
    """

    activated: tuple[Expert, ...] = ()
    deactivated: tuple[Expert, ...] = ()
    rule: Rule = "exact"
    dose: float = 1.0
    directions: tuple[Direction, ...] = ()
    toward: Side | None = None
    chat_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    model: ModelFacts | None = None
    evidence: Evidence | None = None
    scores: Scores | None = field(default=None, compare=False)
    candidates: Candidates | None = field(default=None, compare=False)
    name: str = "profile"
    gate: Gate | None = None

    def __post_init__(self) -> None:
        for what, value, known in (
            ("rule", self.rule, get_args(Rule)),
            ("toward", self.toward, (*get_args(Side), None)),
        ):
            if value not in known:
                raise MoesteerError(f"{self.name}: {what} is {value!r}; it must be one of {known}.")
        both = sorted(set(self.activated) & set(self.deactivated))
        if both:
            raise MoesteerError(
                f"{self.name}: {_listed(both)} would be both activated and deactivated."
            )
        for experts in (self.activated, self.deactivated):
            twice = sorted({expert for expert in experts if experts.count(expert) > 1})
            if twice:
                raise MoesteerError(f"{self.name}: {_listed(twice)} is named twice.")
        if not 0 <= self.dose <= 1:
            raise MoesteerError(f"{self.name}: the dose is {self.dose}; it must be from 0 to 1.")
        _check_ablations(self)
        if self.model is not None:
            check_fits(self, self.model.layers)
            check_directions(self, self.model)
            check_gate(self, self.model)

    def experts_of(self, layer: int) -> tuple[list[int], list[int]]:
        """Activated and deactivated expert indices of one layer."""
        return (
            [expert for where, expert in self.activated if where == layer],
            [expert for where, expert in self.deactivated if where == layer],
        )

    @property
    def steered_layers(self) -> tuple[int, ...]:
        """The layers whose routing is steered."""
        return tuple(sorted({layer for layer, _ in (*self.activated, *self.deactivated)}))

    @property
    def steers(self) -> bool:
        """Whether it does anything at all."""
        return bool(self.steered_layers or self.directions)

    @property
    def ungated(self) -> "Profile":
        """The same without its gate: it steers every request. Itself where it has none."""
        return self if self.gate is None else replace(self, gate=None)

    @property
    def lowest_layer(self) -> int | None:
        """The lowest decoder layer that does otherwise than unsteered; None where none does.

        What enters a layer is what the layer below it puts out.
        """
        sites = [site for direction in self.directions for site in direction.sites]
        layers = [max(0, layer - (place == "input")) for layer, place in sites]
        return min((*self.steered_layers[:1], *layers), default=None)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that are equal exactly where two profiles do the same to a model."""
        does = {
            "activated": sorted(self.activated),
            "deactivated": sorted(self.deactivated),
            "rule": self.rule,
            "dose": self.dose,
        }
        if self.directions:
            does["directions"] = [asdict(direction) for direction in self.directions]
        if self.gate is not None:
            does["gate"] = self.gate.does
        return sha256(json.dumps(does).encode()).hexdigest()[:16]

    def made_by(self, command: str) -> "Profile":
        """The same, with one more command in the line of those that made it."""
        if self.evidence is None:
            return self
        commands = " && ".join(filter(None, (self.evidence.command, command)))
        return replace(self, evidence=replace(self.evidence, command=commands))

    def reversed(self) -> "Profile":
        """The sign-reversed profile: activated and deactivated swapped, directions turned round.

        A gate is kept. MoesteerError where a direction is ablated.
        """
        other: dict[str | None, Side | None] = {"a": "b", "b": "a", None: None}
        return replace(
            self,
            activated=self.deactivated,
            deactivated=self.activated,
            directions=tuple(direction.reversed() for direction in self.directions),
            toward=other[self.toward],
            name=f"{self.name} reversed",
        )

    # `profile_file` is built on this module. What follows only hands over to it, and so imports it
    # when called: a profile that is never written or read needs no file.

    def to_json(self) -> str:
        """Everything the profile holds but candidates, as one JSON object; scores as a list."""
        from moesteer.profile_file import as_text

        return as_text(self)

    @classmethod
    def from_json(cls, text: str, where: str | Path = "profile") -> "Profile":
        """What `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        from moesteer.profile_file import from_text

        return from_text(text, where)

    def save(self, path: str | Path) -> None:
        """Write the profile atomically; MoesteerError if the file can't be written."""
        from moesteer.profile_file import write

        write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read and check a profile; MoesteerError says what is wrong with the file."""
        from moesteer.profile_file import read

        return read(Path(path))


def _check_ablations(profile: Profile) -> None:
    """Two lines can't be projected out at one place: the second would bring back the first."""
    sites = [
        (*site, direction.expert)
        for direction in profile.directions
        if direction.operation == "ablate"
        for site in direction.sites
    ]
    if twice := [site for site in sites if sites.count(site) > 1]:
        layer, place, expert = twice[0]
        whose = "" if expert is None else f", expert {expert}"
        raise MoesteerError(
            f"{profile.name}: two directions are ablated at the {place} of layer {layer}{whose};"
            " one at a place."
        )


# -- words ---------------------------------------------------------------------------------------


def _listed(experts: list[Expert]) -> str:
    return "expert " + ", ".join(f"({layer}, {expert})" for layer, expert in experts)
