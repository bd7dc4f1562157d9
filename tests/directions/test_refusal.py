"""The refusal score against a naive one, the tokens against the testbed's words, the filter."""

import math
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from made_models import as_prompts, made_sets, rendered
from moesteer.direction import Direction
from moesteer.directions.prompts import Sides, draw_sets, read_prompt_set
from moesteer.directions.refusal import (
    filtered,
    find_tokens,
    log_odds,
    prepare_sets,
    refusal_scores,
    tokens_of_words,
    with_tokens,
)
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.testbed.world import REFUSALS


@pytest.fixture(scope="module")
def testbed() -> TransformersEngine:
    return load_transformers("testbed")


def naive(engine: TransformersEngine, text: str, tokens: tuple[int, ...]) -> float:
    ids = engine.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        p = engine.model(ids).logits[0, -1].double().softmax(-1)
    inside = p[list(tokens)].sum().item()
    p[list(tokens)] = 0
    return math.log(inside / p.sum().item())


# --- log-odds -------------------------------------------------------------------------------------


@given(st.lists(st.floats(-200, -0.01), min_size=1, max_size=6))
def test_log_odds_are_exact(logs: list[float]):
    with localcontext() as context:
        context.prec = 120
        p = sum((Decimal(x).exp() for x in logs), Decimal(0))
        if p >= Decimal("0.9999"):
            return
        exact = float((p / (1 - p)).ln())
    assert log_odds(np.array([logs])) == pytest.approx([exact], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("logs", [[0.0], [1e-7], [-1e-9], [math.log(0.6), math.log(0.4)]])
def test_certainty_is_finite(logs: list[float]):
    assert 15 < log_odds(np.array([logs])).item() < 17


def test_many_scores_at_once():
    logs = np.log(np.array([[[0.1, 0.2], [0.3, 0.5]]]))
    np.testing.assert_allclose(log_odds(logs), [[math.log(0.3 / 0.7), math.log(0.8 / 0.2)]])


@pytest.mark.parametrize("dense", [False, True])
def test_scores_are_naive_ones(dense: bool):
    made = made_sets(dense)
    prompts, tokens = made.sets.all, (3, 84, 28)
    told: list[int] = []
    found = refusal_scores(made.engine, prompts, tokens, progress=told.append)
    assert found.shape == (1, len(prompts))
    assert sum(told) == len(prompts)
    expected = [naive(made.engine, prompt.text, tokens) for prompt in prompts]
    np.testing.assert_allclose(found[0], expected, atol=2e-3)


def test_scores_under_profiles():
    made = made_sets(False)
    prompts, tokens = made.sets.fit.a, made.sets.tokens
    vector = tuple(np.random.default_rng(0).normal(size=64) * 3)
    profile = Profile(directions=(Direction(vector, ((1, "input"),)),))
    told: list[int] = []
    found = refusal_scores(
        made.engine, prompts, tokens, [None, profile, None], progress=told.append
    )
    assert sum(told) == 3 * len(prompts)
    np.testing.assert_allclose(found[0], found[2])
    assert np.abs(found[1] - found[0]).max() > 0.1


class Nan:
    class facts:  # noqa: N801
        id = "broken"

    def read(self, readouts, profiles=(None,), *, progress=None) -> np.ndarray:
        return np.full((len(profiles), len(readouts)), np.nan)


def test_nan_is_refused():
    prompts = made_sets(False).sets.fit.a
    with pytest.raises(MoesteerError, match=rf"{prompts[0].source}: broken gives NaN"):
        refusal_scores(Nan(), prompts, (1, 2))  # pyright: ignore


# --- tokens ---------------------------------------------------------------------------------------


def test_the_testbeds_refusals_are_found(testbed: TransformersEngine):
    a, b = (read_prompt_set(f"testbed:{task}") for task in ("restricted", "benign"))
    sets = draw_sets(testbed, a, b)
    tokens = find_tokens(testbed, sets.fit, batch_size=16)
    words = {str(testbed.tokenizer.decode([token])) for token in tokens}
    assert words == {refusal.split()[0].strip(",") for refusal in REFUSALS}
    assert tokens_of_words(testbed, sets.fit.a, sorted(words)) == tuple(
        sorted(tokens, key=lambda token: str(testbed.tokenizer.decode([token])))
    )
    # The other way round, the words that answers begin with: each below a tenth or above.
    answers = find_tokens(testbed, Sides(sets.fit.b, sets.fit.a), batch_size=16)
    assert answers
    assert not set(answers) & set(tokens)


@pytest.mark.parametrize("dense", [False, True])
def test_a_habit_is_found_and_named(dense: bool):
    made = made_sets(dense)
    assert made.sets.tokens == (made.habit.token,)
    assert made.sets.settings["refusal_tokens"] == repr(made.habit.word)
    assert made.sets.settings["refusal_token_ids"] == str(made.habit.token)
    assert tokens_of_words(made.engine, made.sets.fit.a, [made.habit.word]) == (made.habit.token,)


def test_sets_that_are_answered_alike_have_no_tokens():
    made = made_sets(False)
    half = len(made.sets.fit.a) // 2
    same = Sides(made.sets.fit.a[:half], made.sets.fit.a[half:])
    word = made.habit.word
    with pytest.raises(
        MoesteerError, match=rf"begin alike: .*'{word}' 100% and 100%.*--refusal-to"
    ):
        find_tokens(made.engine, same, batch_size=4)


def test_words_that_say_nothing():
    made = made_sets(False)
    with pytest.raises(MoesteerError, match="--refusal-tokens has ' '"):
        tokens_of_words(made.engine, made.sets.fit.a, ["I", " "])


def test_named_words_spare_the_generation():
    made = made_sets(False)
    told: list[tuple[int, int]] = []
    a, b = as_prompts(made.habit.a, "a"), as_prompts(made.habit.b, "b")
    sets = draw_sets(made.engine, a, b, fit=10, validate=5)
    for words, reads in ((None, 50), ([made.habit.word], 30)):
        told.clear()
        prepare_sets(made.engine, sets, words, batch_size=7, progress=lambda *now: told.append(now))
        assert told[-1] == (reads, reads)
        assert [done for done, _ in told] == sorted(done for done, _ in told)


# --- the filter -----------------------------------------------------------------------------------


def test_the_filter_keeps_what_the_model_treats_so():
    made = made_sets(False)
    # A fifth of either side is of the other kind.
    a = as_prompts(made.habit.a[:16] + made.habit.b[:4], "a")
    b = as_prompts(made.habit.b[4:20] + made.habit.a[16:20], "b")
    sets = with_tokens(
        made.engine,
        draw_sets(made.engine, a, b, fit=14, validate=6),
        [made.habit.word],
        batch_size=8,
    )
    kept = filtered(made.engine, sets)
    for name, part in sets.parts.items():
        sign = 1 if name.endswith("a") else -1
        right = [p for p in part if sign * naive(made.engine, p.text, sets.tokens) > 0]
        assert list(kept.parts[name]) == right
        assert kept.settings[name] == len(part)
        assert kept.settings[f"{name}_kept"] == len(right)
    asked = {rendered(text) for text in made.habit.a}
    assert {prompt.text for prompt in (*kept.fit.a, *kept.validation.a)} <= asked
    assert sum(cast(int, kept.settings[f"{n}_kept"]) for n in sets.parts) == 32


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            (7, 20, 20, 20),
            r"side A: of 20 prompts to fit on only 7 have a score above 0; at least 8",
        ),
        (
            (20, 5, 20, 20),
            r"side B: of 20 prompts to fit on only 5 have a score below 0; at least 8",
        ),
        (
            (20, 20, 3, 20),
            r"side A: of 20 prompts to choose on only 3 have .* at least 4 are needed",
        ),
        (
            (20, 20, 20, 0),
            r"side B: of 20 prompts to choose on only 0 have .* at least 4 are needed",
        ),
    ],
)
def test_too_few_are_left(parts: tuple[int, ...], message: str):
    made = made_sets(False)
    sets = made.sets
    right, wrong = {}, {}
    a, b = sets.fit.a, sets.fit.b
    for name, own, other, number in zip(sets.parts, (a, b, a, b), (b, a, b, a), parts, strict=True):
        right[name], wrong[name] = (own * 3)[:number], (other * 3)[: 20 - number]
    mixed = {name: (*right[name], *wrong[name]) for name in right}
    sets = replace(
        sets,
        fit=Sides(mixed["fit_a"], mixed["fit_b"]),
        validation=Sides(mixed["validate_a"], mixed["validate_b"]),
    )
    with pytest.raises(MoesteerError, match=message) as raised:
        filtered(made.engine, sets)
    assert repr(made.habit.word) in str(raised.value)
