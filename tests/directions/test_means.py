"""Streamed means against means in two passes, and residuals against transformers' own."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import write_model
from moesteer.directions.means import RunningMean, mean_residuals
from moesteer.directions.prompts import AskedPrompt
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError

numbers = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=numbers),
    st.lists(st.integers(1, 7), min_size=40, max_size=40),
)
def test_a_streamed_mean_is_the_mean_in_two_passes(values: np.ndarray, sizes: list[int]):
    mean, start = RunningMean(), 0
    for size in sizes:
        mean.add(values[start : start + size])
        start += size
    assert mean.count == len(values)
    exact = [math.fsum(map(float, column)) / len(values) for column in values.T]
    scale = float(np.abs(values).max()) or 1.0
    np.testing.assert_allclose(mean.value, exact, rtol=0, atol=1e-14 * scale * len(values))


@given(arrays(np.float32, 3, elements=numbers), st.integers(1, 50))
def test_the_mean_of_equal_vectors_is_that_vector(value: np.ndarray, times: int):
    mean = RunningMean()
    mean.add(np.stack([value] * times))
    assert (mean.value == value.astype(np.float64)).all()


def test_large_numbers_lose_nothing_to_their_sum():
    mean = RunningMean()
    for _ in range(1000):
        mean.add(np.array([[1e7], [1e7 + 1]], np.float32))
    assert mean.value[0] == pytest.approx(1e7 + 0.5, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_residuals_are_those_that_transformers_gives(tmp_path_factory, batch_size: int):
    engine = load_transformers(str(write_model(tmp_path_factory.mktemp("m") / "m")))
    texts = ["Tell me.", "Yes, sure, and no.", "No way", "Tell me, tell me, tell me now."]
    prompts = [
        AskedPrompt(text, tuple(engine.tokenizer(text)["input_ids"]), 1, text) for text in texts
    ]
    told: list[int] = []
    found = mean_residuals(engine, prompts, 2, batch_size=batch_size, progress=told.append)
    total = np.zeros((4, 2, 64))
    for prompt in prompts:
        with torch.no_grad():
            states = engine.model(torch.tensor([prompt.ids]), output_hidden_states=True)
        for layer, state in enumerate(states.hidden_states[:4]):  # [l] is what enters layer l
            total[layer] += state[0, -2:].double().numpy()
    np.testing.assert_allclose(found, total / 4, atol=2e-5)
    assert sum(told) == 4


class Broken:
    """An engine whose second text is NaN at one place."""

    class facts:  # noqa: N801
        id = "broken"

    def residuals(self, texts: Sequence[Sequence[int]], last: int) -> np.ndarray:
        found = np.ones((len(texts), 3, last, 2))
        found[1, 2, 0, 1] = np.nan
        return found


def test_a_model_that_gives_nan_is_refused():
    prompts = [AskedPrompt("x", (1, 2, 3), 1, f"file:{n}") for n in (1, 2)]
    with pytest.raises(MoesteerError, match=r"file:2: .* layer 2 of broken is NaN .* position -2"):
        mean_residuals(Broken(), prompts, 2, batch_size=2)  # pyright: ignore
