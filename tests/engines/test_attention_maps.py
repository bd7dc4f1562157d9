"""Attention maps against the weights that transformers gives of one text alone, and what experts'
numbers make of tokens against routing counts."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_directing import vector
from test_reading import attached, engine, made_profiles, made_readouts
from test_token_gradients import FAMILIES, made
from torch import Tensor

from moesteer.chat import TokenisedConversation
from moesteer.direction import Direction, Window
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers.stream import find_decoder
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.profile import Profile

READOUTS = made_readouts()[1:5]
TEXTS = [readout.ids for readout in READOUTS]


def maps(
    e: TransformersEngine,
    profile: Profile | None = None,
    readouts: Sequence[Readout] = READOUTS,
) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoesteerWarning)
        found = dict(e.attention_maps(readouts, profile))
    return [found[number] for number in range(len(readouts))]


@pytest.mark.parametrize("name", ["dense", "mixtral", "qwen3_moe", "gpt_oss", "longcat_flash"])
def test_maps_are_the_mean_over_heads_of_one_text_alone(name: str) -> None:
    e = made(name)
    found, before = maps(e), e.model.config._attn_implementation or "eager"
    e.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            outputs = [e.model(torch.tensor([t]), output_attentions=True) for t in TEXTS]
    finally:
        e.model.set_attn_implementation(before)
    for text, own, output in zip(TEXTS, found, outputs, strict=True):
        weights = torch.stack([layer[0] for layer in output.attentions])
        heads = weights.mean(1)
        if name == "longcat_flash":  # two attentions a layer
            heads = heads.view(-1, 2, len(text), len(text)).mean(1)
        wanted = heads / heads.sum(-1, keepdim=True)
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("jamba", "qwen3_next")])
def test_a_row_sums_to_one_and_looks_back_only(name: str) -> None:
    e = made(name)
    before = attached(e.model)
    for text, own in zip(TEXTS, maps(e), strict=True):
        assert own.shape == (len(find_decoder(e.model, e.layers)), len(text), len(text))
        torch.testing.assert_close(own.sum(-1), torch.ones(own.shape[:2]))
        assert not own.triu(1).any()
        assert (own >= 0).all()
    assert attached(e.model) == before


def test_attention_is_switched_with_a_note_and_back() -> None:
    e = made("qwen3_moe")
    assert e.model.config._attn_implementation == "sdpa"
    with pytest.warns(MoesteerWarning, match="runs its attention as 'sdpa', which gives no weigh"):
        next(e.attention_maps(READOUTS))
    assert e.model.config._attn_implementation == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(made("gpt_oss").attention_maps(READOUTS))  # eager as it is


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3_next", r"2 of its 4 layers \(the first is layer 0: Qwen3NextGatedDeltaNet\)"),
        ("jamba", r"2 of its 4 layers \(the first is layer 1: JambaMambaMixer\)"),
    ],
)
def test_layers_that_attend_otherwise_are_named(name: str, said: str) -> None:
    with pytest.raises(MoesteerError, match=said):
        maps(made(name))


def test_maps_under_a_profile() -> None:
    e = made("qwen3_moe")
    low = made_profiles(e)[3]
    plain, steered = maps(e)[0], maps(e, low)[0]
    torch.testing.assert_close(plain[0], steered[0])  # what is steered stands behind it
    assert not torch.allclose(plain[-1], steered[-1], atol=1e-3)


@pytest.mark.parametrize("name", ["dense", "gpt_oss"])
@pytest.mark.parametrize("window", ["prompt", "generation", "all"])
def test_a_direction_steers_from_where_the_reply_begins(name: str, window: Window) -> None:
    """Of three readouts two go on behind their prompts, and one of these shares a batch with the
    third."""
    e = made(name)
    begins = [3, len(TEXTS[1]), 5]
    ends = [Term(len(text), 7, 1.0) for text in TEXTS[:3]]
    readouts = [
        Readout(text, (Term(at, 9, 0.0), end))
        for text, at, end in zip(TEXTS[:3], begins, ends, strict=True)
    ]
    direction = Direction(vector(size=5.0), ((1, "mlp"),), window=window)
    profile = Profile(directions=(direction,))
    plain, found = maps(e, None, readouts), maps(e, profile, readouts)
    for number, (readout, begin) in enumerate(zip(readouts, begins, strict=True)):
        own, before = found[number], plain[number]
        torch.testing.assert_close(maps(e, profile, [readout])[0], own, atol=1e-5, rtol=0)
        model, ids = e.model, torch.tensor([readout.ids])
        implementation = model.config._attn_implementation or "eager"
        model.set_attn_implementation("eager")
        # A prompt that ends with its text is not met by a direction of replies.
        reaches = window != "generation" or begin < len(readout.ids)
        steering = steer(model, profile, e.layers, prompts=[begin]) if reaches else nullcontext()
        try:
            with torch.no_grad(), steering:
                weights = model(ids, output_attentions=True, use_cache=False).attentions
        finally:
            model.set_attn_implementation(implementation)
        heads = torch.stack([layer[0] for layer in weights]).mean(1)
        torch.testing.assert_close(own, heads / heads.sum(-1, keepdim=True), atol=1e-5, rtol=0)
        changed = (own - before).abs().amax((0, 2)) > 1e-4  # which tokens attend otherwise
        assert changed.any() == reaches
        if window == "generation":
            assert not changed[:begin].any()


def test_a_readout_without_terms_is_refused() -> None:
    with pytest.raises(MoesteerError, match="readout 2 has no terms"):
        maps(made("gpt_oss"), None, [READOUTS[0], Readout((3, 4), ())])


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "dense"])
def test_weighed_selections_are_counts_times_numbers(name: str) -> None:
    e = made(name)
    conversations = [TokenisedConversation(text, (True,) * len(text)) for text in TEXTS]
    counts = e.count_selections(conversations)
    table = np.random.default_rng(0).normal(size=counts.shape[1:])
    found = e.weigh_selections(TEXTS, table)
    totals = (counts * table).sum((1, 2))
    np.testing.assert_allclose([own.sum() for own in found], totals, atol=1e-6)
    assert [len(own) for own in found] == [len(text) for text in TEXTS]
    for place in (0, 2):  # a single token
        target = [i == place for i in range(len(TEXTS[0]))]
        alone = e.count_selections([TokenisedConversation(TEXTS[0], tuple(target))])[0]
        assert found[0][place] == pytest.approx((alone * table).sum(), abs=1e-6)


def test_an_activated_expert_is_in_every_token() -> None:
    e = engine("mixtral")
    last, table = e.facts.layers[-1].layer, np.zeros((len(e.facts.layers), 8))
    table[-1, 1] = 2.5
    for own in e.weigh_selections(TEXTS, table, Profile(((last, 1),))):
        np.testing.assert_array_equal(own, 2.5)
    for own in e.weigh_selections(TEXTS, table, Profile((), ((last, 1),))):
        np.testing.assert_array_equal(own, 0)


def test_a_table_of_another_model_is_refused() -> None:
    with pytest.raises(MoesteerError, match="each of 2 layers and 8 experts; the model routes in"):
        made("mixtral").weigh_selections(TEXTS, np.zeros((2, 8)))
