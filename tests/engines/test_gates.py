"""Gate gradients against finite differences: the gate moved by hand, one expert at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from test_reading import TYPES, attached, engine, made_profiles, made_readouts
from torch import Tensor

from moesteer.chat import TokenisedConversation
from moesteer.engines.readouts import Readout
from moesteer.engines.transformers import gates, reading
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError

FAMILIES = [
    "dbrx",
    "deepseek_v3",
    "gemma4_text",
    "gpt_oss",
    "jamba",
    "llama4_text",
    "longcat_flash",
    "phimoe",
    "qwen3_moe",
]
STEP = 1e-2
"""Large enough for fp32 (grouped matrix products know no fp64)."""


def moved(e: TransformersEngine, readout: Readout, row: int, expert: int, gate: float) -> float:
    """The readout when the weight of one expert is multiplied at every token that selects it."""
    layer = e.layers[row]

    def at_experts(_module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        names = list(kwargs)
        hidden, index, weights = (*args, *(kwargs[name] for name in names))[:3]
        scaled = torch.where(index == expert, weights * gate, weights)
        new = (hidden, index, scaled)
        return new[: len(args)], dict(zip(names, new[len(args) :], strict=True))

    def at_router(_module: object, _args: object, output: Any) -> Any:
        scores = output[0].clone()
        scores[:, expert] *= gate
        return scores, *output[1:]

    handle = (
        layer.module.register_forward_hook(at_router)
        if layer.experts is None
        else layer.experts.register_forward_pre_hook(at_experts, with_kwargs=True)
    )
    try:
        with torch.no_grad():
            logits = e.model(torch.tensor([readout.ids]), use_cache=False).logits[0].double()
    finally:
        handle.remove()
    logs = logits.log_softmax(-1)
    return sum(t.weight * float(logs[t.position - 1, t.token]) for t in readout.terms)


def difference(e: TransformersEngine, readout: Readout, row: int, expert: int, h: float) -> float:
    ends = [moved(e, readout, row, expert, gate) for gate in (1 + h, 1 - h)]
    return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_finite_differences(name: str) -> None:
    e, readouts = engine(name), made_readouts()[1:3]
    found = e.gate_gradients(readouts)
    exact = np.full_like(found, np.nan)
    for number, readout in enumerate(readouts):
        for row, shape in enumerate(e.facts.layers):
            for expert in range(shape.experts):
                wide, narrow = (difference(e, readout, row, expert, h) for h in (STEP, STEP / 2))
                # Where a router further up changes its mind, a readout jumps.
                if abs(wide - narrow) < 1e-3 * max(1, abs(narrow)):
                    exact[number, row, expert] = narrow
    smooth = ~np.isnan(exact)
    assert smooth.mean() > 0.8
    np.testing.assert_allclose(found[smooth], exact[smooth], atol=1e-3, rtol=2e-3)
    assert np.abs(exact[smooth]).max() > 0.01


@pytest.mark.parametrize("name", TYPES)
def test_experts_that_no_token_selects_have_no_gradient(name: str) -> None:
    e, readouts = engine(name), made_readouts()[:3]
    before, trained = attached(e.model), [p.requires_grad for p in e.model.parameters()]
    found = e.gate_gradients(readouts)
    texts = [
        TokenisedConversation(ids, (True,) * len(ids))
        for r in readouts
        for ids in [r.ids[: max(t.position for t in r.terms)]]
    ]
    selected = e.count_selections(texts)
    assert (found[selected == 0] == 0).all()
    assert np.isfinite(found).all()
    assert (np.abs(found).max(-1) > 0).all()
    assert attached(e.model) == before
    assert all(p.grad is None for p in e.model.parameters())
    assert [p.requires_grad for p in e.model.parameters()] == trained


@pytest.mark.parametrize("name", ["llama4_text", "minimax", "qwen3_moe"])
def test_gradients_do_not_depend_on_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    e, readouts = engine(name), made_readouts()
    together = e.gate_gradients(readouts)
    alone = np.concatenate([e.gate_gradients([readout]) for readout in readouts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert not together[5].any()
    monkeypatch.setattr(gates, "BATCH_TOKENS", 1)
    np.testing.assert_allclose(e.gate_gradients(readouts), together, atol=1e-5)
    monkeypatch.setattr(reading, "BATCH_LOGITS", 3 * 128)  # texts in pieces
    np.testing.assert_allclose(e.gate_gradients(readouts), together, atol=1e-5)


def test_half_precision_comes_close() -> None:
    e = engine("mixtral", torch.bfloat16)
    readouts = made_readouts()[:5]
    half = e.gate_gradients(readouts)
    e.model.float()
    try:
        full = e.gate_gradients(readouts)
    finally:
        e.model.bfloat16()
    assert np.corrcoef(half.ravel(), full.ravel())[0, 1] > 0.95


def test_weights_that_are_frozen_stay_so() -> None:
    e = engine("olmoe")
    frozen: Tensor = next(e.model.parameters())
    frozen.requires_grad_(False)
    try:
        e.gate_gradients(made_readouts()[:1])
        assert [p.requires_grad for p in e.model.parameters()].count(False) == 1
    finally:
        frozen.requires_grad_(True)


def test_reading_and_gradients_take_turns() -> None:
    """What was made in inference mode must not get in the way of gradients, nor the reverse."""
    e, readouts = engine("gpt_oss"), made_readouts()
    first = e.read(readouts, made_profiles(e))
    gradients = e.gate_gradients(readouts)
    np.testing.assert_array_equal(e.read(readouts, made_profiles(e)), first)
    np.testing.assert_array_equal(e.gate_gradients(readouts), gradients)


@pytest.mark.parametrize("row", [0, -1])
def test_experts_that_let_no_gradient_through_are_named(
    row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = engine("qwen3_moe")
    before = attached(e.model)
    experts: Any = e.layers[row].experts
    monkeypatch.setattr(experts, "forward", torch.no_grad()(experts.forward))
    with pytest.raises(MoesteerError, match="its experts don't let gradients through"):
        e.gate_gradients(made_readouts())
    monkeypatch.undo()
    assert attached(e.model) == before
    assert all(p.requires_grad for p in e.model.parameters())
