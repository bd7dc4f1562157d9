"""The profile file: what is saved comes back, and what says less, more or nonsense is refused."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from made_profiles import directed, full, scores
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.profile_file import HEADER_KEY, SCHEMA


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
        return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


Change = Callable[[dict[str, Any], dict[str, np.ndarray]], object]


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[[Change], Path]:
    """A saved profile after a change to its header or its tensors."""

    def rewrite(change: Change) -> Path:
        path = tmp_path / "changed.safetensors"
        full().save(path)
        header, arrays = contents(path)
        change(header, arrays)
        save_file(arrays, path, metadata={HEADER_KEY: json.dumps(header)})
        return path

    return rewrite


# --- round trip -----------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path: Path):
    path = tmp_path / "full.safetensors"
    full().save(path)
    loaded = Profile.load(path)
    assert loaded == full()
    assert loaded.scores is not None
    for key, array in vars(scores()).items():
        np.testing.assert_array_equal(getattr(loaded.scores, key), array)


def test_a_profile_made_by_hand_comes_back_named_after_its_file(tmp_path: Path):
    path = tmp_path / "hand.safetensors"
    Profile(activated=((2, 5),)).save(path)
    assert Profile.load(path) == Profile(activated=((2, 5),), name="hand.safetensors")


def test_the_header_says_what_is_steered_and_where(tmp_path: Path):
    full().save(tmp_path / "p")
    header, arrays = contents(tmp_path / "p")
    assert header["schema"] == SCHEMA
    assert header["operation"] == "steer experts"
    assert header["hook_points"] == ["router logits"]
    assert header["model"]["layers"][2] == {"layer": 5, "experts": 3, "top_k": 1}
    assert "scores" not in header
    assert set(arrays) == {"value", "low", "high", "p", "q", "rate_a", "rate_b"}


def test_directions_are_written_and_read(tmp_path: Path):
    before = directed()
    before.save(tmp_path / "p")
    header, arrays = contents(tmp_path / "p")
    assert header["operation"] == "steer experts and ablate directions and add directions"
    assert header["hook_points"] == [
        "router logits",
        "input of layer 0",
        "mlp of layer 0",
        "mlp of layer 5",
    ]
    assert header["directions"][0]["norm"] == 5
    assert "a positive coefficient steers towards a" in header["directions"][1]["sign"]
    assert "vector" not in header["directions"][0]
    assert arrays["directions.0"].tolist() == [3, 0, 4]
    after = Profile.load(tmp_path / "p")
    assert after.directions == before.directions
    assert after.fingerprint == before.fingerprint
    assert after.candidates is not None
    assert before.candidates is not None
    assert after.candidates.kind == "own"
    for name in ("layer", "position", "expert", "vector"):
        np.testing.assert_array_equal(
            getattr(after.candidates, name), getattr(before.candidates, name)
        )
    np.testing.assert_array_equal(after.candidates.scores["kl"], [0.25, 1.5])
    assert after.candidates.find(5, -2, 0) == 1
    with pytest.raises(MoesteerError, match=r"no direction of layer 4, position -1; there are"):
        after.candidates.find(4, -1)
    again = Profile.from_json(before.to_json())
    assert again.directions == before.directions


def test_json_for_programs():
    said = json.loads(full().to_json())
    assert said["activated"] == [[5, 2], [1, 0]]
    assert said["deactivated"] == [[1, 3], [2, 1], [5, 0]]
    assert said["chat_options"] == full().chat_options
    assert len(said["scores"]) == 4 + 4 + 3  # the fourth expert of layer 5 does not exist
    last = said["scores"][-1]
    assert (last["layer"], last["expert"]) == (5, 2)
    assert last["value"] == scores().value[2, 2]
    assert last["rate_b"] == scores().rate_b[2, 2]
    assert json.loads(Profile().to_json())["scores"] == []


def test_json_is_read_back_whole():
    for profile in (full(), Profile(activated=((2, 5),)), replace(full(), scores=None)):
        read = Profile.from_json(profile.to_json())
        assert read == profile
        assert (read.scores is None) == (profile.scores is None)
        if read.scores is not None and profile.scores is not None:
            exists = [(0, 3), (1, 0), (2, 2)]
            for key, array in vars(profile.scores).items():
                assert [getattr(read.scores, key)[e] for e in exists] == [array[e] for e in exists]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.pop("name"), "no profile that can be read"),
        (lambda raw: raw.update(schema=99), "schema 99"),
        (lambda raw: raw.update(dose=2), "dose is 2"),
        (lambda raw: raw["scores"][0].update(layer=77), "no profile that can be read"),
        (lambda raw: raw["scores"][0].update(value=float("nan")), "must be a finite number"),
    ],
)
def test_other_json_is_refused(change: Callable[[dict], object], said: str):
    raw = json.loads(full().to_json())
    change(raw)
    with pytest.raises(MoesteerError, match=said) as refusal:
        Profile.from_json(json.dumps(raw), "run.json")
    assert str(refusal.value).startswith("run.json")


@pytest.mark.parametrize("text", ["null", "[]", "{", "3"])
def test_what_is_no_profile_at_all(text: str):
    with pytest.raises(MoesteerError, match=r"^run\.json holds no profile"):
        Profile.from_json(text, "run.json")


def test_loading_never_unpickles(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return open, (str(tmp_path / "ran"), "w")  # pyright: ignore[reportReturnType]

    path = tmp_path / "bomb.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(MoesteerError, match="not a readable profile"):
        Profile.load(path)
    objects = np.array([Bomb()], dtype=object)
    np.save(path.with_suffix(".npy"), objects, allow_pickle=True)
    with pytest.raises(MoesteerError, match="not a readable profile"):
        Profile.load(path.with_suffix(".npy"))
    assert not (tmp_path / "ran").exists()


# --- what a file must not be ----------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 4, 7, 8, 100, -1])
def test_truncated(tmp_path: Path, cut: int):
    path = tmp_path / "cut.safetensors"
    full().save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(MoesteerError, match=r"cut\.safetensors is not a readable profile"):
        Profile.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b'{"activated": []}' * 100])
def test_not_safetensors(tmp_path: Path, content: bytes):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(MoesteerError, match="not a readable profile"):
        Profile.load(tmp_path / "p")


def test_no_such_file(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(MoesteerError, match="no such profile file"):
            Profile.load(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_of_a_model_are_no_profile(tmp_path: Path, dtype: str):
    import torch
    from safetensors.torch import save_file as save_weights

    weights = {"w": torch.zeros(3, dtype=getattr(torch, dtype))}
    save_weights(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoesteerError, match="not a profile of moesteer"):
        Profile.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, _: h.update(schema=99), r"schema 99; this version of moesteer reads schema 3"),
        (lambda h, _: h.update(schema=2), r"schema 2; this version of moesteer reads schema 3"),
        (lambda h, _: h.pop("schema"), r"schema None"),
        (lambda h, _: h.update(operation="ablate"), r"operation is 'ablate'.*'steer experts'"),
        (lambda h, _: h.update(hook_points=["mlp"]), r"hook_points is \['mlp'\].*'router logits'"),
        (lambda h, _: h.pop("hook_points"), r"hook_points is None"),
        (lambda h, _: h.pop("rule"), r"rule is missing"),
        (lambda h, _: h.pop("dose"), r"dose is missing"),
        (lambda h, _: h.pop("activated"), r"activated is missing"),
        (lambda h, _: h.update(strength=2), r"strength is unknown"),
        (lambda h, _: h.update(rule="soft"), r"rule: Input should be 'exact' or 'paper'"),
        (lambda h, _: h.update(toward="A"), r"toward: Input should be 'a' or 'b'"),
        (lambda h, _: h.update(dose="1"), r"dose: "),
        (lambda h, _: h.update(dose=1.5), r"the dose is 1.5; it must be from 0 to 1"),
        (lambda h, _: h.update(dose=-0.1), r"the dose is -0.1"),
        (lambda h, _: h.update(dose=float("nan")), r"dose"),
        (lambda h, _: h.update(activated=[[1]]), r"activated\.0"),
        (lambda h, _: h.update(activated=[[1, 2.5]]), r"activated\.0\.1"),
        (lambda h, _: h.update(activated="all"), r"activated"),
        (lambda h, _: h["model"].pop("family"), r"model\.family"),
        (lambda h, _: h["model"]["layers"][0].pop("top_k"), r"model\.layers\.0\.top_k"),
        (lambda h, _: h["evidence"].update(counted="top-9"), r"evidence\.counted"),
        (lambda h, _: h["evidence"].update(spans="longer"), r"evidence\.spans"),
        (lambda h, _: h["evidence"].update(stability="high"), r"evidence\.stability"),
        (lambda h, _: h.update(model=None), r"has scores but does not say of which model"),
        (
            lambda _, t: t.pop("low"),
            r"holds tensors high, p, q, rate_a, rate_b, value; expected value",
        ),
        (lambda _, t: t.update(more=t["low"]), r"holds tensors high, low, more"),
        (
            lambda _, t: t.update(value=t["value"][:2]),
            r"value has shape \(2, 4\).*3 routed layers of 4 experts",
        ),
        (lambda _, t: t.update(low=t["low"].T.copy()), r"low has shape \(4, 3\)"),
        (
            lambda _, t: t["value"].__setitem__((2, 1), np.nan),
            r"value of expert \(5, 1\) is nan; it must be a finite number",
        ),
        (lambda _, t: t["high"].__setitem__((0, 3), -np.inf), r"high of expert \(1, 3\) is -inf"),
        (lambda h, _: h.update(directions=[{}]), r"lacks the vector of direction 0"),
        (lambda h, _: h.update(directions="all"), r"directions is no list"),
        (lambda h, _: h.update(candidates="own"), r"lacks the tensor 'candidates\.layer'"),
    ],
)
def test_refused(rewritten: Callable[[Change], Path], change: Change, said: str):
    path = rewritten(change)
    with pytest.raises(MoesteerError, match=said) as refusal:
        Profile.load(path)
    assert str(refusal.value).startswith(str(path))


Tables = dict[str, np.ndarray]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # A default in its place would steer otherwise.
        (lambda h, _: h["directions"][0].pop("window"), "window of direction 0 is missing"),
        (lambda h, _: h["directions"][1].pop("coefficient"), "coefficient of direction 1 is miss"),
        (lambda h, _: h["directions"][1].pop("expert"), "expert of direction 1 is missing"),
        (lambda h, _: h["directions"][1].update(dose=1), "dose of direction 1 is unknown"),
        (lambda h, _: h.update(candidates="all"), "candidates is 'all'; it is one of"),
        (lambda h, _: h.update(candidates=["own"]), "candidates is .'own'.; it is one of"),
        (lambda h, _: h.update(model=None), "has candidates but does not say of which model"),
        (
            lambda h, _: h.update(candidates="residual"),
            r"candidate 0 \(residual\) is of layer 5, position -1, expert 2; .* none such",
        ),
        (lambda _, t: _put(t, "layer", np.array(3)), "tensors of unequal shapes"),
        (lambda _, t: _put(t, "layer", np.array([[5], [5]])), "tensors of unequal shapes"),
        (lambda _, t: _put(t, "vector", np.ones(2)), "tensors of unequal shapes"),
        (lambda _, t: _put(t, "scores.kl", np.ones((2, 2))), "tensors of unequal shapes"),
        (lambda _, t: _put(t, "scores.kl", np.ones(3)), "tensors of unequal shapes"),
        (lambda _, t: _put(t, "layer", np.array([5.0, 5.5])), "layer .* is of float64, not whole"),
        (lambda _, t: _put(t, "layer", np.array([5, 6])), "candidate 1 .* of layer 6"),
        (lambda _, t: _put(t, "layer", np.array([-1, 5])), "candidate 0 .* of layer -1"),
        (lambda _, t: _put(t, "position", np.array([-1, 1])), "candidate 1 .* position 1"),
        (lambda _, t: _put(t, "expert", np.array([3, 0])), "candidate 0 .* expert 3"),
        (lambda _, t: _put(t, "vector", np.ones((2, 4))), "have 4 numbers, .* have 3"),
        (
            lambda _, t: t["candidates.vector"].__setitem__((1, 2), np.nan),
            "vector of candidate 1 holds NaN",
        ),
        (
            lambda _, t: t["candidates.scores.kl"].__setitem__(0, np.inf),
            "kl of candidate 0 holds NaN or infinity",
        ),
    ],
)
def test_broken_directions_are_refused(tmp_path: Path, change: Change, said: str):
    path = tmp_path / "p"
    directed().save(path)
    header, arrays = contents(path)
    change(header, arrays)
    save_file(arrays, path, metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(MoesteerError, match=said) as refusal:
        Profile.load(path)
    assert str(refusal.value).startswith(str(path))


def _put(arrays: Tables, name: str, array: np.ndarray) -> None:
    arrays[f"candidates.{name}"] = array


def test_scores_of_a_dense_model_are_refused(rewritten: Callable[[Change], Path]):
    def dense(header: dict, _: Tables) -> None:
        header["model"].update(layers=[], router_norms=[])
        header.update(activated=[], deactivated=[])

    with pytest.raises(MoesteerError, match="0 routed layers of 0 experts"):
        Profile.load(rewritten(dense))


@pytest.mark.parametrize("header", ["[]", "not json", '"text"'])
def test_header_that_is_no_object(tmp_path: Path, header: str):
    save_file({}, tmp_path / "p", metadata={HEADER_KEY: header})
    with pytest.raises(MoesteerError, match="the header is not"):
        Profile.load(tmp_path / "p")


def test_the_unchanged_file_is_not_refused(rewritten: Callable[[Change], Path]):
    assert Profile.load(rewritten(lambda _h, _t: None)).dose == 0.5


def test_nan_is_not_saved(tmp_path: Path):
    broken = scores()
    broken.low[0, 0] = np.nan
    with pytest.raises(MoesteerError, match=r"low holds NaN"):
        replace(full(), scores=broken).save(tmp_path / "p")
    assert not list(tmp_path.iterdir())
