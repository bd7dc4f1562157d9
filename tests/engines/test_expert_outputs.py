"""Outputs of single experts, in every architecture, against weights, whole passes and the model's
own hidden states."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
from test_architectures import TYPES
from test_directing import NOT_A_SUM
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moesteer.direction import Direction
from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers import expert_outputs
from moesteer.engines.transformers.contributions import contributions
from moesteer.engines.transformers.expert_outputs import (
    forced_outputs,
    observe_experts,
    own_outputs,
)
from moesteer.engines.transformers.replay import Replay
from moesteer.engines.transformers.routers import MoELayer
from moesteer.engines.transformers.steering import checked_layers, steer
from moesteer.engines.transformers.stream import Stream, find_stream
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

SUMS = [name for name in TYPES if name not in NOT_A_SUM]
BIAS_FREE = ("olmoe", "mixtral", "qwen3_moe", "phimoe", "lfm2_moe", "minimax_m2", "mellum")
"""Experts [expert, hidden, width] without a bias, and no shared ones beside them."""
MIXED = "inkling_text"
"""A convolution over tokens behind the experts, so that they have no part of their own."""
TEXTS = [[3, 5, 7, 9, 11, 13, 20], [4, 4, 6, 8, 10]]
LAST = 3


@dataclass
class Built:
    model: PreTrainedModel
    layers: list[MoELayer]
    replay: Replay

    @cached_property
    def stream(self) -> Stream:
        return find_stream(self.model, self.layers)


@cache
def built(name: str) -> Built:
    model = tiny_model(name)
    layers = checked_layers(model)
    return Built(model, layers, Replay(model, layers))


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def experts_of(b: Built, layer: MoELayer) -> nn.Module:
    return b.model.get_submodule(layer.name.rpartition(".")[0]).get_submodule("experts")


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def outputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """What these modules put out, in order."""
    seen: list[Tensor] = []

    def keep(_module: object, _args: object, output: Any) -> None:
        seen.append(first(output).detach().clone())

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def written(b: Built, layer: int, ids: Tensor, profile: Any = None) -> Tensor:
    """What the layer's feed-forward part writes, [row, token, hidden], in a whole forward pass."""
    parts = b.stream.writes[layer, "mlp"]
    steered = profile if profile is not None else Profile(name="unsteered")
    with steer(b.model, steered, b.layers), outputs(*parts) as seen:
        b.model(ids)
    return torch.stack([part.view(*ids.shape, -1) for part in seen]).sum(0)


# -- outputs of single experts -------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_weighted_outputs_sum_to_what_the_experts_put_out(name: str) -> None:
    b = built(name)
    for layer in b.layers:
        calls = []

        def see(call: Any, output: Tensor, calls: list = calls) -> None:
            calls.append((call.weights, call.own(torch.arange(len(call.index))), output))

        undo = observe_experts(b.model, layer, see)
        with torch.no_grad(), outputs(experts_of(b, layer)) as seen:
            b.model(torch.tensor(TEXTS[:1]))
        undo()
        ((weights, own, output),) = calls
        assert torch.equal(output, seen[0])
        total = (own * weights.unsqueeze(-1)).sum(1)
        # Of experts that all run on all tokens the outputs stand one after another.
        whole = output.reshape(-1, *total.shape).sum(0)
        torch.testing.assert_close(total, whole.to(total), atol=2e-6, rtol=1e-5)
        assert own.shape[:2] == (len(TEXTS[0]), layer.top_k)
        assert own.norm() > 0


def test_enough_architectures() -> None:
    assert len(TYPES) >= 50
    assert len(SUMS) >= 40


