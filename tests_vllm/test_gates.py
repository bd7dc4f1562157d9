"""Gates on vLLM: the same scores as in transformers, and each request by its own decision.

Served: `test_serving.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine import steerable

from moesteer import testbed
from moesteer.chat import TokenisedConversation
from moesteer.directions.prompts import draw_sets, read_prompt_set
from moesteer.engines.probing import scores
from moesteer.engines.readouts import mean_log_probability
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.engines.vllm import load_profile
from moesteer.engines.vllm.names import Names
from moesteer.engines.vllm.payload import payload_of
from moesteer.engines.vllm_engine import VllmEngine
from moesteer.errors import MoesteerError
from moesteer.gate import DirectionProbe, Gate, RoutingProbe
from moesteer.gating.fitting import fit_gate
from moesteer.profile import Profile

STEP = 64
"""Tokens of a step: fewer than some prompts, and than all of a batch, have."""
PLANTED = testbed.ground_truth().behaviours["refusal"].planted


@dataclass(frozen=True)
class Both:
    vllm: VllmEngine
    transformers: TransformersEngine
    gates: dict[str, Gate]
    prompts: list[str]
    ids: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    """The testbed in both engines, gates fitted in transformers, and prompts of every kind."""
    engine = load_transformers("testbed", dtype="float32")
    a, b = (read_prompt_set(f"testbed:{task}") for task in ("restricted", "benign"))
    sets = draw_sets(engine, a, b, fit=32, validate=32)
    gates = {by: fit_gate(engine, sets, by=by) for by in ("routing", "direction")}
    read = (*sets.validation.a[:6], *sets.validation.b[:6])
    profiles = [Profile(activated=PLANTED, gate=gate) for gate in gates.values()]
    with steerable("testbed", profiles, max_num_batched_tokens=STEP) as vllm:
        yield Both(vllm, engine, gates, [one.text for one in read], [one.ids for one in read])


def test_scores_are_those_of_transformers(both: Both) -> None:
    probes = [
        both.gates["routing"].probe,
        replace(both.gates["routing"].probe, last=None),
        replace(both.gates["routing"].probe, last=4),
        both.gates["direction"].probe,
        replace(both.gates["direction"].probe, layer=0, position=-5),
    ]
    for probe in probes:
        ours, theirs = (scores(e, both.ids, probe) for e in (both.vllm, both.transformers))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert np.ptp(theirs) > 0.01


def test_projections_along_any_vector_at_any_layer(both: Both) -> None:
    vector = np.random.default_rng(0).normal(size=128) * 3
    ours = np.zeros(0)
    for layer in range(4):
        ours, theirs = (
            e.project(both.ids, layer, -3, vector.tolist()) for e in (both.vllm, both.transformers)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    # Once more, among others and in another order: nothing of the first time is left.
    again = both.vllm.project(both.ids[::-1] * 2, 3, -3, vector.tolist())
    np.testing.assert_allclose(again[: len(ours)], ours[::-1], atol=1e-4)
    np.testing.assert_allclose(again[len(ours) :], ours[::-1], atol=1e-4)
    assert not both.vllm.project(both.ids, 1, -1, [0.0] * 128).any()


def test_a_long_prompt_is_read_across_several_steps(both: Both) -> None:
    lengths = (200, 130, STEP, 7)  # a step runs fewer tokens
    ids = [
        tuple(torch.randint(5, 1000, (n,), generator=torch.Generator().manual_seed(n)).tolist())
        for n in lengths
    ]
    for probe in (DirectionProbe(2, -7, unit(128)), RoutingProbe(((0, 1), (3, 5)), (1.0, -2.0))):
        ours, theirs = (scores(e, ids, probe) for e in (both.vllm, both.transformers))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(MoesteerError, match="text 4 has 7 tokens"):
        scores(both.vllm, ids, DirectionProbe(2, -8, unit(128)))


def unit(width: int) -> tuple[float, ...]:
    vector = np.random.default_rng(1).normal(size=width)
    return tuple((vector / np.linalg.norm(vector)).tolist())


@pytest.mark.parametrize("by", ["routing", "direction"])
def test_each_request_of_a_batch_by_its_own_decision(both: Both, by: str) -> None:
    gated = Profile(deactivated=PLANTED, gate=both.gates[by], name="gated")
    plain = Profile(activated=PLANTED, name="plain")
    order = [i for pair in zip(range(6), range(6, 12), strict=True) for i in pair]  # mixed
    prompts = [both.prompts[i] for i in order]
    profiles = [
        gated if number % 4 < 2 else plain if number % 4 == 2 else None for number in range(12)
    ]
    made = [
        e.generate(prompts, profiles, max_new_tokens=16) for e in (both.vllm, both.transformers)
    ]
    assert made[0].replies == made[1].replies
    opens = [i < 6 for i in order]
    expected = [
        is_open if profile is gated else profile is plain
        for is_open, profile in zip(opens, profiles, strict=True)
    ]
    assert made[0].steered == made[1].steered == expected
    under = [
        profile.ungated if profile is not None and steered else None
        for profile, steered in zip(profiles, expected, strict=True)
    ]
    by_hand = both.transformers.generate(prompts, under, max_new_tokens=16, batch_size=1)
    assert made[0].replies == by_hand.replies
    assert made[0].replies != both.transformers.generate(prompts, max_new_tokens=16).replies


def test_no_prompt_that_opens_is_no_failure(both: Both) -> None:
    shut = Profile(activated=PLANTED, gate=replace(both.gates["direction"], threshold=1e6))
    made = both.vllm.generate(both.prompts, shut, max_new_tokens=16)
    assert made.steered == [False] * 12
    assert made.evidence == []
    assert made.replies == both.vllm.generate(both.prompts, max_new_tokens=16).replies


def test_readings_and_divergences_go_through_the_gate(both: Both) -> None:
    reply = tuple(both.vllm.tokenizer("I cannot help with that.")["input_ids"])
    texts = [
        TokenisedConversation(ids + reply, (False,) * len(ids) + (True,) * len(reply))
        for ids in both.ids
    ]
    readouts = [mean_log_probability(text) for text in texts]
    gated = Profile(deactivated=PLANTED, gate=both.gates["routing"])
    profiles = [None, gated, gated.ungated]
    ours, theirs = (e.read(readouts, profiles) for e in (both.vllm, both.transformers))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_array_equal(ours[1, :6], ours[2, :6])
    np.testing.assert_array_equal(ours[1, 6:], ours[0, 6:])
    found = [e.divergence(texts, gated) for e in (both.vllm, both.transformers)]
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-5)
    assert (found[0][:6] > 0.1).all()
    assert not found[0][6:].any()


def test_what_does_not_ask_a_gate_refuses_it(both: Both, tmp_path: Path) -> None:
    gated = Profile(activated=PLANTED, gate=both.gates["routing"], name="gated")
    with pytest.raises(MoesteerError, match="gated has a gate"):
        load_profile(both.vllm.llm, "gated", gated)
    gated.save(tmp_path / "gated")
    started_with = {"moesteer": {"profiles": {"g": str(tmp_path / "gated")}}}
    config = SimpleNamespace(
        additional_config=started_with, model_config=both.vllm.llm.llm_engine.model_config
    )
    with pytest.raises(MoesteerError, match="gated has a gate"):
        Names.at_start(config)
    with pytest.raises(MoesteerError, match="gated has a gate"):
        payload_of(Profile.load(tmp_path / "gated"))


def test_an_engine_without_room_says_what_it_needs(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = both.vllm.llm.collective_rpc(lambda worker: worker.moesteer_rows)[0]
    monkeypatch.setattr(rows, "directed", None)
    with pytest.raises(MoesteerError, match="its gate reads the residual stream"):
        both.vllm.project(both.ids, 1, -1, unit(128))
