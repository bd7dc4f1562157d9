"""Controls: as many experts, in the same layers, but others."""

from collections import Counter
from dataclasses import replace

import pytest

from moesteer.errors import MoesteerError
from moesteer.evaluation.controls import random_control
from moesteer.profile import LayerShape, Profile

LAYERS = (LayerShape(1, 8, 2), LayerShape(2, 8, 2), LayerShape(7, 6, 1))
PROFILE = Profile(
    activated=((1, 0), (1, 5), (7, 2)),
    deactivated=((1, 3), (2, 0), (2, 1), (2, 7)),
    rule="paper",
    dose=0.5,
    toward="a",
    name="p",
)


@pytest.mark.parametrize("seed", range(20))
def test_as_many_others_in_the_same_layers(seed: int):
    control = random_control(PROFILE, LAYERS, seed)
    for ours, theirs in (
        (control.activated, PROFILE.activated),
        (control.deactivated, PROFILE.deactivated),
    ):
        assert Counter(layer for layer, _ in ours) == Counter(layer for layer, _ in theirs)
    steered = {*PROFILE.activated, *PROFILE.deactivated}
    assert not steered & {*control.activated, *control.deactivated}
    assert (control.rule, control.dose, control.toward) == ("paper", 0.5, "a")
    assert f"seed {seed}" in control.name
    # The constructor has checked that none is both or twice.


def test_the_seed_decides():
    controls = [random_control(PROFILE, LAYERS, seed) for seed in range(30)]
    assert random_control(PROFILE, LAYERS, 7) == controls[7]
    assert len({control.activated for control in controls}) > 10


def test_every_other_expert_can_be_drawn():
    drawn = Counter(
        expert
        for seed in range(200)
        for expert in random_control(PROFILE, LAYERS, seed).activated
        if expert[0] == 7
    )
    assert sorted(drawn) == [(7, 0), (7, 1), (7, 3), (7, 4), (7, 5)]
    assert min(drawn.values()) > 15  # 40 each, were it even


def test_too_few_others():
    with pytest.raises(MoesteerError, match=r"p: 5 of 8 experts of layer 2 are steered"):
        random_control(Profile((), tuple((2, e) for e in range(5)), name="p"), LAYERS, 0)


def test_a_profile_of_another_model():
    with pytest.raises(MoesteerError, match=r"\(5, 0\) names layer 5"):
        random_control(replace(PROFILE, activated=((5, 0),)), LAYERS, 0)


def test_nothing_steered_nothing_drawn():
    control = random_control(Profile(), LAYERS, 0)
    assert (control.activated, control.deactivated) == ((), ())
