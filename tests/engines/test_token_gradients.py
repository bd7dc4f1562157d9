"""Gradients by the embeddings against autograd and finite differences on one text alone."""

from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from test_directing import dense_model, vector
from test_reading import attached, engine, made_profiles, made_readouts
from test_transformers_engine import tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moesteer.direction import Direction, Operation
from moesteer.engines.base import TokenGradient
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

ATTENDING = ["dense", "qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "llama4_text", "phimoe"]
FAMILIES = [*ATTENDING, "dbrx", "gemma4_text", "jamba", "longcat_flash", "qwen3_next", "zaya"]
STEP = 2e-4
"""Norms compute in fp32 whatever they are given."""
READOUTS = made_readouts()[:5]


@cache
def made(name: str) -> TransformersEngine:
    if name == "dense":
        return TransformersEngine(dense_model(), tokenizer(), id="dense")
    return engine(name)


def linear_engine() -> TransformersEngine:
    """A model whose logits are a matrix times the embedding of the last token."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=16, num_hidden_layers=0, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.model.add_module("norm", nn.Identity())
    return TransformersEngine(model, tokenizer(), id="linear")


def head_of(e: TransformersEngine) -> nn.Linear:
    head = e.model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def embedding_of(e: TransformersEngine) -> nn.Embedding:
    embedding = e.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding


def gates_of(one: TokenGradient) -> Tensor:
    assert one.gates is not None
    return one.gates


def found(e: TransformersEngine, *args, **options) -> list[TokenGradient]:
    by_number = dict(e.token_gradients(READOUTS, *args, **options))
    return [by_number[number] for number in range(len(READOUTS))]


def value(logits: Tensor, readout: Readout) -> Tensor:
    logs = logits.log_softmax(-1)
    return torch.stack([t.weight * logs[t.position - 1, t.token] for t in readout.terms]).sum()


def by_hand(
    e: TransformersEngine, readout: Readout, profile: Profile | None = None, padding: int = 0
) -> Tensor:
    """Through the whole model from its embeddings, padded on the left."""
    ids = torch.tensor([[0] * padding + [*readout.ids]])
    attention = torch.tensor([[0] * padding + [1] * len(readout.ids)])
    leaf = e.model.get_input_embeddings()(ids).detach().requires_grad_()
    with steer(e.model, profile, e.layers) if profile else nullcontext():
        output = e.model(
            inputs_embeds=leaf,
            attention_mask=attention,
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        )
    (gradient,) = torch.autograd.grad(value(output.logits[0, padding:], readout), leaf)
    return gradient[0, padding:]


def same(one: Tensor, other: Tensor, within: float = 1e-5) -> None:
    """Equal up to rounding in fp32, of which large numbers have more."""
    torch.testing.assert_close(one, other, atol=within * max(1, float(other.abs().max())), rtol=0)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("name", ATTENDING)
def test_gradients_are_those_of_one_text_padded_on_the_left(name: str, padding: int) -> None:
    e = made(name)
    for readout, own in zip(READOUTS, found(e), strict=True):
        same(own.gradient, by_hand(e, readout, padding=padding))
        same(own.embedding, e.model.get_input_embeddings()(torch.tensor(readout.ids)).detach(), 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_do_not_depend_on_company_or_checkpoints(name: str) -> None:
    e, gates = made(name), name != "dense"
    before, trained = attached(e.model), [p.requires_grad for p in e.model.parameters()]
    together = found(e, gates=gates)
    again = found(e, gates=gates, checkpointing=True)
    for number, readout in enumerate(READOUTS):
        ((_, alone),) = e.token_gradients([readout], gates=gates)
        same(together[number].gradient, alone.gradient)
        same(again[number].gradient, together[number].gradient)
        if gates:
            same(gates_of(again[number]), gates_of(together[number]))
    assert attached(e.model) == before
    assert [p.requires_grad for p in e.model.parameters()] == trained
    assert all(p.grad is None for p in e.model.parameters())


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "dense"])
def test_gates_of_tokens_sum_to_those_of_experts(name: str) -> None:
    e = made(name)
    totals = e.gate_gradients(READOUTS).sum((1, 2))
    own = [gates_of(one) for one in found(e, gates=True)]
    np.testing.assert_allclose([float(gates.sum()) for gates in own], totals, atol=1e-5)
    if name != "gemma4_text":  # a norm behind the experts takes out what scales them all
        assert max(float(gates.abs().max()) for gates in own) > 1e-3
    assert all(gates.shape == (len(r.ids),) for gates, r in zip(own, READOUTS, strict=True))


def test_gradients_are_finite_differences() -> None:
    e, exact = made("dense"), dense_model().double()
    rng = torch.Generator().manual_seed(1)
    for readout, own in zip(READOUTS, found(e), strict=True):
        embedding = exact.get_input_embeddings()(torch.tensor([readout.ids])).detach()
        along = torch.randn(embedding.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            ends = [
                value(exact(inputs_embeds=embedding + h * along).logits[0], readout)
                for h in (STEP, -STEP)
            ]
        slope = float(ends[0] - ends[1]) / (2 * STEP)
        assert float((own.gradient.double() * along[0]).sum()) == pytest.approx(slope, abs=3e-3)


def test_on_a_linear_model_gradient_times_input_is_weight_times_input() -> None:
    e = linear_engine()
    ids = READOUTS[0].ids
    readout = Readout(ids, (Term(len(ids), 7, 1.0), Term(len(ids), 9, -1.0)))
    ((_, own),) = e.token_gradients([readout])
    weight = head_of(e).weight.detach()
    wanted = torch.zeros(len(ids))
    wanted[-1] = (weight[7] - weight[9]) @ own.embedding[-1]
    same((own.gradient * own.embedding).sum(-1), wanted, 1e-6)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "phimoe", "qwen3_moe"])
def test_gradients_under_a_profile_are_those_of_the_steered_model(name: str) -> None:
    e = made(name)
    before, plain = attached(e.model), found(e)
    two, low = made_profiles(e)[2:4]
    for profile in (two, low):
        steered = found(e, profile, gates=True)
        again = found(e, profile, checkpointing=True)
        for readout, own, other in zip(READOUTS, steered, again, strict=True):
            same(own.gradient, by_hand(e, readout, profile))
            same(other.gradient, own.gradient)
    assert not torch.allclose(found(e, low)[0].gradient, plain[0].gradient, atol=1e-3)
    assert attached(e.model) == before


@pytest.mark.parametrize("name", ["dense", "qwen3_moe"])
@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_gradients_under_a_direction(name: str, operation: Operation) -> None:
    e = made(name)
    size = 1.0 if operation == "ablate" else 5.0
    direction = Direction(vector(size=size), ((1, "mlp"), (2, "input")), operation)
    profile = Profile(directions=(direction,), name=operation)
    for readout, own, other in zip(
        READOUTS, found(e, profile), found(e, profile, checkpointing=True), strict=True
    ):
        same(own.gradient, by_hand(e, readout, profile))
        same(other.gradient, own.gradient)


def test_half_precision_comes_close() -> None:
    half, full = engine("mixtral", torch.bfloat16), engine("mixtral")
    one, other = (
        torch.cat([one.gradient.flatten() for one in found(e)]).numpy() for e in (half, full)
    )
    assert found(half)[0].gradient.dtype == torch.float32
    assert np.corrcoef(one, other)[0, 1] > 0.95


def test_checkpoints_leave_dropout_off() -> None:
    """The switch of transformers would put layers in training mode."""
    e = made("dense")
    drops = nn.Dropout(0.5).eval()
    handle = e.model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: drops(out))
    try:
        one, other = found(e), found(e, checkpointing=True)
    finally:
        handle.remove()
    same(other[0].gradient, one[0].gradient)
    assert not any(module.training for module in e.model.modules())


def test_what_has_no_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoesteerError, match="readout 6 has no terms"):
        list(made("dense").token_gradients(made_readouts()))
    with pytest.raises(MoesteerError, match="is a dense model: it has no experts"):
        made("dense").token_gradients(READOUTS, gates=True)
    with pytest.raises(MoesteerError, match="readout 1 asks for position 9"):
        made("dense").token_gradients([Readout((3, 4), (Term(9, 1, 1.0),))])
    e = made("qwen3_moe")
    head = head_of(e)
    monkeypatch.setattr(head, "forward", torch.no_grad()(head.forward))
    with pytest.raises(MoesteerError, match=r"lets no gradients through .* use occlusion"):
        list(e.token_gradients(READOUTS))
