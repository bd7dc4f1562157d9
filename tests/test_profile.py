"""The profile: what contradicts itself is refused; its reversal and its fingerprint."""

from dataclasses import replace

import pytest

from made_profiles import MODEL, directed, full
from moesteer.direction import Direction
from moesteer.errors import MoesteerError
from moesteer.profile import Profile


def test_contradictions():
    with pytest.raises(MoesteerError, match=r"\(1, 2\), \(2, 0\) would be both"):
        Profile(((2, 0), (1, 2)), ((1, 2), (2, 0)))
    with pytest.raises(MoesteerError, match=r"\(1, 2\) is named twice"):
        Profile(((1, 2), (1, 2)))
    with pytest.raises(MoesteerError, match=r"\(1, 2\) is named twice"):
        Profile((), ((1, 2), (1, 2)))


def test_reversed():
    there = Profile(((1, 0),), ((1, 3), (2, 1)), toward="a", model=MODEL, name="p")
    back = there.reversed()
    assert back.activated == ((1, 3), (2, 1))
    assert back.deactivated == ((1, 0),)
    assert back.toward == "b"
    assert back.name == "p reversed"
    assert back.reversed() == replace(there, name="p reversed reversed")
    one_way = Profile((), ((5, 0), (5, 1)), model=MODEL)
    with pytest.raises(MoesteerError, match="2 experts are activated in layer 5"):
        one_way.reversed()


def test_what_directions_do_is_in_the_fingerprint():
    one = directed()
    prints = {
        one.fingerprint,
        replace(one, directions=one.directions[:1]).fingerprint,
        replace(one, directions=(replace(one.directions[0], window="all"),)).fingerprint,
        replace(one, directions=()).fingerprint,
    }
    assert len(prints) == 4
    assert one.lowest_layer == 0
    assert replace(one, activated=(), directions=one.directions[1:]).lowest_layer == 5
    entering = Direction((1.0, 0, 0), ((4, "input"),))
    assert replace(one, activated=(), directions=(entering,)).lowest_layer == 3
    assert not Profile().steers


def test_an_ablation_has_no_other_sign():
    with pytest.raises(MoesteerError, match="no sign to be reversed"):
        directed().reversed()
    turned = replace(directed(), directions=directed().directions[1:]).reversed()
    assert turned.directions[0].coefficient == 2.5


def test_layers_and_their_experts():
    profile = full()
    assert profile.steered_layers == (1, 2, 5)
    assert profile.experts_of(1) == ([0], [3])
    assert profile.experts_of(2) == ([], [1])
    assert profile.experts_of(3) == ([], [])


@pytest.mark.parametrize(("field", "value"), [("rule", "bogus"), ("toward", "A")])
def test_a_word_that_is_none_is_refused(field: str, value: str):
    with pytest.raises(MoesteerError, match=f"{field} is '{value}'"):
        Profile(**{field: value})  # pyright: ignore[reportArgumentType]
