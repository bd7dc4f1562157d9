"""Drift: by hand, and on the bundled model, where nothing steered must be no drift at all."""

import numpy as np
import pytest

from moesteer.chat import TokenisedConversation, render_prompt
from moesteer.contrast import Message
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.evaluation.drift import as_conversations, divergence, routing_drift, selections
from moesteer.profile import Profile
from moesteer.testbed import ground_truth
from moesteer.testbed.world import probes


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return load_transformers("testbed")


@pytest.fixture(scope="module")
def prompts(engine: TransformersEngine) -> list[str]:
    asked = probes("conflicts", "dev")[:10]
    return [render_prompt([Message("user", p.prompt)], engine.tokenizer) for p in asked]


def replies(engine: TransformersEngine, prompts: list[str], profile: Profile | None) -> list[str]:
    return engine.generate(prompts, profile, max_new_tokens=16).replies


@pytest.fixture(scope="module")
def unsteered(engine: TransformersEngine, prompts: list[str]) -> list[TokenisedConversation]:
    return as_conversations(engine.tokenizer, prompts, replies(engine, prompts, None))


def test_routing_drift_by_hand():
    before = np.array([[8, 0, 0, 0], [1, 1, 1, 1]])
    after = np.array([[2, 1, 1, 0], [2, 2, 2, 2]])
    # Layer 0: (1, 0, 0, 0) against (½, ¼, ¼, 0); layer 1 is alike: (½ + 0) / 2.
    assert routing_drift(before, after) == pytest.approx(0.25)
    assert routing_drift(before[:1], np.array([[0, 3, 0, 0]])) == 1
    assert routing_drift(before, 7 * before) == 0
    assert routing_drift(None, after) is None
    assert routing_drift(before, None) is None


def test_the_reply_is_the_target_and_empty_replies_are_left_out(engine: TransformersEngine):
    tokenizer = engine.tokenizer
    (found,) = as_conversations(tokenizer, ["The tree", "The town"], ["", "is the oak."])
    said = [i for i, target in zip(found.ids, found.target, strict=True) if target]
    asked = [i for i, target in zip(found.ids, found.target, strict=True) if not target]
    assert tokenizer.decode(said) == tokenizer.decode(tokenizer.encode("is the oak."))
    assert tokenizer.decode(asked) == tokenizer.decode(tokenizer.encode("The town"))
    assert found.target == (False,) * len(asked) + (True,) * len(said)


def test_every_reply_token_selects_k_experts(
    engine: TransformersEngine, unsteered: list[TokenisedConversation]
):
    table = selections(engine, unsteered, 16)
    assert table is not None
    tokens = sum(sum(c.target) for c in unsteered)
    assert (table.sum(-1) == [tokens * shape.top_k for shape in engine.facts.layers]).all()
    in_batches = selections(engine, unsteered, 3)
    assert in_batches is not None
    assert np.abs(table - in_batches).sum() <= 0.01 * table.sum()


def test_steering_that_changes_replies_drifts_and_decoys_do_not(
    engine: TransformersEngine, prompts: list[str], unsteered: list[TokenisedConversation]
):
    truth = ground_truth().behaviours["document"]
    before = selections(engine, unsteered, 16)
    found = {}
    for name, experts in (("planted", truth.planted), ("decoys", truth.decoys)):
        profile = Profile(activated=experts, name=name)
        after = as_conversations(engine.tokenizer, prompts, replies(engine, prompts, profile))
        found[name] = (
            divergence(engine, unsteered, profile, 4),
            routing_drift(before, selections(engine, after, 16)),
        )
    assert found["planted"][0] > 0.1
    assert found["planted"][1] > 0.1
    assert found["decoys"][0] < 0.02
    assert found["decoys"][1] < 0.02


def test_batches_do_not_change_the_divergence(
    engine: TransformersEngine, unsteered: list[TokenisedConversation]
):
    profile = Profile(activated=ground_truth().behaviours["document"].planted)
    expected = np.mean([engine.divergence([c], profile)[0] for c in unsteered])
    assert divergence(engine, unsteered, profile, 3) == pytest.approx(expected, rel=1e-4)


def test_without_replies_there_is_nothing_to_measure(engine: TransformersEngine):
    assert divergence(engine, [], Profile(activated=((1, 1),)), 4) is None
    assert selections(engine, [], 4) is None
