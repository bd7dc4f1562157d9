"""The profile: what to steer, how, where, on which model, from which evidence.

What doesn't fit the model that is to be steered is refused (`check_model`). The file that a profile
is kept in: `profile_file.py`.
"""

import json
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float

from moesteer.direction import Candidates, Direction
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.gate import DirectionProbe, Gate

NORM_TOLERANCE = 1e-4
"""Relative; loading the same weights in another dtype changes a router's norm by about 1e-5."""

Expert = tuple[int, int]
"""(layer, expert): the decoder layer's own number and the expert's index in it, both from 0."""

Side = Literal["a", "b"]

Rule = Literal["exact", "paper"]
"""How logits are rewritten: see `moesteer.rules`."""

UNKNOWN = "unknown"
"""What a profile says of its model where the scores' source did not name it; not compared."""


@dataclass(frozen=True)
class LayerShape:
    """A routed layer: its number among all decoder layers, how many experts, how many a token."""

    layer: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class ModelFacts:
    """What a profile must know of its model to refuse another one.

    The norms tell models of one shape apart, whatever dtype they are loaded in: `router_norms` of
    each layer's router (rows weighted by expert, so that renumbered experts show), `layer_norms` of
    the rest of the decoder layer (of stacked experts, the first). Empty where the weights could not
    be read. `dtype` is what the model ran in; it is not compared. `decoder_layers` and `hidden` are
    how many layers the residual stream passes and how wide it is, 0 where that is not known. A
    dense model has no routed `layers`.
    """

    id: str
    revision: str | None
    model_type: str
    config_hash: str
    tokenizer_hash: str
    family: str
    layers: tuple[LayerShape, ...]
    router_norms: tuple[float, ...] = ()
    layer_norms: tuple[float, ...] = ()
    dtype: str = UNKNOWN
    decoder_layers: int = 0
    hidden: int = 0


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


def check_fits(profile: Profile, layers: tuple[LayerShape, ...]) -> None:
    """Raise MoesteerError unless each steered expert exists and each layer can obey."""
    shapes = {shape.layer: shape for shape in layers}
    for layer, expert in (*profile.activated, *profile.deactivated):
        if not shapes:
            raise MoesteerError(
                f"{profile.name}: expert ({layer}, {expert}) names layer {layer}, but the model is"
                " dense: it routes in none."
            )
        if layer not in shapes:
            raise MoesteerError(
                f"{profile.name}: expert ({layer}, {expert}) names layer {layer}, but the model"
                f" routes in layers {_ranges(sorted(shapes))} only."
            )
        if not 0 <= expert < shapes[layer].experts:
            raise MoesteerError(
                f"{profile.name}: expert ({layer}, {expert}) does not exist: layer {layer} has"
                f" experts 0–{shapes[layer].experts - 1}."
            )
    for layer in profile.steered_layers:
        activated, deactivated = profile.experts_of(layer)
        shape = shapes[layer]
        if len(activated) > shape.top_k:
            raise MoesteerError(
                f"{profile.name}: {len(activated)} experts are activated in layer {layer}"
                f" ({', '.join(map(str, activated))}), but a token selects k = {shape.top_k}."
                " Activate fewer experts, or choose among them."
            )
        if shape.experts - len(deactivated) < shape.top_k:
            raise MoesteerError(
                f"{profile.name}: {len(deactivated)} of {shape.experts} experts are deactivated in"
                f" layer {layer}, which leaves fewer than the k = {shape.top_k} a token selects."
                " Deactivate fewer experts."
            )


def check_directions(profile: Profile, model: ModelFacts) -> None:
    """Raise MoesteerError unless each direction's layer exists and its width is the stream's.

    Nothing is compared where the model's are unknown.
    """
    shapes = {shape.layer: shape for shape in model.layers}
    for direction in profile.directions:
        if model.hidden and len(direction.vector) != model.hidden:
            raise MoesteerError(
                f"{profile.name}: a direction has {len(direction.vector)} numbers, but the hidden"
                f" states of {model.id} have {model.hidden}."
            )
        for layer, _ in direction.sites:
            if layer < 0 or (model.decoder_layers and layer >= model.decoder_layers):
                raise MoesteerError(
                    f"{profile.name}: a direction names layer {layer}, but {model.id} has layers"
                    f" 0–{model.decoder_layers - 1}."
                )
        if direction.expert is not None:
            layer = direction.sites[0][0]
            experts = shapes[layer].experts if layer in shapes else 0
            if not 0 <= direction.expert < experts:
                raise MoesteerError(
                    f"{profile.name}: a direction names expert {direction.expert} of layer {layer},"
                    f" which has {experts} experts."
                )


