"""Steering a transformers model: put it under a profile, prove that it fired, take it off again.

    with steer(model, profile) as fired:
        model.generate(...)
    print(fired)        # a line a layer: tokens, activated present, deactivated absent

Leaving the block restores the model exactly, also after an exception, and raises `DidNotFire`
where the evidence does not show that every token obeyed. A list of profiles steers each row of a
batch by its own; None leaves a row alone. What is steered is routing (`seam.py`), and the residual
stream (`directing.py`).
"""

from collections.abc import Sequence
from typing import Self

import torch
from transformers import PreTrainedModel

from moesteer.engines.evidence import DirectionEvidence, LayerEvidence, check_fired
from moesteer.engines.transformers.directing import DirectedSite, directed_sites
from moesteer.engines.transformers.routers import (
    MoELayer,
    describe,
    forward_dummy,
    is_dense,
    trace_layers,
)
from moesteer.engines.transformers.seam import Rows, SelectionCounts, SteeredLayer, Undo, observe
from moesteer.engines.transformers.stream import Stream, find_stream
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.profile import Expert, Profile
from moesteer.profile_fit import check_fits, check_ungated

UNSTEERED = Profile(name="unsteered")

_STEERED = "_moesteer_steering"


class Steering:
    """A model under profiles, from `steer` until `remove`; a context manager and a handle."""

    def __init__(
        self,
        model: PreTrainedModel,
        profiles: Profile | Sequence[Profile | None],
        layers: Sequence[MoELayer],
        stream: Stream | None = None,
        prompts: Sequence[int] | None = None,
    ) -> None:
        holder = model.__dict__.get(_STEERED)
        if holder is not None:
            raise MoesteerError(
                f"the model is already steered by {holder.name}. Remove that first, or combine the"
                " profiles into one with moesteer.combine."
            )
        self._model = model
        self._layers = {layer.layer: layer for layer in layers}
        self._stream = stream
        self._rows = Rows(prompts)
        self._directed: list[DirectedSite] = []
        self._undo_directed: list[Undo] = []
        self._steered: dict[int, SteeredLayer] = {}
        self._undo: dict[int, Undo] = {}
        self._profiles: list[Profile] = []
        self._undo_watch = self._rows.watch(model.base_model)
        model.__dict__[_STEERED] = self
        try:
            self.replace(profiles)
        except BaseException:
            self._detach()
            raise

    def replace(self, profiles: Profile | Sequence[Profile | None]) -> None:
        """Steer by other profiles from now on; the evidence starts anew.

        Layers that stay steered keep their tables, written in place, so a compiled model needs no
        new graph as long as the same layers are steered with no more distinct profiles.
        """
        if self._model.__dict__.get(_STEERED) is not self:
            raise MoesteerError("this steering was removed from its model; steer the model anew.")
        by_row = [profiles] if isinstance(profiles, Profile) else [p or UNSTEERED for p in profiles]
        distinct = list({id(profile): profile for profile in by_row}.values())
        for profile in distinct:
            check_ungated(profile)
            check_fits(profile, layer_shapes(self._layers.values()))
        slots = max(len(distinct), len(self._profiles))
        directed = self._sites(distinct, slots)
        self._undo_directions()
        grown = bool(self._profiles) and slots > len(self._profiles)
        wanted = {layer for profile in distinct for layer in profile.steered_layers}
        for layer in list(self._steered):
            if grown or layer not in wanted:
                self._undo.pop(layer)()
                del self._steered[layer]
        self._profiles = distinct + [UNSTEERED] * (slots - len(distinct))
        self._rows.slots = None
        if not isinstance(profiles, Profile):
            order = {id(profile): slot for slot, profile in enumerate(distinct)}
            self._rows.slots = torch.tensor([order[id(profile)] for profile in by_row])
        for layer in sorted(wanted):
            if layer not in self._steered:
                self._steered[layer] = SteeredLayer(self._layers[layer], slots)
                self._undo[layer] = self._steered[layer].attach(self._rows)
            self._steered[layer].write(self._profiles)
        self._directed = directed
        for site in directed:  # behind the routing: they read logits before it is steered
            self._undo_directed.append(site.attach(self._rows))

    def _sites(self, profiles: list[Profile], slots: int) -> list[DirectedSite]:
        """The sites of the profiles' directions; the stream is found where they are the first."""
        if not any(profile.directions for profile in profiles):
            return []
        if self._stream is None:
            self._stream = find_stream(self._model, list(self._layers.values()))
        padded = profiles + [UNSTEERED] * (slots - len(profiles))
        return directed_sites(self._stream, list(self._layers.values()), padded)

    def evidence(self) -> list[LayerEvidence | DirectionEvidence]:
        """What was counted at the experts' input, and measured at the sites of directions, since
        the profiles were put in place."""
        return [seen for _, seen in self._seen()]

    def _seen(self) -> list[tuple[Profile, LayerEvidence | DirectionEvidence]]:
        found: list[tuple[Profile, LayerEvidence | DirectionEvidence]] = []
        for slot, profile in enumerate(self._profiles):
            for layer in profile.steered_layers:
                counts = self._steered[layer].evidence
                selected = counts.table()[slot].tolist()
                activated, deactivated = profile.experts_of(layer)
                seen = LayerEvidence(
                    profile.name,
                    layer,
                    int(counts.tokens[slot]),
                    {expert: selected[expert] for expert in activated},
                    {expert: selected[expert] for expert in deactivated},
                )
                found.append((profile, seen))
        for site in self._directed:
            found += site.evidence(self._profiles)
        return found

    def check(self) -> None:
        """Raise DidNotFire unless each profile is proved to have steered (`check_fired`)."""
        for profile, seen in self._seen():
            check_fired(profile, [seen])

    def remove(self) -> None:
        """Restore the model exactly, then `check` what was done."""
        self._detach()
        self.check()

    def _undo_directions(self) -> None:
        while self._undo_directed:
            self._undo_directed.pop()()

    def _detach(self) -> None:
        self._undo_directions()
        for undo in reversed(self._undo.values()):
            undo()
        self._undo.clear()
        self._undo_watch()
        if self._model.__dict__.get(_STEERED) is self:
            del self._model.__dict__[_STEERED]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._detach()
        if kind is None:
            self.check()

    @property
    def name(self) -> str:
        """The names of its profiles."""
        return ", ".join(dict.fromkeys(profile.name for profile in self._profiles))

    def __str__(self) -> str:
        lines = [_line(seen) for seen in self.evidence()]
        return "\n".join([self.name, *(lines or ["  steers nothing"])])