@pytest.mark.parametrize("name", BIAS_FREE)
def test_an_experts_own_output_is_what_its_weights_say(name: str) -> None:
    b = built(name)
    layer = b.layers[-1]
    experts: Any = layer.experts
    seen: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda _m, args: seen.append(args[:2]))
    with torch.no_grad():
        b.model(torch.tensor(TEXTS[:1]))
    handle.remove()
    ((hidden, index),) = seen
    expected = torch.zeros(layer.num_experts, 64)
    counts = torch.zeros(layer.num_experts, dtype=torch.int64)
    for token in range(len(TEXTS[0]) - LAST, len(TEXTS[0])):
        for expert in index[token].tolist():
            gate, up = linear(hidden[token], experts.gate_up_proj[expert]).chunk(2)
            expected[expert] += linear(silu(gate) * up, experts.down_proj[expert]).detach()
            counts[expert] += 1
    sums, found = own_outputs(b.model, layer, TEXTS, LAST, 64)
    np.testing.assert_allclose(sums[0], expected.numpy(), atol=1e-5)
    assert found[0].tolist() == counts.tolist()


@pytest.mark.parametrize("name", TYPES)
def test_own_outputs_of_a_batch_are_those_of_each_text(name: str) -> None:
    b = built(name)
    layer = b.layers[0]
    sums, counts = own_outputs(b.model, layer, TEXTS, LAST, 64)
    for row, text in enumerate(TEXTS):
        alone, seen = own_outputs(b.model, layer, [text], LAST, 64)
        np.testing.assert_allclose(sums[row], alone[0], atol=1e-4)
        assert counts[row].tolist() == seen[0].tolist()
    assert (counts.sum(1) <= LAST * layer.top_k).all()
    assert not sums[counts == 0].any()


def test_experts_narrower_than_the_stream_have_no_output_in_it() -> None:
    b = built("olmoe")
    with pytest.raises(MoesteerError, match="put out 64 numbers, the residual stream has 96"):
        own_outputs(b.model, b.layers[0], TEXTS, LAST, 96)


# -- one expert forced ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUMS)
def test_forced_outputs_are_those_of_whole_passes(name: str) -> None:
    b = built(name)
    before = b.model(torch.tensor(TEXTS[:1])).logits
    for layer in {id(layer): layer for layer in (b.layers[0], b.layers[-1])}.values():
        found = forced_outputs(b.model, b.layers, b.stream, b.replay, layer, TEXTS, LAST)
        profiles = [Profile(((layer.layer, e),)) for e in range(layer.num_experts)]
        for row, text in enumerate(TEXTS):
            ids = torch.tensor([text] * layer.num_experts)
            expected = written(b, layer.layer, ids, profiles)[:, -LAST:].numpy()
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found[row], expected, atol=1e-5 * max(scale, 1.0))
    assert torch.equal(b.model(torch.tensor(TEXTS[:1])).logits, before)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4_text", "flex_olmo", "llama4_text"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_all_experts_take_few_passes(name: str, rows: int, monkeypatch) -> None:
    """At most (experts / rows per batch + 2), be it the block alone that runs, or whole layers."""
    b = built(name)
    layer, stream = b.layers[-1], b.stream
    b.replay.saves(layer.layer)  # whether the layer can be entered is tried out once a model
    monkeypatch.setattr(expert_outputs, "BATCH_TOKENS", rows * len(TEXTS[0]))
    passes: list[int] = []
    handle = b.model.base_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = forced_outputs(b.model, b.layers, stream, b.replay, layer, TEXTS[:1], LAST)
    handle.remove()
    monkeypatch.undo()
    again = forced_outputs(b.model, b.layers, stream, b.replay, layer, TEXTS[:1], LAST)
    assert len(passes) <= layer.num_experts / rows + 2
    assert max(passes) <= rows
    np.testing.assert_allclose(found, again, atol=1e-5)


# -- ablation ------------------------------------------------------------------------------------


def along(seed: int = 0) -> Tensor:
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm()


