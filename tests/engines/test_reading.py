"""Readouts against the plain model: one text alone, no padding, all its logits, in fp64."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from moesteer.chat import TokenisedConversation
from moesteer.direction import Direction
from moesteer.engines.readouts import Readout, Term, mean_log_probability
from moesteer.engines.tiny import moe_model_types, tiny_model
from moesteer.engines.transformers import reading as module
from moesteer.engines.transformers.reading import split
from moesteer.engines.transformers.seam import SteeredLayer
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.profile import Profile

TYPES = sorted({*moe_model_types()} - {"doge", "jetmoe"})  # those can't be steered
FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "zaya"]


class _Tokenizer:
    """Enough of one for an engine that is never given text."""

    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {}


@cache
def engine(model_type: str, dtype: torch.dtype = torch.float32) -> TransformersEngine:
    stand_in: Any = _Tokenizer()
    return TransformersEngine(tiny_model(model_type, dtype=dtype), stand_in, id=model_type)


def made_readouts() -> list[Readout]:
    """Of unequal lengths, with one and several terms, two on one text, one after the last token."""
    rng = np.random.default_rng(0)
    texts = [tuple(rng.integers(3, 99, length).tolist()) for length in (12, 5, 9, 3)]
    return [
        Readout(texts[0], (Term(4, 7, 1.0), Term(4, 9, -1.0))),
        Readout(texts[1], (Term(5, 11, 1.0),)),
        Readout(texts[2], tuple(Term(i, texts[2][i], 1 / 8) for i in range(1, 9))),
        Readout(texts[0], (Term(12, 3, 0.5), Term(1, 20, 2.0))),
        Readout(texts[3], (Term(1, 60, -0.3),)),
        Readout(texts[3], ()),
    ]


def made_profiles(e: TransformersEngine) -> list[Profile | None]:
    """With lowest layers of every kind, and two that steer nothing."""
    shapes = e.facts.layers
    low, middle, high = (shapes[i].layer for i in (0, len(shapes) // 2, -1))
    return [
        Profile(((high, 1),), name="high"),
        None,
        Profile((), ((middle, 0), (high, 2)), name="two"),
        Profile(((low, 2),), ((low, 0),), name="low"),
        Profile(name="empty"),
    ]


def attached(model: PreTrainedModel) -> dict[str, tuple]:
    """What hangs on each module, so that two states can be compared."""
    return {
        name: (
            list(vars(module)),
            list(module._forward_hooks.items()),
            list(module._forward_pre_hooks.items()),
        )
        for name, module in model.named_modules()
    }


def plain_logits(
    e: TransformersEngine, ids: tuple[int, ...], profile: Profile | None
) -> np.ndarray:
    """The text alone, whole, through the model's own forward."""
    with torch.no_grad(), steer(e.model, profile, e.layers) if profile else nullcontext():
        return e.model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


def plainly(e: TransformersEngine, readout: Readout, profile: Profile | None) -> float:
    total = 0.0
    for term in readout.terms:
        row = plain_logits(e, readout.ids, profile)[term.position - 1]
        log_sum = row.max() + np.log(np.exp(row - row.max()).sum())
        total += term.weight * (row[term.token] - log_sum)
    return total


def expected(e: TransformersEngine, readouts: Sequence[Readout], profiles: Sequence) -> np.ndarray:
    return np.array([[plainly(e, r, profile) for r in readouts] for profile in profiles])


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_readouts_are_those_of_the_plain_model(name: str) -> None:
    e, readouts = engine(name), made_readouts()
    profiles = made_profiles(e)
    before = attached(e.model)
    found = e.read(readouts, profiles)
    np.testing.assert_allclose(found, expected(e, readouts, profiles), atol=2e-4)
    assert attached(e.model) == before
    assert not np.allclose(found[0, :5], found[1, :5], atol=1e-3)
    np.testing.assert_array_equal(found[1], found[4])
    np.testing.assert_array_equal(found[:, 5], 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reading_does_not_depend_on_its_company(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, readouts = engine(name), made_readouts()
    profiles = made_profiles(e)
    together = e.read(readouts, profiles)
    alone = [[e.read([r], [profile])[0, 0] for r in readouts] for profile in profiles]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(e.read(readouts[::-1], profiles)[:, ::-1], together, atol=1e-4)
    monkeypatch.setattr(module, "BATCH_TOKENS", 20)
    np.testing.assert_allclose(e.read(readouts, profiles), together, atol=1e-4)
    monkeypatch.setattr(module, "BATCH_LOGITS", 3 * 128)  # three positions a batch
    np.testing.assert_allclose(e.read(readouts, profiles), together, atol=1e-4)


@given(
    weights=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    places=st.lists(st.integers(1, 12), min_size=6, max_size=6),
)
@settings(max_examples=20, deadline=None)
def test_a_readout_is_the_weighted_sum_of_its_terms(
    weights: list[float], places: list[int]
) -> None:
    e, ids = engine("qwen3_moe"), made_readouts()[0].ids
    terms = [Term(p, 7 + p, w) for p, w in zip(places, weights, strict=False)]
    single = e.read([Readout(ids, (Term(t.position, t.token, 1.0),)) for t in terms])[0]
    whole = e.read([Readout(ids, tuple(terms))])[0, 0]
    np.testing.assert_allclose(whole, weights @ single, atol=1e-4)


def test_probabilities_of_all_words_sum_to_one() -> None:
    e, ids = engine("mixtral"), made_readouts()[1].ids
    logs = e.read([Readout(ids, (Term(3, word, 1.0),)) for word in range(128)])
    assert np.exp(logs).sum() == pytest.approx(1, abs=1e-5)


def test_half_precision_is_read_in_full() -> None:
    """Log-probabilities of bf16 logits, not rounded to bf16 themselves (eight bits, here 0.03)."""
    e, readouts = engine("olmoe", torch.bfloat16), made_readouts()[1:2]
    with torch.no_grad():
        logits = e.model(torch.tensor([readouts[0].ids]), use_cache=False).logits[0, -1]
    exact = logits.double().log_softmax(-1)[11].item()
    assert e.read(readouts)[0, 0] == pytest.approx(exact, abs=1e-5)


def test_nothing_to_read() -> None:
    e = engine("olmoe")
    assert e.read([], [None, None]).shape == (2, 0)
    assert e.read(made_readouts(), []).shape == (0, 6)


# -- how it is run -------------------------------------------------------------------------------


def test_the_lm_head_sees_only_what_is_asked_for() -> None:
    e, readouts = engine("qwen3_moe"), made_readouts()
    seen = []
    head: Any = e.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[-2]))
    try:
        e.read(readouts)
    finally:
        handle.remove()
    assert sum(seen) == sum(len(readout.terms) for readout in readouts)


