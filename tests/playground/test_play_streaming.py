"""Replies token by token: the same as the engine's, and what each token selected, read twice."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from moesteer.engines.evidence import LayerEvidence
from moesteer.engines.transformers.seam import SteeredLayer
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.gate import Gate, RoutingProbe
from moesteer.playground.streaming import (
    GrowingText,
    Replies,
    SameDice,
    Sampling,
    end_tokens,
    stream_replies,
)
from moesteer.profile import Profile

PROMPTS = ("<|user|>Tell me.<|end|><|assistant|>", "<|user|>No, never. Sure?<|end|><|assistant|>")
PROFILE = Profile(((0, 1), (2, 5)), ((0, 3), (1, 0), (2, 2)), name="mine")
WATCHED = (*PROFILE.activated, *PROFILE.deactivated, (3, 4))


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder))


def stream(engine: TransformersEngine, *profiles: Profile | None, **more) -> Iterator[Replies]:
    given = {
        "sampling": Sampling(12),
        "watched": WATCHED,
        "stop": threading.Event(),
        "alone": threading.Lock(),
    } | more
    return stream_replies(engine, PROMPTS, profiles, **given)


def test_replies_are_the_engines(engine: TransformersEngine):
    *_, last = stream(engine, None, PROFILE)
    expected = engine.generate(PROMPTS, [None, PROFILE], max_new_tokens=12)
    assert last.texts == tuple(expected.replies)
    assert last.evidence == tuple(expected.evidence)
    assert last.texts[0] != last.texts[1]


def test_replies_grow(engine: TransformersEngine):
    *growing, last = stream(engine, None, PROFILE)
    assert len(growing) >= 2
    for before, after in zip(growing, [*growing[1:], last], strict=True):
        for short, long in zip(before.rows, after.rows, strict=True):
            assert [token.id for token in short] == [token.id for token in long][: len(short)]
        assert before.evidence is None
    assert last.evidence


def test_tokens_selected_what_one_pass_over_the_whole_text_selects(engine: TransformersEngine):
    """Read again from the experts' arguments, without cache, padding or batch."""
    *_, last = stream(engine, None, PROFILE)
    for row, (prompt, profile) in enumerate(zip(PROMPTS, (None, PROFILE), strict=True)):
        ids = engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = len(ids)
        whole = torch.tensor([ids + [token.id for token in last.rows[row]]])
        selected = {layer: [] for layer in range(4)}

        def see(_module: object, args: tuple, into: list) -> None:
            into.extend(args[1].tolist())

        hooks = [
            layer.mlp.experts.register_forward_pre_hook(partial(see, into=selected[number]))
            for number, layer in enumerate(engine.model.model.layers)
        ]
        with torch.no_grad(), steer(engine.model, profile or Profile(), engine.layers):
            engine.model(whole, use_cache=False)
        for hook in hooks:
            hook.remove()
        tokens = last.rows[row]
        assert len(tokens) == 12
        for place, token in enumerate(tokens[:-1]):
            found = {(n, e) for n, chosen in selected.items() for e in chosen[start + place]}
            assert token.selected == found.intersection(WATCHED)
        assert tokens[-1].selected is None  # no pass has read it: the reply was cut off


def test_marks_agree_with_the_evidence(engine: TransformersEngine):
    *_, last = stream(engine, PROFILE, PROFILE)
    for token in (*last.rows[0][:-1], *last.rows[1][:-1]):
        assert token.selected is not None
        assert set(PROFILE.activated) <= token.selected
        assert not set(PROFILE.deactivated) & token.selected
    columns = max(len(ids) for ids in engine.tokenizer(list(PROMPTS))["input_ids"])
    for seen in last.evidence or ():
        assert isinstance(seen, LayerEvidence)
        assert seen.tokens == 2 * (columns + 11)


def test_without_steering_deactivated_experts_are_selected(engine: TransformersEngine):
    *_, last = stream(engine, None, None)
    selected = frozenset().union(*(token.selected or () for row in last.rows for token in row))
    assert selected & set(PROFILE.deactivated)
    assert last.evidence == ()


