"""Attribution as a whole: every method through a model, beside what the engine gives directly."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_laid import made_laid

from moesteer.chat import TokenisedConversation
from moesteer.direction import Direction
from moesteer.engines.base import TokenGradient
from moesteer.engines.readouts import Readout
from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile, Scores
from moesteer.rationale.attribution import METHODS, ROUTED, Attributed, attribute, pooled, top
from moesteer.rationale.instances import Instance, TextSpan
from moesteer.rationale.labels import Decision, decision_readout
from moesteer.rationale.layout import Laid, lay_out
from moesteer.rationale.masking import Mask, without
from moesteer.rationale.methods.integrated_gradients import TOLERANCE

MASK = Mask("delete", None)
SAID = Decision("right", "wrong", {})
TEXTS = ("Tell me, sure.", "No, never tell. Yes!", "Sure, yes, yes, no, never; tell me never.")


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    engine = load_transformers(str(model_folder), dtype="float32")
    engine.model.set_attn_implementation("eager")
    return engine


@pytest.fixture(scope="module")
def laid(engine: TransformersEngine) -> list[Laid]:
    """The labels of the last one begin alike."""
    labels = {"right": "Yes", "wrong": "No"}
    spans = (TextSpan("text", 0, 4),)
    instances = [
        Instance(f"made:{n}", {"text": text}, "right", labels, spans, "{text} Is it?", {})
        for n, text in enumerate(TEXTS, start=1)
    ]
    instances[-1] = replace(instances[-1], labels={"right": "zzq", "wrong": "zzk"})
    found = lay_out(instances, engine.tokenizer)
    assert len(decision_readout(found[-1], SAID).ids) > len(found[-1].ids)
    return found


@pytest.fixture(scope="module")
def behaviour(engine: TransformersEngine) -> Profile:
    """Scores drawn at random; of the second layer nothing is said."""
    shape = (len(engine.facts.layers), engine.facts.layers[0].experts)
    value = np.random.default_rng(0).normal(size=shape)
    value[1] = np.nan
    return Profile(model=engine.facts, scores=Scores(value, *[np.zeros(shape)] * 6), name="drawn")


STEERING = Profile(activated=((0, 1), (2, 5)), deactivated=((1, 0),))


REPLYING = Profile(
    directions=(Direction(tuple([4.0] + [0.0] * 63), ((0, "input"),), window="generation"),)
)


@pytest.mark.parametrize("profile", [None, STEERING])
def test_every_method_is_what_the_engine_gives(
    engine: TransformersEngine, laid: list[Laid], behaviour: Profile, profile: Profile | None
) -> None:
    counted: list[int] = []
    found = attribute(
        engine,
        laid,
        [SAID] * 3,
        list(METHODS),
        mask=MASK,
        profile=profile,
        behaviour=behaviour,
        progress=counted.append,
    )
    assert sum(counted) == 3 * len(METHODS)
    assert all(gap is not None and 0 <= gap <= TOLERANCE for gap in found.gaps)
    assert len(found.gaps) == 3
    assert [list(of) for of in found.scores] == [list(METHODS)] * 3
    readouts = [decision_readout(one, SAID) for one in laid]
    maps = dict(engine.attention_maps(readouts, profile))
    gradients = dict(engine.token_gradients(readouts, profile, gates=True))
    table = np.where(np.isnan(behaviour.scores.value), 0, behaviour.scores.value)  # pyright: ignore
    routed = engine.weigh_selections([one.ids for one in laid], table, profile)
    full = engine.read(readouts, [profile])[0]
    for number, one in enumerate(laid):
        by_token = {
            "attention-last": maps[number][-1, -1],
            "attention-mean": maps[number][:, -1].mean(0),
            "saliency-l1": gradients[number].gradient.abs().sum(-1),
            "saliency-l2": gradients[number].gradient.square().sum(-1).sqrt(),
            "input-x-gradient": (gradients[number].gradient * gradients[number].embedding).sum(-1),
            "gate-x-gradient": gradients[number].gates,
            "behaviour-routing": routed[number],
        }
        for method, scores in by_token.items():
            own = [float(sum(scores[t] for t in unit.tokens)) for unit in one.units]
            np.testing.assert_allclose(found.scores[number][method], own, atol=1e-5)
        for unit in range(len(one.units)):
            shorter = replace(one, ids=without(one, [unit], MASK))
            left = engine.read([decision_readout(shorter, SAID)], [profile])[0, 0]
            drop = found.scores[number]["occlusion"][unit]
            assert drop == pytest.approx(full[number] - left, abs=1e-5)


def test_a_profile_changes_what_is_attributed(
    engine: TransformersEngine, laid: list[Laid], behaviour: Profile
) -> None:
    arms = [
        attribute(
            *(engine, laid, [SAID] * 3, list(METHODS)),
            mask=MASK,
            profile=profile,
            behaviour=behaviour,
        )
        for profile in (None, STEERING)
    ]
    for method in METHODS:
        before, after = (np.array(arm.scores[2][method]) for arm in arms)
        assert np.abs(before - after).max() > 1e-5


def test_attention_is_steered_in_replies_alone(
    engine: TransformersEngine, laid: list[Laid]
) -> None:
    """Only the last instance's labels begin alike, so that its reply has begun."""
    methods = ["attention-last", "attention-mean", "attention-rollout"]
    before, after = (
        attribute(engine, laid, [SAID] * 3, methods, mask=MASK, profile=profile).scores
        for profile in (None, REPLYING)
    )
    for number in range(3):
        for method in methods:
            moved = np.abs(np.subtract(before[number][method], after[number][method])).max()
            assert (moved > 1e-5) == (number == 2)


