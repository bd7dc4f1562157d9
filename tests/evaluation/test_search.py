"""The search on the bundled model: it finds what was planted, and random ranks do not."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.chat import render_prompt
from moesteer.contrast import Message, read_pairs
from moesteer.detection.detect import detect
from moesteer.detection.selecting import select_experts
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import read_card
from moesteer.evaluation.comparison import STEERED, UNSTEERED
from moesteer.evaluation.controls import shuffled_ranking
from moesteer.evaluation.search import SearchResult, grid, most_experts, search
from moesteer.evaluation.trials import Trial, best_of, pareto_front
from moesteer.profile import Profile, Side
from moesteer.testbed import ground_truth
from moesteer.testbed.world import outcome, probes

ITEMS = 12
TARGET = "testbed-document"
PRICES = {"testbed-facts": 0.95, "testbed-benign": 0.9}


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return load_transformers("testbed")


@pytest.fixture(scope="module")
def ranking(engine: TransformersEngine) -> Profile:
    return detect(engine, read_pairs("testbed:document")[:48], source="testbed:document")


def run(engine: TransformersEngine, ranking: Profile, out: Path, **more: Any) -> SearchResult:
    settings: dict[str, Any] = {
        "toward": "a",
        "prices": [(read_card(name), least) for name, least in PRICES.items()],
        "budget": 8,
        "seeds": 1,
        "limit": ITEMS,
        "batch_size": ITEMS,
        "command": "moesteer search",
    }
    return search(engine, [ranking], read_card(TARGET), out=out, **settings | more)


@pytest.fixture(scope="module")
def done(
    engine: TransformersEngine, ranking: Profile, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SearchResult]:
    out = tmp_path_factory.mktemp("searches") / "run"
    return out, run(engine, ranking, out)


def trials_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


def followed(engine: TransformersEngine, profile: Profile | None, split: str) -> float:
    asked = probes("conflicts", split)[:ITEMS]
    prompts = [render_prompt([Message("user", p.prompt)], engine.tokenizer) for p in asked]
    replies = engine.generate(prompts, profile, max_new_tokens=16).replies
    said = [outcome(probe, reply) for probe, reply in zip(asked, replies, strict=True)]
    return said.count("document") / ITEMS


# -- on the bundled model ------------------------------------------------------------------------


def test_the_search_reaches_the_planted_effect_within_its_limits_and_random_ranks_do_not(
    engine: TransformersEngine, done: tuple[Path, SearchResult]
):
    _, result = done
    before = followed(engine, None, "test")
    planted = Profile(activated=ground_truth().behaviours["document"].planted)
    effect = followed(engine, planted, "test") - before
    assert effect >= 0.4
    assert result.test.share(TARGET, UNSTEERED).share == before
    steered = result.test.share(TARGET, STEERED).share
    assert steered is not None
    assert steered - before >= 0.9 * effect
    for task, least in PRICES.items():
        price = result.test.share(task, STEERED).share
        assert price is not None
        assert price >= least
    assert result.controls[0].best is not None
    control = result.test.share(TARGET, "search-matched 0").share
    assert control is not None
    assert control - before < 0.5 * effect
    over = result.test.difference(TARGET, STEERED, "search-matched")
    assert over.low is not None
    assert over.low > 0


@pytest.mark.filterwarnings("ignore::moesteer.errors.MoesteerWarning")
def test_the_best_profile_is_written_and_does_what_was_found(
    engine: TransformersEngine, ranking: Profile, done: tuple[Path, SearchResult]
):
    out, result = done
    profile = Profile.load(out / "best.safetensors")
    best = result.best
    chosen = select_experts(ranking, activate=best.activate, deactivate=best.deactivate, toward="a")
    assert (profile.activated, profile.deactivated) == (chosen.activated, chosen.deactivated)
    assert profile.evidence is not None
    assert profile.evidence.command.endswith("moesteer search")
    assert followed(engine, profile, "dev") == best.values[TARGET]
    assert best.objective == best.values[TARGET]


def test_every_trial_is_written_and_allowed_only_within_the_limits(
    done: tuple[Path, SearchResult],
):
    out, result = done
    trials = trials_of(out)
    searched = [t for t in trials if t["stage"] == "search"]
    assert sum(t["control"] is None for t in searched) == 8
    assert sum(t["control"] == "random" for t in searched) == 8
    for trial in searched:
        kept = all(trial["values"][task] >= least for task, least in PRICES.items())
        assert trial["allowed"] == kept
        assert (trial["objective"] >= 0) == kept
        assert trial["kl"] >= 0
    assert trials[0]["stage"] == "unsteered"
    assert result.unsteered.values[TARGET] == 0.5
    numbers = [(t.activate, t.deactivate) for t in result.dose]
    assert (result.best.activate, result.best.deactivate) in numbers
    assert numbers == sorted(set(numbers))


def test_the_summary_is_the_result(done: tuple[Path, SearchResult]):
    out, result = done
    path = out / "summary.json"
    assert SearchResult.from_json(path.read_text(), path) == result
    with pytest.raises(MoesteerError, match=r"x is a search of format 7"):
        SearchResult.from_json('{"schema": 7}', "x")


class Killed(BaseException):
    pass


def test_an_interrupted_search_is_taken_up(
    engine: TransformersEngine, ranking: Profile, done: tuple[Path, SearchResult], tmp_path: Path
):
    whole, result = done

    def stop(trials: int, total: int) -> None:
        if trials == 12:
            raise Killed

    with pytest.raises(Killed):
        run(engine, ranking, tmp_path / "run", progress=stop)
    there = len(trials_of(tmp_path / "run"))
    assert 8 < there < len(trials_of(whole))
    said: list[str] = []
    assert run(engine, ranking, tmp_path / "run", say=said.append) == result
    assert trials_of(tmp_path / "run") == trials_of(whole)
    assert f"({there} trials are there)" in said[0]
    assert said[0].startswith(f"at most 23 trials of {3 * ITEMS} prompts: {23 * 3 * ITEMS} replies")


def test_optuna_searches_and_resumes_alike(
    engine: TransformersEngine, ranking: Profile, tmp_path: Path
):
    more: dict[str, Any] = {
        "optimiser": "optuna",
        "budget": 6,
        "seeds": 0,
        "prices": [],
        "limit": 4,
        "max_kl": 5.0,
    }
    result = run(engine, ranking, tmp_path / "run", **more)
    assert result.best.objective >= result.unsteered.objective
    trials = trials_of(tmp_path / "run")
    assert 2 <= len([t for t in trials if t["stage"] == "search"]) <= 6
    assert run(engine, ranking, tmp_path / "run", **more) == result
    assert trials_of(tmp_path / "run") == trials


# -- what cannot be ------------------------------------------------------------------------------


def test_other_settings_are_not_mixed_in(
    engine: TransformersEngine, ranking: Profile, done: tuple[Path, SearchResult]
):
    with pytest.raises(MoesteerError, match="budget was 8 and is 9 now"):
        run(engine, ranking, done[0], budget=9)
    with pytest.raises(MoesteerError, match=r"rankings\.risk-difference was"):
        run(engine, shuffled_ranking(ranking, 0), done[0])


def test_limits_that_nothing_keeps(engine: TransformersEngine, ranking: Profile, tmp_path: Path):
    more: dict[str, Any] = {"max_kl": 0.0, "budget": 3, "limit": 4, "seeds": 0}
    with pytest.raises(MoesteerError, match=r"none of 3 choices keeps to the limits; the nearest"):
        run(engine, ranking, tmp_path / "run", **more)
    assert len(trials_of(tmp_path / "run")) == 4


def test_limits_that_the_unsteered_model_breaks(
    engine: TransformersEngine, ranking: Profile, tmp_path: Path
):
    strict = [(replace(read_card("testbed-facts"), outcome="wrong"), 0.5)]
    with pytest.raises(MoesteerError, match=r"unsteered model itself has 0.000 on testbed-facts"):
        run(engine, ranking, tmp_path / "run", prices=strict, limit=4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": 2}, "--budget is 2; it must be at least 3 trials a ranking"),
        ({"seeds": -1}, "--seeds is -1; it must be at least 0"),
        ({"seed": -1}, "--seed is -1; it must be at least 0"),
        ({"max_kl": -0.1}, "--max-kl is -0.1; it must be at least 0"),
        ({"max_kl": float("nan")}, "--max-kl is nan"),
        ({"data": {"towns": "f.jsonl"}}, "--data names 'towns', which is none of the tasks"),
        ({"limit": 0}, "--limit is 0; it must be at least 1"),
        ({"prices": [(read_card(TARGET), 0.5)]}, "testbed-document is named twice"),
    ],
)
def test_bad_settings(
    engine: TransformersEngine, ranking: Profile, tmp_path: Path, more: dict, message: str
):
    with pytest.raises(MoesteerError, match=message):
        run(engine, ranking, tmp_path / "run", **more)


def test_rankings_need_scores_of_this_model(
    engine: TransformersEngine, ranking: Profile, tmp_path: Path
):
    card, out = read_card(TARGET), tmp_path / "run"
    with pytest.raises(MoesteerError, match="there is no ranking"):
        search(engine, [], card, toward="a", out=out)
    with pytest.raises(MoesteerError, match="hand holds no scores"):
        search(engine, [Profile(name="hand")], card, toward="a", out=out)
    with pytest.raises(MoesteerError, match="is given twice"):
        search(engine, [ranking, ranking], card, toward="a", out=out)
    thinking = replace(ranking, chat_options={"thinking": True}, evidence=None, name="thinking")
    with pytest.raises(MoesteerError, match="made with different chat options"):
        search(engine, [ranking, thinking], card, toward="a", out=out)
    assert ranking.model is not None
    other = replace(ranking, model=replace(ranking.model, config_hash="other"))
    with pytest.raises(MoesteerError, match="config hash"):
        search(engine, [other], card, toward="a", out=out)


def test_without_optuna(
    engine: TransformersEngine, ranking: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MoesteerError, match=r'pip install "moesteer\[search\]"'):
        run(engine, ranking, tmp_path / "run", optimiser="optuna", limit=2, prices=[])


# -- choices -------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.sampled_from(["x", "y", "z"]),
        st.tuples(st.integers(0, 60), st.integers(0, 900)),
        min_size=1,
    ),
    st.integers(9, 200),
)
def test_the_grid_keeps_to_the_budget_and_the_most(most: dict[str, tuple[int, int]], budget: int):
    choices = grid(most, budget)
    assert len(choices) == len(set(choices)) <= budget
    for label, activate, deactivate in choices:
        assert 0 <= activate <= most[label][0]
        assert 0 <= deactivate <= most[label][1]
        assert activate or deactivate
    for label, (up, down) in most.items():
        tried = {(a, d) for name, a, d in choices if name == label}
        assert (not up) or (1, 0) in tried
        assert (not down) or (0, 1) in tried
        if budget // len(most) >= 8:
            assert (not up and not down) or (up, down) in tried


def test_the_default_budget_is_a_grid_of_seven_by_seven():
    choices = grid({"x": (32, 1000)}, 48)
    assert sorted({a for _, a, _ in choices}) == [0, 1, 2, 4, 8, 16, 32]
    assert sorted({d for _, _, d in choices}) == [0, 1, 4, 16, 63, 251, 1000]


@given(st.integers(6, 900), st.integers(6, 900))
def test_every_ranking_gets_as_many_tries(up: int, down: int):
    """Where a ranking can be steered less far, rounding must not cost it choices."""
    assert len(grid({"x": (up, down)}, 48)) == 48


@pytest.mark.parametrize("toward", ["a", "b"])
@pytest.mark.filterwarnings("ignore::moesteer.errors.MoesteerWarning")
def test_the_most_experts_fit_and_one_more_does_not(ranking: Profile, toward: Side):
    for profile in (ranking, *(shuffled_ranking(ranking, seed) for seed in range(5))):
        up, down = most_experts(profile, toward)
        chosen = select_experts(profile, activate=up, deactivate=down, toward=toward)
        assert (len(chosen.activated), len(chosen.deactivated)) == (up, down)
        with pytest.raises(MoesteerError):
            select_experts(profile, activate=up + 1, deactivate=0, toward=toward)
        assert down <= 64 / 3


def trial(activate: int, values: Mapping[str, float], allowed: bool = True) -> Trial:
    objective = values["t"] if allowed else -0.5
    return Trial("search", None, 0, "d", activate, 0, "a", dict(values), 0.1, allowed, objective)


def test_the_best_is_allowed_then_largest_then_of_the_fewest_experts():
    trials = [trial(1, {"t": 0.5}), trial(9, {"t": 0.9}), trial(3, {"t": 0.9})]
    assert best_of([*trials, trial(2, {"t": 1.0}, allowed=False)]) == trials[2]
    assert best_of([trial(2, {"t": 1.0}, allowed=False)]) is None


shares = st.sampled_from([0.0, 0.5, 1.0])


@given(st.lists(st.tuples(shares, shares, shares), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(values: list[tuple[float, float, float]]):
    trials = [
        trial(number, dict(zip("tuv", three, strict=True))) for number, three in enumerate(values)
    ]
    front = {tuple(t.values.values()) for t in pareto_front(trials)}
    beaten = {
        v
        for v in values
        for w in values
        if v != w and all(b >= a for a, b in zip(v, w, strict=True))
    }
    assert front == set(values) - beaten
    assert len(pareto_front(trials)) == len(front)
    assert all(t.activate == values.index(tuple(t.values.values())) for t in pareto_front(trials))  # pyright: ignore[reportArgumentType]
