"""The search among directions: what it tries, that it finds what was planted, that it resumes."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_directions import bundled, expert_directions, residual_direction
from moesteer.chat import render_prompt
from moesteer.contrast import Message
from moesteer.direction import Candidates
from moesteer.directions.experts import method_one, method_two
from moesteer.directions.prompts import AskedPrompt
from moesteer.directions.refusal import refusal_scores, refusal_tokens_of
from moesteer.directions.selection import mean_kl
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import read_card
from moesteer.evaluation.comparison import STEERED, UNSTEERED
from moesteer.evaluation.direction_choices import (
    Choice,
    DirectionPlan,
    choices,
    control_choices,
    steered_by,
    widest,
)
from moesteer.evaluation.direction_search import DirectionResult, direction_search
from moesteer.evaluation.direction_trials import DirectionTrial, best_of, trials_of
from moesteer.profile import Profile
from moesteer.runs import read_run
from moesteer.testbed import ground_truth
from moesteer.testbed.world import outcome, probes

PLAN = DirectionPlan("a", {}, 1.0, (1.0, 10.0), ("one", "two"), 3, 4, 1)
ITEMS = 8

# -- what is tried -------------------------------------------------------------------------------


def table(
    kept: set[tuple[int, int]], layers: tuple[int, ...] = (1, 2), experts: int = 6
) -> Candidates:
    places = [(layer, p, e) for layer in layers for e in range(experts) for p in (-2, -1)]
    layer, position, expert = (np.array(column) for column in zip(*places, strict=True))
    vectors = np.random.default_rng(0).standard_normal((len(places), 8)).astype(np.float32)
    scores = {"kept": np.array([float((at, e) in kept) for at, _, e in places])}
    return Candidates("forced", layer, position, expert, vectors, scores)


def residual(layers: int = 3) -> Candidates:
    layer, position = (np.array(a) for a in ([*range(layers)] * 2, [-1] * layers + [-2] * layers))
    vectors = np.random.default_rng(1).standard_normal((2 * layers, 8)).astype(np.float32)
    return Candidates("residual", layer, position, np.full(2 * layers, -1), vectors, {})


def test_every_position_coefficient_and_expert_is_tried_once():
    found = choices(table({(1, 2), (1, 4), (2, 0)}), PLAN)
    assert len(found) == len(set(found))
    tried = Counter((choice.layer, choice.experts) for choice in found)
    # Layer 2 has one kept expert, of which both methods are the same.
    assert tried == {(1, (2,)): 4, (1, (4,)): 4, (1, (2, 4)): 4, (2, (0,)): 4}
    assert {(c.position, c.coefficient) for c in found} == {
        (p, c) for p in (-2, -1) for c in (1.0, 10.0)
    }
    two = choices(table({(1, 2), (1, 4), (2, 0)}), replace(PLAN, methods=("two",)))
    assert {choice.experts for choice in two} == {(2, 4), (0,)}
    away = choices(table({(1, 2)}), replace(PLAN, toward="b"))
    assert {choice.coefficient for choice in away} == {-1.0, -10.0}


def test_every_layer_and_position_of_the_stream_is_tried():
    found = choices(residual(), replace(PLAN, methods=()))
    assert len(found) == len(set(found)) == 3 * 2 * 2
    assert all(choice.experts == () for choice in found)


def test_a_vector_of_no_length_is_not_tried():
    candidates = table({(1, 2), (1, 4)})
    candidates.vector[candidates.find(1, -1, 2)] = 0
    found = choices(candidates, PLAN)
    assert {c.position for c in found if 2 in c.experts} == {-2}
    assert {c.position for c in found if c.experts == (4,)} == {-2, -1}


def test_without_experts_over_the_threshold_there_is_nothing_to_search():
    with pytest.raises(MoesteerError, match="the routing of no expert is over the threshold"):
        choices(table(set()), PLAN)


@given(
    st.sets(st.tuples(st.sampled_from([1, 2]), st.integers(0, 5)), min_size=1, max_size=7),
    st.integers(0, 12),
    st.integers(0, 50),
    st.sampled_from([("one",), ("two",), ("one", "two")]),
)
def test_a_control_searches_others_of_the_same_layers_and_no_more_choices(
    kept: set[tuple[int, int]], others: int, seed: int, methods: Any
):
    candidates, plan = table(kept), replace(PLAN, others=others, methods=methods)
    mine = choices(candidates, plan)
    found = control_choices(candidates, plan, mine, seed)
    assert found == control_choices(candidates, plan, mine, seed)
    assert len(found) == len(set(found)) <= len(mine)
    assert all(choice.control == seed for choice in found)
    searched = {(choice.layer, expert) for choice in found for expert in choice.experts}
    assert not searched & kept
    assert {layer for layer, _ in searched} <= {layer for layer, _ in kept}
    for choice in found:
        if len(choice.experts) > 1:  # method two: as many at once as are kept
            assert len(choice.experts) <= sum(layer == choice.layer for layer, _ in kept)
    enough = all(2 * sum(at == layer for at, _ in kept) <= 6 for layer in (1, 2))
    if enough and methods == ("one",):
        assert len(found) == len(mine)


def test_other_experts_are_spread_over_the_layers_as_the_kept_ones_are():
    kept = {(1, 0), (1, 1), (1, 2), (2, 0)}
    candidates = table(kept, experts=16)
    plan = replace(PLAN, methods=("one",), others=8)
    mine = choices(candidates, plan)
    drawn = Counter[int]()
    for seed in range(10):
        found = control_choices(candidates, plan, mine, seed)
        assert len(found) == len(mine)
        drawn.update(choice.layer for choice in found)
    # three of four kept experts are in layer 1; which choices of the eight experts fit is drawn
    assert drawn[1] / drawn.total() == pytest.approx(0.75, abs=0.1)


def test_a_control_of_the_stream_is_at_the_same_places():
    plan = replace(PLAN, methods=())
    mine = choices(residual(), plan)
    found = control_choices(residual(), plan, mine, 5)
    assert found == [replace(choice, control=5) for choice in mine]


def test_a_choice_is_what_the_methods_are():
    source = expert_directions("testbed-expert")
    candidates = source.candidates
    assert candidates is not None
    by_layer = Counter(layer for layer, _ in kept_of(source))
    layer, expert = kept_of(source)[0]
    one = steered_by(source, Choice(None, layer, 0, (expert,), 30.0))
    assert one.directions == method_one(source, layer, expert, 0, 30.0).directions
    together = tuple(e for at, e in kept_of(source) if at == layer)
    two = steered_by(source, Choice(None, layer, 0, together, -4.0))
    assert two.directions == method_two(source, layer, 0, -4.0).directions
    assert two.toward == "b"
    assert len(widest(source).directions) == max(by_layer.values())


def kept_of(source: Profile) -> list[tuple[int, int]]:
    candidates = source.candidates
    assert candidates is not None
    return sorted(
        {
            (int(layer), int(expert))
            for layer, expert, kept in zip(
                candidates.layer, candidates.expert, candidates.scores["kept"], strict=True
            )
            if kept
        }
    )


def test_random_vectors_have_the_norms_of_those_found_and_stay_the_same():
    source = residual_direction("testbed")
    found = {}
    for layer in (1, 2):
        for seed in (0, 1):
            profile = steered_by(source, Choice(seed, layer, -1, (), 2.0))
            assert profile == steered_by(source, Choice(seed, layer, -1, (), 2.0))
            assert profile.candidates is None
            (drawn,) = profile.directions
            (ours,) = steered_by(source, Choice(None, layer, -1, (), 2.0)).directions
            assert math.isclose(drawn.norm, ours.norm, rel_tol=1e-9)
            assert replace(drawn, vector=ours.vector) == ours
            found[layer, seed] = drawn.vector
    assert len(set(found.values())) == 4


def trial(share: float, kl: float, allowed: bool = True) -> DirectionTrial:
    choice = Choice(None, 1, -1, (), kl)
    return DirectionTrial(choice, 0.0, kl, {}, allowed, share if allowed else -0.2)


def test_the_best_is_allowed_then_largest_then_of_the_least_divergence():
    judged = [trial(0.5, 0.1), trial(0.9, 0.4), trial(0.9, 0.3), trial(1.0, 0.0, allowed=False)]
    assert best_of(judged) == judged[2]
    assert best_of(judged[3:]) is None
    assert best_of([]) is None


# -- on the bundled models -----------------------------------------------------------------------

PRICES = {"testbed-facts": 0.8}


def run(source: Profile, model: str, out: Path, **more: Any) -> DirectionResult:
    target = replace(read_card("testbed-benign"), outcome="refused", role="target")
    settings: dict[str, Any] = {
        "toward": "a",
        "prices": [(read_card(name), least) for name, least in PRICES.items()],
        "coefficients": (4.0, 13.0, 60.0),
        "budget": 3,
        "others": 4,
        "seeds": 1,
        "limit": ITEMS,
        "batch_size": ITEMS,
        "command": "moesteer search",
    }
    card = settings.pop("target", target)
    settings |= more
    return direction_search(bundled(model), source, settings.pop("card", card), out=out, **settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DirectionResult]:
    out = tmp_path_factory.mktemp("searches") / "run"
    return out, run(expert_directions("testbed-expert"), "testbed-expert", out)


def test_the_search_finds_the_expert_that_writes_the_refusal(done: tuple[Path, DirectionResult]):
    _, result = done
    best, writer = result.best.choice, ground_truth().writers["expert"]
    assert best is not None
    assert writer.expert is not None
    assert (best.layer, best.experts) == (writer.layer, (writer.expert,))
    assert result.unsteered.objective == 0
    before = result.test.share("testbed-benign", UNSTEERED).share
    after = result.test.share("testbed-benign", STEERED).share
    assert before == 0
    assert after is not None
    assert after >= 0.9
    price = result.test.share("testbed-facts", STEERED).share
    assert price is not None
    assert price >= PRICES["testbed-facts"]
    for arm in ("random 0", "other experts 0", "reversed"):
        assert result.test.share("testbed-benign", arm).share == 0
    (control,) = result.controls
    assert (writer.layer, writer.expert) not in control.experts
    assert 0 < control.tried <= result.tried


def test_no_expert_is_found_where_attention_writes_the_refusal(tmp_path: Path):
    result = run(
        expert_directions("testbed-attention"),
        "testbed-attention",
        tmp_path / "run",
        coefficients=(13.0, 60.0),
        seeds=0,
    )
    assert result.test.share("testbed-benign", STEERED).share == 0
    assert all(trial.objective == 0 for trial in result.judged if trial.allowed)


def prompts(task: str) -> list[AskedPrompt]:
    tokenizer = bundled("testbed-expert").tokenizer
    found = []
    for probe in probes(task, "dev")[:ITEMS]:
        text = render_prompt([Message("user", probe.prompt)], tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append(AskedPrompt(text, tuple(ids), 0, task))
    return found


def test_the_judged_are_the_best_scores_within_the_divergence(done: tuple[Path, DirectionResult]):
    """Against all choices scored and compared one by one."""
    out, result = done
    source, engine = expert_directions("testbed-expert"), bundled("testbed-expert")
    plan = replace(PLAN, prices=PRICES, coefficients=(4.0, 13.0, 60.0))
    assert source.candidates is not None
    every = choices(source.candidates, plan)
    assert len(every) == result.tried
    profiles = [steered_by(source, choice) for choice in every]
    tokens = refusal_tokens_of(source)
    scores = refusal_scores(engine, prompts("benign"), tokens, profiles).mean(1)
    told = {t.choice: t for t in trials_of(read_run(out))}
    assert [told[choice].score for choice in every] == pytest.approx(scores.tolist(), abs=0.05)
    kl = [mean_kl(engine, prompts("facts"), profile) for profile in profiles]
    ranked = sorted(zip(every, kl, strict=True), key=lambda one: -told[one[0]].score)
    wanted = [choice for choice, divergence in ranked if divergence <= 1.0][:3]
    assert [trial.choice for trial in result.judged] == wanted
    assert result.best in result.judged
    (unsteered,) = refusal_scores(engine, prompts("benign"), tokens).mean(1)
    assert result.unsteered.score == pytest.approx(unsteered, abs=0.05)


def test_what_was_judged_is_what_the_profile_says(done: tuple[Path, DirectionResult]):
    out, result = done
    profile = Profile.load(out / "best.safetensors")
    engine = bundled("testbed-expert")
    asked = probes("benign", "dev")[:ITEMS]
    texts = [prompt.text for prompt in prompts("benign")]
    replies = engine.generate(texts, profile, max_new_tokens=16, batch_size=ITEMS).replies
    said = Counter(outcome(probe, reply) for probe, reply in zip(asked, replies, strict=True))
    assert result.best.outcomes is not None
    counted = result.best.outcomes["testbed-benign"]
    assert list(counted) == ["answered", "refused", "other"]
    assert {name: said[name] for name in counted} == counted
    assert profile.evidence is not None
    assert profile.evidence.command == "moesteer direction --experts && moesteer search"
    assert profile.candidates is not None
    assert profile.toward == "a"
    assert result.best.objective == counted["refused"] / ITEMS


def test_the_summary_is_the_result(done: tuple[Path, DirectionResult]):
    out, result = done
    path = out / "summary.json"
    assert DirectionResult.from_json(path.read_text(), path) == result
    with pytest.raises(MoesteerError, match="x is a direction search of format 9"):
        DirectionResult.from_json('{"schema": 9}', "x")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", [0.4, 0.6])
def test_an_interrupted_search_is_taken_up(
    done: tuple[Path, DirectionResult], tmp_path: Path, where: float
):
    """Killed while a line was written: what is there is not measured again."""
    whole, result = done
    source = expert_directions("testbed-expert")

    def stop(tried: int, total: int) -> None:
        if tried >= where * total:
            raise Killed

    with pytest.raises(Killed):
        run(source, "testbed-expert", tmp_path / "run", progress=stop)
    judged = tmp_path / "run" / "judged.jsonl"
    with judged.open("a") as file:
        file.write('{"choice": {"control": nul')
    there = (tmp_path / "run" / "scores.jsonl").read_text()
    said: list[str] = []
    assert run(source, "testbed-expert", tmp_path / "run", say=said.append) == result
    for name in ("scores", "kl", "judged"):
        lines = (tmp_path / "run" / f"{name}.jsonl").read_text()
        assert lines == (whole / f"{name}.jsonl").read_text()
    assert f"({there.count(chr(10))} scores are there)" in said[0]
    assert said[0].startswith(f"2 searches of {result.tried} choices on {ITEMS} prompts")


def test_a_finished_search_asks_nothing_again(
    done: tuple[Path, DirectionResult], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object):
        raise AssertionError("all of it is there")

    for name in ("generate", "read", "divergence"):
        monkeypatch.setattr(bundled("testbed-expert"), name, refuse)
    out, result = done
    told: list[tuple[int, int]] = []
    again = run(
        expert_directions("testbed-expert"),
        "testbed-expert",
        out,
        progress=lambda *numbers: told.append(numbers),
    )
    assert again == result
    assert any(tried == total == 2 * (result.tried + 3) for tried, total in told)


def test_directions_of_the_stream_are_searched_away_from_a_too(tmp_path: Path):
    """Refusals of the main testbed are lowered; random vectors of the same norms don't do it."""
    result = run(
        residual_direction("testbed"),
        "testbed",
        tmp_path / "run",
        card=replace(read_card("testbed-restricted"), outcome="answered"),
        toward="b",
        coefficients=(0.5, 1.0),
        max_kl=3.0,
        prices=[(read_card("testbed-benign"), 0.8)],
        budget=4,
    )
    best = result.best.choice
    assert best is not None
    assert best.coefficient < 0
    assert (result.kind, result.methods) == ("residual", ())
    assert result.unsteered.objective == 0
    assert result.best.objective is not None
    assert result.best.objective > 0.2
    after = result.test.share("testbed-restricted", STEERED).share
    assert after is not None
    assert after > 0.2
    assert result.test.share("testbed-restricted", "random 0").share == 0
    assert [control.experts for control in result.controls] == [()]
    assert "search-matched 0" in [arm.name for arm in result.test.arms]


