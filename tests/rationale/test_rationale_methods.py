"""Each method's reduction beside the formula written out, and occlusion on models made up."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_laid import made_laid

from moesteer.engines.base import TokenGradient
from moesteer.engines.readouts import Readout
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.rationale.labels import Decision, decision_readout
from moesteer.rationale.layout import Laid
from moesteer.rationale.masking import Mask
from moesteer.rationale.methods import attention, saliency
from moesteer.rationale.methods.behaviour_routing import behaviour_routing
from moesteer.rationale.methods.gate_x_gradient import gate_x_gradient
from moesteer.rationale.methods.input_x_gradient import input_x_gradient
from moesteer.rationale.methods.integrated_gradients import gap_note
from moesteer.rationale.methods.occlusion import masked, occlusion
from moesteer.rationale.methods.random_units import random_scores

# -- attention -----------------------------------------------------------------------------------


def _maps(seed: int, layers: int, tokens: int) -> torch.Tensor:
    """Causal attention maps, whose rows sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layers, tokens, tokens, generator=generator).tril()
    return scores / scores.sum(-1, keepdim=True)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 8))
def test_attention_is_read_off_the_last_row(seed: int, layers: int, tokens: int) -> None:
    maps = _maps(seed, layers, tokens)
    half = [(layer + np.eye(tokens)) / 2 for layer in maps.double().numpy()]
    product = np.linalg.multi_dot([*half[::-1], np.eye(tokens), np.eye(tokens)])
    np.testing.assert_allclose(attention.rollout(maps), product[-1], atol=1e-6)
    np.testing.assert_allclose(attention.last(maps), maps[layers - 1, tokens - 1].numpy())
    np.testing.assert_allclose(attention.mean(maps), maps.numpy().mean(0)[-1], atol=1e-6)
    for reading in (attention.last, attention.mean, attention.rollout):
        assert reading(maps).sum() == pytest.approx(1, abs=1e-5)


def test_rollout_of_two_layers_by_hand() -> None:
    """Token 2 looks at token 1 above, which looked at token 0 below."""
    look = torch.eye(3).repeat(2, 1, 1)
    look[1, 2] = torch.tensor([0.0, 1.0, 0.0])
    look[0, 1] = torch.tensor([1.0, 0.0, 0.0])
    np.testing.assert_allclose(attention.rollout(look), [0.25, 0.25, 0.5])
    np.testing.assert_allclose(attention.last(look), [0, 1, 0])
    np.testing.assert_allclose(attention.mean(look), [0, 0.5, 0.5])


# -- gradients -----------------------------------------------------------------------------------


def test_input_x_gradient_of_a_linear_model_is_weight_times_input() -> None:
    weight, embedding = torch.randn(5, 3), torch.randn(5, 3, requires_grad=True)
    value = (weight * embedding).sum() + 7
    (gradient,) = torch.autograd.grad(value, embedding)
    found = input_x_gradient(TokenGradient(gradient, embedding.detach()))
    rows = zip(weight.tolist(), embedding.tolist(), strict=True)
    by_hand = [sum(w * e for w, e in zip(*row, strict=True)) for row in rows]
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    assert found.sum() == pytest.approx(value.item() - 7, abs=1e-5)


def test_saliency_by_hand() -> None:
    gradient = torch.tensor([[3.0, -4.0], [0.0, 0.0], [-1.0, 0.0]])
    found = TokenGradient(gradient, torch.ones(3, 2), torch.tensor([0.5, -1.0, 0.0]))
    np.testing.assert_array_equal(saliency.l1(found), [7, 0, 1])
    np.testing.assert_array_equal(saliency.l2(found), [5, 0, 1])
    np.testing.assert_array_equal(input_x_gradient(found), [-1, 0, -1])
    np.testing.assert_array_equal(gate_x_gradient(found), [0.5, -1, 0])


def test_scores_that_do_not_add_up_are_told() -> None:
    sources = [f"made:{n}" for n in range(4)]
    assert gap_note(sources, [None] * 4) is None
    assert gap_note(sources, [0.001, 0.0099, 0.0, None]) is None
    assert gap_note(sources, [0.02, 0.5, 0.0, None]) == (
        "integrated gradients of 2 of 3 readings miss more than 1% of what they should sum to, at"
        " most 50.0% (made:1)."
    )


# -- occlusion -----------------------------------------------------------------------------------


class _Bag:
    """A model that decides by the sum of its tokens' weights, and must be asked at a text's end."""

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights

    def read(self, readouts: Sequence[Readout], profiles: Sequence[Profile | None]) -> np.ndarray:
        assert profiles == ["the profile"]
        for readout in readouts:
            assert {term.position for term in readout.terms if term.weight} == {len(readout.ids)}
        return np.array([[self.weights[list(readout.ids)].sum() for readout in readouts]])


LAID = [made_laid({"text": "A gate is red."}), made_laid({"a": "Two.", "b": "Texts, there."})]
SAID = Decision("right", "wrong", {})


def _long_labels(laid: Laid) -> Laid:
    """Labels that begin with the same two tokens."""
    return replace(laid, labels={"right": (3, 4, 200, 7), "wrong": (3, 4, 201)})


@given(st.integers(0, 10**6), st.booleans())
def test_occlusion_of_a_sum_is_the_word_s_own_part(seed: int, long: bool) -> None:
    weights = np.random.default_rng(seed).normal(size=300)
    laid = [_long_labels(one) if long else one for one in LAID]
    readouts = [decision_readout(one, SAID) for one in laid]
    engine: Any = _Bag(weights)
    steered: Any = "the profile"
    for mask, instead in ((Mask("delete", None), 0.0), (Mask("neutral", 250), weights[250])):
        found = occlusion(engine, laid, readouts, mask, steered)
        for one, drops in zip(laid, found, strict=True):
            own = [sum(weights[one.ids[t]] - instead for t in unit.tokens) for unit in one.units]
            np.testing.assert_allclose(drops, own, atol=1e-9)


def test_a_masked_readout_is_that_of_the_shorter_prompt() -> None:
    laid = _long_labels(LAID[0])
    readout = decision_readout(laid, SAID)
    shorter = replace(laid, ids=laid.ids[:2] + laid.ids[3:])
    assert masked(readout, laid, 1, Mask("delete", None)) == decision_readout(shorter, SAID)
    other = replace(laid, ids=(*laid.ids[:2], 9, *laid.ids[3:]))
    assert masked(readout, laid, 1, Mask("neutral", 9)) == decision_readout(other, SAID)


# -- routing and chance --------------------------------------------------------------------------


def test_a_behaviour_without_scores() -> None:
    with pytest.raises(MoesteerError, match="by hand has no scores of experts; give a profile"):
        behaviour_routing(SimpleNamespace(), [], Profile(name="by hand"))  # pyright: ignore


def test_random_scores_are_an_instance_s_own() -> None:
    first, second = (made_laid({"text": text}) for text in ("a b c d e f", "a b c d e f g"))
    assert random_scores(first, 0) == random_scores(first, 0)
    drawn = {random_scores(one, seed) for one in (first, second) for seed in range(5)}
    assert len(drawn) == 10
    assert {len(scores) for scores in drawn} == {6, 7}
    assert all(0 <= min(scores) <= max(scores) < 1 for scores in drawn)


def test_each_unit_is_as_likely_to_be_drawn_first() -> None:
    laid = made_laid({"text": "a b c d"})
    firsts = [int(np.argmax(random_scores(laid, seed))) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=4)
    # Four standard deviations around 500.
    assert np.abs(counts - 500).max() < 4 * np.sqrt(2000 * 0.25 * 0.75)
