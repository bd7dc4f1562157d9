"""Knocking on an engine whose answers are a formula, and on models against single interventions."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesteer.chat import tokenise_pairs
from moesteer.contrast import read_pairs
from moesteer.detection.decision import pair_readouts
from moesteer.detection.knocking import knock, knocking_cost, layers_to_enter
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile
from moesteer.runs import open_run
from moesteer.testbed import ground_truth
from moesteer.testbed.world import BEHAVIOURS

SHAPES = (LayerShape(1, 4, 2), LayerShape(3, 6, 2), LayerShape(4, 4, 2))


class Formula:
    """Reads, for text t: t + Σ of 10·layer + expert + t of what is activated, − twice of what is
    deactivated."""

    def __init__(self, fail_at_layer: int | None = None) -> None:
        self.facts: Any = SimpleNamespace(layers=SHAPES, id="formula")
        self.asked: list[list[Profile | None]] = []
        self.fail_at_layer = fail_at_layer

    def read(
        self,
        readouts: Sequence[Readout],
        profiles: Sequence[Profile | None],
        *,
        progress: Callable[[int], None],
    ) -> np.ndarray:
        if any(p and p.steered_layers == (self.fail_at_layer,) for p in profiles):
            raise KeyboardInterrupt
        self.asked.append(list(profiles))
        progress(len(readouts) * len(profiles))
        asked = [[self.value(r.ids[0], p or Profile()) for r in readouts] for p in profiles]
        return np.array(asked, dtype=float)

    def value(self, text: int, profile: Profile) -> float:
        up = sum(10 * layer + expert + text for layer, expert in profile.activated)
        down = sum(10 * layer + expert + text for layer, expert in profile.deactivated)
        return text + up - 2 * down


def texts(*numbers: int) -> list[tuple[Readout, ...]]:
    return [(Readout((number, 0, 0), (Term(2, 5, 1.0),)),) for number in numbers]


def engine(fail_at_layer: int | None = None) -> Any:
    return Formula(fail_at_layer)


def test_every_expert_is_knocked_out_and_in() -> None:
    e = engine()
    pairs = [*texts(3, 5), texts(1)[0] + texts(2)[0]]  # the last pair has two readouts
    found = knock(e, pairs, beside={"other": texts(100, 300)})
    for row, shape in enumerate(SHAPES):
        for expert in range(6):
            exists = expert < shape.experts
            change = np.array([10 * shape.layer + expert + t for t in (3, 5)])
            both = 2 * (10 * shape.layer + expert) + 3
            expected = [*change, both] if exists else [0, 0, 0]
            np.testing.assert_allclose(found.knock_in[:, row, expert], expected)
            np.testing.assert_allclose(found.knock_out[:, row, expert], 2 * np.array(expected))
            beside = 10 * shape.layer + expert + 200 if exists else 0
            np.testing.assert_allclose(found.beside["other"][:, row, expert], [-2 * beside, beside])
    assert [len(profiles) for profiles in e.asked] == [9, 13, 9]
    single = [len(p.activated) + len(p.deactivated) for asked in e.asked for p in asked if p]
    assert set(single) == {1}


def test_screening_goes_into_the_strongest_layers_only() -> None:
    e = engine()
    found = knock(e, texts(3), into=2)
    assert np.isnan(found.knock_out[0, 0, :4]).all()
    assert not found.knock_out[0, 0, 4:].any()
    assert not np.isnan(found.knock_out[0, 1:]).any()
    blocks = [p.deactivated for asked in e.asked[:3] for p in asked if p]
    assert all(not p.activated for asked in e.asked[:3] for p in asked if p)
    assert sorted(place for block in blocks for place in block) == [
        (shape.layer, expert) for shape in SHAPES for expert in range(shape.experts)
    ]


def test_blocks_leave_k_experts() -> None:
    e = engine()
    e.facts.layers = (LayerShape(0, 64, 60), LayerShape(1, 64, 8))
    knock(e, texts(3), into=1)
    sizes = [[len(p.deactivated) for p in asked if p] for asked in e.asked[:2]]
    assert sizes == [[4] * 16, [8] * 8]


@pytest.mark.parametrize("into", [None, 1, 2])
def test_the_cost_is_what_is_read(into: int | None) -> None:
    e, told = engine(), []
    e.facts.layers = SHAPES[1:2] * 1 + (LayerShape(5, 6, 2), LayerShape(6, 6, 2))
    pairs, beside = texts(1, 2), {"other": texts(4)}
    cost = knocking_cost(e.facts.layers, pairs, beside, into)
    knock(e, pairs, beside=beside, into=into, progress=lambda *done: told.append(done))
    assert cost.interventions == sum(map(len, e.asked))
    assert told[-1] == (cost.texts, cost.texts)
    assert cost.tokens == 2 * cost.texts  # position 2: two tokens are read of each


def test_how_many_layers_are_entered() -> None:
    many = [LayerShape(layer, 128, 8) for layer in range(48)]
    assert layers_to_enter(many, None) == 7
    assert layers_to_enter(many[:7], None) == 7
    assert layers_to_enter(many, 48) == 48
    assert layers_to_enter([LayerShape(0, 4096, 8), LayerShape(1, 8, 2)], None) == 1
    for wrong in (0, 49):
        with pytest.raises(MoesteerError, match=f"{wrong} layers are .*; the model has 48"):
            layers_to_enter(many, wrong)


@pytest.mark.parametrize("into", [None, 2])
def test_an_interrupted_run_goes_on(tmp_path: Path, into: int | None) -> None:
    pairs, beside = texts(3, 5), {"other": texts(7)}
    whole = knock(engine(), pairs, beside=beside, into=into)
    with (
        pytest.raises(KeyboardInterrupt),
        open_run(tmp_path / "run", "detectors", {}, {}) as run,
    ):
        knock(engine(fail_at_layer=4), pairs, beside=beside, into=into, run=run)
    again, told = engine(), []
    with open_run(tmp_path / "run", "detectors", {}, {}) as run:
        found = knock(
            again, pairs, beside=beside, into=into, run=run, progress=lambda *n: told.append(n)
        )
        assert len(run.lines("knocking")) == (into or 3)
    # With screening, it was the screening of layer 4 that was interrupted.
    asked = {p.steered_layers for asked in again.asked for p in asked if p}
    assert asked == ({(3,), (4,)} if into else {(4,)})
    assert len(again.asked) == (3 if into else 1)
    assert told[0][0] > 0
    np.testing.assert_array_equal(found.knock_out, whole.knock_out)
    np.testing.assert_array_equal(found.knock_in, whole.knock_in)
    np.testing.assert_array_equal(found.beside["other"], whole.beside["other"])


def test_nothing_to_measure_is_refused() -> None:
    for pairs in ([], [()]):
        with pytest.raises(MoesteerError, match="there are no pairs"):
            knock(engine(), pairs)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_planted_experts_have_the_largest_effects(behaviour: str) -> None:
    """On the shipped bf16 weights; the earlier measurement, with a steering of its own, agrees."""
    e = load_transformers("testbed")
    pairs = tokenise_pairs(read_pairs(f"testbed:{behaviour}:dev")[:24], e.tokenizer)
    found = knock(e, [pair_readouts(pair) for pair in pairs])
    out, into = found.knock_out.mean(0), found.knock_in.mean(0)
    effect = np.maximum(np.abs(out), np.abs(into))
    order = np.argsort(-effect, axis=None)
    first = [tuple(map(int, np.unravel_index(i, effect.shape))) for i in order[:3]]
    truth = ground_truth().behaviours[behaviour]
    assert not set(first) & set(truth.decoys)
    assert len(set(first) & set(truth.planted)) >= (3 if behaviour == "refusal" else 2)
    for place in truth.planted:
        assert out[place] > 3
        assert into[place] > 0
    recorded = ground_truth().measured["planted"]["experts"][behaviour]
    theirs = np.array([[-r["knock_out"], r["knock_in"]] for r in recorded])
    ours = np.array([[out[tuple(r["place"])], into[tuple(r["place"])]] for r in recorded])
    assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.95


def test_a_record_is_json(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "detectors", {}, {}) as run:
        knock(engine(), texts(3), beside={"other": texts(7)}, run=run)
    lines = (tmp_path / "run" / "knocking.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert record["layer"] == 1
    assert record["knock_out"] == [[26, 28, 30, 32]]
    assert record["beside"]["other"] == [[-34, -36, -38, -40], [17, 18, 19, 20]]