def test_together_is_as_one_by_one(
    engine: TransformersEngine, laid: list[Laid], behaviour: Profile
) -> None:
    together = _attributed(engine, laid, list(METHODS), behaviour).scores
    for one, found in zip(laid, together, strict=True):
        for method in METHODS:
            (alone,) = _attributed(engine, [one], [method], behaviour).scores
            np.testing.assert_allclose(found[method], alone[method], atol=1e-5, rtol=1e-4)


def _attributed(
    engine: TransformersEngine, laid: list[Laid], methods: list[str], behaviour: Profile
) -> Attributed:
    return attribute(engine, laid, [SAID] * len(laid), methods, mask=MASK, behaviour=behaviour)


def test_integrated_gradients_sum_to_what_the_words_do(
    engine: TransformersEngine, laid: list[Laid], behaviour: Profile
) -> None:
    """As far as the engine's own scores say; that these add up is tested with the engine."""
    readouts = [decision_readout(one, SAID) for one in laid]
    places = [[t for unit in one.units for t in unit.tokens] for one in laid]
    engines_own = {n: scores for n, scores, _ in engine.integrated_gradients(readouts, places)}
    found = _attributed(engine, laid, ["integrated-gradients"], behaviour)
    for number, scores in enumerate(found.scores):
        whole = float(engines_own[number].sum())
        assert sum(scores["integrated-gradients"]) == pytest.approx(whole, abs=1e-4)


def test_behaviour_routing_is_the_table_at_each_token_s_selections(
    engine: TransformersEngine, laid: list[Laid], behaviour: Profile
) -> None:
    (found,) = _attributed(engine, laid[1:2], ["behaviour-routing"], behaviour).scores
    ids = laid[1].ids
    for unit, score in zip(laid[1].units, found["behaviour-routing"], strict=True):
        target = tuple(place in unit.tokens for place in range(len(ids)))
        counts = engine.count_selections([TokenisedConversation(ids, target)])[0]
        assert score == pytest.approx(np.nansum(counts * behaviour.scores.value))  # pyright: ignore


def test_checkpointing_changes_nothing(
    engine: TransformersEngine, laid: list[Laid], behaviour: Profile
) -> None:
    methods = ["input-x-gradient", "integrated-gradients", "gate-x-gradient"]
    plain = _attributed(engine, laid[:2], methods, behaviour)
    again = attribute(engine, laid[:2], [SAID] * 2, methods, mask=MASK, checkpointing=True)
    for one, other in zip(plain.scores, again.scores, strict=True):
        for method in methods:
            np.testing.assert_allclose(one[method], other[method], atol=1e-5)


# -- passes and errors, with engines made up -----------------------------------------------------


class _Counting:
    """An engine of which each pass is noted."""

    def __init__(self, gap: float = 0.0, value: float = 1.0, layers: int = 1) -> None:
        self.facts = SimpleNamespace(id="made up", layers=(LayerShape(0, 2, 1),) * layers)
        self.gap, self.value, self.passes = gap, value, []

    def attention_maps(self, readouts: list[Readout], profile: object) -> Any:
        self.passes.append("attention")
        for number in reversed(range(len(readouts))):
            length = len(readouts[number].ids)
            yield number, torch.full((2, length, length), 1 / length)

    def token_gradients(self, readouts: list[Readout], profile: object, **how: Any) -> Any:
        self.passes.append(how)
        for number in reversed(range(len(readouts))):
            table = torch.full((len(readouts[number].ids), 3), self.value)
            yield number, TokenGradient(table, table, table[:, 0] if how["gates"] else None)

    def integrated_gradients(self, readouts: list[Readout], *_: Any, **how: Any) -> Any:
        self.passes.append(how)
        for number, readout in enumerate(readouts):
            yield number, torch.zeros(len(readout.ids)), self.gap


