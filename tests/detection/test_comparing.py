"""Detectors compared: the parts against numbers by hand, the whole on the bundled model."""

import json
from pathlib import Path

import numpy as np
import pytest

from moesteer.cli import main
from moesteer.contrast import read_pairs
from moesteer.detection.compare_to_folder import compare_to_folder
from moesteer.detection.comparing import (
    EITHER,
    GRADIENT,
    KNOCK_IN,
    KNOCK_OUT,
    agreement,
    drawn,
    larger,
    planted_in,
    read_neutral,
    recovery,
)
from moesteer.detection.detectors import DETECTORS
from moesteer.detection.selecting import select_experts
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile, Scores
from moesteer.runs import read_run
from moesteer.testbed import PlantedBehaviour, ground_truth

LAYERS = (LayerShape(1, 3, 1), LayerShape(4, 2, 1))
EXISTS = np.array([[True, True, True], [True, True, False]])


def scores(value: list[list[float]], p: float = 0.04) -> Scores:
    table = np.array(value, dtype=float)
    ps = np.full_like(table, p)
    return Scores(table, table - 1, table + 1, ps, ps, table, table)


# -- the parts -----------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    out = scores([[5, -4, 3], [2, 1, 0]])
    assert agreement(out, out, EXISTS, 2).signed == pytest.approx(1)
    reverse = scores([[-5, 4, -3], [-2, -1, 0]])
    found = agreement(reverse, out, EXISTS, 2)
    assert (found.signed, found.size, found.shared) == (pytest.approx(-1), pytest.approx(1), 2)
    # Ranks 5 1 4 3 2 beside 4 5 3 2 1: ρ = 1 − 6 Σ d² / (n (n² − 1)) = 1 − 6 · 20 / 120.
    other = scores([[4, 5, 3], [2, 1, 0]])
    assert agreement(other, out, EXISTS, 1).signed == pytest.approx(0)
    assert agreement(other, out, EXISTS, 1).shared == 0
    assert agreement(other, out, EXISTS, 2).shared == 2
    alike = agreement(scores([[1, 1, 1], [1, 1, 0]]), out, EXISTS, 2)
    assert (alike.signed, alike.size) == (None, None)


def test_experts_that_were_not_knocked_do_not_count() -> None:
    out = scores([[5, 4, 3], [0, 0, 0]])
    entered = np.array([[True, True, True], [False, False, False]])
    other = scores([[5, 4, 3], [90, -90, 0]])
    assert agreement(other, out, entered, 2).signed == pytest.approx(1)
    assert agreement(other, out, entered, 2).shared == 2


def test_recovery_by_hand() -> None:
    truth = PlantedBehaviour("a", "b", planted=((1, 0), (4, 1)), decoys=((1, 2),))
    found = recovery(scores([[5, -4, 3], [2, -9, 99]]), LAYERS, truth)
    assert (found.found, found.precision, found.recall) == (2, 1.0, 1.0)
    assert (found.planted, found.decoys) == ((1, 2), (4,))
    # Equal scores keep layer and expert order.
    ties = recovery(scores([[1, 1, 1], [1, 1, 0]]), LAYERS, truth)
    assert (ties.found, ties.planted, ties.decoys) == (1, (1, 5), (3,))
    assert ties.precision == 0.5


def test_the_larger_of_both_knocks() -> None:
    out, into = scores([[5, -4, 3], [2, 1, 0]]), scores([[-6, 1, 3], [0, -7, 0]], p=0.3)
    found = larger(out, into, EXISTS)
    np.testing.assert_array_equal(found.value, [[-6, -4, 3], [2, -7, 0]])
    np.testing.assert_array_equal(found.low, found.value - 1)
    np.testing.assert_allclose(found.p, 0.08)
    np.testing.assert_allclose(found.q[EXISTS], 0.08)
    assert found.q[1, 2] == 1


def test_pairs_are_drawn_in_order_and_not_by_a_stride() -> None:
    pairs = read_pairs("testbed:digits:dev")
    some = drawn(pairs, 24)
    places = [pairs.index(pair) for pair in some]
    assert places == sorted(set(places))
    assert len(places) == 24
    assert len({place % 2 for place in places}) == 2  # habits take turns in the file
    assert drawn(pairs, 24) == some
    assert drawn(pairs, None) == drawn(pairs, 1000) == pairs
    with pytest.raises(MoesteerError, match="0 pairs are to be used"):
        drawn(pairs, 0)


def test_causal_scores_are_profiles_to_select_by(tmp_path: Path) -> None:
    engine = load_transformers("testbed")
    pairs = drawn(read_pairs("testbed:digits:dev"), 24)
    out = tmp_path / "run"
    result = compare_to_folder(engine, pairs, out=out, source="pairs.jsonl", command="made")
    for name in ("knock-out", "knock-in", "gate-gradient"):
        profile = Profile.load(out / f"{name}.safetensors")
        assert profile.scores is not None
        assert profile.evidence is not None
        assert np.array_equal(profile.scores.value, result.scores[name].value)
        assert (profile.evidence.detector, profile.evidence.pairs) == (name, 24)
        assert (profile.evidence.source, profile.evidence.command) == ("pairs.jsonl", "made")
    chosen = select_experts(
        Profile.load(out / "knock-out.safetensors"), activate=3, deactivate=0, toward="a"
    )
    assert set(chosen.activated) == set(ground_truth().behaviours["digits"].planted)


