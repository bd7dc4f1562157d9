"""What the models route, unsteered and steered, is what the formulas of their families say."""

from typing import Any

import numpy as np
import pytest
import torch
from oracle import ROUTINGS, Steered, layer_number, routed, watch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers.routers import find_routers
from moesteer.engines.transformers.steering import checked_layers, steer
from moesteer.profile import Profile

CASES = [
    *((name, {}) for name in sorted(ROUTINGS) if name != "dbrx"),
    ("dbrx", {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0}}),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
]


def built(model_type: str, overrides: dict) -> PreTrainedModel:
    model = tiny_model(CONFIG_MAPPING[model_type](**overrides))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            tensor.data.mul_(6)  # large enough to decide between experts
    return model


def check_routing(model: PreTrainedModel, ids: torch.Tensor, by_layer: dict[int, Steered]) -> None:
    with watch(model) as seen, torch.no_grad():
        model(ids)
    routing = ROUTINGS[model.config.model_type]
    routers = {layer_number(f".{router.name}."): router.module for router in find_routers(model)}
    assert routers
    for layer, router in routers.items():
        expected = routed(
            seen[layer].hidden, router, model.config, routing, by_layer.get(layer, Steered())
        )
        found = seen[layer].weights.numpy()
        assert np.array_equal(expected != 0, found != 0), layer
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("model_type", "overrides"), CASES, ids=str)
def test_routing_is_what_the_formula_says(model_type: str, overrides: dict) -> None:
    model = built(model_type, overrides)
    layers = checked_layers(model)
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    check_routing(model, ids, {})

    rng = np.random.default_rng(0)
    by_layer = {}
    for layer in layers[::2]:  # the layers between stay the model's own
        experts = rng.permutation(layer.num_experts).tolist()
        # With groups, one each: no more than the chosen groups can make room for.
        several = 1 if getattr(model.config, "topk_group", None) else 2
        activated = experts[: min(several, layer.top_k)]
        deactivated = experts[len(activated) : len(activated) + min(several, layer.num_experts - 2)]
        by_layer[layer.layer] = Steered(tuple(activated), tuple(deactivated))
    profile = Profile(
        tuple((layer, expert) for layer, s in by_layer.items() for expert in s.activated),
        tuple((layer, expert) for layer, s in by_layer.items() for expert in s.deactivated),
    )
    with steer(model, profile, layers):
        check_routing(model, ids, by_layer)
    check_routing(model, ids, {})


@pytest.mark.parametrize("name", ["zaya", "inkling_text"])
def test_only_the_experts_logits_are_rewritten(name: str) -> None:
    """Zaya's router is a small network; Inkling's scores its shared experts in the same map."""
    model = tiny_model(name)
    layer = checked_layers(model)[1]
    calls: list[tuple[Any, ...]] = []
    profile = Profile(((layer.layer, 1),), ((layer.layer, 2), (layer.layer, 4)))
    with torch.no_grad(), steer(model, profile):
        hook = layer.module.register_forward_hook(
            lambda _module, *call: calls.append(call), with_kwargs=True
        )
        model(torch.arange(3, 15).view(1, 12))
        hook.remove()
    ((args, kwargs, output),) = calls
    with torch.no_grad():
        unsteered = layer.module(*args, **kwargs)

    logits = unsteered[0].clone()
    expected = logits.clone()
    expected[:, 1] = logits.amax(-1) + 0.01
    expected[:, [2, 4]] = logits.amin(-1, keepdim=True) - 0.01
    torch.testing.assert_close(output[0], expected)
    if name == "zaya":  # what the router hands on to the next layer's stays as it was
        assert torch.equal(output[3], unsteered[3])
