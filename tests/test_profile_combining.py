"""Profiles of profiles; what contradicts is refused."""

from dataclasses import replace

import pytest

from made_profiles import EVIDENCE, MODEL, directed
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.profile_combining import combine


def test_directions_and_experts_compose():
    one = directed()
    experts = Profile(((2, 1),), rule="exact", name="experts")
    both = combine(replace(one, activated=()), experts)
    assert both.activated == ((2, 1),)
    assert both.directions == one.directions
    assert both.candidates is None
    paper = Profile(((2, 1),), rule="paper", dose=0.5)
    assert combine(replace(one, activated=()), paper).rule == "paper"
    with pytest.raises(MoesteerError, match="two directions are ablated at the input of layer 0"):
        combine(one, Profile(directions=(replace(one.directions[0], vector=(1.0, 1.0, 1.0)),)))


def test_combine():
    first = Profile(((1, 0),), ((2, 1),), name="first")
    second = Profile(((1, 0), (5, 1)), ((2, 0),), model=MODEL, evidence=EVIDENCE, name="second")
    both = combine(first, second)
    assert both.activated == ((1, 0), (5, 1))
    assert both.deactivated == ((2, 1), (2, 0))
    assert both.name == "first + second"
    assert both.model == MODEL  # whichever names one: it is still checked against the model
    assert both.evidence is None
    assert combine(first) == replace(first, toward=None)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Profile(rule="paper"), r"rule exact, dose 1.0.*rule paper"),
        (Profile(dose=0.5), r"dose 1.0.*dose 0.5"),
        (Profile((), ((1, 0),)), r"\(1, 0\) would be both"),
        (Profile(((1, 1), (1, 2))), r"3 experts are activated in layer 1"),
    ],
)
def test_combine_refuses_what_contradicts(other: Profile, said: str):
    with pytest.raises(MoesteerError, match=said):
        combine(Profile(((1, 0),), model=MODEL), other)


def test_combine_refuses_profiles_of_different_models():
    one = Profile(model=MODEL, name="one")
    other = Profile(model=replace(MODEL, id="org/other", config_hash="c1"), name="other")
    retrained = Profile(model=replace(MODEL, router_norms=(1.0, 2.0, 4.0)), name="retrained")
    said = r"other was made on org/other and does not fit org/model: config hash is c1.*c0"
    with pytest.raises(MoesteerError, match=said):
        combine(one, other)
    with pytest.raises(MoesteerError, match=said):
        combine(Profile(name="by hand"), one, other)
    with pytest.raises(MoesteerError, match=r"retrained.*layer 5 has norm 4.*3"):
        combine(one, retrained)


def test_profiles_of_other_chat_options_do_not_combine():
    one, other = (Profile(chat_options={"enable_thinking": thinks}) for thinks in (True, False))
    with pytest.raises(MoesteerError, match="different chat options"):
        combine(one, other)
    assert combine(one, one).chat_options == {"enable_thinking": True}
