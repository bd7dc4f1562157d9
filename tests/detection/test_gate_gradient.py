"""Gate gradients of pairs: added up, and on the bundled model beside a gate that is moved."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moesteer.chat import tokenise_pairs
from moesteer.contrast import read_pairs
from moesteer.detection.decision import pair_readouts
from moesteer.detection.gate_gradient import gate_gradient
from moesteer.engines.readouts import Readout
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.testbed import ground_truth


def test_the_readouts_of_a_pair_are_added_up() -> None:
    def gradients(readouts: list[Readout]) -> np.ndarray:
        return np.array([[[float(r.ids[0]), 1.0]] for r in readouts])

    engine: Any = SimpleNamespace(gate_gradients=gradients)
    one, two, four = (Readout((n,), ()) for n in (1, 2, 4))
    found = gate_gradient(engine, [(one, two), (four,)])
    np.testing.assert_array_equal(found, [[[3, 2]], [[4, 1]]])


@pytest.mark.parametrize("readouts", [[], [()]])
def test_no_pairs(readouts: list) -> None:
    with pytest.raises(MoesteerError, match="there are no pairs to take gradients of"):
        gate_gradient(SimpleNamespace(), readouts)  # pyright: ignore[reportArgumentType]


def test_the_decision_moves_as_the_gradient_says() -> None:
    """Each planted expert's weight lessened by a hundredth at every token of the bundled model."""
    engine = load_transformers("testbed", dtype="float32")
    pairs = tokenise_pairs(read_pairs("testbed:document:dev")[:4], engine.tokenizer)
    readouts = [pair_readouts(pair) for pair in pairs]
    flat = [readout for pair in readouts for readout in pair]
    found = gate_gradient(engine, readouts)
    before = engine.read(flat)[0]
    for layer, expert in ground_truth().behaviours["document"].planted:

        def lessen(_module: object, args: tuple, expert: int = expert) -> tuple:
            hidden, index, weights = args
            less: Tensor = torch.where(index == expert, 0.99 * weights, weights)
            return hidden, index, less

        experts: Any = engine.layers[layer].experts
        handle = experts.register_forward_pre_hook(lessen)
        after = engine.read(flat)[0]
        handle.remove()
        change = (before - after) / 0.01
        np.testing.assert_allclose(change, found[:, layer, expert], atol=0.05, rtol=0.05)
        assert np.abs(change).max() > 0.1


def test_a_pair_with_its_sides_swapped_has_the_opposite_gradient() -> None:
    engine = load_transformers("testbed")
    pairs = tokenise_pairs(read_pairs("testbed:digits:dev")[:3], engine.tokenizer)
    there = gate_gradient(engine, [pair_readouts(pair) for pair in pairs])
    swapped = [type(pair)(pair.b, pair.a, pair.source) for pair in pairs]
    back = gate_gradient(engine, [pair_readouts(pair) for pair in swapped])
    np.testing.assert_allclose(back, -there, atol=1e-6)
