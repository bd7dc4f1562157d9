"""Counting, with an engine of numpy whose routing is a table, against counting one by one."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.chat import TokenisedConversation, TokenisedPair
from moesteer.detection import counts
from moesteer.detection.counts import RoutingCounts, batches_by_length, count_routing
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape

if TYPE_CHECKING:
    from moesteer.engines.base import Counted, Engine

LAYERS = (LayerShape(1, 6, 2), LayerShape(3, 4, 3))
VOCABULARY = 20


class TableEngine:
    """A token's experts depend on the token alone: `scores[layer][token, expert]`."""

    def __init__(self, stop_after: int | None = None) -> None:
        generator = np.random.default_rng(0)
        self.facts = SimpleNamespace(id="table", layers=LAYERS)
        self.scores = [generator.normal(size=(VOCABULARY, s.experts)) for s in LAYERS]
        self.batches: list[list[tuple[int, ...]]] = []
        self.stop_after = stop_after

    def chosen(self, position: int, token: int, counted: "Counted") -> list[int]:
        k = 1 if counted == "top-1" else LAYERS[position].top_k
        return np.argsort(-self.scores[position][token])[:k].tolist()

    def count_selections(
        self, conversations: Sequence[TokenisedConversation], counted: "Counted"
    ) -> np.ndarray:
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        self.batches.append([conversation.ids for conversation in conversations])
        table = np.zeros((len(conversations), len(LAYERS), 6), dtype=np.int64)
        for row, conversation in enumerate(conversations):
            for token, inside in zip(conversation.ids, conversation.target, strict=True):
                for position in range(len(LAYERS)) if inside else ():
                    table[row, position, self.chosen(position, token, counted)] += 1
        return table


class ProbabilityEngine(TableEngine):
    """Counts probabilities (softmax of the scores); `scale` breaks them."""

    def __init__(self, scale: float = 1.0, stop_after: int | None = None) -> None:
        super().__init__(stop_after)
        weights = [np.exp(scores) for scores in self.scores]
        self.probabilities = [scale * w / w.sum(-1, keepdims=True) for w in weights]

    def count_selections(
        self, conversations: Sequence[TokenisedConversation], counted: "Counted"
    ) -> np.ndarray:
        super().count_selections(conversations, counted)
        table = np.zeros((len(conversations), len(LAYERS), 6), dtype=np.float64)
        for row, conversation in enumerate(conversations):
            inside = np.array(conversation.ids)[np.array(conversation.target)]
            for position, probabilities in enumerate(self.probabilities):
                table[row, position, : LAYERS[position].experts] = probabilities[inside].sum(0)
        return table


def engine(stop_after: int | None = None) -> "tuple[TableEngine, Engine]":
    table = TableEngine(stop_after)
    return table, cast("Engine", table)


def make_pairs(number: int = 9, seed: int = 1) -> list[TokenisedPair]:
    generator = np.random.default_rng(seed)

    def conversation() -> TokenisedConversation:
        length = int(generator.integers(1, 30))
        target = generator.random(length) < 0.5
        target[generator.integers(length)] = True
        ids = generator.integers(0, VOCABULARY, length)
        return TokenisedConversation(tuple(ids.tolist()), tuple(target.tolist()))

    return [TokenisedPair(conversation(), conversation(), f"p:{n}") for n in range(number)]


def same(one: RoutingCounts, other: RoutingCounts) -> bool:
    return np.array_equal(one.selected, other.selected) and np.array_equal(one.tokens, other.tokens)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "BATCH_TOKENS", 60)


# --- the counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", ["top-k", "top-1"])
def test_counts_are_those_of_counting_one_by_one(counted: "Counted"):
    table, as_engine = engine()
    pairs = make_pairs()
    found = count_routing(as_engine, pairs, counted)
    assert len(table.batches) > 3
    assert found.selected.shape == (9, 2, 2, 6)
    for i, pair in enumerate(pairs):
        for side, conversation in enumerate((pair.a, pair.b)):
            targets = [
                t for t, inside in zip(conversation.ids, conversation.target, strict=True) if inside
            ]
            assert found.tokens[i, side] == len(targets)
            for position in range(2):
                for expert in range(6):
                    expected = sum(
                        expert in table.chosen(position, token, counted) for token in targets
                    )
                    assert found.selected[i, side, position, expert] == expected


def test_probabilities_are_summed_and_taken_up_after_an_interruption(tmp_path: Path):
    pairs = make_pairs()
    whole = count_routing(cast("Engine", ProbabilityEngine()), pairs, "probability")
    assert np.issubdtype(whole.selected.dtype, np.floating)
    np.testing.assert_allclose(whole.selected.sum(-1), whole.tokens[:, :, None].repeat(2, -1), 1e-5)
    table = ProbabilityEngine()
    for i, pair in enumerate(pairs):
        ids = [t for t, inside in zip(pair.b.ids, pair.b.target, strict=True) if inside]
        expected = sum(table.probabilities[0][token] for token in ids)
        np.testing.assert_allclose(whole.selected[i, 1, 0], expected, rtol=1e-5)
    more = {"checkpoint": tmp_path / "counts.partial", "identity": "x"}
    with pytest.raises(KeyboardInterrupt):
        count_routing(cast("Engine", ProbabilityEngine(stop_after=2)), pairs, "probability", **more)
    resumed = count_routing(cast("Engine", ProbabilityEngine()), pairs, "probability", **more)
    assert same(resumed, whole)


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_probabilities_that_do_not_sum_to_one_are_refused(scale: float):
    with pytest.raises(MoesteerError, match="layer 1 of table"):
        count_routing(cast("Engine", ProbabilityEngine(scale)), make_pairs(), "probability")


