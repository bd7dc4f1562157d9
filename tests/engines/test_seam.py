"""Router probabilities against a softmax of the router's own weights and inputs, in fp64."""

from typing import Any

import numpy as np
import pytest
import torch
from oracle import Parameters, softmax, watch
from test_reading import TYPES, attached, engine

from moesteer.chat import TokenisedConversation
from moesteer.engines.transformers.seam import observe_logits
from moesteer.engines.transformers.steering import steer
from moesteer.profile import Profile

LOGITS: dict[str, Any] = {
    "dbrx": lambda p: (p["layer.weight"], 0),
    "deepseek_v3": lambda p: (p["weight"], 0),
    "gpt_oss": lambda p: (p["weight"], p["bias"]),
    "llama4_text": lambda p: (p["weight"], 0),
    "qwen3_moe": lambda p: (p["weight"], 0),
}
"""How a family's router makes its logits: weights and bias."""


def conversations() -> list[TokenisedConversation]:
    rng = np.random.default_rng(2)
    targets = ("0011101", "1100", "00000", "11111111111")
    return [
        TokenisedConversation(
            tuple(rng.integers(3, 99, len(target)).tolist()), tuple(c == "1" for c in target)
        )
        for target in targets
    ]


@pytest.mark.parametrize("name", TYPES)
def test_probabilities_sum_to_the_target_tokens(name: str) -> None:
    e, texts = engine(name), conversations()
    before = attached(e.model)
    found = e.count_selections(texts, "probability")
    targets = np.array([sum(text.target) for text in texts])
    np.testing.assert_allclose(found.sum(-1), np.tile(targets, (found.shape[1], 1)).T, rtol=1e-5)
    for row, shape in enumerate(e.facts.layers):
        assert not found[:, row, shape.experts :].any()
        assert (found[3, row, : shape.experts] > 0).all()
    assert attached(e.model) == before
    np.testing.assert_allclose(e.count_selections(texts[1:2], "probability"), found[1:2], atol=1e-4)


@pytest.mark.parametrize("name", LOGITS)
def test_probabilities_are_a_softmax_of_the_logits(name: str) -> None:
    e, texts = engine(name), conversations()
    found = e.count_selections(texts, "probability")
    for number, text in enumerate(texts):
        with torch.no_grad(), watch(e.model) as seen:
            e.model(torch.tensor([text.ids]))
        for row, layer in enumerate(e.layers):
            state: Parameters = {
                k: v.double().numpy() for k, v in layer.module.state_dict().items()
            }
            weight, bias = LOGITS[name](state)
            hidden = seen[layer.layer].hidden.double().numpy()
            total = sum(
                (softmax(weight @ h + bias) for h, t in zip(hidden, text.target, strict=True) if t),
                np.zeros(layer.num_experts),
            )
            np.testing.assert_allclose(found[number, row], total, atol=1e-4)


def test_logits_are_those_before_steering() -> None:
    e, texts = engine("qwen3_moe"), conversations()
    before = e.count_selections(texts, "probability")
    with steer(e.model, Profile(((0, 1),), ((0, 2),)), e.layers):
        steered = e.count_selections(texts, "probability")
    np.testing.assert_allclose(steered[:, 0], before[:, 0], atol=1e-5)
    assert not np.allclose(steered[:, 1], before[:, 1], atol=1e-3)


def test_logits_beyond_the_experts_are_left_out() -> None:
    """Some routers score shared experts with the same linear map."""
    wide = [
        (name, layer)
        for name in TYPES
        for layer in engine(name).layers[-1:]
        if layer.logits_width > layer.num_experts
    ]
    assert wide
    for name, layer in wide:
        seen: list[torch.Size] = []
        undo = observe_logits(layer, lambda logits, into=seen: into.append(logits.shape))
        engine(name).count_selections(conversations())
        undo()
        assert seen[0][-1] == layer.num_experts
