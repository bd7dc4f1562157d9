"""Controls of directions: as strong a push at the same sites, along something else.

    random          a random vector of the same norm: does any push do as well?
    other experts   of vectors weighted by experts: other experts of the layer, whose routing does
                    not tell the sides apart, each with its own vector at the same norm

In a space of d dimensions random vectors are almost orthogonal to each other and to what was found
(cosines about 1/√d), so nothing needs to be taken out of them. What the routing threshold kept is
never drawn among the others (Marbut, Olson, Wheeler 2026, arXiv 2606.04160).
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesteer.direction import Candidates, Direction
from moesteer.errors import MoesteerError
from moesteer.profile import Expert, Profile

KEPT = "kept"
"""The score of a candidate that says whether its expert's routing is over the threshold."""


def random_vector(width: int, norm: float, generator: np.random.Generator) -> tuple[float, ...]:
    """A vector of this norm whose direction is uniform on the sphere."""
    drawn = generator.standard_normal(width)
    return tuple(float(x) for x in drawn * (norm / np.linalg.norm(drawn)))


def random_directions(directions: Sequence[Direction], seed: int) -> tuple[Direction, ...]:
    """Each vector replaced by a random one of its norm, the same one wherever it stands."""
    generator = np.random.default_rng(seed)
    drawn: dict[tuple[float, ...], tuple[float, ...]] = {}
    for direction in directions:
        if direction.vector not in drawn:
            width, norm = len(direction.vector), direction.norm
            drawn[direction.vector] = random_vector(width, norm, generator)
    return tuple(replace(d, vector=drawn[d.vector]) for d in directions)


def directions_of_others(profile: Profile, seed: int) -> tuple[Direction, ...]:
    """The profile's directions, each expert's replaced by another's; what has none is random.

    Another expert's vector is its candidate at the same position, scaled to the norm that it takes
    the place of. MoesteerError where the profile holds no such candidates, or too few.
    """
    generator = random.Random(seed)
    drawn: dict[tuple[int, int], int] = {}
    found = []
    for direction, other in zip(
        profile.directions, random_directions(profile.directions, seed), strict=True
    ):
        if direction.expert is None:
            found.append(other)
            continue
        layer, candidates = direction.sites[0][0], _candidates(profile)
        if (layer, direction.expert) not in drawn:
            used = {d.expert for d in profile.directions if d.sites[0][0] == layer}
            taken = {expert for (at, _), expert in drawn.items() if at == layer}
            waiting = [e for e in below_threshold(candidates, layer) if e not in used | taken]
            if not waiting:
                raise MoesteerError(
                    f"{profile.name}: directions of {len(used)} experts of layer {layer} are used,"
                    " which leaves too few below the routing threshold for a control."
                )
            drawn[layer, direction.expert] = generator.choice(waiting)
        expert = drawn[layer, direction.expert]
        vector = _vector_of(candidates, direction, expert, profile.name)
        found.append(replace(direction, expert=expert, vector=vector))
    return tuple(found)


def over_threshold(candidates: Candidates) -> list[Expert]:
    """The experts whose routing differs between the sides by at least the threshold."""
    kept = candidates.scores.get(KEPT, np.zeros(len(candidates))) > 0
    layers, experts = candidates.layer[kept].tolist(), candidates.expert[kept].tolist()
    return sorted(set(zip(layers, experts, strict=True)))


def below_threshold(candidates: Candidates, layer: int) -> list[int]:
    """The experts of a layer that were measured, and whose routing is below the threshold."""
    measured = set(candidates.expert[candidates.layer == layer].tolist()) - {-1}
    return sorted(measured - {expert for at, expert in over_threshold(candidates) if at == layer})


def _candidates(profile: Profile) -> Candidates:
    if profile.candidates is None:
        raise MoesteerError(f"{profile.name} holds no vectors of other experts.")
    return profile.candidates


def _vector_of(
    candidates: Candidates, direction: Direction, expert: int, name: str
) -> tuple[float, ...]:
    """An expert's vector where the direction's own was read, at the direction's norm."""
    layer = direction.sites[0][0]
    assert direction.expert is not None
    mine = np.flatnonzero((candidates.layer == layer) & (candidates.expert == direction.expert))
    own = np.array(direction.vector) / direction.norm
    likeness = [float(own @ v) / float(np.linalg.norm(v) or 1) for v in candidates.vector[mine]]
    if not likeness or max(likeness) < 1 - 1e-4:
        raise MoesteerError(
            f"{name}: the direction of expert {direction.expert} of layer {layer} is none of its"
            " candidates, so nobody knows where to read another expert's."
        )
    position = int(candidates.position[mine[int(np.argmax(likeness))]])
    vector = candidates.vector[candidates.find(layer, position, expert)].astype(np.float64)
    if not np.linalg.norm(vector) > 0:
        raise MoesteerError(
            f"{name}: the direction of expert {expert} of layer {layer} has norm 0."
        )
    return tuple(float(x) for x in vector * (direction.norm / np.linalg.norm(vector)))
