"""The profile file: what is saved comes back, and what says less, more or nonsense is refused."""

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from moesteer.direction import Candidates, Direction
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.profile import (
    UNKNOWN,
    Evidence,
    LayerShape,
    ModelFacts,
    Profile,
    Scores,
    check_fits,
    check_model,
    combine,
)
from moesteer.profile_file import HEADER_KEY, SCHEMA

# A dense layer 0, then routed layers of unequal width.
LAYERS = (LayerShape(1, 4, 2), LayerShape(2, 4, 2), LayerShape(5, 3, 1))
MODEL = ModelFacts(
    id="org/model",
    revision="abc",
    model_type="qwen3_moe",
    config_hash="c0",
    tokenizer_hash="t0",
    family="softmax → top-k",
    layers=LAYERS,
    router_norms=(1.0, 2.0, 3.0),
)
EVIDENCE = Evidence(
    detector="risk-difference",
    counted="top-k",
    pairs=7,
    source="pairs.jsonl",
    data_hash="d0",
    target="reply",
    tokens_a=70,
    tokens_b=60,
    seed=3,
    interval="95% percentile bootstrap",
    spans="matched",
    stability=0.75,
    versions={"python": "3.11"},
    command="moesteer detect …",
)


def scores() -> Scores:
    generator = np.random.default_rng(0)
    value, width, p, q, rate_a, rate_b = generator.uniform(0, 1, (6, 3, 4))
    return Scores(value, value - width, value + width, p, q, rate_a, rate_b)


def full() -> Profile:
    return Profile(
        activated=((5, 2), (1, 0)),
        deactivated=((1, 3), (2, 1), (5, 0)),
        rule="paper",
        dose=0.5,
        toward="b",
        chat_options={"enable_thinking": False, "effort": "low", "depth": 2, "share": 0.5},
        model=MODEL,
        evidence=EVIDENCE,
        scores=scores(),
        name="full.safetensors",
    )


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


def directed() -> Profile:
    """Experts and directions, with candidates that these were chosen from."""
    line = Direction((3.0, 0.0, 4.0), ((0, "input"), (0, "mlp")), "ablate", window="generation")
    along = Direction((0.1, 0.2, 0.3), ((5, "mlp"),), coefficient=-2.5, expert=2)
    found = Candidates(
        "own",
        np.array([5, 5]),
        np.array([-1, -2]),
        np.array([2, 0]),
        np.array([[0.1, 0.2, 0.3], [1, 2, 3]], dtype=np.float32),
        {"kl": np.array([0.25, 1.5])},
    )
    model = replace(MODEL, decoder_layers=6, hidden=3)
    return Profile(((1, 0),), directions=(line, along), model=model, candidates=found)


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


# --- what can't be steered ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activated", "deactivated", "said"),
    [
        (((1, 0), (1, 1), (1, 3)), (), r"3 experts are activated in layer 1 \(0, 1, 3\).*k = 2"),
        (((5, 0), (5, 1)), (), r"2 experts are activated in layer 5 \(0, 1\).*k = 1"),
        ((), ((2, 0), (2, 1), (2, 2)), r"3 of 4 experts are deactivated in layer 2.*k = 2"),
        (((0, 1),), (), r"\(0, 1\) names layer 0.*routes in layers 1–2, 5 only"),
        ((), ((3, 1),), r"\(3, 1\) names layer 3"),
        (((1, 4),), (), r"\(1, 4\) does not exist: layer 1 has experts 0–3"),
        ((), ((5, 3),), r"\(5, 3\) does not exist: layer 5 has experts 0–2"),
        (((1, -1),), (), r"\(1, -1\) does not exist"),
    ],
)
def test_refused_on_this_model(activated: tuple, deactivated: tuple, said: str):
    by_hand = Profile(activated, deactivated)
    with pytest.raises(MoesteerError, match=said):
        check_fits(by_hand, LAYERS)
    with pytest.raises(MoesteerError, match=said):
        check_model(by_hand, MODEL)
    with pytest.raises(MoesteerError, match=said):
        Profile(activated, deactivated, model=MODEL)


def test_as_many_as_a_layer_can_take():
    check_fits(Profile(((1, 0), (1, 1), (5, 2)), ((1, 2), (1, 3), (5, 0), (5, 1))), LAYERS)
    check_fits(Profile(), LAYERS)