def steer(
    model: PreTrainedModel,
    profiles: Profile | Sequence[Profile | None],
    layers: Sequence[MoELayer] | None = None,
    stream: Stream | None = None,
    prompts: Sequence[int] | None = None,
) -> Steering:
    """Steer a model by a profile, or each row of its batches by its own profile.

    `layers` are the model's routed layers where they are known already (`checked_layers`), `stream`
    its residual stream (`find_stream`); without them they are traced and self-tested now. `prompts`
    says how many columns of each row are its prompt, for directions with a window; without it the
    prompt is what runs before anything is cached. Raises MoesteerError where the model can't be
    steered, is steered already, a profile doesn't fit it, or a profile has a gate, which is decided
    on a whole prompt before anything runs: `Engine.generate` does that.
    """
    if layers is None:
        layers = [] if is_dense(model) else checked_layers(model)
    return Steering(model, profiles, layers, stream, prompts)


def layer_shapes(layers: Sequence[MoELayer] | object) -> tuple[LayerShape, ...]:
    return tuple(LayerShape(m.layer, m.num_experts, m.top_k) for m in layers)  # pyright: ignore


def checked_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The routed layers of a model, after a self-test that steering takes hold in each.

    Two forward passes of a few tokens: in each layer the expert that was selected most is
    deactivated and one that was selected least activated, and the selection is read at the experts'
    input. Raises MoesteerError where it does not obey.
    """
    layers = trace_layers(model)
    counts = count_dummy_selections(model, layers)
    activated: list[Expert] = []
    deactivated: list[Expert] = []
    for layer in layers:
        selected = counts[layer.layer].table()[0]
        if layer.num_experts > layer.top_k:
            deactivated.append((layer.layer, int(selected.argmax())))
        if int(selected.min()) < int(selected.max()):
            activated.append((layer.layer, int(selected.argmin())))
    probe = Profile(tuple(activated), tuple(deactivated), name="self-test")
    try:
        with Steering(model, probe, layers):
            forward_dummy(model)
    except DidNotFire as failure:
        raise MoesteerError(
            f"{describe(model)} can't be steered: {failure} Its block bypasses the router that"
            " transformers names (a quantised or kernel-replaced block?)."
        ) from None
    return layers


def count_dummy_selections(
    model: PreTrainedModel, layers: Sequence[MoELayer]
) -> dict[int, SelectionCounts]:
    """How often the tokens of one dummy forward pass select each expert, by layer."""
    counts = {layer.layer: SelectionCounts(layer, 1) for layer in layers}
    undo = [
        observe(layer, lambda index, weights, c=counts[layer.layer]: c.add(index, weights, None))
        for layer in layers
    ]
    try:
        forward_dummy(model)
    finally:
        for restore in undo:
            restore()
    return counts


def _line(seen: LayerEvidence | DirectionEvidence) -> str:
    if isinstance(seen, LayerEvidence):
        return (
            f"  layer {seen.layer}: {seen.tokens} tokens"
            f"; activated selected by {_shares(seen.activated, seen.tokens)}"
            f"; deactivated by {_shares(seen.deactivated, seen.tokens)}"
        )
    whose = "" if seen.expert is None else f", expert {seen.expert}"
    where = f"  layer {seen.layer}, {seen.place}{whose}: {seen.tokens} tokens"
    if seen.operation == "ablate":
        return f"{where}; at most {seen.measured:.2%} of their norm left along the direction"
    return f"{where}; moved {seen.measured:+.4g} along the direction, {seen.expected:+.4g} expected"


def _shares(selected: dict[int, int], tokens: int) -> str:
    if not selected:
        return "–"
    return ", ".join(f"{e}: {n / tokens:.0%}" if tokens else f"{e}: –" for e, n in selected.items())
