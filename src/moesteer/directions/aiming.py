"""From a direction that was measured to one that steers: which, where, how strongly, on what.

A file of directions keeps every one that was measured; any of them can be put to use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesteer.direction import Direction, Operation, Place, Site, Window
from moesteer.directions.selection import every_write
from moesteer.errors import MoesteerError
from moesteer.profile import Profile, Side


@dataclass(frozen=True)
class Aim:
    """How a direction is used.

    Without a `place`, it is added at what enters its layer, or ablated from every write to the
    residual stream; with one, added at that place of its layer, or ablated there in all layers. A
    direction of an expert is used at that expert's output.
    """

    operation: Operation = "add"
    coefficient: float = 1.0
    place: Place | None = None
    window: Window = "all"

    def __post_init__(self) -> None:
        # What a direction refuses, it refuses before any is measured.
        Direction((1.0,), ((0, "input"),), self.operation, self.coefficient, self.window)

    @property
    def toward(self) -> Side:
        """Ablation takes the behaviour away, and with it A."""
        return "a" if self.operation == "add" and self.coefficient > 0 else "b"


def aimed(profile: Profile, candidates: Sequence[int], aim: Aim) -> Profile:
    """The profile with some of its candidates, by number, as the directions that it steers by."""
    if profile.steered_layers and profile.toward not in (None, aim.toward):
        raise MoesteerError(
            f"{profile.name} steers experts towards {profile.toward}, so its direction can't be"
            f" aimed towards {aim.toward}. Select experts the other way first (moesteer select)."
        )
    directions = tuple(_direction(profile, number, aim) for number in candidates)
    return replace(profile, directions=directions, toward=aim.toward)


def find_candidates(
    profile: Profile, layer: int, position: int, experts: Sequence[int]
) -> list[int]:
    """The numbers of a profile's candidates of a layer and position, one for each expert.

    Without experts, of directions of experts those whose routing differs by the threshold that they
    were found with. Raises MoesteerError where the profile has none such.
    """
    if profile.candidates is None:
        raise MoesteerError(
            f"{profile.name} holds no directions to choose from; make some with"
            " `moesteer direction`."
        )
    candidates = profile.candidates
    if candidates.kind == "residual" and experts:
        raise MoesteerError(
            f"{profile.name} holds directions of the residual stream, which belong to no expert;"
            " leave out --expert."
        )
    if twice := [expert for expert in experts if list(experts).count(expert) > 1]:
        raise MoesteerError(f"--expert names expert {twice[0]} twice.")
    if candidates.kind != "residual" and not experts:
        here = (candidates.layer == layer) & (candidates.position == position)
        kept = np.flatnonzero(here & (candidates.scores.get("kept", np.zeros(len(here))) > 0))
        if here.any() and not len(kept):
            raise MoesteerError(
                f"{profile.name}: of layer {layer} no expert's routing differs by the threshold;"
                " say which to use: --expert."
            )
        if len(kept):
            return kept.tolist()
    return [candidates.find(layer, position, expert) for expert in experts or (-1,)]


def _direction(profile: Profile, number: int, aim: Aim) -> Direction:
    candidates, model = profile.candidates, profile.model
    assert candidates is not None
    assert model is not None
    layer, expert = int(candidates.layer[number]), int(candidates.expert[number])
    sites: tuple[Site, ...]
    if expert >= 0:
        if aim.place not in (None, "mlp"):
            raise MoesteerError(
                f"a direction of expert {expert} is used at that expert's output; leave out"
                f" --place {aim.place}."
            )
        sites = ((layer, "mlp"),)
    elif aim.operation == "add":
        sites = ((layer, aim.place or "input"),)
    else:
        every = every_write(model.decoder_layers)
        sites = tuple(site for site in every if aim.place in (None, site[1]))
    return Direction(
        candidates.vector_of(number),
        sites,
        aim.operation,
        aim.coefficient,
        aim.window,
        expert if expert >= 0 else None,
    )
