"""Masking against a model whose answer is known, and against the plain model text by text."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesteer.engines.readouts import Readout
from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.rationale.faithfulness import SHARES, Question, counts, measure
from moesteer.rationale.instances import Instance
from moesteer.rationale.labels import Decision, decide, score_labels
from moesteer.rationale.layout import Laid, Unit
from moesteer.rationale.masking import Mask
from moesteer.rationale.reading import Masked

DELETE = Mask("delete", None)
YES, NO, FILLER = 90, 91, 5


def laid_out(words: Sequence[Sequence[int]], labels: dict[str, tuple[int, ...]]) -> Laid:
    """Units of the tokens given, with one token before them and one after that are in none."""
    ids, units = [3], list[Unit]()
    for word in words:
        units.append(Unit("text", 0, 1, tuple(range(len(ids), len(ids) + len(word))), False))
        ids += word
    instance = Instance("made", {"text": "-"}, "yes", {"yes": "y", "no": "n"}, (), "{text}", {})
    return Laid(instance, (*ids, 4), tuple(units), labels)


class Counting:
    """An engine to which a label is as likely as e^(how often its token is in the text)."""

    def __init__(self) -> None:
        self.read_texts: list[tuple[int, ...]] = []

    def read(
        self, readouts: Sequence[Readout], profiles: Sequence[None], progress: Any = None
    ) -> np.ndarray:
        self.read_texts += [readout.ids for readout in readouts]
        return np.array([[float(r.ids.count(r.terms[0].token)) for r in readouts]] * len(profiles))


def asked(engine: Any, laid: Laid, units: Sequence[int]) -> Question:
    return Question(laid, decide(laid, score_labels(engine, [(laid, laid.ids)])[0]), tuple(units))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@st.composite
def words_and_units(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    words = draw(st.lists(st.sampled_from([YES, NO, FILLER]), min_size=1, max_size=10))
    return words, draw(st.lists(st.integers(0, len(words) - 1), unique=True))


@given(words_and_units())
def test_a_model_that_counts_words(made: tuple[list[int], list[int]]):
    words, units = made
    laid = laid_out([(word,) for word in words], {"yes": (YES,), "no": (NO,)})

    def lead(numbers: Sequence[int]) -> int:
        return sum((words[n] == YES) - (words[n] == NO) for n in numbers)

    everything = lead(range(len(words)))
    sign = 1 if everything >= 0 else -1  # the first label of equals
    left = sign * (everything - lead(units))
    for mask in (DELETE, Mask("neutral", 7)):
        engine: Any = Counting()
        (found,) = measure(engine, [asked(engine, laid, units)], mask)
        assert found.flipped == (left < 0 or (left == 0 and sign < 0))
        whole = sigmoid(abs(everything))
        assert found.comprehensiveness == pytest.approx(whole - sigmoid(left))
        assert found.sufficiency == pytest.approx(whole - sigmoid(sign * lead(units)))


def test_nothing_and_everything_masked():
    laid = laid_out([(NO,), (NO,), (YES,)], {"yes": (YES,), "no": (NO,)})
    engine: Any = Counting()
    nothing, everything = measure(
        engine, [asked(Counting(), laid, ()), asked(Counting(), laid, (0, 1, 2))], DELETE
    )
    gone = sigmoid(1) - sigmoid(0)
    assert nothing == Masked(0, 0, nothing.sufficiency)
    assert everything == Masked(1, everything.comprehensiveness, 0)
    assert nothing.sufficiency == everything.comprehensiveness == pytest.approx(gone)
    # Of both only the prompt without any unit had to be read, once for each label.
    assert engine.read_texts == [(3, 4), (3, 4)]


def test_offsets_are_subtracted_from_masked_inputs_too():
    laid = laid_out([(YES,), (NO,)], {"yes": (YES,), "no": (NO,)})
    decision = Decision("no", "yes", {"yes": sigmoid(-2), "no": sigmoid(2)})
    engine: Any = Counting()
    (found,) = measure(engine, [Question(laid, decision, (1,), np.array([2.0, 0.0]))], DELETE)
    assert found.flipped == 0  # a lead of 1 − 2
    assert found.comprehensiveness == pytest.approx(sigmoid(2) - sigmoid(1))


def plain_probabilities(model: Any, ids: Sequence[int], laid: Laid) -> np.ndarray:
    scores = []
    for words in laid.labels.values():
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *words]])).logits[0]
        log_p = logits.log_softmax(-1)
        scores.append(sum(log_p[len(ids) + at - 1, word].item() for at, word in enumerate(words)))
    return np.exp(scores) / np.exp(scores).sum()


def test_the_plain_model_one_text_at_a_time():
    rng = np.random.default_rng(0)
    model = tiny_model("qwen3_moe")
    tokenizer: Any = type("", (), {"chat_template": None, "get_vocab": dict})()
    engine = TransformersEngine(model, tokenizer, id="tiny")
    labels = {"a": (7,), "b": (8, 9), "c": (8, 20, 21)}
    questions = []
    for words in (3, 8, 5):
        laid = laid_out([rng.integers(3, 99, 1 + n % 3).tolist() for n in range(words)], labels)
        for units in ((), (0,), (1, 2), tuple(range(words))):
            questions.append(asked(engine, laid, units))
    for mask in (DELETE, Mask("unknown", 6)):
        together = measure(engine, questions, mask)
        for question, found in zip(questions, together, strict=True):
            laid, hidden = question.laid, {t for n in question.units for t in _tokens(n, question)}
            kept = {t for unit in laid.units for t in unit.tokens} - hidden
            p = [
                plain_probabilities(model, _masked(laid.ids, places, mask), laid)
                for places in (set(), hidden, kept)
            ]
            label = int(p[0].argmax())
            assert found.flipped == (p[1].argmax() != label)
            assert found.comprehensiveness == pytest.approx(p[0][label] - p[1][label], abs=1e-5)
            assert found.sufficiency == pytest.approx(p[0][label] - p[2][label], abs=1e-5)
            (alone,) = measure(engine, [question], mask)
            assert alone.comprehensiveness == pytest.approx(found.comprehensiveness, abs=1e-5)


def _tokens(unit: int, question: Question) -> tuple[int, ...]:
    return question.laid.units[unit].tokens


def _masked(ids: Sequence[int], places: set[int], mask: Mask) -> list[int]:
    if mask.token is None:
        return [token for at, token in enumerate(ids) if at not in places]
    return [mask.token if at in places else token for at, token in enumerate(ids)]


def test_counts():
    assert counts(20, SHARES) == counts(20) == (1, 2, 4, 10)
    assert counts(7) == (1, 1, 2, 4)
    assert counts(100, (0.07, 1.0)) == (7, 100)  # 0.07 · 100 is 7.000000000000001


@given(st.integers(1, 500), st.sampled_from([k / 100 for k in range(1, 101)]))
def test_counts_are_the_exact_shares_rounded_up(units: int, share: float):
    assert counts(units, (share,)) == (-(-round(share * 100) * units // 100),)
