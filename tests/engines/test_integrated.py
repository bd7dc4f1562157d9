"""Integrated gradients against what they must sum to, and against a sum by hand in fp64."""

import numpy as np
import pytest
import torch
from test_directing import dense_model
from test_reading import attached, engine, made_profiles
from test_token_gradients import READOUTS, embedding_of, head_of, linear_engine, made, same, value
from torch import Tensor

from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers import integrated, memory
from moesteer.engines.transformers.holding import held, taken_down
from moesteer.engines.transformers.token_gradients import pieces_of, values_of
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

PLACES = [range(1, len(readout.ids) - 1) for readout in READOUTS]
SMOOTH = ["dense", "dbrx", "deepseek_v3", "gpt_oss", "llama4_text", "mixtral", "phimoe"]


def scored(
    e: TransformersEngine, profile: Profile | None = None, **options
) -> list[tuple[Tensor, float]]:
    rows = {n: (s, g) for n, s, g in e.integrated_gradients(READOUTS, PLACES, profile, **options)}
    return [rows[number] for number in range(len(READOUTS))]


def difference(e: TransformersEngine, readout: Readout, places: range) -> float:
    """R(x) − R(x'), the experts of x selected in both."""
    gone = torch.ones(1, len(readout.ids), 1)
    gone[:, list(places)] = 0
    (piece,) = pieces_of([readout])
    embedding = embedding_of(e)

    def less(_module: object, _args: object, output: Tensor) -> Tensor:
        return output * gone

    with torch.no_grad():
        with taken_down(e.layers, 1) as selected:
            there = values_of(e.model, [piece])
        handle = embedding.register_forward_hook(less)
        try:
            with held(e.layers, selected):
                without = values_of(e.model, [piece])
        finally:
            handle.remove()
    return float(there - without)


@pytest.mark.parametrize("name", SMOOTH)
def test_scores_sum_to_what_the_tokens_do(name: str) -> None:
    e = made(name)
    before = attached(e.model)
    for readout, places, (scores, gap) in zip(READOUTS, PLACES, scored(e), strict=True):
        whole = difference(e, readout, places)
        missing = abs(float(scores.double().sum()) - whole)
        assert missing <= 0.011 * abs(whole)
        assert missing == pytest.approx(gap * abs(whole), abs=1e-4)
        assert scores.shape == (len(readout.ids),)
        assert not np.delete(scores.numpy(), list(places)).any()
    assert attached(e.model) == before


def test_on_a_linear_model_scores_are_weight_times_input() -> None:
    e = linear_engine()
    ids = READOUTS[0].ids
    readout = Readout(ids, (Term(len(ids), 7, 1.0), Term(len(ids), 9, -1.0)))
    ((_, scores, gap),) = e.integrated_gradients([readout], [range(len(ids))], steps=16)
    weight = head_of(e).weight.detach()
    wanted = torch.zeros(len(ids))
    wanted[-1] = (weight[7] - weight[9]) @ embedding_of(e).weight[ids[-1]].detach()
    same(scores, wanted)
    assert gap < 1e-3


def test_scores_are_the_integral_summed_by_hand() -> None:
    """Many trapezoids over log α, in fp64, through the whole model."""
    e, exact = made("dense"), dense_model().double()
    ((_, scores, _),) = e.integrated_gradients(READOUTS[:1], PLACES[:1], tolerance=1e-4)
    readout, places = READOUTS[0], list(PLACES[0])
    whole = exact.get_input_embeddings()(torch.tensor([readout.ids])).detach()
    alphas = torch.tensor(np.geomspace(1e-9, 1, 600))
    scale = torch.ones(len(alphas), len(readout.ids), 1, dtype=torch.float64)
    scale[:, places] = alphas.view(-1, 1, 1)
    leaf = (whole * scale).requires_grad_()
    logits = exact(inputs_embeds=leaf, use_cache=False).logits
    (gradient,) = torch.autograd.grad(
        torch.stack([value(row, readout) for row in logits]).sum(), leaf
    )
    products = (whole * gradient).sum(-1) * alphas.unsqueeze(-1)
    by_hand = np.trapezoid(products.numpy(), np.log(alphas.numpy()), axis=0)
    np.testing.assert_allclose(scores[places], by_hand[places], atol=2e-3)


