"""All detectors: against counting token by token, and what must hold for each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log, log2, sqrt
from statistics import fmean, variance

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.detectors import DETECTORS, detector_named
from moesteer.errors import MoesteerError

Tokens = list[tuple[list[np.ndarray], list[np.ndarray]]]
"""Of each pair, the target tokens of A and of B; of each token, the experts' probabilities."""


@dataclass(frozen=True)
class Text:
    """Pairs whose tokens each select k of the experts, in one layer."""

    pairs: Tokens
    k: int

    def counts(self, counted: str) -> RoutingCounts:
        selected = [
            [[sum(self.seen(token, counted) for token in side)] for side in pair]
            for pair in self.pairs
        ]
        lengths = [[len(side) for side in pair] for pair in self.pairs]
        return RoutingCounts(np.array(selected), np.array(lengths))

    def seen(self, token: np.ndarray, counted: str) -> np.ndarray:
        """What of one token counts for each expert."""
        if counted == "probability":
            return token
        chosen = np.zeros(len(token), dtype=np.int64)
        chosen[np.argsort(-token)[: 1 if counted == "top-1" else self.k]] = 1
        return chosen


@st.composite
def texts(draw: st.DrawFn, max_pairs: int = 6) -> Text:
    pairs, experts = draw(st.integers(1, max_pairs)), draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Small concentrations make experts that are never or always selected.
    concentration = generator.choice([0.05, 1.0, 20.0], size=(2, experts))

    def side(which: int) -> list[np.ndarray]:
        tokens = generator.gamma(concentration[which], size=(generator.integers(1, 8), experts))
        return list((tokens + 1e-9) / (tokens + 1e-9).sum(-1, keepdims=True))

    return Text([(side(0), side(1)) for _ in range(pairs)], draw(st.integers(1, experts)))


# --- token by token -------------------------------------------------------------------------------


Sides = tuple[list[list[float]], list[list[float]]]
"""Of A and of B: of each text, what each token counts for the expert."""


def difference(sides: Sides) -> float:
    a, b = ([x for text in side for x in text] for side in sides)
    return fmean(a) - fmean(b)


def cells(sides: Sides) -> list[tuple[float, float]]:
    """Tokens of A and of B that selected the expert, and that didn't, with the correction."""
    n = [sum(len(text) for text in side) for side in sides]
    hits = [sum(x for text in side for x in text) for side in sides]
    add = [length / sum(n) for length in n]
    return [(h + c, length - h + c) for h, c, length in zip(hits, add, n, strict=True)]


def log_odds(sides: Sides) -> float:
    (a, not_a), (b, not_b) = cells(sides)
    return log((a * not_b) / (not_a * b))


def npmi(sides: Sides) -> float:
    joint = {
        (expert, side): count / (2 * sum(cell))
        for side, cell in zip("ab", cells(sides), strict=True)
        for expert, count in zip((True, False), cell, strict=True)
    }
    selected = joint[True, "a"] + joint[True, "b"]
    with_a, with_b = (
        log2(joint[True, side] / (selected * (joint[True, side] + joint[False, side])))
        / -log2(joint[True, side])
        for side in "ab"
    )
    return with_a - with_b


def paired_t(sides: Sides) -> float:
    d = [fmean(a) - fmean(b) for a, b in zip(*sides, strict=True)]
    rounding = fmean((len(a) ** -2 + len(b) ** -2) / 12 for a, b in zip(*sides, strict=True))
    spread = max(variance(d) if len(d) > 1 else 0, rounding)
    return fmean(d) / sqrt(spread / len(d))


ORACLES: dict[str, Callable[[Sides], float]] = {
    "risk-difference": difference,
    "log-odds": log_odds,
    "paired-t": paired_t,
    "npmi": npmi,
    "top-1": difference,
    "probability": difference,
}


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=50)
@given(text=texts())
def test_against_token_by_token(name: str, text: Text):
    detector = DETECTORS[name]
    counts = text.counts(detector.counted)
    found = detector.estimate(detector.parts, detector.score, counts, resamples=2).value
    for expert in range(found.shape[1]):
        sides: Sides = tuple(  # pyright: ignore[reportAssignmentType]
            [
                [float(text.seen(token, detector.counted)[expert]) for token in pair[side]]
                for pair in text.pairs
            ]
            for side in (0, 1)
        )
        assert found[0, expert] == pytest.approx(ORACLES[name](sides), abs=1e-9)


def test_stability_has_its_oracle_in_its_own_test():
    assert set(ORACLES) | {"stability"} == set(DETECTORS)


# --- what must hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
@settings(max_examples=50)
@given(text=texts())
def test_swapping_the_sides_negates_every_score(name: str, text: Text):
    detector = DETECTORS[name]
    counts = text.counts(detector.counted)
    swapped = RoutingCounts(counts.selected[:, ::-1], counts.tokens[:, ::-1])
    there = detector.estimate(detector.parts, detector.score, counts)
    back = detector.estimate(detector.parts, detector.score, swapped)
    np.testing.assert_array_equal(back.value, -there.value)
    np.testing.assert_allclose(back.low, -there.high, atol=1e-9)
    np.testing.assert_allclose(back.high, -there.low, atol=1e-9)
    for array in (there.value, there.low, there.high):
        assert np.isfinite(array).all()
    assert (there.low <= there.high).all()


EXTREMES = {
    "no selections": (0, 0),
    "only on A": (1, 0),
    "only on B": (0, 1),
    "on every token": (1, 1),
}


@pytest.mark.parametrize("pairs", [1, 2, 30])
@pytest.mark.parametrize("rates", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("name", DETECTORS)
def test_finite_at_the_extremes(name: str, rates: tuple[int, int], pairs: int):
    detector = DETECTORS[name]
    tokens = np.tile([9, 2], (pairs, 1))
    selected = (tokens * rates)[:, :, None, None]
    found = detector.estimate(detector.parts, detector.score, RoutingCounts(selected, tokens))
    for array in (found.value, found.low, found.high):
        assert np.isfinite(array).all()
    assert np.sign(found.value.round(9)).item() == np.sign(rates[0] - rates[1])


def test_the_names():
    assert all(name == detector.name for name, detector in DETECTORS.items())
    assert detector_named("npmi") is DETECTORS["npmi"]
    with pytest.raises(
        MoesteerError, match=r"no detector 'magic'; choose from risk-difference, .*"
    ):
        detector_named("magic")
