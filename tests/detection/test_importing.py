"""A published ranking becomes a profile, from which experts are chosen."""

from pathlib import Path

import numpy as np
import pytest

from moesteer.detection.importing import profile_from_ranking
from moesteer.detection.selecting import select_experts
from moesteer.errors import MoesteerError
from moesteer.model_facts import UNKNOWN, LayerShape
from moesteer.profile import Profile

FOLDER = Path(__file__).parents[1] / "data" / "rankings"
FILES = ["pandas-2.3.3-protocol5-totals.pkl", "pandas-1.0.5-protocol4-others.pkl.xz"]


@pytest.mark.parametrize("name", FILES)
def test_ranking_to_profile_to_choice(tmp_path: Path, name: str):
    profile = profile_from_ranking(str(FOLDER / name), top_k=1, command="moesteer import-ranking")
    assert profile.model is not None
    assert profile.model.id == profile.model.config_hash == UNKNOWN
    assert profile.model.layers == (LayerShape(1, 3, 1), LayerShape(3, 3, 1))
    assert profile.scores is not None
    expected = [[0.55, 7 / 40 - 0.5, 3 / 40 - 0.3], [-0.4, 25 / 40 - 0.1, 15 / 40 - 0.5]]
    np.testing.assert_allclose(profile.scores.value, expected, atol=1e-12)
    np.testing.assert_allclose(profile.scores.rate_a[0], [30 / 40, 7 / 40, 3 / 40])
    np.testing.assert_allclose(profile.scores.rate_b[1], [20 / 50, 5 / 50, 25 / 50])
    assert profile.evidence is not None
    assert profile.evidence.interval.startswith("none")
    assert "p = q = 1" in profile.evidence.interval
    assert (profile.scores.p == 1).all()
    assert (profile.scores.q == 1).all()
    assert profile.evidence.detector == "risk-difference"
    assert profile.evidence.stability is None
    assert (profile.evidence.tokens_a, profile.evidence.tokens_b) == (40, 50)
    assert profile.evidence.command == "moesteer import-ranking"

    profile.save(tmp_path / "p")
    chosen = select_experts(Profile.load(tmp_path / "p"), activate=2, deactivate=1, toward="a")
    assert chosen.activated == ((1, 0), (3, 1))
    assert chosen.deactivated == ((3, 0),)


@pytest.mark.parametrize("top_k", [0, 3, 8])
def test_k_that_cannot_be(top_k: int):
    with pytest.raises(MoesteerError, match=rf"--top-k is {top_k}; the ranking has 3 experts"):
        profile_from_ranking(str(FOLDER / FILES[0]), top_k=top_k)


def test_no_ranking(tmp_path: Path):
    (tmp_path / "x.pkl").write_bytes(b"hello")
    with pytest.raises(MoesteerError, match=r"x\.pkl"):
        profile_from_ranking(str(tmp_path / "x.pkl"), top_k=2)
    with pytest.raises(MoesteerError, match="missing"):
        profile_from_ranking(str(tmp_path / "missing.pkl"), top_k=2)
