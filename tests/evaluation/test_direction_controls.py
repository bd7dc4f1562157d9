"""Controls of directions: as strong, at the same sites, along something else."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.direction import Candidates, Direction, Site
from moesteer.errors import MoesteerError
from moesteer.evaluation.controls import arms, other_experts, random_control, reversed_control
from moesteer.evaluation.direction_controls import (
    below_threshold,
    over_threshold,
    random_directions,
)
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile

WIDTH = 64
SITES: tuple[Site, ...] = ((0, "input"), (0, "attention"), (3, "mlp"))
SHAPES = (LayerShape(1, 8, 2), LayerShape(2, 8, 2))


def vector(number: int, width: int = WIDTH) -> tuple[float, ...]:
    return tuple(np.random.default_rng([number, 7]).standard_normal(width).tolist())


def cosine(one: Direction, other: Direction) -> float:
    return float(np.dot(one.vector, other.vector)) / (one.norm * other.norm)


directions = st.lists(
    st.builds(
        Direction,
        vector=st.lists(
            st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3), min_size=4, max_size=4
        ).map(tuple),
        sites=st.sampled_from([SITES, SITES[:1], ((5, "mlp"),)]),
        coefficient=st.sampled_from([-3.0, 0.5, 400.0]),
        window=st.sampled_from(["prompt", "generation", "all"]),
    ),
    min_size=1,
    max_size=4,
)


@given(directions, st.integers(0, 2**40))
def test_random_directions_differ_from_what_was_found_in_their_vectors_only(
    found: list[Direction], seed: int
):
    control = random_directions(found, seed)
    assert control == random_directions(found, seed)
    for ours, theirs in zip(found, control, strict=True):
        assert replace(theirs, vector=ours.vector) == ours
        assert math.isclose(theirs.norm, ours.norm, rel_tol=1e-9)
        assert theirs.vector != ours.vector


def test_random_directions_are_nearly_orthogonal_to_all_others():
    found = Direction(vector(0, 2048), SITES)
    drawn = [random_directions([found], seed)[0] for seed in range(10)]
    for place, one in enumerate(drawn):
        # six standard deviations of a cosine of independent vectors
        assert all(abs(cosine(one, other)) < 6 / 2048**0.5 for other in [found, *drawn[:place]])


def test_one_vector_at_several_places_stays_one():
    both = [Direction(vector(0), SITES[:1]), Direction(vector(0), SITES[1:2], coefficient=-2.0)]
    one, other = random_directions([*both, Direction(vector(1), SITES)][:2], 3)
    assert one.vector == other.vector
    _, _, third = random_directions([*both, Direction(vector(1), SITES)], 3)
    assert third.vector != one.vector


def test_every_way_is_as_likely():
    """No axis is preferred: in three dimensions, a third of the squared length lies on each."""
    drawn = [random_directions([Direction((3.0, 0.0, 4.0), SITES)], s)[0] for s in range(500)]
    squares = np.square([direction.vector for direction in drawn])
    assert np.allclose(squares.mean(0), 25 / 3, atol=1.5)
    assert np.allclose(np.mean([direction.vector for direction in drawn], axis=0), 0, atol=0.6)


# -- experts -------------------------------------------------------------------------------------

KEPT = [(1, 2), (1, 5), (2, 0)]


def table(positions: tuple[int, ...] = (-2, -1)) -> Candidates:
    """A vector of its own for each expert and position of two layers, of growing norms."""
    places = [(s.layer, p, e) for s in SHAPES for e in range(s.experts) for p in positions]
    layer, position, expert = (np.array(column) for column in zip(*places, strict=True))
    vectors = np.array([vector(n) for n in range(len(places))], dtype=np.float32)
    kept = np.array([float((at, e) in KEPT) for at, _, e in places])
    return Candidates(
        "forced",
        layer,
        position,
        expert,
        vectors * (1 + np.arange(len(places)))[:, None].astype(np.float32),
        {"kept": kept, "routing": kept * 0.5},
    )


def used(*places: tuple[int, int, int], coefficient: float = 30.0) -> Profile:
    """A profile of the table's directions by (layer, position, expert)."""
    candidates = table()
    return Profile(
        directions=tuple(
            Direction(
                candidates.vector_of(candidates.find(layer, position, expert)),
                ((layer, "mlp"),),
                coefficient=coefficient,
                expert=expert,
            )
            for layer, position, expert in places
        ),
        candidates=candidates,
        name="p",
    )


def test_who_is_over_the_threshold():
    assert over_threshold(table()) == KEPT
    assert below_threshold(table(), 1) == [0, 1, 3, 4, 6, 7]
    assert below_threshold(table(), 2) == [1, 2, 3, 4, 5, 6, 7]
    unsaid = replace(table(), scores={})
    assert over_threshold(unsaid) == []
    assert below_threshold(unsaid, 1) == list(range(8))