def check_gate(profile: Profile, model: ModelFacts) -> None:
    """Raise MoesteerError unless what the profile's gate reads is there in the model.

    Nothing is compared where the model's own numbers are unknown.
    """
    if profile.gate is None:
        return
    probe = profile.gate.probe
    if isinstance(probe, DirectionProbe):
        if model.hidden and len(probe.vector) != model.hidden:
            raise MoesteerError(
                f"{profile.name}: its gate's vector has {len(probe.vector)} numbers, but the hidden"
                f" states of {model.id} have {model.hidden}."
            )
        if probe.layer < 0 or (model.decoder_layers and probe.layer >= model.decoder_layers):
            raise MoesteerError(
                f"{profile.name}: its gate reads layer {probe.layer}, but {model.id} has layers"
                f" 0–{model.decoder_layers - 1}."
            )
        return
    experts = {shape.layer: shape.experts for shape in model.layers}
    for layer, expert in probe.experts:
        if not 0 <= expert < experts.get(layer, 0):
            raise MoesteerError(
                f"{profile.name}: its gate reads expert ({layer}, {expert}), which {model.id} does"
                f" not have: layer {layer} has {experts.get(layer, 0)} experts."
            )


def check_ungated(profile: Profile | None, here: str = "code that runs the model itself") -> None:
    """Raise MoesteerError for a profile with a gate `here`, in words, where none is asked.

    Each place that puts a profile to use either asks its gate or refuses it here, so that none
    steers what was to be left alone, or leaves alone what was to be steered.
    """
    if profile is not None and profile.gate is not None:
        raise MoesteerError(
            f"{profile.name} has a gate, which is asked about a whole prompt before anything is"
            f" steered, and {here} does not ask it. Use generate, chat, evaluate or serve, or take"
            " the profile without its gate (the file that it was put on; in Python:"
            " profile.ungated)."
        )


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


def check_model(profile: Profile, model: ModelFacts) -> None:
    """Raise MoesteerError if the profile was made on another model; both values are shown.

    Another tokenizer or chat template is a MoesteerWarning only: the experts are the same.
    """
    made_on = profile.model
    check_directions(profile, model)
    check_gate(profile, model)
    if made_on is None:
        check_fits(profile, model.layers)
        return
    differences = [
        ("model type", made_on.model_type, model.model_type),
        ("routed layers", len(made_on.layers), len(model.layers)),
        ("layer numbers", *(_ranges([s.layer for s in m.layers]) for m in (made_on, model))),
        ("experts a layer", *(_widths(m.layers, "experts") for m in (made_on, model))),
        ("experts a token (k)", *(_widths(m.layers, "top_k") for m in (made_on, model))),
        ("routing family", made_on.family, model.family),
        ("config hash", made_on.config_hash, model.config_hash),
    ]
    for what, theirs, ours in differences:
        if theirs not in (ours, UNKNOWN):
            raise MoesteerError(
                f"{profile.name} was made on {made_on.id} and does not fit {model.id}:"
                f" {what} is {theirs} in the profile and {ours} in the model."
            )
    if made_on.tokenizer_hash not in (model.tokenizer_hash, UNKNOWN):
        warnings.warn(
            f"{profile.name} was made with another tokenizer or chat template than {model.id} has"
            " now: what was detected on may read differently.",
            MoesteerWarning,
            stacklevel=2,
        )
    _check_weights(profile.name, made_on, model)
    check_fits(profile, model.layers)


