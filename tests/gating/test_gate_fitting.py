"""Gates fitted on the testbed: what the probes are made of, and what chance makes of them."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from moesteer.contrast import Message
from moesteer.directions.prompts import PromptSets, draw_sets, read_prompt_set
from moesteer.engines.probing import scores, selection_shares
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.gate import DirectionProbe, RoutingProbe
from moesteer.gating.fitting import STRONGEST, fit_gate
from moesteer.generate import Prompt


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return load_transformers("testbed", dtype="float32")


@pytest.fixture(scope="module")
def sets(engine: TransformersEngine) -> PromptSets:
    a, b = (read_prompt_set(f"testbed:{task}") for task in ("restricted", "benign"))
    return draw_sets(engine, a, b, fit=32, validate=32, seed=1)


def test_a_routing_gate_weighs_the_experts_whose_risk_differs_most(engine, sets) -> None:
    told: list[int] = []
    gate = fit_gate(engine, sets, by="routing", last=2, seed=4, source="x", progress=told.append)
    assert isinstance(gate.probe, RoutingProbe)
    shares = [selection_shares(engine, [p.ids for p in s], 2) for s in (sets.fit.a, sets.fit.b)]
    difference = shares[0].mean(0) - shares[1].mean(0)
    assert 0 < len(gate.probe.experts) <= STRONGEST
    for place, weight in zip(gate.probe.experts, gate.probe.weights, strict=True):
        assert weight == pytest.approx(difference[place])
    left = np.abs(difference).copy()
    for place in gate.probe.experts:
        left[place] = 0
    assert left.max() <= min(map(abs, gate.probe.weights)) + 1e-12
    assert sum(told) == 4 * 32 + 2 * 32
    # The evidence, again from the gate alone
    seen = gate.evidence
    assert seen is not None
    dev = (sets.validation.a, sets.validation.b)
    found = [scores(engine, [p.ids for p in side], gate.probe) for side in dev]
    assert [int((f > gate.threshold).sum()) for f in found] == [
        seen.opens.opened,
        seen.keeps_shut.opened,
    ]
    above = np.mean([x > y for x in found[0] for y in found[1]])
    assert seen.auc.value == pytest.approx(above, abs=1e-3)
    assert (seen.fit_opens, seen.fit_keeps_shut, seen.seed, seen.source) == (32, 32, 4, "x")
    assert seen.data_hash == sets.data_hash
    assert fit_gate(engine, sets, by="routing", last=2, seed=4).threshold == gate.threshold


def test_a_direction_gate_is_a_difference_of_means(engine, sets) -> None:
    gate = fit_gate(engine, sets, by="direction")
    assert isinstance(gate.probe, DirectionProbe)
    assert gate.probe.position == -1
    a, b = (engine.residuals([p.ids for p in s], 1)[:, :, 0] for s in (sets.fit.a, sets.fit.b))
    difference = (a.mean(0) - b.mean(0))[gate.probe.layer]
    np.testing.assert_allclose(
        gate.probe.vector, difference / np.linalg.norm(difference), atol=1e-5
    )
    assert gate.probe.layer > 0  # all prompts end in the same token
    # In fp64, as far apart as its layer is, no other is: each half along the other's difference
    apart, halves = [], (slice(0, None, 2), slice(1, None, 2))
    for layer in range(4):
        ways = []
        for one, other in (halves, halves[::-1]):
            line = a[one, layer].mean(0) - b[one, layer].mean(0)
            x, y = a[other, layer] @ line, b[other, layer] @ line
            ways.append((x.mean() - y.mean()) / max(np.sqrt((x.var() + y.var()) / 2), 1e-9))
        apart.append(np.mean(ways))
    assert int(np.argmax(apart)) == gate.probe.layer


@pytest.mark.parametrize("by", ["routing", "direction"])
def test_restricted_and_harmless_prompts_are_told_apart_on_others(engine, sets, by) -> None:
    seen = fit_gate(engine, sets, by=by).evidence
    assert seen is not None
    assert (seen.opens.opened, seen.keeps_shut.opened) == (32, 0)
    assert seen.auc.value == 1
    assert seen.shuffled.low < 0.5 < seen.shuffled.high < 0.9
    assert seen.random.value < 0.95  # less than fitted, though such prompts lie far apart


@pytest.mark.parametrize("by", ["routing", "direction"])
def test_where_the_prompts_are_of_one_kind_it_is_at_chance(engine, by) -> None:
    """Restricted and harmless ones on either side: as if their labels were shuffled."""
    prompts = [p for task in ("restricted", "benign") for p in read_prompt_set(f"testbed:{task}")]
    found, warned = [], 0
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(prompts))
        mixed = [prompts[number] for number in order]
        sets = draw_sets(engine, mixed[:96], mixed[96:], fit=48, validate=48)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MoesteerWarning)
            seen = fit_gate(engine, sets, by=by).evidence
        warned += any("no better than one whose prompts" in str(w.message) for w in caught)
        assert seen is not None
        assert seen.keeps_shut.opened <= 2
        assert seen.opens.opened < 24
        found.append(seen.auc.value)
    assert abs(np.mean(found) - 0.5) < 0.1
    assert max(found) < 0.75
    assert warned >= 4  # of what is at chance, some 2.5 % lie above the middle 95 %


def test_what_a_gate_can_not_be_made_of(engine, sets, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoesteerError, match=r"32 dev prompts .* At least 100 are needed"):
        fit_gate(engine, sets, false_alarms=0.01)
    dense = replace(engine.facts, layers=())
    with monkeypatch.context() as patch:
        patch.setattr(engine, "facts", dense)
        with pytest.raises(MoesteerError, match="dense model, which routes nothing"):
            fit_gate(engine, sets)
    # Prompts that the model reads alike: the same letters behind the instruction, at the end
    same = [Prompt((Message("user", "a" * n),), str(n)) for n in range(1, 25)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoesteerWarning)
        alike = draw_sets(engine, same[:12], same[12:], fit=8, validate=4)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "count_selections", lambda read, counted: np.ones((len(read), 4, 16)))
        with pytest.raises(MoesteerError, match="the same on average"):
            fit_gate(engine, alike, false_alarms=0.5)
    assert not np.isnan(fit_gate(engine, sets).threshold)