def test_what_is_known_of_whom() -> None:
    truth = ground_truth().behaviours
    assert planted_in("testbed", "testbed:digits:dev") == truth["digits"]
    assert planted_in("testbed", "testbed:digits") == truth["digits"]
    for model, pairs in (("testbed-twin", "testbed:digits"), ("testbed", "digits.jsonl")):
        assert planted_in(model, pairs) is None


def test_neutral_texts(tmp_path: Path) -> None:
    path = tmp_path / "neutral.jsonl"
    path.write_text('{"prompt": "Name a tree.", "reply": " An elm. "}\n')
    (text,) = read_neutral(str(path))
    assert text.a == text.b
    assert text.a.messages[1].content == "An elm."
    assert text.source == f"{path}:1"
    path.write_text('{"prompt": "Name a tree."}\n')
    with pytest.raises(MoesteerError, match=r"neutral\.jsonl:1.*reply"):
        read_neutral(str(path))


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run on the bundled model, and its arguments."""
    folder = tmp_path_factory.mktemp("detectors")
    neutral = folder / "neutral.jsonl"
    record = {"prompt": "Question: Name the tree in the square of Ravenford."}
    neutral.write_text(json.dumps(record | {"reply": "The maple is in the square."}) + "\n")
    arguments = ["detectors", "testbed", "--pairs", "testbed:refusal:dev", "--pairs-used", "12"]
    arguments += ["--beside", "testbed:digits:dev", "--neutral", str(neutral)]
    arguments += ["--out", str(folder / "run")]
    main(arguments)
    return folder / "run", arguments


def test_a_run_is_complete(made: tuple[Path, list[str]]) -> None:
    run = read_run(made[0])
    assert run.kind == "detectors"
    assert run.about["command"]
    found = json.loads((made[0] / "summary.json").read_text())
    assert set(found["detectors"]) == {KNOCK_OUT, KNOCK_IN, EITHER, GRADIENT, *DETECTORS}
    assert set(found["beside"]) == {"testbed:digits:dev", "neutral"}
    assert (found["pairs"], found["over"], found["strongest"]) == (12, "decision", 3)
    truth = ground_truth().behaviours["refusal"]
    for detector in found["detectors"].values():
        assert len(detector["scores"]) == 64
        for expert in detector["scores"]:
            assert expert["low"] <= expert["value"] <= expert["high"]
            assert 0 <= expert["p"] <= expert["q"] + 1e-12 <= 1 + 1e-9
        assert len(detector["recovery"]["planted"]) == len(truth.planted)
        assert -1 <= detector["agreement"]["signed"] <= 1
    assert found["detectors"][KNOCK_OUT]["agreement"]["shared"] == 3
    assert found["detectors"][EITHER]["recovery"]["planted"] == [1, 2, 3]
    assert found["detectors"][EITHER]["recovery"]["recall"] == 1


def test_a_carrier_carries_nothing_beside(made: tuple[Path, list[str]]) -> None:
    found = json.loads((made[0] / "summary.json").read_text())
    for place in ground_truth().behaviours["refusal"].planted:
        for name in found["beside"]:
            (seen,) = [e for e in found["beside"][name] if (e["layer"], e["expert"]) == place]
            assert abs(seen[KNOCK_OUT]) < 0.5


def test_a_finished_run_is_shown_again_at_once(
    made: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def never(*_args: object) -> None:
        raise AssertionError("knocked again")

    before = (made[0] / "summary.json").read_text()
    monkeypatch.setattr("moesteer.detection.knocking._knock_layer", never)
    main(made[1])
    assert (made[0] / "summary.json").read_text() == before
    shown = capsys.readouterr()
    assert "132 interventions; 3,300 forward passes" in shown.err
    for word in ("12 pairs; log P(A's token)", "risk difference (top-k)", "3 of 3", "planted"):
        assert word in shown.out


def test_other_settings_are_refused(
    made: tuple[Path, list[str]], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*made[1], "--seed", "1"])
    assert stopped.value.code == 2
    assert "other settings: seed was 0 and is 1 now" in capsys.readouterr().err


def test_a_tiny_model_screened_and_over_spans(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A random model: nothing is planted, and all of it must run."""
    out = tmp_path / "run"
    arguments = ["detectors", str(model_folder), "--pairs", str(pairs_file), "--over", "span"]
    main([*arguments, "--layers", "2", "--out", str(out)])
    shown = capsys.readouterr()
    assert "knocking 2 of 4 layers" in shown.err
    assert "planted" not in shown.out
    found = json.loads((out / "summary.json").read_text())
    assert found["strongest"] == 10
    assert len(found["detectors"][KNOCK_OUT]["scores"]) == 16
    assert len(found["detectors"][GRADIENT]["scores"]) == 32
    assert found["detectors"][KNOCK_OUT]["recovery"] is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "9"], "9 layers are to be gone into; the model has 4"),
        (["--pairs-used", "0"], "0 pairs are to be used"),
        (["--seed", "-1"], "--seed is -1; it can't be negative"),
        (["--beside", "testbed:weather"], "there is no built-in set 'testbed:weather'"),
        (["--neutral", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_can_not_be(
    model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture, more: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["detectors", str(model_folder), "--pairs", str(pairs_file), *more])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