def test_texts_are_cut_after_the_last_term_and_read_once() -> None:
    pieces = split(made_readouts(), 100)
    assert [len(piece.ids) for piece in pieces] == [4, 5, 8, 12, 1]
    twice = [Readout((5, 6, 7), (Term(2, 9, 1.0),)), Readout((5, 6, 8), (Term(2, 4, 1.0),))]
    assert len(split(twice, 100)) == 1
    assert [len(piece.terms) for piece in split(made_readouts()[2:3], 3)] == [3, 3, 2]


def test_progress_counts_every_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_LOGITS", 3 * 128)
    e, told = engine("qwen3_moe"), []
    e.read(made_readouts(), made_profiles(e), progress=told.append)
    assert sum(told) == 6 * 5
    assert len(told) > 5


def test_a_profile_that_does_not_take_hold_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine("qwen3_moe")
    before = attached(e.model)
    monkeypatch.setattr(SteeredLayer, "rewrite", lambda self, logits, rows: logits)
    monkeypatch.setattr(SteeredLayer, "guard", lambda self, scores, rows: scores)
    with pytest.raises(DidNotFire, match="high did not fire in layer 3"):
        e.read(made_readouts(), made_profiles(e))
    with pytest.raises(DidNotFire, match="high did not fire in layer 3"):
        e.divergence(conversations(), made_profiles(e)[0] or Profile())
    assert attached(e.model) == before


def test_a_failing_head_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine("gpt_oss")
    before = attached(e.model)

    class BrokenError(Exception):
        pass

    def broken(*_args: object) -> None:
        raise BrokenError

    head: Any = e.model.get_output_embeddings()
    handle = head.register_forward_hook(broken)
    with pytest.raises(BrokenError):
        e.read(made_readouts(), made_profiles(e)[:1])
    handle.remove()
    assert attached(e.model) == before


def test_a_head_that_is_called_twice_can_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine("mixtral")
    model: Any = e.model
    inner = model.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        model.lm_head(torch.zeros(1, 99, 64))
        return inner(*args, **kwargs)

    monkeypatch.setattr(model, "forward", twice)
    with pytest.raises(MoesteerError, match="calls its LM head 2 times"):
        e.read(made_readouts()[:1])


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        (Readout((5, 6), (Term(0, 5, 1.0),)), "readout 2 asks for position 0; .* positions 1 to 2"),
        (Readout((5, 6), (Term(3, 5, 1.0),)), "asks for position 3"),
        (Readout((5, 6), (Term(1, 128, 1.0),)), "tokens from 5 to 128; the model has 0–127"),
        (Readout((5, -1), (Term(1, 5, 1.0),)), "tokens from -1 to 5"),
        (Readout((5,) * 9999, (Term(1, 5, 1.0),)), "9999 tokens, over the model's context"),
    ],
)
def test_what_can_not_be_read_is_refused(readout: Readout, message: str) -> None:
    e = engine("olmoe")
    with pytest.raises(MoesteerError, match=message):
        e.read([made_readouts()[0], readout])
    with pytest.raises(MoesteerError, match=message):
        e.gate_gradients([made_readouts()[0], readout])


def test_profiles_of_other_models_are_refused() -> None:
    e = engine("olmoe")
    foreign = Profile(((0, 1),), model=engine("qwen3_moe").facts)
    for refused in (foreign, Profile(((9, 0),))):
        with pytest.raises(MoesteerError, match=r"does not fit|names layer 9"):
            e.read(made_readouts(), [None, refused])
        with pytest.raises(MoesteerError, match=r"does not fit|names layer 9"):
            e.divergence(conversations(), refused)