@pytest.mark.parametrize("seed", range(15))
def test_other_experts_push_as_hard_with_their_own_vectors_of_the_same_position(seed: int):
    profile = used((1, -1, 2), (1, -1, 5), (2, -2, 0))
    control = other_experts(profile, SHAPES, seed)
    assert control == other_experts(profile, SHAPES, seed)
    assert control.candidates is None
    one, other, third = control.directions
    assert one.expert != other.expert
    candidates = table()
    for ours, theirs, position in zip(
        profile.directions, control.directions, (-1, -1, -2), strict=True
    ):
        assert replace(theirs, vector=ours.vector, expert=ours.expert) == ours
        assert math.isclose(theirs.norm, ours.norm, rel_tol=1e-6)
        layer = theirs.sites[0][0]
        assert theirs.expert in below_threshold(candidates, layer)
        own = candidates.vector_of(candidates.find(layer, position, theirs.expert or 0))
        assert cosine(replace(theirs, vector=own), theirs) == pytest.approx(1)
    assert (one.sites[0][0], third.sites[0][0]) == (1, 2)


def test_every_expert_below_the_threshold_can_be_drawn():
    profile = used((1, -1, 2))
    drawn = {other_experts(profile, SHAPES, seed).directions[0].expert for seed in range(100)}
    assert drawn == {0, 1, 3, 4, 6, 7}


def test_an_expert_used_twice_is_replaced_by_one():
    profile = used((1, -1, 2), (1, -2, 2))
    one, other = other_experts(profile, SHAPES, 0).directions
    assert one.expert == other.expert
    assert one.vector != other.vector


def test_other_experts_need_vectors_of_others():
    with pytest.raises(MoesteerError, match="p holds no vectors of other experts"):
        other_experts(replace(used((1, -1, 2)), candidates=None), SHAPES, 0)
    strange = Direction(vector(99), ((1, "mlp"),), expert=2)
    profile = replace(used((1, -1, 2)), directions=(strange,))
    with pytest.raises(MoesteerError, match="expert 2 of layer 1 is none of its candidates"):
        other_experts(profile, SHAPES, 0)
    seven = used(*((2, -1, e) for e in range(8)))
    with pytest.raises(MoesteerError, match="directions of 8 experts of layer 2 are used"):
        other_experts(seven, SHAPES, 0)


# -- arms ----------------------------------------------------------------------------------------

ADDED = Direction(vector(0), ((1, "input"),), coefficient=2.0)
ABLATED = Direction(vector(1), SITES, "ablate")


def test_arms_of_a_direction_of_a_dense_model():
    found, missing = arms(Profile(directions=(ADDED,), toward="a", name="p"), (), 2)
    assert list(found) == ["unsteered", "steered", "reversed", "random 0", "random 1"]
    assert missing == []
    backwards, random = found["reversed"], found["random 1"]
    assert backwards is not None
    assert random is not None
    assert backwards.directions == (replace(ADDED, coefficient=-2.0),)
    assert backwards.toward == "b"
    assert random.name == "random directions of the same norm (seed 1)"
    assert random.directions == random_directions([ADDED], 1)


def test_an_ablation_has_no_reversed_arm_and_says_why():
    found, missing = arms(Profile(directions=(ADDED, ABLATED), name="p"), (), 1)
    assert list(found) == ["unsteered", "steered", "random 0"]
    assert missing == ["no control reversed: an ablated direction has no sign to be reversed."]


def test_arms_of_directions_weighted_by_experts():
    found, missing = arms(used((1, -1, 2)), SHAPES, 2)
    assert missing == []
    assert list(found) == [
        "unsteered", "steered", "reversed", "random 0", "random 1", "other experts 0",
        "other experts 1",
    ]  # fmt: skip
    random = found["random 0"]
    assert random is not None
    assert random.directions[0].expert == 2
    found, missing = arms(replace(used((1, -1, 2)), candidates=None), SHAPES, 2)
    assert "other experts 0" not in found
    assert missing == [
        "no control other experts 0, other experts 1: p holds no vectors of other experts."
    ]


def test_both_kinds_are_replaced_at_once():
    both = replace(
        used((1, -1, 2)), activated=((1, 0),), deactivated=((2, 3),), toward="a", name="both"
    )
    found, missing = arms(both, SHAPES, 1)
    assert [note.partition(":")[0] for note in missing] == ["no control matched 0, bottom"]
    assert set(found) == {"unsteered", "steered", "reversed", "random 0", "other experts 0"}
    for name in ("random 0", "other experts 0"):
        control = found[name]
        assert control is not None
        assert control.directions != both.directions
        assert not {*control.activated, *control.deactivated} & {(1, 0), (2, 3)}
        assert len(control.activated) == len(control.deactivated) == 1
    random = random_control(both, SHAPES, 0)
    assert random.name == "random experts and directions of the same norm (seed 0)"
    backwards = reversed_control(both, SHAPES)
    assert (backwards.activated, backwards.deactivated) == (((2, 3),), ((1, 0),))
    assert backwards.directions[0].coefficient == -30
