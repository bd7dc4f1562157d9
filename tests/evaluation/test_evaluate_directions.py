"""The evaluation of directions: on the bundled model, beside experts, and on a dense model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from made_directions import bundled, residual_direction
from made_models import made_sets
from moesteer.direction import Direction
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.evaluation.cards import read_card
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison
from moesteer.evaluation.evaluate import evaluate
from moesteer.generate import check_steers
from moesteer.profile import Profile
from moesteer.testbed import ground_truth

ITEMS = 8
CARDS = ("testbed-benign", "testbed-facts")


def run(profile: Profile, out: Path, **more: object) -> Comparison:
    cards = [replace(read_card(CARDS[0]), outcome="refused", role="target"), read_card(CARDS[1])]
    settings = {"seeds": 1, "limit": ITEMS, "batch_size": ITEMS} | more
    return evaluate(bundled("testbed"), profile, cards, out=out, **settings)  # pyright: ignore[reportArgumentType]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("evaluations") / "run"
    return out, run(residual_direction("testbed"), out)


def test_a_direction_moves_the_target_and_a_random_one_does_not(done: tuple[Path, Comparison]):
    _, comparison = done
    assert [arm.name for arm in comparison.arms] == ["unsteered", "steered", "reversed", "random 0"]
    assert comparison.share("testbed-benign", UNSTEERED).share == 0
    steered = comparison.share("testbed-benign", STEERED).share
    assert steered is not None
    assert steered >= 0.5
    assert comparison.share("testbed-benign", "random 0").share == 0
    assert comparison.share("testbed-benign", "reversed").share == 0
    assert comparison.notes == ()


def test_arms_say_what_they_do_and_that_the_stream_moved(done: tuple[Path, Comparison]):
    out, comparison = done
    profile = residual_direction("testbed")
    unsteered, *arms = comparison.arms
    assert unsteered.directions == ()
    (words,) = arms[0].directions
    assert words == profile.directions[0].words
    assert arms[1].directions[0].startswith("-1×")
    assert all(arm.obeyed and arm.tokens > ITEMS for arm in arms)
    fired = lines(out / "fired.jsonl")
    assert {line["arm"] for line in fired} == {"steered", "reversed", "random 0"}
    layer = profile.directions[0].sites[0][0]
    for line in fired:
        assert (line["layer"], line["place"], line["operation"]) == (layer, "input", "add")
        assert line["measured"] == pytest.approx(line["expected"], rel=0.1)
        assert line["expected"] == pytest.approx(profile.directions[0].norm)  # whichever way


def test_drift_is_measured_in_words_and_in_routing(done: tuple[Path, Comparison]):
    drift = {(d.task, d.arm): d for d in done[1].drifts}
    assert len(drift) == 6
    steered = drift["testbed-benign", STEERED]
    assert steered.kl is not None
    assert steered.kl > 0.1
    assert steered.routing is not None


def test_the_run_is_taken_up_and_another_direction_is_not_mixed_in(done: tuple[Path, Comparison]):
    out, comparison = done
    profile = residual_direction("testbed")
    before = (out / "replies.jsonl").read_bytes()
    assert run(profile, out) == comparison
    (direction,) = profile.directions
    weaker = replace(profile, directions=(replace(direction, coefficient=0.5),))
    with pytest.raises(MoesteerError, match=r"directions was \[\"\+1× at input of layer"):
        run(weaker, out)
    assert (out / "replies.jsonl").read_bytes() == before


@pytest.mark.filterwarnings("ignore::moesteer.errors.MoesteerWarning")
def test_experts_and_directions_together(tmp_path: Path):
    planted = ground_truth().behaviours["document"].planted
    both = replace(residual_direction("testbed"), activated=planted, name="both")
    comparison = run(both, tmp_path / "run", limit=2)
    steered = next(arm for arm in comparison.arms if arm.name == STEERED)
    assert (steered.activated, len(steered.directions)) == (planted, 1)
    random = next(arm for arm in comparison.arms if arm.name == "random 0")
    assert (len(random.activated), len(random.directions)) == (len(planted), 1)
    fired = [line for line in lines(tmp_path / "run" / "fired.jsonl") if line["arm"] == STEERED]
    assert {line.get("place") for line in fired} == {None, "input"}
    # A token counts once a place, however much is steered there.
    tokens = {(line["task"], line["layer"], line.get("place")): line["tokens"] for line in fired}
    assert steered.tokens == sum(
        max(n for (task, _, _), n in tokens.items() if task == name) for name in CARDS
    )


CARD = """
name = "own"
title = "Begins so"
about = "Made for this test."
outcome = "yes"
role = "target"
harmless = true
max_new_tokens = 4
[prompts]
source = "own.jsonl"
template = "{prompt}"
needs = "lines with a prompt."
[[judges]]
kind = "contains"
phrases = [PHRASE]
outcome = "yes"
otherwise = "no"
"""


@pytest.mark.filterwarnings("ignore::moesteer.errors.MoesteerWarning")
def test_a_dense_model_has_no_routing_to_drift(tmp_path: Path):
    made = made_sets(dense=True)
    (tmp_path / "own.toml").write_text(CARD.replace("PHRASE", json.dumps(made.habit.word.strip())))
    prompts = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in made.habit.b[:6])
    (tmp_path / "own.jsonl").write_text(prompts)
    width = made.engine.facts.hidden
    push = Direction(tuple(np.full(width, 2.0).tolist()), ((1, "mlp"),))
    comparison = evaluate(
        made.engine,
        Profile(directions=(push,), name="push"),
        [read_card(str(tmp_path / "own.toml"))],
        out=tmp_path / "run",
        split="all",
        data={"own": str(tmp_path / "own.jsonl")},
        seeds=2,
    )
    assert [arm.name for arm in comparison.arms] == [
        "unsteered", "steered", "reversed", "random 0", "random 1",
    ]  # fmt: skip
    assert all(drift.routing is None and drift.kl for drift in comparison.drifts)
    assert all(arm.obeyed for arm in comparison.arms)


def test_directions_to_choose_from_steer_nothing():
    unused = replace(residual_direction("testbed"), directions=(), name="file")
    with pytest.raises(MoesteerError, match="file steers nothing: it holds directions to choose"):
        check_steers(unused)
    check_steers(residual_direction("testbed"))


def test_an_ablation_has_no_reversed_arm_and_warns(tmp_path: Path):
    profile = residual_direction("testbed")
    vector = profile.directions[0].vector
    ablated = replace(profile, directions=(Direction(vector, ((1, "input"),), "ablate"),))
    with pytest.warns(MoesteerWarning, match="no control reversed: an ablated direction has no"):
        comparison = run(ablated, tmp_path / "run", limit=2)
    assert [arm.name for arm in comparison.arms] == ["unsteered", "steered", "random 0"]
    assert comparison.notes[0].startswith("no control reversed")
