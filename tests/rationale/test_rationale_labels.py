"""Label scores against the plain model: one text alone, all its logits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_laid import made_laid
from scipy.special import softmax

from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.rationale.instances import Instance, parse_instance
from moesteer.rationale.labels import (
    Decision,
    calibration,
    decide,
    decision_readout,
    label_readouts,
    score_labels,
)
from moesteer.rationale.layout import Laid, lay_out


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder))


def made_instances() -> list[Instance]:
    """Labels of one and of several tokens, two of which begin alike."""
    record = {
        "label": "yes",
        "labels": {"yes": "Yes", "no": "No, never", "not": "No, sure", "letter": "k"},
        "rationale": [{"text": "one", "start": 0, "end": 4}],
        "prompt": "{one} Is it?",
    }
    texts = ["Tell me two.", "Tell no more of it, never.", "Tell."]
    return [parse_instance({**record, "texts": {"one": text}}, text) for text in texts]


@pytest.fixture(scope="module")
def laid(engine: TransformersEngine) -> list[Laid]:
    return lay_out(made_instances(), engine.tokenizer)


@torch.no_grad()
def log_probability(
    engine: TransformersEngine, ids: tuple[int, ...], words: tuple[int, ...]
) -> float:
    """Of words after ids, by the chain rule, all logits of one text."""
    logits = engine.model(input_ids=torch.tensor([[*ids, *words]])).logits[0].double()
    logs = logits.log_softmax(-1)
    return sum(logs[len(ids) - 1 + n, word].item() for n, word in enumerate(words))


def test_scores_are_the_log_probabilities_of_the_words(
    engine: TransformersEngine, laid: list[Laid]
):
    assert max(len(tokens) for tokens in laid[0].labels.values()) > 1
    asked = [(item, ids) for item in laid for ids in (item.ids, item.ids[3:])]
    for (item, ids), scores in zip(asked, score_labels(engine, asked), strict=True):
        expected = [log_probability(engine, ids, words) for words in item.labels.values()]
        np.testing.assert_allclose(scores, expected, atol=1e-5)


class _Counting:
    """An engine that says what it was asked, and reads a number off each text."""

    def __init__(self) -> None:
        self.readouts: list[Any] = []
        self.profiles: object = None

    def read(self, readouts: Any, profiles: object, *, progress: Any = None) -> np.ndarray:
        self.readouts, self.profiles = list(readouts), profiles
        if progress is not None:
            progress(len(readouts))
        return np.array([[hash(readout) % 1000 for readout in readouts]], float)


def test_equal_prompts_are_read_once(laid: list[Laid]):
    counting: Any = _Counting()
    profile: Any = object()
    asked = [(laid[0], laid[0].ids), (laid[1], laid[1].ids), (laid[0], list(laid[0].ids))]
    told: list[int] = []
    first, second, again = score_labels(counting, asked, profile, progress=told.append)
    assert len(counting.readouts) == 8
    assert counting.profiles == [profile]
    assert sum(told) == 12
    assert first.tolist() == again.tolist() != second.tolist()
    assert counting.readouts == [
        *label_readouts(laid[0], laid[0].ids),
        *label_readouts(laid[1], laid[1].ids),
    ]


def test_nothing_asked_is_nothing_read(engine: TransformersEngine):
    assert score_labels(engine, []) == []


SCORES = arrays.arrays(float, st.integers(2, 6), elements=st.floats(-1e3, 0, allow_subnormal=False))


@given(scores=SCORES, data=st.data())
def test_a_decision_is_the_softmax_and_its_two_best(scores: np.ndarray, data: st.DataObject):
    offsets = data.draw(arrays.arrays(float, len(scores), elements=st.floats(-9, 0)))
    labels = {f"label {n}": "abcdef"[n] for n in range(len(scores))}
    item = made_laid({"one": "A dog"}, ("dog",), labels)
    for found, used in (
        (decide(item, scores), scores),
        (decide(item, scores, offsets), scores - offsets),
    ):
        shares = softmax(used)
        assert list(found.probabilities) == list(labels)
        np.testing.assert_allclose(list(found.probabilities.values()), shares, atol=1e-12)
        order = sorted(range(len(used)), key=lambda n: (-used[n], n))
        assert found.label == f"label {order[0]}"
        assert found.runner_up == f"label {order[1]}"


def test_calibration_takes_away_what_the_words_have_without_a_text(
    engine: TransformersEngine, laid: list[Laid]
):
    offsets = calibration(engine, laid)
    # All texts are "N/A" then, so all prompts are the same.
    assert all(np.array_equal(offsets[0], other) for other in offsets)
    record = {
        "texts": {"one": "N/A"}, "label": "yes", "labels": laid[0].instance.labels,
        "rationale": [{"text": "one", "start": 0, "end": 3}], "prompt": "{one} Is it?",
    }  # fmt: skip
    (empty,) = lay_out([parse_instance(record, "here")], engine.tokenizer, unit="token")
    expected = [log_probability(engine, empty.ids, words) for words in empty.labels.values()]
    np.testing.assert_allclose(offsets[0], expected, atol=1e-5)
    # The empty prompt itself is then decided by nothing.
    (scores,) = score_labels(engine, [(empty, empty.ids)])
    shares = decide(empty, scores, offsets[0]).probabilities.values()
    np.testing.assert_allclose(list(shares), 1 / 4)


def test_what_is_attributed_is_a_difference_of_logits_where_words_part(
    engine: TransformersEngine, laid: list[Laid]
):
    item = laid[0]
    for label, other in (("yes", "no"), ("no", "not"), ("letter", "yes")):
        readout = decision_readout(item, Decision(label, other, {}))
        chosen, rival = item.labels[label], item.labels[other]
        same = next(n for n in range(9) if chosen[n] != rival[n])
        assert (same > 0) == ((label, other) == ("no", "not"))
        ids = (*item.ids, *chosen[:same])
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([ids])).logits[0, -1]
        expected = (logits[chosen[same]] - logits[rival[same]]).item()
        assert engine.read([readout])[0, 0] == pytest.approx(expected, abs=1e-5)
        # The reply begins after the prompt, whatever the labels have in common.
        assert min(term.position for term in readout.terms) == len(item.ids)
        assert readout.ids == ids


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_scores_that_decide_nothing_are_refused(value: float) -> None:
    laid = made_laid({"text": "A gate."}, source="made:7")
    read = np.full((1, len(laid.labels)), value)
    engine: Any = SimpleNamespace(read=lambda *_, **__: read)
    with pytest.raises(MoesteerError, match="made:7: the log-probabilities of the labels are"):
        score_labels(engine, [(laid, laid.ids)])
    read[0, 0] = -5.0  # a label that is ruled out loses
    if not np.isnan(value):
        assert decide(laid, score_labels(engine, [(laid, laid.ids)])[0]).label == next(
            iter(laid.labels)
        )
