"""Batches within the memory that is free, told by what an earlier one held."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_token_gradients import found, made, same

from moesteer.engines.transformers import memory
from moesteer.engines.transformers.memory import (
    by_length,
    free_memory,
    in_batches,
    measured,
    texts_in_batches,
)
from moesteer.engines.transformers.reading import Piece
from moesteer.errors import MoesteerError

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(1, 5000), max_size=60))
def test_batches_hold_every_row_once_longest_first(lengths: list[int]) -> None:
    rows = list(enumerate(lengths))
    batches = by_length(rows, lambda row: row[1])
    assert sorted(row for batch in batches for row in batch) == rows
    assert [row[1] for batch in batches for row in batch] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * batch[0][1] <= memory.BATCH_TOKENS
    for one, other in pairwise(batches):
        assert (len(one) + 1) * max(one[0][1], other[0][1]) > memory.BATCH_TOKENS


@given(lengths=st.lists(st.integers(1, 50), max_size=30), free=st.integers(60, 600))
def test_rows_go_through_in_batches_that_fit(lengths: list[int], free: int) -> None:
    """A row holds ten bytes a token, and so do all that share its batch."""
    rows, sizes = list(enumerate(lengths)), []

    def compute(batch: list[tuple[int, int]]) -> list[int]:
        size = 10 * len(batch) * max(length for _, length in batch)
        if size > free:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(size)
        return [number for number, _ in batch]

    run = in_batches(rows, lambda row: row[1], lambda row: row[0], CPU, compute, "shorten it")
    if 10 * max(lengths, default=0) > free:
        with pytest.raises(MoesteerError, match="needs more than the"):
            list(run)
    else:
        assert sorted(run) == list(range(len(rows)))


@given(lengths=st.lists(st.integers(1, 300), max_size=30))
def test_texts_keep_their_numbers(lengths: list[int]) -> None:
    pieces = [Piece((number,) * n, n, (), ()) for number, n in enumerate(lengths)]

    def first(batch: Sequence[Piece]) -> list[int]:
        return [piece.ids[0] for piece in batch]

    run = texts_in_batches(pieces, CPU, first, "shorten it")
    assert sorted(run) == [(number, number) for number in range(len(lengths))]


def test_what_a_graph_holds_is_measured() -> None:
    leaf = torch.ones(100, requires_grad=True)
    with measured(CPU) as held:
        product = leaf.exp() * leaf
    assert product.requires_grad
    assert held() == 2 * 400  # what exp gave, and the leaf


def test_weights_are_not_what_a_graph_holds() -> None:
    """They would be shared out over the tokens of the shortest text, and refuse longer ones."""
    e = made("qwen3_moe")
    weights = sum(weight.nbytes for weight in e.model.parameters())
    sizes = []
    for tokens in (4, 40):
        leaf = torch.randn(1, tokens, 64, requires_grad=True)
        with e._subject(None).differentiable(), measured(CPU) as held:
            assert e.model.base_model(inputs_embeds=leaf, use_cache=False)[0].requires_grad
        sizes.append(held())
    assert sizes[0] < weights / 4
    assert sizes[1] / sizes[0] == pytest.approx(10, rel=0.3)


def test_an_estimate_halves_batches_before_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def compute(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        leaf = torch.ones(100 * len(batch), requires_grad=True)
        assert leaf.exp().sum().requires_grad
        return batch

    monkeypatch.setattr(memory, "free_memory", lambda _device: 2000)  # of which 90 % may be taken
    rows = list(range(10))
    run = in_batches(rows, lambda _: 5, lambda row: row, CPU, compute, "shorten it")
    assert sorted(run) == rows
    assert sizes == [1, 4, 2, 3]  # 400 bytes a row


def test_gradients_are_the_same_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    e = made("qwen3_moe")
    whole = found(e)
    monkeypatch.setattr(memory, "BATCH_TOKENS", 13)
    for one, other in zip(whole, found(e), strict=True):
        same(other.gradient, one.gradient)


def test_a_text_that_does_not_fit_says_how_much_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    e = made("qwen3_moe")
    monkeypatch.setattr(memory, "free_memory", lambda _device: 1000)
    said = r"text 1 with its 12 tokens needs about 0\.\d+ GiB; 0\.00 GiB are free: turn on checkpo"
    with pytest.raises(MoesteerError, match=said):
        found(e)
    with pytest.raises(MoesteerError, match="are free: shorten it"):
        found(e, checkpointing=True)


def test_checkpoints_hold_less() -> None:
    e, sizes = made("qwen3_moe"), []
    for checkpointing in (False, True):
        leaf = torch.randn(1, 40, 64, requires_grad=True)
        with e._subject(None, checkpointing).differentiable(), measured(CPU) as held:
            assert e.model.base_model(inputs_embeds=leaf, use_cache=False)[0].requires_grad
        sizes.append(held())
    assert sizes[1] < sizes[0] / 4


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", "other"])
def test_what_a_cpu_says_when_it_is_full(message: str) -> None:
    def compute(_batch: list[int]) -> list[int]:
        raise RuntimeError(message)

    expected = MoesteerError if "memory" in message else RuntimeError
    with pytest.raises(expected):
        list(in_batches([3], lambda _: 3, lambda _: 0, CPU, compute, "shorten it"))


def test_free_memory_is_the_smaller_of_two(tmp_path: Path) -> None:
    assert 2**20 < free_memory(CPU) < 2**50
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._left_in_group(tmp_path) == 300
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_group(tmp_path) is None
    assert memory._left_in_group(tmp_path / "none") is None