def test_contradictions():
    with pytest.raises(MoesteerError, match=r"\(1, 2\), \(2, 0\) would be both"):
        Profile(((2, 0), (1, 2)), ((1, 2), (2, 0)))
    with pytest.raises(MoesteerError, match=r"\(1, 2\) is named twice"):
        Profile(((1, 2), (1, 2)))
    with pytest.raises(MoesteerError, match=r"\(1, 2\) is named twice"):
        Profile((), ((1, 2), (1, 2)))


# --- another model --------------------------------------------------------------------------------


def test_the_same_model_elsewhere_fits():
    check_model(full(), MODEL)
    elsewhere = replace(
        MODEL,
        id="/models/copy",
        revision=None,
    )
    check_model(full(), elsewhere)


@pytest.mark.parametrize(
    ("change", "in_profile", "in_model"),
    [
        ({"model_type": "olmoe"}, "qwen3_moe", "olmoe"),
        ({"layers": LAYERS[:2]}, "routed layers is 3", "2"),
        ({"layers": (*LAYERS[:2], LayerShape(6, 3, 1))}, "1–2, 5", "1–2, 6"),
        ({"layers": (*LAYERS[:2], LayerShape(5, 8, 1))}, "3–4", "4, 8"),
        ({"layers": (*LAYERS[:2], LayerShape(5, 3, 2))}, "1–2", "2"),
        ({"family": "sigmoid → top-k"}, "softmax → top-k", "sigmoid → top-k"),
        ({"config_hash": "c1"}, "config hash is c0", "c1"),
        ({"router_norms": (1.0, 2.01, 3.0)}, "layer 2 has norm 2 ", "2.01"),
    ],
)
def test_another_model_is_refused_with_both_values(change: dict, in_profile: str, in_model: str):
    other = replace(MODEL, id="org/other", **change)
    both = f"{re.escape(in_profile)}.*in the profile and {re.escape(in_model)} in the model"
    with pytest.raises(MoesteerError, match=both) as refusal:
        check_model(full(), other)
    assert "full.safetensors was made on org/model" in str(refusal.value)
    assert "org/other" in str(refusal.value)


def test_what_the_source_did_not_name_is_not_compared():
    anonymous = replace(
        MODEL, id=UNKNOWN, model_type=UNKNOWN, config_hash=UNKNOWN, family=UNKNOWN, router_norms=()
    )
    profile = replace(full(), model=anonymous)
    check_model(profile, MODEL)
    with pytest.raises(MoesteerError, match="layer numbers"):
        check_model(profile, replace(MODEL, layers=(LayerShape(0, 4, 2), *LAYERS[1:])))


# --- profiles of profiles -------------------------------------------------------------------------


def test_reversed():
    there = Profile(((1, 0),), ((1, 3), (2, 1)), toward="a", model=MODEL, name="p")
    back = there.reversed()
    assert back.activated == ((1, 3), (2, 1))
    assert back.deactivated == ((1, 0),)
    assert back.toward == "b"
    assert back.name == "p reversed"
    assert back.reversed() == replace(there, name="p reversed reversed")
    one_way = Profile((), ((5, 0), (5, 1)), model=MODEL)
    with pytest.raises(MoesteerError, match="2 experts are activated in layer 5"):
        one_way.reversed()


def test_what_directions_do_is_in_the_fingerprint():
    one = directed()
    prints = {
        one.fingerprint,
        replace(one, directions=one.directions[:1]).fingerprint,
        replace(one, directions=(replace(one.directions[0], window="all"),)).fingerprint,
        replace(one, directions=()).fingerprint,
    }
    assert len(prints) == 4
    assert one.lowest_layer == 0
    assert replace(one, activated=(), directions=one.directions[1:]).lowest_layer == 5
    entering = Direction((1.0, 0, 0), ((4, "input"),))
    assert replace(one, activated=(), directions=(entering,)).lowest_layer == 3
    assert not Profile().steers


def test_directions_and_experts_compose():
    one = directed()
    experts = Profile(((2, 1),), rule="exact", name="experts")
    both = combine(replace(one, activated=()), experts)
    assert both.activated == ((2, 1),)
    assert both.directions == one.directions
    assert both.candidates is None
    paper = Profile(((2, 1),), rule="paper", dose=0.5)
    assert combine(replace(one, activated=()), paper).rule == "paper"
    with pytest.raises(MoesteerError, match="two directions are ablated at the input of layer 0"):
        combine(one, Profile(directions=(replace(one.directions[0], vector=(1.0, 1.0, 1.0)),)))