@contextmanager
def orthogonal(layer: MoELayer, unit: Tensor, *chosen: int) -> Iterator[None]:
    """These experts' down-projections write nothing along the unit vector."""
    weight: Any = layer.experts.down_proj  # pyright: ignore[reportOptionalMemberAccess]
    kept = weight.detach().clone()
    r = unit.float()
    with torch.no_grad():
        for expert in chosen:
            weight[expert] -= torch.outer(r, r @ weight[expert])
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("name", BIAS_FREE)
def test_ablating_is_orthogonalising_down_projections(name: str) -> None:
    """From the block's output, every expert's; from one expert's output, its own."""
    b = built(name)
    layer, unit, ids = b.layers[1], along(), torch.tensor(TEXTS[:1])
    vector = tuple((5 * unit).tolist())
    used = own_outputs(b.model, layer, TEXTS[:1], 1, 64)[1][0]
    for expert in (None, int(used.argmax())):
        direction = Direction(vector, ((layer.layer, "mlp"),), "ablate", expert=expert)
        with torch.no_grad(), steer(b.model, Profile(directions=(direction,)), b.layers):
            ablated = b.model(ids).logits
        chosen = range(layer.num_experts) if expert is None else (expert,)
        with torch.no_grad(), orthogonal(layer, unit, *chosen):
            changed = b.model(ids).logits
        torch.testing.assert_close(ablated, changed, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(ablated, b.model(ids).logits, atol=1e-3)


# -- contributions -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SUMS if name != MIXED])
def test_contributions_sum_to_the_stream(name: str) -> None:
    b = built(name)
    unit = along()
    before = b.model(torch.tensor(TEXTS[:1])).logits
    trained = [weight.requires_grad for weight in b.model.parameters()]
    found = contributions(b.model, b.layers, b.stream, TEXTS, LAST, (7 * unit).tolist())
    added = found.attention + found.rest + found.experts.sum(2)
    below = np.concatenate([np.zeros_like(added[:, :1]), added.cumsum(1)], axis=1)
    np.testing.assert_allclose(found.embedding[:, None] + below, found.stream, atol=1e-5)
    for row, text in enumerate(TEXTS):  # the stream, as transformers itself tells
        with torch.no_grad():
            states = b.model(torch.tensor([text]), output_hidden_states=True).hidden_states
        for layer, state in enumerate(states[:-1]):  # the last one is normalised
            expected = (state[0, -LAST:].double() @ unit).numpy()
            np.testing.assert_allclose(found.stream[row, layer], expected, atol=1e-4)
    assert torch.equal(b.model(torch.tensor(TEXTS[:1])).logits, before)
    assert [weight.requires_grad for weight in b.model.parameters()] == trained
    routed = {layer.layer: layer.num_experts for layer in b.layers}
    for layer in range(found.experts.shape[1]):
        assert not found.experts[:, layer, routed.get(layer, 0) :].any()


def without_weights_of(layer: MoELayer, chosen: Callable[[Tensor], Tensor]) -> Any:
    """The layer's experts with the weights of the chosen ones set to 0."""

    def hook(_module: nn.Module, args: tuple) -> tuple:
        hidden, index, weights = args
        return hidden, index, torch.where(chosen(index), 0.0, weights).to(weights.dtype)

    assert layer.experts is not None
    return layer.experts.register_forward_pre_hook(hook)


NORMED = {"afmoe", "axk1", "flex_olmo", "kolibri1", "gemma4_text"}
"""A norm behind the feed-forward part, which does not let parts be taken out one by one."""


@pytest.mark.parametrize("name", [n for n in SUMS if n not in {MIXED, "llama4_text", *NORMED}])
def test_an_experts_contribution_is_what_lacks_without_it(name: str) -> None:
    """And the rest is what the block writes without any of its experts."""
    b = built(name)
    layer, unit, ids = b.layers[-1], along(), torch.tensor(TEXTS[:1])
    found = contributions(b.model, b.layers, b.stream, TEXTS[:1], LAST, unit.tolist())

    def left(chosen: Callable[[Tensor], Tensor]) -> np.ndarray:
        handle = without_weights_of(layer, chosen)
        values = written(b, layer.layer, ids)[0, -LAST:].double() @ unit
        handle.remove()
        return values.numpy()

    whole = left(lambda index: torch.zeros_like(index, dtype=torch.bool))
    for expert in range(layer.num_experts):
        lacking = whole - left(lambda index, e=expert: index == e)
        np.testing.assert_allclose(found.experts[0, layer.layer, expert], lacking, atol=2e-5)
    rest = left(lambda index: torch.ones_like(index, dtype=torch.bool))
    np.testing.assert_allclose(found.rest[0, layer.layer], rest, atol=2e-5)


def test_a_norm_behind_the_experts_scales_each_of_them_alike() -> None:
    """w ⊙ part / rms(whole), written down by hand."""
    b = built("flex_olmo")
    layer, unit = b.layers[-1], along()
    norm: Any
    (norm,) = b.stream.writes[layer.layer, "mlp"]
    calls: list[tuple] = []
    assert layer.experts is not None
    handle = layer.experts.register_forward_pre_hook(lambda _m, args: calls.append(args))
    with torch.no_grad(), outputs(layer.experts) as seen:
        b.model(torch.tensor(TEXTS[:1]))
    handle.remove()
    ((hidden, index, weights),), (output,) = calls, seen
    rms = (output.double().square().mean(-1) + norm.variance_epsilon).sqrt()
    found = contributions(b.model, b.layers, b.stream, TEXTS[:1], LAST, unit.tolist())
    forward: Any = layer.experts.forward
    for place, token in enumerate(range(len(TEXTS[0]) - LAST, len(TEXTS[0]))):
        for slot, expert in enumerate(index[token].tolist()):
            one = torch.ones(1, 1)
            own = forward(hidden[token, None], torch.tensor([[expert]]), one)[0].double()
            part = norm.weight.double() * own * weights[token, slot].double() / rms[token]
            expected = float((part @ unit).detach())
            assert found.experts[0, layer.layer, expert, place] == pytest.approx(expected, abs=1e-5)


def test_a_dense_model_has_a_rest_and_no_experts() -> None:
    model = dense()
    stream = find_stream(model, [])
    found = contributions(model, [], stream, TEXTS, LAST, along().tolist())
    assert found.experts.shape == (2, 3, 0, LAST)
    added = (found.attention + found.rest).sum(1)
    np.testing.assert_allclose(found.embedding + added, found.stream[:, -1], atol=1e-5)
    assert np.abs(found.rest).min() > 0


def test_experts_that_are_mixed_over_tokens_are_refused() -> None:
    b = built(MIXED)
    with pytest.raises(MoesteerError, match="on its way to the stream"):
        contributions(b.model, b.layers, b.stream, TEXTS, LAST, along().tolist())
    assert all(weight.requires_grad for weight in b.model.parameters() if weight.is_leaf)
    b.model(torch.tensor(TEXTS[:1]))


class Centred(nn.Module):
    """A norm that takes the mean away, so that parts are not only scaled."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(-1, keepdim=True)


class Doubled(nn.Module):
    """No norm, and not linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        written = self.inner(hidden)
        return written * written.abs()


def test_what_is_not_linear_behind_the_experts_is_refused() -> None:
    class CentredNorm(Centred):
        pass

    for change, reason in (
        (lambda layer: setattr(layer, "post_feedforward_layernorm", CentredNorm()), "a mean"),
        (lambda layer: setattr(layer, "mlp", Doubled(layer.mlp)), "non-linearly"),
    ):
        model = tiny_model("flex_olmo" if reason == "a mean" else "olmoe")
        change(model.get_submodule("model.layers.1"))
        layers = checked_layers(model)
        with pytest.raises(MoesteerError, match=f"layer 1 .*{reason}"):
            contributions(model, layers, find_stream(model, layers), TEXTS, LAST, along().tolist())