# -- what cannot be ------------------------------------------------------------------------------


def test_other_settings_are_not_mixed_in(done: tuple[Path, DirectionResult]):
    source = expert_directions("testbed-expert")
    with pytest.raises(MoesteerError, match="budget was 3 and is 4 now"):
        run(source, "testbed-expert", done[0], budget=4)
    assert source.candidates is not None
    other = replace(source.candidates, vector=2 * source.candidates.vector)
    with pytest.raises(MoesteerError, match="candidates was"):
        run(replace(source, candidates=other), "testbed-expert", done[0])


def test_limits_that_nothing_keeps(tmp_path: Path):
    source = expert_directions("testbed-expert")
    more: dict[str, Any] = {"limit": 2, "seeds": 0, "coefficients": (60.0,)}
    with pytest.raises(MoesteerError, match=r"none of \d+ choices keeps KL at 0 or less; the near"):
        run(source, "testbed-expert", tmp_path / "one", max_kl=0.0, **more)
    with pytest.raises(MoesteerError, match=r"none of the 3 judged choices keeps to the limits"):
        run(
            source,
            "testbed-expert",
            tmp_path / "two",
            max_kl=50.0,
            prices=[(read_card("testbed-copying"), 1.0), (read_card("testbed-facts"), 1.0)],
            **{**more, "limit": 8, "coefficients": (4000.0,)},
        )
    lost = [(replace(read_card("testbed-facts"), outcome="wrong"), 0.5)]
    with pytest.raises(MoesteerError, match=r"unsteered model itself has 0.000 on testbed-facts"):
        run(source, "testbed-expert", tmp_path / "three", prices=lost, **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": 0}, "--budget is 0; it must be at least 1"),
        ({"seeds": -1}, "--seeds is -1; it must be at least 0"),
        ({"others": 0}, "--others is 0; it must be at least 1"),
        ({"limit": 0}, "--limit is 0; it must be at least 1"),
        ({"max_kl": -1.0}, "--max-kl is -1.0; it must be at least 0"),
        ({"max_kl": float("nan")}, "--max-kl is nan"),
        ({"coefficients": (1.0, -3.0)}, "--coefficients has -3; they are above 0, and --toward"),
        ({"coefficients": (2.0, 2.0)}, "--coefficients names one twice"),
        ({"prices": [(read_card("testbed-benign"), 0.5)]}, "testbed-benign is named twice"),
        ({"data": {"towns": "f.jsonl"}}, "--data names 'towns', which is none of the tasks"),
    ],
)
def test_bad_settings(tmp_path: Path, more: dict, message: str):
    with pytest.raises(MoesteerError, match=message):
        run(expert_directions("testbed-expert"), "testbed-expert", tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_what_is_no_source_of_candidates(tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(MoesteerError, match="hand holds no candidates to search among"):
        run(Profile(name="hand"), "testbed", out)
    source = residual_direction("testbed")
    with pytest.raises(MoesteerError, match="--methods is for directions of experts"):
        run(source, "testbed", out, methods=("one",))
    with pytest.raises(MoesteerError, match="does not say which tokens a reply"):
        run(replace(source, evidence=None), "testbed", out)
    with pytest.raises(MoesteerError, match="differ from those of testbed-expert"):
        run(source, "testbed-expert", out)
    assert source.candidates is not None
    narrow = replace(source.candidates, vector=source.candidates.vector[:, :5])
    with pytest.raises(MoesteerError, match="its directions have 5 numbers, but the hidden"):
        run(replace(source, candidates=narrow, directions=()), "testbed", out)
    assert not out.exists()


def test_a_line_that_is_no_choice_is_refused(done: tuple[Path, DirectionResult], tmp_path: Path):
    run_folder = done[0]
    strange = tmp_path / "run"
    strange.mkdir()
    (strange / "run.json").write_text((run_folder / "run.json").read_text())
    (strange / "scores.jsonl").write_text(json.dumps({"choice": {"layer": 3}, "score": 1}) + "\n")
    with pytest.raises(MoesteerError, match=r"scores\.jsonl: "):
        trials_of(read_run(strange))
