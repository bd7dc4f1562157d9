"""What doesn't fit a model is refused with both values; what may still steer is warned of."""

import re
from dataclasses import replace

import pytest

from made_profiles import LAYERS, MODEL, directed, full
from moesteer.direction import Direction
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.model_facts import UNKNOWN, LayerShape
from moesteer.profile import Profile
from moesteer.profile_fit import check_fits, check_model


@pytest.mark.parametrize(
    ("activated", "deactivated", "said"),
    [
        (((1, 0), (1, 1), (1, 3)), (), r"3 experts are activated in layer 1 \(0, 1, 3\).*k = 2"),
        (((5, 0), (5, 1)), (), r"2 experts are activated in layer 5 \(0, 1\).*k = 1"),
        ((), ((2, 0), (2, 1), (2, 2)), r"3 of 4 experts are deactivated in layer 2.*k = 2"),
        (((0, 1),), (), r"\(0, 1\) names layer 0.*routes in layers 1–2, 5 only"),
        ((), ((3, 1),), r"\(3, 1\) names layer 3"),
        (((1, 4),), (), r"\(1, 4\) does not exist: layer 1 has experts 0–3"),
        ((), ((5, 3),), r"\(5, 3\) does not exist: layer 5 has experts 0–2"),
        (((1, -1),), (), r"\(1, -1\) does not exist"),
    ],
)
def test_refused_on_this_model(activated: tuple, deactivated: tuple, said: str):
    by_hand = Profile(activated, deactivated)
    with pytest.raises(MoesteerError, match=said):
        check_fits(by_hand, LAYERS)
    with pytest.raises(MoesteerError, match=said):
        check_model(by_hand, MODEL)
    with pytest.raises(MoesteerError, match=said):
        Profile(activated, deactivated, model=MODEL)


def test_as_many_as_a_layer_can_take():
    check_fits(Profile(((1, 0), (1, 1), (5, 2)), ((1, 2), (1, 3), (5, 0), (5, 1))), LAYERS)
    check_fits(Profile(), LAYERS)


def test_the_same_model_elsewhere_fits():
    check_model(full(), MODEL)
    elsewhere = replace(
        MODEL,
        id="/models/copy",
        revision=None,
    )
    check_model(full(), elsewhere)


@pytest.mark.parametrize(
    ("change", "in_profile", "in_model"),
    [
        ({"model_type": "olmoe"}, "qwen3_moe", "olmoe"),
        ({"layers": LAYERS[:2]}, "routed layers is 3", "2"),
        ({"layers": (*LAYERS[:2], LayerShape(6, 3, 1))}, "1–2, 5", "1–2, 6"),
        ({"layers": (*LAYERS[:2], LayerShape(5, 8, 1))}, "3–4", "4, 8"),
        ({"layers": (*LAYERS[:2], LayerShape(5, 3, 2))}, "1–2", "2"),
        ({"family": "sigmoid → top-k"}, "softmax → top-k", "sigmoid → top-k"),
        ({"config_hash": "c1"}, "config hash is c0", "c1"),
        ({"router_norms": (1.0, 2.01, 3.0)}, "layer 2 has norm 2 ", "2.01"),
    ],
)
def test_another_model_is_refused_with_both_values(change: dict, in_profile: str, in_model: str):
    other = replace(MODEL, id="org/other", **change)
    both = f"{re.escape(in_profile)}.*in the profile and {re.escape(in_model)} in the model"
    with pytest.raises(MoesteerError, match=both) as refusal:
        check_model(full(), other)
    assert "full.safetensors was made on org/model" in str(refusal.value)
    assert "org/other" in str(refusal.value)


def test_what_the_source_did_not_name_is_not_compared():
    anonymous = replace(
        MODEL, id=UNKNOWN, model_type=UNKNOWN, config_hash=UNKNOWN, family=UNKNOWN, router_norms=()
    )
    profile = replace(full(), model=anonymous)
    check_model(profile, MODEL)
    with pytest.raises(MoesteerError, match="layer numbers"):
        check_model(profile, replace(MODEL, layers=(LayerShape(0, 4, 2), *LAYERS[1:])))


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        (Direction((1.0, 2.0), ((0, "mlp"),)), "has 2 numbers, but the hidden states of .* have 3"),
        (Direction((1.0, 2.0, 3.0), ((6, "mlp"),)), "names layer 6, but .* has layers 0–5"),
        (Direction((1.0, 2.0, 3.0), ((5, "mlp"),), expert=3), "expert 3 of layer 5.* 3 experts"),
        (Direction((1.0, 2.0, 3.0), ((0, "mlp"),), expert=0), "expert 0 of layer 0.* 0 experts"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(direction: Direction, said: str):
    with pytest.raises(MoesteerError, match=said):
        Profile(directions=(direction,), model=directed().model)


def test_another_chat_template_is_a_warning():
    profile = Profile(activated=((1, 0),), model=MODEL, name="mine")
    with pytest.warns(MoesteerWarning, match="mine was made with another tokenizer"):
        check_model(profile, replace(MODEL, tokenizer_hash="other"))
    check_model(profile, MODEL)


def test_other_weights_beside_the_same_routers_are_a_warning():
    profile = Profile(activated=((1, 0),), model=replace(MODEL, layer_norms=(1.0, 2.0, 3.0)))
    with pytest.warns(MoesteerWarning, match="layer 2: norm 2 in the profile, 2.1 in the model"):
        check_model(profile, replace(MODEL, layer_norms=(1.0, 2.1, 3.0)))
    check_model(profile, replace(MODEL, layer_norms=(1.00001, 2.0, 3.0)))


def test_weights_that_cannot_be_compared_are_a_warning():
    profile = Profile(activated=((1, 0),), model=MODEL)
    with pytest.warns(MoesteerWarning, match="can't be compared"):
        check_model(profile, replace(MODEL, router_norms=()))