def test_progress_is_told_from_nothing_to_all():
    pairs = make_pairs()
    total = sum(len(side.ids) for pair in pairs for side in (pair.a, pair.b))
    told: list[tuple[int, int]] = []
    table, as_engine = engine()
    count_routing(as_engine, pairs, progress=lambda read, of: told.append((read, of)))
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert len(told) == 1 + len(table.batches)
    assert all(before[0] < after[0] for before, after in pairwise(told))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda seen: seen * 0, r"layer 1 of table: 0 selections.*were not observed"),
        (lambda seen: seen * 2, r"layer 1 of table: .*at most"),
        (lambda seen: seen * np.array([1, 0])[:, None], r"layer 3 of table: 0 selections"),
    ],
)
def test_counts_that_cannot_be_are_refused(change, said: str, monkeypatch: pytest.MonkeyPatch):
    table, as_engine = engine()
    true = table.count_selections
    monkeypatch.setattr(table, "count_selections", lambda *args: change(true(*args)))
    with pytest.raises(MoesteerError, match=said):
        count_routing(as_engine, make_pairs())


# --- batches --------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_batches(lengths: list[int], budget: int):
    batches = batches_by_length(lengths, budget)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or lengths[batch[0]] * len(batch) <= budget
    for batch, following in pairwise(batches):  # none is cut too early
        assert following
        assert lengths[batch[0]] * (len(batch) + 1) > budget


# --- after a kill ---------------------------------------------------------------------------------


def test_an_interrupted_count_goes_on_where_it_was(tmp_path: Path):
    pairs = make_pairs()
    whole_table, as_engine = engine()
    whole = count_routing(as_engine, pairs)
    checkpoint = tmp_path / "counts.partial"
    first, as_engine = engine(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        count_routing(as_engine, pairs, checkpoint=checkpoint, identity="x")
    second, as_engine = engine(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        count_routing(as_engine, pairs, checkpoint=checkpoint, identity="x")
    third, as_engine = engine()
    told: list[int] = []
    resumed = count_routing(
        as_engine, pairs, checkpoint=checkpoint, identity="x", progress=lambda n, _: told.append(n)
    )
    assert same(resumed, whole)
    assert first.batches + second.batches + third.batches == whole_table.batches
    assert told[0] == sum(len(ids) for batch in whole_table.batches[:3] for ids in batch)


def test_a_killed_count_goes_on_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A kill runs no code of ours: what helps is what was saved on the way.
    class Killed(BaseException):
        pass

    pairs = make_pairs()
    checkpoint = tmp_path / "counts.partial"
    monkeypatch.setattr(counts, "CHECKPOINT_SECONDS", 0)
    first, as_engine = engine()
    true = first.count_selections

    def die(*args) -> np.ndarray:
        if len(first.batches) == 3:
            raise Killed
        return true(*args)

    monkeypatch.setattr(first, "count_selections", die)
    with pytest.raises(Killed):
        count_routing(as_engine, pairs, checkpoint=checkpoint, identity="x")
    second, as_engine = engine()
    resumed = count_routing(as_engine, pairs, checkpoint=checkpoint, identity="x")
    whole_table, as_engine = engine()
    assert same(resumed, count_routing(as_engine, pairs))
    assert second.batches == whole_table.batches[3:]


def test_checkpoints_are_written_now_and_then_only(tmp_path: Path):
    _, as_engine = engine()
    count_routing(as_engine, make_pairs(), checkpoint=tmp_path / "counts", identity="x")
    assert not list(tmp_path.iterdir())  # it took no half minute


@pytest.mark.parametrize("damage", ["identity", "truncated", "text", "tensors"])
def test_a_checkpoint_that_is_not_ours_is_not_taken_up(tmp_path: Path, damage: str):
    from safetensors.numpy import save_file

    pairs = make_pairs()
    checkpoint = tmp_path / "counts.partial"
    _, as_engine = engine(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        count_routing(as_engine, pairs, checkpoint=checkpoint, identity="x")
    match damage:
        case "truncated":
            checkpoint.write_bytes(checkpoint.read_bytes()[:-5])
        case "text":
            checkpoint.write_text("hello")
        case "tensors":
            save_file({"done": np.ones(18, dtype=bool)}, checkpoint, metadata={"identity": "x"})
    table, as_engine = engine()
    identity = "y" if damage == "identity" else "x"
    found = count_routing(as_engine, pairs, checkpoint=checkpoint, identity=identity)
    whole_table, as_engine = engine()
    assert same(found, count_routing(as_engine, pairs))
    assert table.batches == whole_table.batches
