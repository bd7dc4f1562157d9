"""A profile's gate: what it may be, that files keep it, and that nothing takes it off unasked."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from made_profiles import LAYERS, MODEL, directed, full
from moesteer.errors import MoesteerError
from moesteer.evaluation.controls import arms, random_control, reversed_control
from moesteer.gate import (
    AreaUnderCurve,
    DirectionProbe,
    Gate,
    GateEvidence,
    Opened,
    Probe,
    RoutingProbe,
)
from moesteer.gguf_export import control_vectors
from moesteer.profile import Profile
from moesteer.profile_combining import combine
from moesteer.profile_file import HEADER_KEY, SCHEMA
from moesteer.profile_fit import check_model

ROUTING = RoutingProbe(((1, 0), (5, 2)), (0.25, -1 / 3), last=4)
DIRECTION = DirectionProbe(2, -3, (0.6, 0.0, -0.8))
EVIDENCE = GateEvidence(
    source="a.txt and b.txt",
    data_hash="d1",
    fit_opens=40,
    fit_keeps_shut=41,
    false_alarms=0.1,
    opens=Opened(18, 20, 0.7, 0.97),
    keeps_shut=Opened(1, 20, 0.01, 0.24),
    auc=AreaUnderCurve(0.98, 0.9, 1.0),
    shuffled=AreaUnderCurve(0.5, 0.3, 0.7),
    random=AreaUnderCurve(0.6, 0.5, 0.8),
    seed=7,
    versions={"python": "3.11"},
    command="moesteer gate …",
)
GATES = [Gate(ROUTING, 0.125, EVIDENCE), Gate(DIRECTION, -2.5, EVIDENCE), Gate(ROUTING, 1.0)]
WIDE = replace(MODEL, decoder_layers=6, hidden=3)


def gated(gate: Gate = GATES[0]) -> Profile:
    return replace(full(), gate=gate, model=WIDE)


# --- what a gate may be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RoutingProbe((), ()), "0 experts and 0 weights"),
        (lambda: RoutingProbe(((1, 0),), (1.0, 2.0)), "1 experts and 2 weights"),
        (lambda: RoutingProbe(((1, 0), (1, 0)), (1.0, 2.0)), "names an expert twice"),
        (lambda: RoutingProbe(((1, 0),), (float("nan"),)), "must be finite"),
        (lambda: RoutingProbe(((1, 0),), (0.0,)), "not all of them 0"),
        (lambda: RoutingProbe(((1, 0),), (1.0,), 0), "last 0 tokens"),
        (lambda: DirectionProbe(1, 0, (1.0,)), "reads position 0"),
        (lambda: DirectionProbe(1, -1, (3.0, 4.0)), "norm 5; it must be a unit vector"),
        (lambda: DirectionProbe(1, -1, (float("nan"),)), "norm nan"),
        (lambda: Gate(ROUTING, float("inf")), "threshold is inf"),
    ],
)
def test_refused(make: Callable[[], object], said: str):
    with pytest.raises(MoesteerError, match=said):
        make()


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_none_opens_no_gate_and_leaves_none_shut(score: float):
    with pytest.raises(MoesteerError, match=f"score at the gate is {score}"):
        GATES[0].opens(score)


def test_only_more_than_the_threshold_opens():
    gate = Gate(ROUTING, 0.5)
    assert [gate.opens(score) for score in (0.4, 0.5, np.nextafter(0.5, 1))] == [False, False, True]


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (RoutingProbe(((1, 4),), (1.0,)), r"expert \(1, 4\).*layer 1 has 4 experts"),
        (RoutingProbe(((0, 0),), (1.0,)), r"expert \(0, 0\).*layer 0 has 0 experts"),
        (
            DirectionProbe(6, -1, (0.0, 1.0, 0.0)),
            "gate reads layer 6, but org/model has layers 0–5",
        ),
        (DirectionProbe(1, -1, (1.0,)), "gate's vector has 1 numbers, but .* have 3"),
    ],
)
def test_refused_on_this_model(probe: Probe, said: str):
    by_hand = Profile(((1, 0),), gate=Gate(probe, 0.0))
    with pytest.raises(MoesteerError, match=said):
        check_model(by_hand, WIDE)
    with pytest.raises(MoesteerError, match=said):
        replace(by_hand, model=WIDE)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_what_is_saved_comes_back(gate: Gate, tmp_path: Path):
    gated(gate).save(tmp_path / "p")
    for read in (Profile.load(tmp_path / "p"), Profile.from_json(gated(gate).to_json())):
        assert read.gate == gate
        assert read.gate is not None
        assert asdict(read.gate) == asdict(gate)  # its evidence, too
        assert replace(read, name="", gate=None) == replace(gated(gate), name="", gate=None)
        assert read.fingerprint == gated(gate).fingerprint


def test_a_profile_without_a_gate_is_what_it_always_was(tmp_path: Path):
    # As computed and written before there were gates.
    assert full().fingerprint == "245dbe8ec0e15d15"
    assert directed().fingerprint == "71b2b4be2892f728"
    full().save(tmp_path / "p")
    header, arrays = contents(tmp_path / "p")
    assert "gate" not in header
    assert "gate" not in json.loads(full().to_json())
    assert not [name for name in arrays if name.startswith("gate")]
    assert Profile.load(tmp_path / "p").gate is None


def test_versions_that_know_no_gates_refuse_the_file_by_its_key(tmp_path: Path):
    gated().save(tmp_path / "p")
    header, _ = contents(tmp_path / "p")
    assert header["schema"] == SCHEMA == 3  # which they read
    assert "gate" in header  # a key that they refuse: "gate is unknown in the header"


Change = Callable[[dict[str, Any], dict[str, np.ndarray]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, a: h["gate"].pop("threshold"), "threshold of gate is missing"),
        (lambda h, a: h["gate"].pop("last"), "last of gate is missing"),
        (lambda h, a: h["gate"].update(layer=1), "layer of gate is unknown"),
        (lambda h, a: h["gate"].update(kind="mood"), "gate is of none of the kinds routing and"),
        (lambda h, a: h["gate"].update(kind=["routing"]), "gate is of none of the kinds"),
        (lambda h, a: h.update(gate=3), "gate is of none of the kinds"),
        (lambda h, a: a.pop("gate.numbers"), "lacks the tensor gate.numbers"),
        (lambda h, a: h.pop("gate"), "gate.numbers, but its header says nothing of a gate"),
        (lambda h, a: h.update(gate=None), "gate.numbers, but its header says nothing of a gate"),
        (lambda h, a: a.update({"gate.numbers": np.array([1.0, np.nan])}), "holds NaN"),
        (lambda h, a: a.update({"gate.numbers": np.ones((2, 1))}), "lacks the tensor"),
        (lambda h, a: a.update({"gate.numbers": np.ones(3)}), "2 experts and 3 weights"),
        (lambda h, a: h["gate"].update(threshold="high"), "gate.threshold"),
        (lambda h, a: h["gate"].update(experts=[[1, 0], [1, 9]]), r"expert \(1, 9\)"),
        (lambda h, a: h["gate"]["evidence"].pop("auc"), "auc: Field required"),
    ],
)
def test_a_broken_file_is_refused(change: Change, said: str, tmp_path: Path):
    gated().save(tmp_path / "p")
    header, arrays = contents(tmp_path / "p")
    change(header, arrays)
    save_file(arrays, tmp_path / "p", metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(MoesteerError, match=said) as refusal:
        Profile.load(tmp_path / "p")
    assert str(tmp_path / "p") in str(refusal.value)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
        return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


# --- who keeps it ---------------------------------------------------------------------------------


def test_the_fingerprint_says_what_a_gate_does_and_not_where_it_comes_from():
    plain, with_gate = gated().ungated, gated()
    assert plain.gate is None
    assert plain.ungated is plain
    others = [replace(GATES[0], threshold=0.25), Gate(replace(ROUTING, last=5), 0.125), GATES[1]]
    prints = [p.fingerprint for p in (plain, with_gate, *map(gated, others))]
    assert len(set(prints)) == 5
    assert gated(replace(GATES[0], evidence=None)).fingerprint == with_gate.fingerprint


def test_controls_and_the_reversed_profile_steer_the_same_requests():
    profile = replace(gated(), rule="exact", dose=1.0)
    assert profile.reversed().gate == profile.gate
    assert reversed_control(profile, LAYERS).gate == profile.gate
    small = replace(profile, activated=((1, 0),), deactivated=((1, 1),))
    assert random_control(small, LAYERS, 0).gate == profile.gate
    found, _ = arms(small, LAYERS, 2)
    assert list(found)[:3] == ["unsteered", "steered", "ungated"]
    for name, arm in found.items():
        if name == "unsteered":
            assert arm is None
        else:
            assert arm is not None
            assert arm.gate == (None if name == "ungated" else profile.gate)
    assert "ungated" not in arms(small.ungated, LAYERS, 2)[0]


def test_profiles_are_combined_under_one_gate_or_none():
    one, two = (Profile(((1, e),), gate=GATES[0], name=f"p{e}") for e in (0, 1))
    again = replace(two, gate=replace(GATES[0], evidence=None))
    both = combine(one, again)
    assert both.gate == GATES[0]
    assert both.activated == ((1, 0), (1, 1))
    with pytest.raises(MoesteerError, match=r"p0 has a gate and p1 has none: .* can't be one"):
        combine(one, two.ungated)
    with pytest.raises(MoesteerError, match="p0 has no gate and p1 has one"):
        combine(one.ungated, two)
    with pytest.raises(MoesteerError, match="p0 has a gate and p1 has another"):
        combine(one, replace(two, gate=GATES[1]))


def test_a_control_vector_has_no_gate():
    steering = directed().directions[1]
    profile = Profile(directions=(steering,), gate=GATES[1], name="moved")
    with pytest.raises(MoesteerError, match=r"moved has a gate.*llama\.cpp does not ask it"):
        control_vectors(profile)