def test_a_profile_that_does_not_fire_raises(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(SteeredLayer, "rewrite", lambda self, logits, rows: logits)
    monkeypatch.setattr(SteeredLayer, "guard", lambda self, scores, rows: scores)
    with pytest.raises(DidNotFire, match="mine did not fire in layer 0"):
        list(stream(engine, None, PROFILE))
    monkeypatch.undo()
    *_, last = stream(engine, None, PROFILE)  # nothing is left of it on the model
    assert last.evidence


def test_another_models_profile_is_refused(engine: TransformersEngine):
    with pytest.raises(MoesteerError, match="layer 9"):
        list(stream(engine, None, Profile(((9, 0),), name="other")))


def test_a_gate_decides_before_anything_is_steered(engine: TransformersEngine):
    probe = RoutingProbe(((0, 0), (0, 1)), (1.0, 1.0))
    for threshold, opened in ((-1.0, True), (9.0, False)):
        profile = replace(PROFILE, gate=Gate(probe, threshold))
        *_, last = stream(engine, None, profile)
        expected = engine.generate(PROMPTS, [None, profile], max_new_tokens=12)
        assert last.texts == tuple(expected.replies)
        assert last.steered == (False, opened)
        assert bool(last.evidence) == opened


def test_stopped_replies_are_proved_too(engine: TransformersEngine):
    stop = threading.Event()
    long = stream(engine, None, PROFILE, sampling=Sampling(4000), stop=stop)
    next(long)
    stop.set()
    *_, last = long
    assert 1 <= len(last.rows[0]) == len(last.rows[1]) < 4000
    assert last.evidence


def test_whoever_stops_listening_stops_the_model(engine: TransformersEngine):
    alone = threading.Lock()
    long = stream(engine, None, PROFILE, sampling=Sampling(100_000), alone=alone)
    next(long)
    assert not alone.acquire(blocking=False)
    long.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert alone.acquire(timeout=30)


def test_who_asks_waits_for_who_asked_before(engine: TransformersEngine):
    alone, found = threading.Lock(), []
    with alone:
        thread = threading.Thread(
            target=lambda: found.extend(stream(engine, None, None, alone=alone))
        )
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert not found
    thread.join(30)
    assert found[-1].evidence == ()


def test_both_sides_draw_with_the_same_dice(engine: TransformersEngine):
    hot = Sampling(12, temperature=1.5, seed=3)
    same = (PROMPTS[0], PROMPTS[0])
    more = {"watched": (), "stop": threading.Event(), "alone": threading.Lock()}
    *_, last = stream_replies(engine, same, (None, None), hot, **more)
    more["stop"] = threading.Event()
    *_, other = stream_replies(engine, same, (None, None), replace(hot, seed=4), **more)
    assert last.texts[0] == last.texts[1]
    assert other.texts[0] != last.texts[0]
    assert last.texts[0] != engine.generate(same[:1], max_new_tokens=12).replies[0]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(0.3, 3))
def test_the_dice_draw_from_the_softmax(seed: int, temperature: float):
    scores = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    dice = SameDice(Sampling(1, temperature, seed))
    draws = [int(dice(torch.zeros(1, 1, dtype=torch.int64), scores).argmax()) for _ in range(400)]
    expected = np.exp(scores[0].double().numpy() / temperature)
    expected *= len(draws) / expected.sum()
    # a false alarm once in 10⁷ examples, where a wrong temperature or sign is far beyond it
    assert chisquare(np.bincount(draws, minlength=4), expected).pvalue > 1e-7


@settings(deadline=None)
@given(st.lists(st.integers(0, 283), max_size=30))
def test_the_pieces_are_the_text(engine: TransformersEngine, ids: list[int]):
    """Of any bytes: characters of several tokens, broken ones, special tokens between."""
    text = GrowingText(engine.tokenizer, frozenset())
    for token in ids:
        text.add(token)
    text.end()
    expected = engine.tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert len(text.pieces) == len(ids) == len(text.ids)
    assert "".join(text.pieces) == expected


def test_nothing_comes_after_the_end(engine: TransformersEngine):
    (end,) = engine.tokenizer("<|end|>", add_special_tokens=False)["input_ids"]
    word = engine.tokenizer("never", add_special_tokens=False)["input_ids"]
    text = GrowingText(engine.tokenizer, frozenset({end}))
    for token in (*word, end, end, *word):
        text.add(token)
    assert text.ids == [*word, end]
    assert "".join(text.pieces) == "never"


def test_a_row_that_ended_waits_for_the_other(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
):
    *_, free = stream(engine, None, PROFILE)
    end = free.rows[0][4].id
    assert end not in [token.id for token in free.rows[1]][:6]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [end])
    assert end_tokens(engine) == {end}
    *_, last = stream(engine, None, PROFILE)
    first = [token.id for token in free.rows[0]].index(end)
    assert last.rows[0][:first] == free.rows[0][:first]
    assert len(last.rows[0]) == first + 1  # the end itself, and no padding
    assert len(last.rows[1]) > len(last.rows[0])
