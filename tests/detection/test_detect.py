"""From pairs to a profile: every detector on the bundled model, whose experts are known."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesteer.contrast import ContrastPair, Conversation, read_pairs
from moesteer.detection.detect import detect, existing_experts
from moesteer.detection.detectors import DETECTORS
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile
from moesteer.testbed import ground_truth


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return load_transformers("testbed")


@pytest.fixture(scope="module")
def pairs() -> list[ContrastPair]:
    return read_pairs("testbed:refusal")[:40]


def saved_and_loaded(profile: Profile, path: Path) -> Profile:
    profile.save(path / "p")
    return Profile.load(path / "p")


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_sees_the_planted_experts(
    engine: TransformersEngine, pairs: list[ContrastPair], name: str, tmp_path: Path
):
    profile = saved_and_loaded(detect(engine, pairs, name), tmp_path)
    scores, evidence = profile.scores, profile.evidence
    assert scores is not None
    assert evidence is not None
    assert evidence.detector == name
    assert evidence.counted == DETECTORS[name].counted
    assert evidence.stability is not None
    assert evidence.stability > 0.7
    for planted in ground_truth().behaviours["refusal"].planted:
        assert scores.value[planted] > 0.2
        assert scores.low[planted] > 0
        assert scores.q[planted] < 0.001
    width = 1 if evidence.counted != "top-k" else 4
    np.testing.assert_allclose(scores.rate_a.sum(-1), width, rtol=1e-4)
    assert (scores.q >= scores.p).all()


def test_spans_and_pairs_are_what_evidence_says(
    engine: TransformersEngine, pairs: list[ContrastPair]
):
    given, matched = (detect(engine, pairs, match_spans=match).evidence for match in (False, True))
    assert given is not None
    assert matched is not None
    assert (given.spans, matched.spans) == ("as given", "matched")
    assert given.pairs == matched.pairs == len(pairs)
    assert matched.tokens_a == matched.tokens_b < given.tokens_a
    assert "scipy" in given.versions


def test_counts_of_other_spans_are_not_taken_up(
    engine: TransformersEngine, pairs: list[ContrastPair], tmp_path: Path
):
    # A checkpoint of the given spans must not be used for the matched ones, nor for another count.
    class Stop(BaseException):
        pass

    def stop_at_end(read: int, total: int) -> None:
        if read == total:
            raise Stop

    run = partial(detect, engine, pairs, checkpoint=tmp_path / "counts")
    with pytest.raises(Stop):
        run(progress=stop_at_end)
    read: list[int] = []
    others: list[dict[str, Any]] = [{}, {"match_spans": True}, {"detector": "top-1"}]
    for options in others:
        told: list[int] = []
        run(progress=lambda n, _, told=told: told.append(n), **options)
        read.append(told[0])
    assert read[0] > 0
    assert read[1:] == [0, 0]


def test_one_pair(engine: TransformersEngine, pairs: list[ContrastPair], tmp_path: Path):
    for name in DETECTORS:
        profile = saved_and_loaded(detect(engine, pairs[:1], name), tmp_path)
        assert profile.scores is not None
        assert profile.evidence is not None
        assert (profile.scores.p == 1).all()
        assert (profile.scores.q == 1).all()
        np.testing.assert_array_equal(profile.scores.low, profile.scores.high)
        assert profile.evidence.interval == "none: one pair can't be resampled"
        assert profile.evidence.stability is None


def test_the_seed_decides(engine: TransformersEngine, pairs: list[ContrastPair]):
    one, same, other = (detect(engine, pairs, seed=seed).scores for seed in (0, 0, 1))
    assert one is not None
    assert same is not None
    assert other is not None
    for key, array in vars(one).items():
        np.testing.assert_array_equal(array, getattr(same, key))
    np.testing.assert_array_equal(one.value, other.value)
    assert not np.array_equal(one.low, other.low)


def test_sides_of_unequal_length(engine: TransformersEngine, pairs: list[ContrastPair]):
    short = [replace(pair, a=cut(pair)) for pair in pairs]
    with pytest.warns(MoesteerWarning, match=r"40 tokens of A and [0-9]+ of B"):
        detect(engine, short)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile = detect(engine, short, match_spans=True)
    assert profile.evidence is not None
    assert profile.evidence.tokens_a == profile.evidence.tokens_b == 40


def cut(pair: ContrastPair) -> Conversation:
    """Side A with the first letter of its target only."""
    (span,) = pair.a.spans
    return replace(pair.a, spans=(replace(span, end=span.start + 1),))


def test_refused(engine: TransformersEngine, pairs: list[ContrastPair]):
    with pytest.raises(MoesteerError, match="no contrast pairs"):
        detect(engine, [])
    with pytest.raises(MoesteerError, match="no detector 'magic'"):
        detect(engine, pairs, "magic")


def test_which_experts_exist():
    layers = (LayerShape(1, 2, 1), LayerShape(4, 3, 1))
    np.testing.assert_array_equal(existing_experts(layers), [[1, 1, 0], [1, 1, 1]])
