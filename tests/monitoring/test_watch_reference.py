"""A reference: what it says of texts, its file, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from made_profiles import MODEL
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.monitoring.drift import reference_shares, routing_drift
from moesteer.monitoring.reference import Limits, Origin, Reference, check_reference
from moesteer.monitoring.reference_file import HEADER_KEY, load_reference, save_reference
from moesteer.profile import Expert

SELECTED = np.array([[90, 50, 50, 10], [60, 60, 60, 20], [50, 40, 10, 0]])
ORIGIN = Origin(
    model=MODEL,
    over="prompt",
    linked=((1, 0), (5, 2)),
    false_alarms=0.2,
    borders=(10,),
    texts=9,
    source="ordinary.jsonl",
    data_hash="d0",
    chat_options={"enable_thinking": False, "depth": 2},
    seed=3,
    versions={"python": "3.11"},
    command="moesteer watch fit …",
)


def made(experts: tuple[Expert, ...] = ORIGIN.linked, **changes: Any) -> Reference:
    """Nine short held-out texts and nine long ones: half of 20 % is the most extreme one."""
    arrays = {
        "selected": SELECTED,
        "tokens": np.array([5] * 9 + [20] * 9),
        "drift": np.r_[np.linspace(0.2, 1, 9), np.linspace(0.02, 0.1, 9)],
        "linked": np.r_[np.linspace(0.5, 0.1, 9), np.linspace(0.6, 0.3, 9)],
    }
    of_origin = {key: value for key, value in changes.items() if key not in arrays}
    origin = replace(ORIGIN, linked=experts, **of_origin)
    return Reference(origin, **(arrays | {k: v for k, v in changes.items() if k in arrays}))


def text(tokens: int, linked: int) -> np.ndarray:
    """Much as the reference is routed; `linked` tokens select (1, 0), none selects (5, 2)."""
    first = [linked, 2 * tokens - linked, 0, 0]
    return np.array([first, [tokens, tokens, 0, 0], [tokens, 0, 0, 0]])


def test_thresholds_of_short_and_of_long_texts() -> None:
    assert made().bin_sizes == (9, 9)
    assert made().limits == (Limits(1.0, 0.1), Limits(0.1, 0.3))
    without = made(experts=(), false_alarms=0.1)
    assert without.limits == (Limits(1.0, None), Limits(0.1, None))


def test_one_drift_is_ordinary_of_a_short_text_and_an_alarm_of_a_long_one() -> None:
    reference = made()
    shares = reference_shares(SELECTED, MODEL.layers)
    short, long = reference.judge(text(10, 4), 10), reference.judge(text(20, 8), 20)
    drift = routing_drift(text(10, 4), shares)
    assert 0.1 < drift < 1
    assert short.drift == pytest.approx(drift)
    assert long.drift == pytest.approx(drift)
    assert (short.linked, long.linked) == (0.2, 0.2)
    assert (short.word, short.raised) == ("ok", ())
    assert (long.word, long.raised) == ("alarm", ("drift", "linked"))
    assert reference.judge(text(11, 4), 11).word == "alarm"


def test_a_score_at_its_threshold_is_no_alarm() -> None:
    reference = made()
    assert reference.judge(text(10, 2), 10).raised == ()  # linked share 0.1
    assert reference.judge(text(10, 1), 10).raised == ("linked",)
    drift = routing_drift(text(10, 4), reference.shares)
    for limit, raised in ((drift, ()), (np.nextafter(drift, 0), ("drift",))):
        at = made(drift=np.r_[np.full(9, limit), np.zeros(9)])
        assert at.judge(text(10, 4), 10).raised == raised


def test_nothing_counted_is_unknown_never_ok() -> None:
    reference = made()
    assert reference.judge(np.zeros((3, 4)), 0).word == "unknown"
    partly = text(10, 4)
    partly[1] = 0
    assert reference.judge(partly, 10).word == "unknown"
    assert reference.judge(partly, 10).drift is None


def test_too_few_held_out_texts_for_the_rate() -> None:
    with pytest.raises(MoesteerError, match=r"9 held-out .* needs 19 .* a rate of 0\.2 or more"):
        made(false_alarms=0.1)
    with pytest.raises(MoesteerError, match=r"by one score, which needs 19 .* of 0\.1 or more"):
        made(false_alarms=0.05, experts=())
    for rate in (0.0, -0.1, 0.6, float("nan")):
        with pytest.raises(MoesteerError, match=r"above 0, and at most 0\.5"):
            made(false_alarms=rate)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": ((1, 7),)}, r"expert \(1, 7\) does not exist"),
        ({"experts": ((3, 0),)}, "routes in layers 1–2, 5 only"),
        ({"selected": SELECTED * [[1], [0], [1]]}, "select nothing"),
        ({"selected": -SELECTED}, "select nothing"),
        ({"drift": np.zeros(5)}, "unequal numbers"),
        ({"borders": (10, 3)}, "do not ascend"),
    ],
)
def test_what_can_t_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(MoesteerError, match=said):
        made(**changes)


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "watch.safetensors"
    save_reference(made(), path)
    read = load_reference(path)
    assert read.name == "watch.safetensors"
    assert read.origin == ORIGIN
    for name in ("selected", "tokens", "drift", "linked"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made(), name))
    assert read.limits == made().limits
    header = json.loads(_metadata(path)[HEADER_KEY])
    assert header["limits"] == [{"drift": 1.0, "linked": 0.1}, {"drift": 0.1, "linked": 0.3}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 9}, "has watch schema 9; this version of moesteer reads schema 1"),
        ({"surprise": 1}, "surprise is unknown in the header"),
        ({"seed": None}, "seed: Input should be a valid int"),
        ({"false_alarms": 0.4}, "limits is .* but its scores give"),
        ({"limits": []}, "limits is"),
        ({"over": "both"}, "over: Input should be"),
        ({"borders": [10, 7]}, "do not ascend"),
    ],
)
def test_a_file_that_contradicts_itself(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    path = tmp_path / "watch.safetensors"
    save_reference(made(), path)
    header = json.loads(_metadata(path)[HEADER_KEY]) | change
    save_file(load_file(path), path, metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(MoesteerError, match=rf"watch\.safetensors.*{said}"):
        load_reference(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drift": np.r_[[np.nan], np.ones(17)]}, "drift holds NaN"),
        ({"drift": np.linspace(0, 1, 18)}, "limits is .* but its scores give"),
        ({"tokens": np.ones(18)}, "tokens is of float64"),
        ({"selected": SELECTED[:2]}, r"shape \(2, 4\), but .* has 3 routed layers of 4 experts"),
        ({"linked": np.zeros((18, 1))}, "linked has 2 dimensions"),
        ({"more": np.zeros(3)}, "holds tensors drift, linked, more, selected, tokens; expected"),
    ],
)
def test_tensors_that_can_t_be(tmp_path: Path, change: dict[str, np.ndarray], said: str) -> None:
    path = tmp_path / "watch.safetensors"
    save_reference(made(), path)
    metadata = _metadata(path)
    save_file(load_file(path) | change, path, metadata=metadata)
    with pytest.raises(MoesteerError, match=said):
        load_reference(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    other = tmp_path / "weights.safetensors"
    save_file({"a": np.zeros(2)}, other)
    with pytest.raises(MoesteerError, match="no reference of `moesteer watch fit`"):
        load_reference(other)
    other.write_bytes(b"nothing of the kind")
    with pytest.raises(MoesteerError, match="is not a readable reference"):
        load_reference(other)
    with pytest.raises(MoesteerError, match="there is no such file"):
        load_reference(tmp_path / "missing")


def test_checked_against_the_model() -> None:
    check_reference(made(), MODEL)
    with pytest.raises(MoesteerError, match="another tokenizer or chat template than org/model"):
        check_reference(made(), replace(MODEL, tokenizer_hash="t1"))
    with pytest.raises(MoesteerError, match="config hash is c0 in the profile and c1 in the model"):
        check_reference(made(), replace(MODEL, config_hash="c1"))
    with pytest.raises(MoesteerError, match=r"the router of layer 2 has norm 2 .* and 2\.1"):
        check_reference(made(), replace(MODEL, router_norms=(1.0, 2.1, 3.0)))
    tuned = replace(MODEL, layer_norms=(1.0, 1.0, 1.0))
    with pytest.warns(MoesteerWarning, match="other weights"):
        check_reference(made(model=tuned), replace(tuned, layer_norms=(1.0, 1.5, 1.0)))


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.metadata()
