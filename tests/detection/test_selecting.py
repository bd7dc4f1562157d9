"""From scores to a choice of experts."""

import inspect
import warnings
from dataclasses import replace

import numpy as np
import pytest

from moesteer.detection.selecting import ranked_experts, scores_by_expert, select_experts
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.gate import Gate, RoutingProbe
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.profile import Profile, Scores

MODEL = ModelFacts(
    id="org/model",
    revision=None,
    model_type="mixtral",
    config_hash="c",
    tokenizer_hash="t",
    family="softmax → top-k",
    layers=(LayerShape(1, 4, 2), LayerShape(4, 3, 1)),
)


def scored(*rows: list[float]) -> Profile:
    value = np.array(rows)
    return Profile(model=MODEL, scores=Scores(*[value] * 7), name="p")


# The fourth expert of layer 4 does not exist, whatever stands there.
PROFILE = scored([0.1, -0.5, 0.3, 0.0], [-0.3, 0.4, -0.2, 9.0])


def test_ranking_is_by_size_whatever_the_sign_and_equal_ones_keep_their_order():
    order = [(1, 1), (4, 1), (1, 2), (4, 0), (4, 2), (1, 0), (1, 3)]
    assert ranked_experts(PROFILE) == order
    assert scores_by_expert(PROFILE)[4, 2] == -0.2
    tied = scored([0.1] * 4, [-0.1] * 4)
    assert ranked_experts(tied) == [(1, 0), (1, 1), (1, 2), (1, 3), (4, 0), (4, 1), (4, 2)]


def test_toward_a():
    chosen = select_experts(PROFILE, activate=2, deactivate=2, toward="a")
    assert chosen.activated == ((4, 1), (1, 2))
    assert chosen.deactivated == ((1, 1), (4, 0))
    assert chosen.toward == "a"
    assert chosen.scores is PROFILE.scores


def test_toward_b_is_the_other_way_round():
    chosen = select_experts(PROFILE, activate=2, deactivate=2, toward="b")
    assert chosen.activated == ((1, 1), (4, 0))
    assert chosen.deactivated == ((4, 1), (1, 2))
    assert chosen.toward == "b"


def test_a_new_choice_replaces_the_old_one():
    first = select_experts(PROFILE, activate=2, deactivate=0, toward="a")
    second = select_experts(first, activate=0, deactivate=1, toward="a")
    assert second.activated == ()
    assert second.deactivated == ((1, 1),)


@pytest.mark.parametrize(
    ("activate", "deactivate", "toward", "said"),
    [
        (4, 0, "a", r"p: 4 experts to activate toward a, but only 3 have a score of that sign"),
        (0, 4, "a", r"4 experts to deactivate toward a, but only 3"),
        (4, 0, "b", r"4 experts to activate toward b, but only 3"),
        (3, 0, "b", r"2 experts are activated in layer 4 \(0, 2\).*k = 1"),
        (-1, 0, "a", "can't be negative"),
        (0, -1, "a", "can't be negative"),
    ],
)
def test_refused(activate: int, deactivate: int, toward, said: str):
    with pytest.raises(MoesteerError, match=said):
        select_experts(PROFILE, activate=activate, deactivate=deactivate, toward=toward)


def test_experts_that_make_no_difference_are_never_chosen():
    with pytest.raises(MoesteerError, match="but only 0"):
        select_experts(scored([0.0] * 4, [0.0] * 4), activate=1, deactivate=0, toward="a")


def test_no_scores():
    for profile in (Profile(name="hand"), replace(PROFILE, scores=None, name="hand")):
        with pytest.raises(MoesteerError, match="hand holds no scores to select experts by"):
            select_experts(profile, activate=1, deactivate=0, toward="a")


def test_a_cut_through_equal_scores_is_said():
    tied = scored([0.4, 0.4, 0.4, 0.1], [0.0, 0.0, 0.0, 0.0])
    with pytest.warns(MoesteerWarning, match=r"3 experts share the score \+0.400"):
        chosen = select_experts(tied, activate=2, deactivate=0, toward="a")
    assert chosen.activated == ((1, 0), (1, 1))


def with_interval(low: list[float], high: list[float]) -> Profile:
    value = np.array([[0.5, -0.4, 0.3, 0.2], [-0.1, 0.1, 0.0, 0.0]])
    ends = (np.array([row, [-0.2, 0.05, 0, 0]]) for row in (low, high))
    return Profile(model=MODEL, scores=Scores(value, *ends, *[value] * 4), name="p")


def test_experts_whose_interval_contains_0_are_warned_of():
    unsure = with_interval([0.4, -0.6, 0.0, 0.0], [0.6, 0.1, 0.5, 0.3])
    said = (
        r"p: the intervals of 2 of the 3 experts chosen contain 0, first that of expert 2 of layer"
        r" 1 \(\+0.300, interval \+0.000 … \+0.500\)"
    )
    with pytest.warns(MoesteerWarning, match=said):
        select_experts(unsure, activate=2, deactivate=1, toward="a")
    with pytest.warns(MoesteerWarning, match=r"of 1 of the 1 experts chosen.*expert 1 of layer 1"):
        select_experts(unsure, activate=1, deactivate=0, toward="b")
    select_experts(unsure, activate=1, deactivate=0, toward="a")  # 0.4 … 0.6: no warning


def test_where_there_is_no_interval_nothing_is_warned_of():
    select_experts(PROFILE, activate=2, deactivate=1, toward="a")


def test_a_gate_that_is_kept_for_the_other_side_is_warned_of():
    gated = replace(PROFILE, toward="a", gate=Gate(RoutingProbe(((1, 1),), (1.0,)), 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_experts(gated, activate=1, deactivate=0, toward="a").gate == gated.gate
    with pytest.warns(MoesteerWarning, match="keeps its gate.*when it steered toward a"):
        assert select_experts(gated, activate=1, deactivate=0, toward="b").gate == gated.gate


def test_a_side_that_is_none_is_refused():
    # Past the tests' own type checks, which would refuse it first.
    unchecked = inspect.unwrap(select_experts)
    with pytest.raises(MoesteerError, match="toward is 'A'"):
        unchecked(PROFILE, activate=1, deactivate=0, toward="A")  # pyright: ignore
