"""Lower layers run once where that is exact, and all of them where it isn't."""

from typing import Any

import numpy as np
import pytest
import torch
from test_reading import attached, engine, expected, made_readouts
from torch import Tensor

from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers import reading
from moesteer.engines.transformers.replay import Replay
from moesteer.engines.transformers.steering import checked_layers
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.profile import Profile

CARRYING = ["glm_moe_dsa", "hy_v4", "zaya"]
"""Layers that hand on more than hidden states."""


def runs_of_layer(e: TransformersEngine, profiles: list[Profile | None]) -> int:
    """How often the lowest layer's attention is run while the readouts are read."""
    times = []
    attention: Any = e.model.get_submodule("model.layers.0").self_attn
    handle = attention.register_forward_hook(lambda *_args: times.append(1))
    try:
        e.read(made_readouts(), profiles)
    finally:
        handle.remove()
    return len(times)


def of_layer(layer: int) -> list[Profile | None]:
    return [Profile(((layer, expert),), name=str(expert)) for expert in range(8)]


def test_lower_layers_run_once_for_all_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_TOKENS", 60)  # a batch a profile
    e = engine("qwen3_moe")
    e.read(made_readouts(), of_layer(2))  # tries layer 2 out
    assert runs_of_layer(e, of_layer(2)) == 1
    assert runs_of_layer(e, [*of_layer(2), None]) == 1
    assert runs_of_layer(e, of_layer(0)) == 8


@pytest.mark.parametrize("name", CARRYING)
def test_layers_that_hand_on_more_are_all_run(name: str) -> None:
    model = tiny_model(name)
    replay = Replay(model, checked_layers(model))
    before = attached(model)
    assert not any(replay.saves(layer) for layer in range(1, 4))
    assert attached(model) == before


def test_every_start_is_exact_in_most_architectures() -> None:
    for name in ("dbrx", "deepseek_v3", "gpt_oss", "jamba", "llama4_text", "qwen3_moe"):
        model = tiny_model(name)
        replay = Replay(model, checked_layers(model))
        layers = [layer.layer for layer in checked_layers(model)]
        assert [replay.saves(layer) for layer in layers] == [layer > 0 for layer in layers]


def test_what_layers_share_behind_our_back_is_noticed() -> None:
    """Layer 3 adds what layer 0 left for it: entered at 2 or 3 it would miss that."""
    stand_in: Any = engine("mixtral").tokenizer
    e = TransformersEngine(tiny_model("mixtral", seed=3), stand_in, id="sharing")
    left: list[Tensor] = []

    def leave(_module: object, _args: object, output: Any) -> None:
        left.append(output)

    def take(_module: object, _args: object, output: Any) -> Tensor:
        return output + left.pop()

    e.model.get_submodule("model.layers.0").register_forward_hook(leave)
    e.model.get_submodule("model.layers.3").register_forward_hook(take)
    assert not any(e._replay.saves(start) for start in (1, 2, 3))
    left.clear()
    profiles = of_layer(3)[:3]
    found = e.read(made_readouts(), profiles)
    np.testing.assert_allclose(found, expected(e, made_readouts(), profiles), atol=1e-4)


def test_entering_puts_the_states_where_they_were_kept() -> None:
    model = tiny_model("olmoe")
    replay, ids = Replay(model, checked_layers(model)), torch.arange(20).view(2, 10)
    before = attached(model)
    with torch.no_grad():
        with replay.keep({2}) as kept:
            full = model(ids).logits
        with replay.put(2, kept[2], 3):
            other = torch.zeros_like(ids).repeat(3, 1)  # whatever the tokens, the states decide
            entered = model(other).logits
    torch.testing.assert_close(entered, full.repeat(3, 1, 1), atol=1e-5, rtol=1e-5)
    assert attached(model) == before
