"""The robustness curve: who is lost, and what is read off, against brute force and by hand."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.auditing.concentration import Concentration, Measure
from moesteer.auditing.importance import ExpertEffect, Importance
from moesteer.auditing.restoring import Tried, activating, arms_of_restoring, best_of
from moesteer.auditing.robustness import (
    INTACT,
    area_between,
    arms_of_losses,
    halved,
    losses,
    numbers_up_to,
    others_alike,
)
from moesteer.evaluation.comparison import STEERED, UNSTEERED
from moesteer.model_facts import LayerShape
from moesteer.profile_fit import check_fits

LAYERS = (LayerShape(1, 6, 2), LayerShape(4, 4, 2))


def importance(effects: dict[tuple[int, int], float], knock_in: float = 1.0) -> Importance:
    """Experts of these effects; `knock_in` times their effect is what activating them adds."""
    experts = [
        ExpertEffect(
            layer=layer,
            expert=expert,
            effect=float(value),
            low=float(value),
            high=float(value),
            q=0.0,
            sham=0.0,
            knock_in=float(knock_in * value),
            turned=0,
            named=False,
            held=None,
        )
        for (layer, expert), value in effects.items()
    ]
    experts.sort(key=lambda expert: (-expert.effect, expert.place))
    none = Concentration(len(effects), *[Measure(None, None, None)] * 6)
    return Importance("made", 1, 1, 1, 1, 0.0, (1, 0), tuple(experts), none, none)


def full(**named: float) -> dict[tuple[int, int], float]:
    """All experts of LAYERS; those that are not named, as "l4e1", have a small effect."""
    places = [(shape.layer, e) for shape in LAYERS for e in range(shape.experts)]
    small = {place: 0.01 * (1 + number) for number, place in enumerate(places)}
    return small | {(int(key[1]), int(key[3])): value for key, value in named.items()}


# -- who is lost ---------------------------------------------------------------------------------


def test_numbers() -> None:
    assert numbers_up_to(0) == []
    assert numbers_up_to(1) == [1]
    assert numbers_up_to(8) == [1, 2, 3, 5, 8]
    assert numbers_up_to(10, 4, 11, 0) == [1, 2, 3, 4, 5, 8, 10]


def test_a_layer_that_can_t_lose_more_is_passed_over() -> None:
    """Layer 4 has 4 experts and k = 2: two can be lost; the third is kept, and said so."""
    made = importance(full(l4e0=9, l4e1=8, l4e2=7, l1e5=6))
    found = losses(made, LAYERS, 3, seeds=2)
    assert found.important == ((4, 0), (4, 1), (1, 5))
    assert any(note.startswith("(4, 2): kept") for note in found.notes)
    # Of random ones of layer 4 there are the other two.
    for lost in found.randomly:
        assert Counter(layer for layer, _ in lost) == {4: 2, 1: 1}
        assert not {*lost} & {*found.important}
    # Least first: (1, 0), (1, 1), (1, 2) have the smallest effects.
    assert found.least == ((1, 0), (1, 1), (1, 2))


def test_the_curve_ends_where_nobody_takes_away() -> None:
    made = importance(dict.fromkeys(full(), -1.0) | {(1, 2): 3.0})
    found = losses(made, LAYERS, 5, seeds=1)
    assert found.important == ((1, 2),)
    assert any("the curve ends at 1" in note for note in found.notes)
    assert losses(importance(dict.fromkeys(full(), -1.0)), LAYERS, 5, 1).important == ()


def test_without_enough_others_random_sets_end() -> None:
    """Four of six experts of layer 1 are lost: it has two others."""
    made = importance(full(l1e0=9, l1e1=8, l1e2=7, l1e3=6))
    found = losses(made, LAYERS, 4, seeds=1)
    assert found.important == ((1, 0), (1, 1), (1, 2), (1, 3))
    assert len(found.randomly[0]) == 2
    assert any("beyond 2 lost experts there are no random ones" in note for note in found.notes)
    arms = arms_of_losses(found, [2, 4])
    assert "random 0" in arms[2]
    assert "random 0" not in arms[4]


@given(st.integers(0, 99), st.lists(st.sampled_from([*full()]), unique=True, max_size=4))
def test_random_ones_are_others_of_the_same_layers_and_nested(seed: int, taken: list) -> None:
    found = others_alike(taken, LAYERS, taken, seed)
    assert [layer for layer, _ in found] == [layer for layer, _ in taken[: len(found)]]
    assert not {*found} & {*taken}
    assert len({*found}) == len(found)
    assert {*found} <= {*full()}
    for number in range(len(taken)):
        assert others_alike(taken[:number], LAYERS, taken, seed) == found[:number]


def test_arms_fit_the_model_and_say_who_they_are() -> None:
    found = losses(importance(full(l4e0=9, l1e1=8)), LAYERS, 3, seeds=2)
    arms = arms_of_losses(found, [1, 3])
    assert [*arms[1]] == [UNSTEERED, STEERED, "random 0", "random 1", "bottom"]
    assert arms[1][UNSTEERED] == (INTACT, None)
    assert arms[1][STEERED][0] == "the most important expert lost"
    names = [name for roles in arms.values() for name, _ in roles.values()]
    assert len({*names}) == len(names) - 1  # the intact model once
    for roles in arms.values():
        for _, profile in roles.values():
            if profile is not None:
                check_fits(profile, LAYERS)
    lost = arms[3][STEERED][1]
    assert lost is not None
    assert lost.deactivated == ((1, 1), (4, 0), (4, 3))


# -- what restores -------------------------------------------------------------------------------


def test_those_that_are_left_are_activated_as_far_as_a_layer_can() -> None:
    made = importance(full(l4e0=9, l4e1=8, l4e2=7, l4e3=6))
    order = activating(made, LAYERS, [(4, 0)], 3)
    # k = 2 of layer 4: its third comes too late; then the strongest of layer 1.
    assert order == [(4, 1), (4, 2), (1, 5)]
    assert activating(importance(full(), knock_in=-1.0), LAYERS, [], 3) == []


def test_random_ones_keep_the_loss() -> None:
    arms = arms_of_restoring([(4, 0)], [(1, 0), (4, 1)], LAYERS, seeds=3)
    assert [*arms] == [UNSTEERED, STEERED, "random 0", "random 1", "random 2"]
    for role, (_, profile) in arms.items():
        assert profile.deactivated == ((4, 0),)
        check_fits(profile, LAYERS)
        assert len(profile.activated) == (0 if role == UNSTEERED else 2)
        if role.startswith("random"):
            assert not {*profile.activated} & {(1, 0), (4, 0), (4, 1)}


def test_of_equal_shares_the_fewest_are_chosen() -> None:
    tried = [Tried(0, 0.1), Tried(1, 0.4), Tried(2, 0.4)]
    assert best_of(tried) == Tried(1, 0.4)
    assert best_of([Tried(0, 0.4), Tried(3, 0.4)]).activated == 0


# -- what is read off ----------------------------------------------------------------------------


def hits(count: int, of: int = 20) -> np.ndarray:
    return np.arange(of) < count


def test_halved_by_hand() -> None:
    lost = {1: hits(15), 2: hits(11), 5: hits(10), 8: hits(2)}
    assert halved(hits(20), lost).value == 5
    assert halved(hits(20), {n: hits(11) for n in lost}).value is None
    assert halved(hits(20), {1: hits(0), 2: hits(20)}).value == 1
    found = halved(hits(20), {1: hits(20), 3: hits(0)})
    assert (found.value, found.low, found.high) == (3, 3, 3)
    assert halved(hits(0), {1: hits(0)}).value is None


def test_halved_is_open_where_it_may_not_fall_so_far() -> None:
    found = halved(hits(40, 40), {2: hits(32, 40), 5: hits(19, 40)})
    assert found.value == 5
    assert found.high is None
    assert found.low == 5


@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
@settings(max_examples=20, deadline=None)
def test_halved_is_that_of_brute_force(seed: int, prompts: int) -> None:
    generator = np.random.default_rng(seed)
    intact = generator.random(prompts) < 0.9
    lost = {n: generator.random(prompts) < 1 / n for n in (1, 2, 3, 5)}
    fallen = [n for n in lost if intact.any() and lost[n].mean() <= intact.mean() / 2]
    found = halved(intact, lost)
    assert found.value == min(fallen, default=None)
    if found.value is not None:
        assert (found.low or 6) <= (found.high or 6)


def test_area_by_hand() -> None:
    """Random: always all. Important: half at 1, none at 3. Gap 0, ½, 1 at 0, 1, 3."""
    important = {1: hits(10), 3: hits(0)}
    randomly = {n: np.stack([hits(20), hits(20)]) for n in (1, 3)}
    area = area_between(important, randomly)
    assert area is not None
    assert area.most == 3
    assert area.value == pytest.approx((0.25 * 1 + 0.75 * 2) / 3)
    assert area.low < area.value < area.high
    other = area_between({1: hits(20), 3: hits(20)}, {n: hits(0)[None] for n in (1, 3)})
    assert other is not None
    assert other.value == pytest.approx(-(0.5 * 1 + 1 * 2) / 3)


def test_area_goes_as_far_as_there_are_random_sets() -> None:
    area = area_between({1: hits(0), 3: hits(0)}, {1: hits(20)[None]})
    assert area is not None
    assert (area.most, area.value) == (1, 0.5)
    assert area_between({1: hits(0)}, {}) is None
