"""On the bundled model: every command's work comes out the same in both engines."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import steerable

from moesteer import demo, testbed
from moesteer.chat import TokenisedConversation
from moesteer.contrast import read_pairs
from moesteer.detection.comparing import measurement
from moesteer.detection.detect import detect
from moesteer.detection.knocking import knock
from moesteer.engines.base import Engine
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.engines.vllm.rows import KEPT_RESULTS
from moesteer.engines.vllm_engine import VllmEngine
from moesteer.evaluation.cards import read_card
from moesteer.evaluation.controls import random_control
from moesteer.evaluation.evaluate import evaluate
from moesteer.evaluation.search import search
from moesteer.profile import Profile
from moesteer.testbed.world import BEHAVIOURS

pytestmark = pytest.mark.filterwarnings("ignore::moesteer.errors.MoesteerWarning")


@pytest.fixture(scope="module")
def vllm() -> Iterator[VllmEngine]:
    with steerable("testbed", max_num_seqs=64) as engine:
        yield engine


@pytest.fixture(scope="module")
def transformers() -> TransformersEngine:
    return load_transformers("testbed", dtype="float32")


@pytest.mark.parametrize("detector", ["risk-difference", "log-odds"])
def test_detection_writes_the_same_profile(
    detector: str, vllm: VllmEngine, transformers: TransformersEngine, tmp_path: Path
) -> None:
    pairs, headers = read_pairs("testbed:document")[:32], []
    for number, engine in enumerate((vllm, transformers)):
        found = detect(engine, pairs, detector, source="testbed:document", command="moesteer")
        found.save(tmp_path / f"{number}")
    ours, theirs = (Profile.load(tmp_path / f"{number}") for number in (0, 1))
    for profile in (ours, theirs):
        assert profile.scores is not None
        headers.append(json.loads(profile.to_json()) | {"scores": None, "name": None})
        headers[-1]["evidence"].pop("versions")
    assert ours.scores is not None
    assert theirs.scores is not None
    for key, array in vars(theirs.scores).items():
        np.testing.assert_array_equal(getattr(ours.scores, key), array, err_msg=key)
    assert headers[0] == headers[1]


def arms(transformers: TransformersEngine) -> dict[str, Profile | None]:
    """Unsteered, each behaviour's planted experts both ways, and random ones in their place."""
    found: dict[str, Profile | None] = {"unsteered": None}
    for behaviour in BEHAVIOURS:
        planted = testbed.ground_truth().behaviours[behaviour].planted
        found[f"{behaviour} activated"] = Profile(activated=planted)
        found[f"{behaviour} deactivated"] = Profile(deactivated=planted)
    planted = found["document activated"]
    assert planted is not None
    found["random"] = random_control(planted, transformers.facts.layers, 0)
    return found


def test_the_demonstrations_replies_are_the_same(
    vllm: VllmEngine, transformers: TransformersEngine
) -> None:
    """Reply for reply, on every test prompt of the demonstration."""
    asked, shares = demo._probes("test"), {}
    for name, profile in arms(transformers).items():
        ours, theirs = (demo.ask(engine, asked, profile) for engine in (vllm, transformers))
        assert ours.replies == theirs.replies, name
        assert ours.shares == theirs.shares
        shares[name] = ours.shares
    # It is no silence that they agree on.
    for name, column in {"refusal": "benign refused", "digits": "digits"}.items():
        up, down = (shares[f"{name} {how}"][column] for how in ("activated", "deactivated"))
        assert up - down > 0.5


def test_the_decision_of_each_expert_is_the_same(
    vllm: VllmEngine, transformers: TransformersEngine
) -> None:
    """The demonstration's knock-outs, on fewer pairs."""
    pairs = read_pairs("testbed:refusal:dev")[:4]
    ours, theirs = (
        knock(engine, measurement(engine, pairs).readouts).knock_out
        for engine in (vllm, transformers)
    )
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def outcomes(engine: Engine, out: Path) -> dict[str, Any]:
    """What `evaluate` and `search` find of the planted experts of one behaviour."""
    out.mkdir()
    ranking = detect(engine, read_pairs("testbed:document")[:24], source="testbed:document")
    planted = testbed.ground_truth().behaviours["document"].planted
    settings: dict[str, Any] = {"limit": 6, "seeds": 1}
    compared = evaluate(
        engine,
        replace(ranking, activated=planted, toward="a", name="planted"),
        [read_card("testbed-document"), read_card("testbed-facts")],
        out=out / "evaluation",
        **settings,
    )
    found = search(
        engine,
        [ranking],
        read_card("testbed-document"),
        toward="a",
        out=out / "search",
        prices=[(read_card("testbed-facts"), 0.9)],
        budget=4,
        **settings,
    )
    return {
        "replies": replies(out / "evaluation"),
        "shares": [asdict(share) for share in compared.shares],
        "differences": [asdict(difference) for difference in compared.differences],
        "best": (found.best.activate, found.best.deactivate, found.best.values),
        "dose": [(trial.activate, trial.values) for trial in found.dose],
        "tested": replies(out / "search" / "test"),
    }


def replies(folder: Path) -> list[tuple]:
    lines = map(json.loads, (folder / "replies.jsonl").read_text().splitlines())
    return sorted((r["task"], r["arm"], r["item"], r["reply"], r["outcome"]) for r in lines)


def test_evaluation_and_search_come_out_the_same(
    vllm: VllmEngine, transformers: TransformersEngine, tmp_path: Path
) -> None:
    ours = outcomes(vllm, tmp_path / "vllm")
    theirs = outcomes(transformers, tmp_path / "transformers")
    assert ours.keys() == theirs.keys()
    for what, value in ours.items():
        assert value == theirs[what], what


def test_more_texts_than_the_workers_keep_results_of(
    vllm: VllmEngine, transformers: TransformersEngine
) -> None:
    planted = Profile(activated=testbed.ground_truth().behaviours["refusal"].planted)
    draw = np.random.default_rng(0)
    texts = [tuple(draw.integers(5, 1000, 3).tolist()) for _ in range(KEPT_RESULTS + 10)]
    readouts = [Readout(ids, (Term(3, 7, 1.0),)) for ids in texts]
    conversations = [TokenisedConversation(ids, (True,) * 3) for ids in texts]
    np.testing.assert_allclose(
        vllm.read(readouts, [None, planted]),
        transformers.read(readouts, [None, planted]),
        atol=1e-4,
    )
    ours, theirs = (engine.count_selections(conversations) for engine in (vllm, transformers))
    np.testing.assert_array_equal(ours, theirs)
