"""Scores at a gate, against hooks of our own that read each prompt alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moesteer.engines.probing import scores, selection_shares
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.gate import DirectionProbe, RoutingProbe

PROMPTS = [tuple(range(5 + n, 5 + 3 * n)) for n in (4, 9, 1, 6, 2)]
LAST = [None, 1, 3, 50]


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder), dtype="float32")


def selected_by_hand(engine: TransformersEngine, prompt: tuple[int, ...]) -> np.ndarray:
    """[token, layer, expert], from what each router's linear map puts out."""
    found, handles = {}, []
    for number, layer in enumerate(engine.model.model.layers):
        linear = layer.mlp.gate

        def see(module, args, _output, number=number):
            logits = torch.nn.functional.linear(
                args[0].reshape(-1, args[0].shape[-1]), module.weight
            )
            chosen = logits.topk(3, dim=-1).indices
            found[number] = torch.zeros_like(logits).scatter_(-1, chosen, 1.0)

        handles.append(linear.register_forward_hook(see))
    with torch.no_grad():
        engine.model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return torch.stack([found[number] for number in range(4)], dim=1).numpy()


@pytest.mark.parametrize("last", LAST)
def test_routing_is_the_mean_weight_of_the_experts_that_tokens_select(engine, last):
    weights = np.random.default_rng(0).normal(size=(4, 8)) * (np.arange(8) % 3 > 0)
    places = [(int(layer), int(e)) for layer, e in np.argwhere(weights)]
    probe = RoutingProbe(tuple(places), tuple(weights[place] for place in places), last)
    found = scores(engine, PROMPTS, probe, batch_size=3)
    shares = selection_shares(engine, PROMPTS, last)
    for number, prompt in enumerate(PROMPTS):
        selected = selected_by_hand(engine, prompt)[-(last or len(prompt)) :]
        np.testing.assert_allclose(shares[number], selected.mean(0), atol=1e-12)
        assert found[number] == pytest.approx((selected * weights).sum((1, 2)).mean())
    assert np.ptp(found) > 0


@pytest.mark.parametrize(("layer", "position"), [(0, -1), (2, -1), (3, -2)])
def test_a_direction_is_read_where_it_enters_the_layer(engine, layer: int, position: int):
    vector = np.random.default_rng(1).normal(size=engine.facts.hidden)
    probe = DirectionProbe(layer, position, tuple(vector / np.linalg.norm(vector)))
    prompts = [prompt for prompt in PROMPTS if len(prompt) >= -position]
    found = scores(engine, prompts, probe, batch_size=2)
    for number, prompt in enumerate(prompts):
        entered = []
        handle = engine.model.model.layers[layer].register_forward_pre_hook(
            lambda _module, args, entered=entered: entered.append(args[0])
        )
        with torch.no_grad():
            engine.model(torch.tensor([prompt]))
        handle.remove()
        expected = entered[0][0, position].double().numpy() @ np.array(probe.vector)
        assert found[number] == pytest.approx(expected, abs=1e-5)
    assert np.ptp(found) > 1e-3


def test_what_can_not_be_read_is_refused(engine):
    vector = (1.0,) + (0.0,) * (engine.facts.hidden - 1)
    with pytest.raises(MoesteerError, match="text 3 has 2 tokens, and none at position -3"):
        engine.project(PROMPTS[:2] + PROMPTS[2:3], 1, -3, vector)
    with pytest.raises(MoesteerError, match="has no layer 4; it has layers 0–3"):
        engine.project(PROMPTS, 4, -1, vector)
    with pytest.raises(MoesteerError, match="vector has 1 numbers"):
        engine.project(PROMPTS, 1, -1, (1.0,))
    with pytest.raises(MoesteerError, match="position 0 is not counted from the end"):
        engine.project(PROMPTS, 1, 0, vector)