def test_an_ablation_has_no_other_sign():
    with pytest.raises(MoesteerError, match="no sign to be reversed"):
        directed().reversed()
    turned = replace(directed(), directions=directed().directions[1:]).reversed()
    assert turned.directions[0].coefficient == 2.5


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        (Direction((1.0, 2.0), ((0, "mlp"),)), "has 2 numbers, but the hidden states of .* have 3"),
        (Direction((1.0, 2.0, 3.0), ((6, "mlp"),)), "names layer 6, but .* has layers 0–5"),
        (Direction((1.0, 2.0, 3.0), ((5, "mlp"),), expert=3), "expert 3 of layer 5.* 3 experts"),
        (Direction((1.0, 2.0, 3.0), ((0, "mlp"),), expert=0), "expert 0 of layer 0.* 0 experts"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(direction: Direction, said: str):
    with pytest.raises(MoesteerError, match=said):
        Profile(directions=(direction,), model=directed().model)


def test_combine():
    first = Profile(((1, 0),), ((2, 1),), name="first")
    second = Profile(((1, 0), (5, 1)), ((2, 0),), model=MODEL, evidence=EVIDENCE, name="second")
    both = combine(first, second)
    assert both.activated == ((1, 0), (5, 1))
    assert both.deactivated == ((2, 1), (2, 0))
    assert both.name == "first + second"
    assert both.model == MODEL  # whichever names one: it is still checked against the model
    assert both.evidence is None
    assert combine(first) == replace(first, toward=None)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Profile(rule="paper"), r"rule exact, dose 1.0.*rule paper"),
        (Profile(dose=0.5), r"dose 1.0.*dose 0.5"),
        (Profile((), ((1, 0),)), r"\(1, 0\) would be both"),
        (Profile(((1, 1), (1, 2))), r"3 experts are activated in layer 1"),
    ],
)
def test_combine_refuses_what_contradicts(other: Profile, said: str):
    with pytest.raises(MoesteerError, match=said):
        combine(Profile(((1, 0),), model=MODEL), other)


def test_combine_refuses_profiles_of_different_models():
    one = Profile(model=MODEL, name="one")
    other = Profile(model=replace(MODEL, id="org/other", config_hash="c1"), name="other")
    retrained = Profile(model=replace(MODEL, router_norms=(1.0, 2.0, 4.0)), name="retrained")
    said = r"other was made on org/other and does not fit org/model: config hash is c1.*c0"
    with pytest.raises(MoesteerError, match=said):
        combine(one, other)
    with pytest.raises(MoesteerError, match=said):
        combine(Profile(name="by hand"), one, other)
    with pytest.raises(MoesteerError, match=r"retrained.*layer 5 has norm 4.*3"):
        combine(one, retrained)


def test_layers_and_their_experts():
    profile = full()
    assert profile.steered_layers == (1, 2, 5)
    assert profile.experts_of(1) == ([0], [3])
    assert profile.experts_of(2) == ([], [1])
    assert profile.experts_of(3) == ([], [])


def test_another_chat_template_is_a_warning():
    profile = Profile(activated=((1, 0),), model=MODEL, name="mine")
    with pytest.warns(MoesteerWarning, match="mine was made with another tokenizer"):
        check_model(profile, replace(MODEL, tokenizer_hash="other"))
    check_model(profile, MODEL)


def test_other_weights_beside_the_same_routers_are_a_warning():
    profile = Profile(activated=((1, 0),), model=replace(MODEL, layer_norms=(1.0, 2.0, 3.0)))
    with pytest.warns(MoesteerWarning, match="layer 2: norm 2 in the profile, 2.1 in the model"):
        check_model(profile, replace(MODEL, layer_norms=(1.0, 2.1, 3.0)))
    check_model(profile, replace(MODEL, layer_norms=(1.00001, 2.0, 3.0)))


def test_weights_that_cannot_be_compared_are_a_warning():
    profile = Profile(activated=((1, 0),), model=MODEL)
    with pytest.warns(MoesteerWarning, match="can't be compared"):
        check_model(profile, replace(MODEL, router_norms=()))


@pytest.mark.parametrize(("field", "value"), [("rule", "bogus"), ("toward", "A")])
def test_a_word_that_is_none_is_refused(field: str, value: str):
    with pytest.raises(MoesteerError, match=f"{field} is '{value}'"):
        Profile(**{field: value})  # pyright: ignore[reportArgumentType]


def test_profiles_of_other_chat_options_do_not_combine():
    one, other = (Profile(chat_options={"enable_thinking": thinks}) for thinks in (True, False))
    with pytest.raises(MoesteerError, match="different chat options"):
        combine(one, other)
    assert combine(one, one).chat_options == {"enable_thinking": True}
