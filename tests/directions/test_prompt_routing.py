"""Routing differences against selections that plain hooks see, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from made_models import Made, made_sets
from moesteer.directions.prompts import AskedPrompt, Sides
from moesteer.directions.routing import (
    by_expert,
    over_threshold,
    rates,
    routing_scores,
)
from moesteer.model_facts import LayerShape
from moesteer.profile import Scores

LAST = 4


def made() -> Made:
    return made_sets(dense=False)


def rates_by_hand(prompts: Sequence[AskedPrompt], what: str) -> np.ndarray:
    """Shares [layer, expert] of the prompts' last tokens, as the router's own output tells."""
    total = np.zeros((4, 8))
    model = made().engine.model
    for prompt in prompts:
        seen: list[tuple] = []
        handles = [
            layer.module.register_forward_hook(lambda _m, _a, out, s=seen: s.append(out))
            for layer in made().engine.layers
        ]
        with torch.no_grad():
            model(torch.tensor([prompt.ids]))
        for handle in handles:
            handle.remove()
        for layer, (logits, weights, index) in enumerate(seen):
            for token in range(-LAST, 0):
                if what == "probability":
                    total[layer] += logits[token].double().softmax(-1).numpy()
                elif what == "top-k":
                    total[layer, index[token].numpy()] += 1
                else:
                    total[layer, int(index[token][weights[token].argmax()])] += 1
    return total / (len(prompts) * LAST)


@pytest.mark.parametrize("counted", ["top-1", "top-k"])
def test_scores_are_differences_of_frequencies(counted) -> None:
    fit = made().sets.fit
    scores, interval, _ = routing_scores(made().engine, fit, LAST, counted=counted, seed=3)
    pairs = min(len(fit.a), len(fit.b))
    a, b = (rates_by_hand(side[:pairs], counted) for side in (fit.a, fit.b))
    np.testing.assert_allclose(scores.value, a - b, atol=1e-12)
    np.testing.assert_allclose(scores.rate_a, a)
    np.testing.assert_allclose(scores.rate_b, b)
    assert (scores.low <= scores.value).all()
    assert (scores.value <= scores.high).all()
    assert "bootstrap" in interval


def test_what_one_side_has_more_of_is_left_out() -> None:
    fit = made().sets.fit
    less = routing_scores(made().engine, Sides(fit.a[:5], fit.b[:5]), LAST)[0]
    more = routing_scores(made().engine, Sides(fit.a[:5], fit.b), LAST)[0]
    assert np.array_equal(less.value, more.value)


def test_probabilities_are_means_of_the_routers() -> None:
    fit = made().sets.fit
    found = rates(made().engine, fit, LAST, "probability")
    pairs = min(len(fit.a), len(fit.b))
    for side, seen in zip((fit.a, fit.b), found, strict=True):
        expected = rates_by_hand(side[:pairs], "probability")
        for (layer, expert), value in seen.items():
            assert value == pytest.approx(expected[layer, expert], abs=1e-5)
        assert sum(seen.values()) == pytest.approx(4, abs=1e-4)


def test_the_threshold_is_in_points_and_keeps_what_goes_with_a() -> None:
    value = np.array([[0.15, 0.1499, -0.4, 0.0], [0.3, 0.0, 0.0, 0.9]])
    layers = (LayerShape(1, 4, 2), LayerShape(3, 3, 2))  # the second has three experts only
    scores = Scores(*[value] * 7)
    assert over_threshold(scores, layers, 15.0) == {(1, 0), (3, 0)}
    assert over_threshold(scores, layers, 31.0) == set()
    rounded = np.full((2, 4), 0.35 - 0.2)  # a hair less than 0.15 in fp64
    assert len(over_threshold(replace(scores, value=rounded), layers, 15.0)) == 7
    assert over_threshold(replace(scores, value=-value), layers, 15.0) == {(1, 2)}
    assert set(by_expert(value, layers)) == {(1, e) for e in range(4)} | {(3, e) for e in range(3)}
