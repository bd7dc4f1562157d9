"""Does a profile fit the model, and the place, where it is to be used? What doesn't is refused.

Both values are shown, the profile's and the model's. What is unknown is not compared.
"""

import warnings
from typing import TYPE_CHECKING

from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.gate import DirectionProbe
from moesteer.model_facts import UNKNOWN, LayerShape, ModelFacts

if TYPE_CHECKING:  # which checks itself by what is here
    from moesteer.profile import Profile

NORM_TOLERANCE = 1e-4
"""Relative; loading the same weights in another dtype changes a router's norm by about 1e-5."""


def check_model(profile: "Profile", model: ModelFacts) -> None:
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


def check_fits(profile: "Profile", layers: tuple[LayerShape, ...]) -> None:
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


def check_directions(profile: "Profile", model: ModelFacts) -> None:
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


def check_gate(profile: "Profile", model: ModelFacts) -> None:
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


def check_ungated(profile: "Profile | None", here: str = "code that runs the model itself") -> None:
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


def _check_weights(name: str, made_on: ModelFacts, model: ModelFacts) -> None:
    """Refuse other routers; warn of other weights beside them, which fine-tuning may change."""
    routers = zip(model.layers, made_on.router_norms, model.router_norms, strict=False)
    for shape, theirs, ours in routers:
        if abs(theirs - ours) > NORM_TOLERANCE * theirs:
            raise MoesteerError(
                f"{name} was made on {made_on.id}, whose weights differ from those of {model.id}:"
                f" the router of layer {shape.layer} has norm {theirs:.6g} in the profile and"
                f" {ours:.6g} in the model. Make it anew on this model."
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


# -- words ---------------------------------------------------------------------------------------


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