# -- divergence ----------------------------------------------------------------------------------


def conversations() -> list[TokenisedConversation]:
    """Targets in the middle, at the start (whose first token nothing predicts), and everywhere."""
    rng = np.random.default_rng(1)
    targets = ("0011101", "1100", "11111111111")
    return [
        TokenisedConversation(
            tuple(rng.integers(3, 99, len(target)).tolist()), tuple(c == "1" for c in target)
        )
        for target in targets
    ]


def kl(e: TransformersEngine, text: TokenisedConversation, profile: Profile) -> float:
    """By the definition, word by word, from two plain runs."""

    def distributions(applied: Profile | None) -> np.ndarray:
        weights = np.exp(plain_logits(e, text.ids, applied))
        return weights / weights.sum(-1, keepdims=True)

    p, q = distributions(None), distributions(profile)
    places = [i - 1 for i, target in enumerate(text.target) if target and i]
    return float(np.mean([np.sum(p[i] * np.log(p[i] / q[i])) for i in places]))


@pytest.mark.parametrize("name", FAMILIES)
def test_divergence_is_the_mean_kl_of_the_targets(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, texts = engine(name), conversations()
    for profile in filter(None, made_profiles(e)):
        if profile.steered_layers:
            exact = [kl(e, text, profile) for text in texts]
            found = e.divergence(texts, profile)
            np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-5)
            assert found.max() > 0.0001
            monkeypatch.setattr(module, "BATCH_LOGITS", 5 * 128)
            np.testing.assert_allclose(e.divergence(texts, profile), exact, rtol=1e-3, atol=1e-5)
            monkeypatch.undo()


def test_an_empty_profile_does_not_diverge() -> None:
    e = engine("qwen3_moe")
    assert e.divergence(conversations(), Profile()).tolist() == [0, 0, 0]


def test_a_direction_of_generated_tokens_has_none_to_move_right_after_a_prompt() -> None:
    """And moves those there are: by the oracle of a text whose last tokens alone are moved."""
    e = engine("qwen3_moe")
    vector = tuple(np.random.default_rng(3).normal(size=64) * 3)
    late = Direction(vector, ((2, "input"),), window="generation")
    always = Direction(vector, ((1, "mlp"),))
    profiles = [Profile(directions=d) for d in ((late,), (always,), (always, late))]
    prompt = tuple(range(5, 12))
    first = [Readout(prompt, (Term(len(prompt), word, 1.0),)) for word in (3, 8)]
    plain, only_late, one, both = e.read(first, (None, *profiles))
    np.testing.assert_array_equal(only_late, plain)
    np.testing.assert_array_equal(both, one)
    assert np.abs(one - plain).max() > 1e-3
    text = TokenisedConversation((*prompt, 20, 21, 22), (False,) * 8 + (True,) * 2)
    short = TokenisedConversation((*prompt, 20), (False,) * 7 + (True,))
    assert e.divergence([short], profiles[0]).tolist() == [0]
    longer = TokenisedConversation(text.ids, (False,) * 7 + (True,) * 3)
    assert e.divergence([longer], profiles[0])[0] > 1e-4
    # A text whose first term stands after 8 tokens: those are its prompt.
    with torch.no_grad():
        layer = e.model.get_submodule("model.layers.2")
        move = torch.zeros(1, 9, 64)
        move[:, 8:] = torch.tensor(vector)
        handle = layer.register_forward_pre_hook(lambda _m, args: (args[0] + move, *args[1:]))
        logs = e.model(torch.tensor([text.ids[:9]])).logits[0].double().log_softmax(-1)
        handle.remove()
    expected = (logs[7, 21] + logs[8, 22]).item() / 2
    found = e.read([mean_log_probability(text)], [profiles[0]])[0, 0]
    assert found == pytest.approx(expected, abs=1e-5)


def test_words_that_the_model_rules_out_do_not_diverge() -> None:
    """A vocabulary padded with −inf has 0 · (−inf − −inf) there."""
    e = engine("qwen3_moe")
    head: Any = e.model.get_output_embeddings()

    def mask(_module: object, _args: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([0, 1]), -torch.inf)

    handle = head.register_forward_hook(mask)
    try:
        found = e.divergence(conversations(), made_profiles(e)[0] or Profile())
    finally:
        handle.remove()
    assert np.isfinite(found).all()
    assert (found > 0).all()


def test_a_target_that_nothing_predicts_is_refused() -> None:
    with pytest.raises(MoesteerError, match="a text of 2 tokens has no target token after the fir"):
        engine("olmoe").divergence([TokenisedConversation((5, 6), (True, False))], Profile())


def test_mean_log_probability_of_a_target() -> None:
    e, text = engine("olmoe"), conversations()[0]
    found = e.read([mean_log_probability(text, -2.0)])[0, 0]
    single = [Readout(text.ids, (Term(i, text.ids[i], 1.0),)) for i in (2, 3, 4, 6)]
    assert found == pytest.approx(-2 * e.read(single).mean(), abs=1e-5)