MADE = [made_laid({"text": "A gate."}), made_laid({"text": "A red gate."}, source="made:2")]


def _made(methods: list[str], engine: Any, laid: list[Laid] = MADE) -> Attributed:
    return attribute(engine, laid, [SAID] * len(laid), methods, mask=MASK)


def test_methods_share_a_pass() -> None:
    engine = _Counting()
    own = [method for method in METHODS if method.split("-")[0] in ("attention", "saliency")]
    found = _made([*own, "input-x-gradient"], engine)
    assert engine.passes == ["attention", {"gates": False, "checkpointing": False}]
    assert [[len(of[m]) for m in own] for of in found.scores] == [[2] * 5, [3] * 5]
    assert found.scores[1]["input-x-gradient"] == (3.0, 3.0, 3.0)
    _made(["gate-x-gradient", "saliency-l1"], engine)
    assert engine.passes[2:] == [{"gates": True, "checkpointing": False}]


def test_nothing_asked_is_nothing_done() -> None:
    engine = _Counting()
    assert _made(list(METHODS)[:8], engine, []) == Attributed((), ())
    assert _made([], engine).scores == ({}, {})
    assert engine.passes == []


def test_what_scores_miss_is_kept_of_each_instance() -> None:
    assert _made(["integrated-gradients"], _Counting(gap=0.3)).gaps == (0.3, 0.3)
    assert _made(["saliency-l1"], _Counting(gap=0.3)).gaps == (None, None)


def test_errors_say_what_and_where() -> None:
    with pytest.raises(MoesteerError, match="no method of attribution 'lime'; choose from atten"):
        _made(["lime"], _Counting())
    for method in ("gate-x-gradient", "behaviour-routing"):
        with pytest.raises(MoesteerError, match=f"{method} looks at experts, and this model is de"):
            _made([method], _Counting(layers=0))
    with pytest.raises(MoesteerError, match="behaviour-routing needs a profile with scores"):
        _made(["behaviour-routing"], _Counting())
    with pytest.raises(MoesteerError, match="made:1: saliency-l2 gives NaN or infinite numbers in"):
        _made(["saliency-l2"], _Counting(value=float("nan")))


def test_a_dense_model_is_attributed(engine: TransformersEngine, laid: list[Laid]) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(len(engine.tokenizer), mean_resizing=False)
    model.set_attn_implementation("eager")
    dense = TransformersEngine(model, engine.tokenizer)
    anywhere = [method for method in METHODS if method not in ROUTED]
    found = _made(anywhere, dense, laid)
    assert all(len(set(scores)) > 1 for of in found.scores for scores in of.values())


# -- units ---------------------------------------------------------------------------------------


SCORED = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.integers(1, 4)), max_size=9)


@given(SCORED, st.integers(0, 20))
def test_the_top_is_in_order_and_ties_go_to_the_first(
    scored: list[tuple[float, int]], budget: int
) -> None:
    scores, tokens = [score for score, _ in scored], [size for _, size in scored]
    order = np.argsort(-np.array(scores), kind="stable").tolist()
    found = top(scores, tokens, budget)
    assert list(found) == order[: len(found)]
    # No other number of units, none aside, comes nearer to the budget.
    sizes = np.cumsum([0, *(tokens[number] for number in order)])
    allowed = range(min(1, budget, len(scored)), len(scored) + 1)
    assert abs(sizes[len(found)] - budget) == min(abs(sizes[count] - budget) for count in allowed)


@given(st.lists(st.floats(-1, 1), max_size=9), st.integers(0, 10))
def test_of_tokens_the_top_has_as_many_as_are_asked_for(scores: list[float], budget: int) -> None:
    assert len(top(scores, [1] * len(scores), budget)) == min(budget, len(scores))


def test_a_word_s_score_is_made_of_its_tokens() -> None:
    laid = made_laid({"text": "one two"})
    units = (replace(laid.units[0], tokens=(0, 3)), replace(laid.units[1], tokens=(2,)))
    scores = np.array([-3.0, 100.0, 4.0, 1.0])
    expected = {"sum": (-2.0, 4.0), "mean": (-1.0, 4.0), "max": (1.0, 4.0)}
    for pool, values in expected.items():
        assert pooled(scores, replace(laid, units=units), pool) == values  # pyright: ignore