@pytest.mark.parametrize("name", [*SMOOTH[1:], "gemma4_text", "longcat_flash", "qwen3_next"])
def test_routing_that_is_held_where_nothing_changed_changes_nothing(name: str) -> None:
    e, pieces = made(name), pieces_of(READOUTS)
    with torch.no_grad():
        plain = values_of(e.model, pieces)
        with taken_down(e.layers, len(pieces)) as selected:
            seen = values_of(e.model, pieces)
        with held(e.layers, selected):
            again = values_of(e.model, pieces)
    assert set(selected) == {layer.layer for layer in e.layers}
    assert torch.equal(plain, seen)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("name", ["gpt_oss", "phimoe", "qwen3_moe"])
def test_routing_is_held_as_it_was_taken_down(name: str) -> None:
    """What other texts would select does not matter; the experts' input says so."""
    e, pieces = made(name), pieces_of(READOUTS[:1])
    other = pieces_of([Readout(tuple(i + 1 for i in READOUTS[0].ids), READOUTS[0].terms)])
    ones = np.random.default_rng(0).normal(size=(len(e.layers), e.layers[0].num_experts))
    wanted, free = e.weigh_selections([pieces[0].ids, other[0].ids], ones)
    assert not np.allclose(wanted, free)
    with torch.no_grad():
        with taken_down(e.layers, 1) as selected:
            values_of(e.model, pieces)
        with held(e.layers, selected):
            (kept,) = e.weigh_selections([other[0].ids], ones)
    np.testing.assert_allclose(kept, wanted)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_without_holding_jumps_are_missed(name: str) -> None:
    e = made(name)
    gaps = {
        hold: [
            gap
            for _, _, gap in integrated.integrated_gradients(
                e._subject(None), READOUTS, PLACES, steps=64, tolerance=0.01, hold=hold
            )
        ]
        for hold in (True, False)
    }
    assert max(gaps[True]) <= 0.01
    assert max(gaps[False]) > 0.1


def test_scores_do_not_depend_on_company_or_checkpoints() -> None:
    e = made("mixtral")
    together, again = scored(e, steps=16), scored(e, steps=16, checkpointing=True)
    for number, (readout, places) in enumerate(zip(READOUTS, PLACES, strict=True)):
        ((_, alone, gap),) = e.integrated_gradients([readout], [places], steps=16)
        same(together[number][0], alone)
        same(again[number][0], alone)
        assert together[number][1] == pytest.approx(gap, abs=1e-4)


def test_scores_under_a_profile_sum_to_what_the_steered_model_does() -> None:
    e = engine("mixtral")
    profile = made_profiles(e)[3]
    assert profile is not None
    before = attached(e.model)
    steered = scored(e, profile)
    assert all(gap <= 0.01 for _, gap in steered)
    # Nothing before the last token moves a text whose embeddings all stay.
    ((_, scores, gap),) = e.integrated_gradients(READOUTS[:1], [()], profile)
    assert not scores.any()
    assert gap == 0
    assert not torch.allclose(scored(e)[0][0], steered[0][0], atol=1e-3)
    assert attached(e.model) == before


def test_steps_end_where_the_gap_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrated, "MOST_STEPS", 4)
    e = made("qwen3_moe")
    gaps = [gap for _, gap in scored(e, steps=2)]
    assert max(gaps) > 0.05


def test_a_text_that_does_not_fit_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though texts of similar length are read together, the longest first."""
    monkeypatch.setattr(memory, "free_memory", lambda _device: 1000)
    short, long = sorted(READOUTS[:2], key=lambda readout: len(readout.ids))
    scores = made("dense").integrated_gradients([short, long], [(1,), (1,)])
    with pytest.raises(MoesteerError, match=f"text 2 with its {len(long.ids)} tokens"):
        list(scores)


def test_a_position_beyond_the_text_is_named() -> None:
    with pytest.raises(MoesteerError, match="readout 2 has 5 tokens, and no position 5"):
        list(made("dense").integrated_gradients(READOUTS[:2], [(1,), (5,)]))
