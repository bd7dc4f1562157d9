"""Controls: the same intervention with experts that should not matter.

Steering as many experts as a profile does, at the same layers, perturbs a model whoever they are;
only what goes beyond the controls says something about the experts that were chosen.
"""

import random
from dataclasses import replace

from moesteer.errors import MoesteerError
from moesteer.profile import Expert, LayerShape, Profile, check_fits


def random_control(profile: Profile, layers: tuple[LayerShape, ...], seed: int) -> Profile:
    """As many random experts in the same layers, none of them the profile's own.

    MoesteerError where a layer has too few others, or the profile doesn't fit the layers.
    """
    check_fits(profile, layers)
    generator = random.Random(seed)
    activated: list[Expert] = []
    deactivated: list[Expert] = []
    for layer in profile.steered_layers:
        shape = next(shape for shape in layers if shape.layer == layer)
        up, down = profile.experts_of(layer)
        others = [e for e in range(shape.experts) if e not in {*up, *down}]
        if len(others) < len(up) + len(down):
            raise MoesteerError(
                f"{profile.name}: {len(up) + len(down)} of {shape.experts} experts of layer {layer}"
                " are steered, which leaves too few others for a random control."
            )
        drawn = generator.sample(others, len(up) + len(down))
        activated += [(layer, expert) for expert in drawn[: len(up)]]
        deactivated += [(layer, expert) for expert in drawn[len(up) :]]
    return replace(
        profile,
        activated=tuple(sorted(activated)),
        deactivated=tuple(sorted(deactivated)),
        evidence=None,
        scores=None,
        name=f"random experts (seed {seed})",
    )
