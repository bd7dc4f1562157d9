"""Controls: as many experts, but others."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesteer.detection.selecting import ranked_experts, scores_by_expert
from moesteer.errors import MoesteerError
from moesteer.evaluation.controls import (
    arms,
    bottom_ranked,
    matched_control,
    random_control,
    reversed_control,
    shuffled_ranking,
)
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.profile import Profile, Scores

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


# -- controls that need scores -------------------------------------------------------------------

SHAPES = (LayerShape(0, 8, 2), LayerShape(3, 8, 2))
EXPERTS = [(shape.layer, e) for shape in SHAPES for e in range(8)]


def scored(
    value: dict[tuple[int, int], float] | None = None,
    rate: dict[tuple[int, int], float] | None = None,
    **chosen: Any,
) -> Profile:
    """A profile of two layers whose scores and selection rates are those given, 0 elsewhere."""

    def table(cells: dict[tuple[int, int], float] | None) -> np.ndarray:
        return np.array([[(cells or {}).get((s.layer, e), 0.0) for e in range(8)] for s in SHAPES])

    nothing, rates = np.zeros((2, 8)), table(rate)
    return Profile(
        **chosen,
        model=ModelFacts("m", None, "t", "h", "h", "f", SHAPES),
        scores=Scores(table(value), nothing, nothing, nothing, nothing, rates, rates),
        name="s",
    )


RATES = {(layer, e): e / 10 + layer / 100 + 0.05 for layer, e in EXPERTS}


@pytest.mark.parametrize("seed", range(10))
def test_matched_experts_are_others_of_the_layer_selected_about_as_often(seed: int):
    profile = scored(rate=RATES, activated=((0, 4), (3, 0)), deactivated=((3, 7),))
    control = matched_control(profile, SHAPES, seed)
    # The three nearest in rate, which grows with the number.
    (layer, one), (other_layer, other) = control.activated
    assert (layer, other_layer) == (0, 3)
    assert one in (2, 3, 5, 6)
    assert other in (1, 2, 3)
    ((last_layer, last),) = control.deactivated
    assert last_layer == 3
    assert last in (4, 5, 6)
    assert control == matched_control(profile, SHAPES, seed)


def test_matched_experts_differ_among_seeds_and_each_other():
    profile = scored(rate=RATES, deactivated=((0, 0), (0, 1), (0, 2), (0, 3)))
    controls = [matched_control(profile, SHAPES, seed) for seed in range(20)]
    assert all({e for _, e in c.deactivated} == {4, 5, 6, 7} for c in controls)
    single = scored(rate=RATES, activated=((0, 4),))
    assert len({matched_control(single, SHAPES, seed).activated for seed in range(20)}) == 3


def test_matching_needs_selection_rates():
    with pytest.raises(MoesteerError, match="s does not hold how often its experts are selected"):
        matched_control(scored(activated=((0, 1),)), SHAPES, 0)
    with pytest.raises(MoesteerError, match="hand holds no scores"):
        matched_control(Profile(activated=((0, 1),), name="hand"), SHAPES, 0)


def test_bottom_ranked_experts_are_the_last_of_all_layers():
    value = dict.fromkeys(EXPERTS, 0.9)
    value |= {(0, 5): 0.01, (0, 6): -0.02, (0, 7): 0.03, (3, 1): -0.04, (3, 2): 0.5}
    profile = scored(value, activated=((3, 0), (3, 4)), deactivated=((0, 0), (0, 1)))
    control = bottom_ranked(profile, SHAPES)
    # Layer 0 can activate two; the third smallest there goes to the deactivated ones.
    assert control.activated == ((0, 5), (0, 6))
    assert control.deactivated == ((0, 7), (3, 1))


def test_bottom_ranked_experts_pass_over_a_full_layer():
    value = dict.fromkeys(EXPERTS, 0.9) | {(0, e): e / 1000 for e in range(5)}
    value[3, 6] = 0.3
    profile = scored(value, activated=((3, 0), (3, 1), (0, 7)))
    assert bottom_ranked(profile, SHAPES).activated == ((0, 0), (0, 1), (3, 6))


def test_too_few_for_a_bottom():
    every = tuple((3, e) for e in range(6)) + tuple((0, e) for e in range(6))
    with pytest.raises(MoesteerError, match="s steers 12 experts, which leaves too few"):
        bottom_ranked(scored(deactivated=every), SHAPES)


def test_reversed_swaps():
    profile = scored(activated=((0, 1),), deactivated=((3, 2), (0, 5)), toward="a")
    control = reversed_control(profile, SHAPES)
    assert (control.activated, control.deactivated) == (((0, 5), (3, 2)), ((0, 1),))
    assert (control.toward, control.name) == ("b", "s reversed")


def test_reversed_keeps_the_strongest_where_a_layer_is_full_and_says_so():
    value = {(0, 1): -0.1, (0, 2): -0.9, (0, 3): -0.5, (3, 3): -0.2}
    profile = scored(value, deactivated=((0, 1), (0, 2), (0, 3), (3, 3)), activated=((3, 0),))
    control = reversed_control(profile, SHAPES)
    assert control.activated == ((0, 2), (0, 3), (3, 3))
    assert control.deactivated == ((3, 0),)
    assert control.name == "s reversed in part: 4 of 5 experts, as a layer can't take more"


def test_a_shuffled_ranking_holds_the_same_scores_elsewhere():
    value = {expert: (i - 7) / 10 for i, expert in enumerate(EXPERTS)}
    profile = scored(value, activated=((0, 1),))
    shuffled = [shuffled_ranking(profile, seed) for seed in range(5)]
    for ranking in shuffled:
        assert sorted(scores_by_expert(ranking).values()) == sorted(value.values())
        assert (ranking.activated, ranking.deactivated) == ((), ())
    assert len({tuple(ranked_experts(ranking)) for ranking in shuffled}) == 5
    assert ranked_experts(shuffled_ranking(profile, 3)) == ranked_experts(shuffled[3])


def test_a_shuffled_ranking_of_layers_of_unequal_width():
    shapes = (LayerShape(0, 3, 1), LayerShape(1, 5, 1))
    table = np.array([[0.1, 0.2, 0.3, 0.0, 0.0], [0.4, 0.5, 0.6, 0.7, 0.8]])
    profile = Profile(
        model=ModelFacts("m", None, "t", "h", "h", "f", shapes), scores=Scores(*[table] * 7)
    )
    found = scores_by_expert(shuffled_ranking(profile, 0))
    assert sorted(found.values()) == pytest.approx([i / 10 for i in range(1, 9)])


def test_all_arms_in_order():
    profile = scored(rate=RATES, activated=((0, 1),))
    found, missing = arms(profile, SHAPES, 2)
    assert missing == []
    assert list(found) == [
        "unsteered", "steered", "reversed", "random 0", "random 1", "matched 0", "matched 1",
        "bottom",
    ]  # fmt: skip
    assert found["unsteered"] is None
    assert found["steered"] is profile
    steered = [arm for arm in found.values() if arm is not None]
    assert all(len(arm.activated) + len(arm.deactivated) == 1 for arm in steered)


def test_a_profile_without_scores_has_fewer_arms_and_says_why():
    profile = Profile(activated=((0, 1),), name="by hand")
    found, (missing,) = arms(profile, SHAPES, 1)
    assert missing.startswith("no control matched 0, bottom: by hand holds no")
    assert list(found) == ["unsteered", "steered", "reversed", "random 0"]


def test_where_a_layer_has_too_few_others_there_are_no_random_arms():
    profile = scored(rate=RATES, deactivated=tuple((0, e) for e in range(5)))
    found, (missing,) = arms(profile, SHAPES, 1)
    assert missing.startswith("no control random 0, matched 0: s: 5 of 8")
    assert list(found) == ["unsteered", "steered", "reversed", "bottom"]