def _check_weights(name: str, made_on: ModelFacts, model: ModelFacts) -> None:
    """Refuse other routers; warn of other weights beside them, which fine-tuning may change."""
    routers = zip(model.layers, made_on.router_norms, model.router_norms, strict=False)
    for shape, theirs, ours in routers:
        if abs(theirs - ours) > NORM_TOLERANCE * theirs:
            raise MoesteerError(
                f"{name} was made on {made_on.id}, whose weights differ from those of {model.id}:"
                f" the router of layer {shape.layer} has norm {theirs:.6g} in the profile and"
                f" {ours:.6g} in the model. Detect again on this model."
            )
    numbers = [shape.layer for shape in model.layers] or range(model.decoder_layers)
    layers = zip(numbers, made_on.layer_norms, model.layer_norms, strict=False)
    for layer, theirs, ours in layers:
        if abs(theirs - ours) > NORM_TOLERANCE * theirs:
            alike = "routers" if model.layers else "shape"
            warnings.warn(
                f"{name} was made on {made_on.id}; {model.id} has the same {alike} but other"
                f" weights (layer {layer}: norm {theirs:.6g} in the profile, {ours:.6g} in"
                " the model): a fine-tuned or quantised relative. Check that it still steers.",
                MoesteerWarning,
                stacklevel=3,
            )
            return
    norms = [m.router_norms if m.layers else m.layer_norms for m in (made_on, model)]
    if made_on.id != UNKNOWN and not all(norms):
        warnings.warn(
            f"{name}: whether it was made on the weights of {model.id} can't be compared (offloaded"
            " weights have no norms); layers, experts and config are the same.",
            MoesteerWarning,
            stacklevel=3,
        )


def combine(*profiles: Profile) -> Profile:
    """One profile that does what all of them do; MoesteerError where they contradict.

    A profile has one gate, so that all of them must have the same, or none.
    """
    if not profiles:
        raise MoesteerError("there is nothing to combine: give at least one profile.")
    first, *others = profiles
    models = [profile.model for profile in profiles if profile.model is not None]
    # Rule and dose are of experts; a profile of directions alone has none of its own.
    with_experts = [p for p in profiles if p.steered_layers or not p.directions]
    ruled = with_experts[0] if with_experts else first
    for other in with_experts:
        if (other.rule, other.dose) != (ruled.rule, ruled.dose):
            raise MoesteerError(
                f"{ruled.name} (rule {ruled.rule}, dose {ruled.dose}) and {other.name} (rule"
                f" {other.rule}, dose {other.dose}) can't be combined; they steer differently."
            )
    for other in others:
        if other.chat_options != first.chat_options:
            raise MoesteerError(
                f"{first.name} and {other.name} were made with different chat options:"
                f" {first.chat_options} and {other.chat_options}."
            )
        _check_same_gate(first, other)
        if other.model is not None:
            check_model(other, models[0])
    merge = dict.fromkeys
    return replace(
        first,
        activated=tuple(merge(e for p in profiles for e in p.activated)),
        deactivated=tuple(merge(e for p in profiles for e in p.deactivated)),
        rule=ruled.rule,
        dose=ruled.dose,
        directions=tuple(merge(d for p in profiles for d in p.directions)),
        toward=None,
        model=models[0] if models else None,
        evidence=None,
        scores=None,
        candidates=None,
        name=" + ".join(p.name for p in profiles),
    )


def _check_same_gate(one: Profile, other: Profile) -> None:
    """Refuse to make one profile of two that steer on different requests."""
    if one.gate != other.gate:
        has = "another" if one.gate and other.gate else "one" if other.gate else "none"
        raise MoesteerError(
            f"{one.name} has {'a gate' if one.gate else 'no gate'} and {other.name} has {has}: they"
            " steer on different requests and can't be one profile. Combine them without gates,"
            " then put a gate on what comes of it (moesteer gate)."
        )


# -- words ---------------------------------------------------------------------------------------


def _listed(experts: list[Expert]) -> str:
    return "expert " + ", ".join(f"({layer}, {expert})" for layer, expert in experts)


def _ranges(numbers: list[int]) -> str:
    """0–3, 5 for [0, 1, 2, 3, 5]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _widths(layers: tuple[LayerShape, ...], what: str) -> str:
    return _ranges(sorted({getattr(shape, what) for shape in layers}))
