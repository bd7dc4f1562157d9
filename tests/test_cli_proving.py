"""`moesteer evaluate` and `moesteer search` as a user meets them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from as_user import Run
from made_directions import residual_direction
from moesteer.evaluation.comparison import Comparison
from moesteer.evaluation.direction_search import DirectionResult
from moesteer.evaluation.search import SearchResult
from moesteer.profile import Profile
from moesteer.testbed import ground_truth

# A warning of ours is a line on standard error here, as it is for the user.
pytestmark = pytest.mark.filterwarnings("always::moesteer.errors.MoesteerWarning")

CARD = """
name = "{name}"
title = "Says yes"
about = "Made for this test."
outcome = "yes"
role = "{role}"
harmless = {harmless}
max_new_tokens = 4
[prompts]
source = "{name}.jsonl"
template = "{{prompt}}"
needs = "lines with a prompt."
[[judges]]
kind = "contains"
phrases = ["yes"]
outcome = "yes"
otherwise = "no"
"""


@pytest.fixture(autouse=True)
def planted(in_tmp_path: Path) -> None:
    """A profile of the testbed, where the commands run."""
    planted = ground_truth().behaviours["document"].planted
    Profile(activated=planted, toward="a", name="planted").save("planted.safetensors")


EVALUATE = "evaluate testbed --with planted.safetensors --out out --seeds 1 --limit 8".split()


def own_task(name: str = "own", role: str = "target", harmless: str = "true") -> None:
    Path(f"{name}.toml").write_text(CARD.format(name=name, role=role, harmless=harmless))


def own_prompts(name: str, number: int = 12) -> None:
    lines = [json.dumps({"prompt": f"Tell me of lantern {i}."}) + "\n" for i in range(number)]
    Path(f"{name}.jsonl").write_text("".join(lines))


# -- evaluate ------------------------------------------------------------------------------------


def test_evaluate_shows_shares_differences_price_and_proof(run: Run):
    said = run(*EVALUATE, "--tasks", "testbed-document", "--tasks", "testbed-facts")
    assert said.code == 0
    comparison = Comparison.from_json(Path("out/summary.json").read_text())
    share = comparison.share("testbed-document", "steered")
    assert share.share == 1
    row = next(line for line in said.out.split("\n") if line.startswith("steered "))
    assert row.split()[:3] == ["steered", "100%", f"({share.low:.0%}–100%)"]
    assert "document (target)" in said.out
    assert "right (price)" in said.out
    effect = comparison.difference("testbed-document", "steered", "random")
    assert effect.difference is not None
    assert effect.low is not None
    assert effect.high is not None
    row = next(line for line in said.out.split("\n") if line.startswith("steered − random "))
    points, low, high = (100 * x for x in (effect.difference, effect.low, effect.high))
    assert f" {points:+.0f} ({low:+.0f} … {high:+.0f}) p = " in row
    assert row.split()[-1] == "0"
    assert "fired: steered (planted.safetensors): +3 −0 experts;" in said.out
    assert "judge of testbed-facts: right on" in said.out
    assert "moesteer: 2 tasks × 4 arms: 64 replies" in said.err
    left_out = "no control matched 0, bottom: planted.safetensors holds no scores"
    assert left_out in said.err
    assert any(note.startswith(left_out) for note in comparison.notes)
    replies = [json.loads(line) for line in Path("out/replies.jsonl").read_text().splitlines()]
    assert len(replies) == 64
    assert not any(reply["reply"] in said.out for reply in replies)
    assert json.loads(Path("out/run.json").read_text())["about"]["command"].startswith(
        "moesteer evaluate testbed --with planted.safetensors"
    )
    again = run(*EVALUATE, "--tasks", "testbed-document", "--tasks", "testbed-facts")
    assert again.out == said.out
    assert "64 of them are there" in again.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nosuch"], "there is no task 'nosuch'"),
        (["--tasks", "testbed-facts", "--data", "testbed-facts"], "is not TASK=FILE"),
        (["--tasks", "own.toml"], "The task own needs: lines with a prompt."),
        (["--tasks", "own.toml", "--data", "own=gone.jsonl"], "gone.jsonl"),
        (["--tasks", "own.toml", "--data", "own=other.jsonl"], "no text in the column 'prompt'"),
        (
            ["--tasks", "testbed-facts", "--max-new-tokens", "0"],
            "--max-new-tokens is 0; it must be",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run: Run, arguments: list[str], message: str):
    own_task()
    Path("other.jsonl").write_text('{"question": "Tell me."}\n')
    said = run(*EVALUATE, *arguments)
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err
    assert not Path("out").exists()


def test_own_tasks_without_a_price_and_a_check_warn(run: Run):
    own_task(harmless="false")
    own_prompts("mine")
    said = run(*EVALUATE, "--tasks", "own.toml", "--data", "own=mine.jsonl")
    assert said.code == 0
    assert "only targets are measured, no price" in said.err
    assert "own: its judge was never checked" in said.err
    assert "judge of own: never checked" in said.out
    assert "lantern" not in said.out


def test_a_run_of_another_model_is_kept_and_refused(run: Run):
    assert run(*EVALUATE, "--tasks", "testbed-facts").code == 0
    before = Path("out/replies.jsonl").read_bytes()
    said = run("evaluate", "testbed-twin", *EVALUATE[2:], "--tasks", "testbed-facts")
    assert said.code == 2
    assert 'model was "testbed" and is "testbed-twin" now' in said.err
    assert Path("out/replies.jsonl").read_bytes() == before


def test_a_killed_evaluation_is_taken_up(run: Run):
    command = [sys.executable, "-m", "moesteer", *EVALUATE[:-1], "32"]
    command += ["--tasks", "testbed-document", "--tasks", "testbed-facts", "--batch-size", "4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    replies = Path("out/replies.jsonl")
    until = time.monotonic() + 60
    while not (replies.is_file() and replies.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = replies.read_text().count("\n")
    assert 0 < kept < 256
    said = run(*command[3:])
    assert said.code == 0
    assert f"{kept} of them are there" in said.err
    lines = [json.loads(line) for line in replies.read_text().splitlines()]
    assert len({(r["task"], r["arm"], r["item"]) for r in lines}) == len(lines) > kept


# -- search --------------------------------------------------------------------------------------

SEARCH = "search testbed --toward a --out out --seeds 1 --limit 6 --budget 3 --batch-size 6".split()


def test_search_shows_what_it_found_and_tests_it(run: Run):
    arguments = [*SEARCH, "--pairs", "testbed:document", "--target", "testbed-document"]
    arguments += ["--prices", "testbed-facts>=0.9"]
    said = run(*arguments)
    assert said.code == 0
    result = SearchResult.from_json(Path("out/summary.json").read_text())
    best = result.best
    assert (
        f"found: {best.activate} activated, {best.deactivate} deactivated by risk-difference;"
        " best.safetensors"
    ) in said.out
    assert "within: testbed-facts at least 90%; grid, 3 trials" in said.out
    assert "On the test prompts, once:" in said.out
    assert "steered − search-matched" in said.out or result.controls[0].best is None
    assert "moesteer: at most 13 trials of 12 prompts: 156 replies on dev" in said.err
    found = Profile.load("out/best.safetensors")
    assert len(found.activated) == best.activate
    assert found.evidence is not None
    assert "moesteer search testbed" in found.evidence.command
    # The scores stand beside the folder, are not detected again, and serve as a ranking.
    assert Profile.load("out.risk-difference.safetensors").scores is not None
    again = run(*arguments)
    assert (again.code, again.out) == (0, said.out)
    assert "detect" not in again.err
    other = run(*SEARCH, "--pairs", "testbed:digits", "--target", "testbed-document")
    assert other.code == 2
    assert "out.risk-difference.safetensors was not made from these pairs" in other.err
    assert Profile.load("out/best.safetensors") == found


def test_the_target_may_be_another_outcome(run: Run):
    said = run(
        *[*SEARCH[:2], "--toward", "b", *SEARCH[4:]],
        *("--pairs", "testbed:document", "--target", "testbed-document=fact"),
    )
    assert said.code == 0
    result = SearchResult.from_json(Path("out/summary.json").read_text())
    assert (result.outcome, result.toward) == ("fact", "b")
    assert result.best.values["testbed-document"] > result.unsteered.values["testbed-document"]


TARGET = ["--target", "testbed-document"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TARGET, "give either --pairs (with --detectors) to rank experts from, or --rankings"),
        ([*TARGET, "--rankings", "x", "--pairs", "y"], "give either --pairs"),
        ([*TARGET, "--rankings", "x", "--detectors", "npmi"], "give either --pairs"),
        ([*TARGET, "--rankings", "gone.safetensors"], "gone.safetensors: there is no such profile"),
        ([*TARGET, "--rankings", "planted.safetensors"], "planted.safetensors holds no scores"),
        ([*TARGET, "--pairs", "testbed:document", "--detectors", "x"], "there is no detector 'x'"),
        (["--target", "testbed-document=blue", "--pairs", "p"], "'blue' is no outcome of testbed"),
        (["--target", "nosuch", "--pairs", "p"], "there is no task 'nosuch'"),
        ([*TARGET, "--pairs", "p", "--prices", "testbed-facts=1"], "is not TASK>=SHARE"),
        ([*TARGET, "--pairs", "p", "--prices", "testbed-facts>=95"], "95 is no share from 0 to 1"),
        ([*TARGET, "--pairs", "p", "--prices", "testbed-facts>=x"], "x is no share from 0 to 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(run: Run, arguments: list[str], message: str):
    said = run(*SEARCH, *arguments)
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err
    assert not Path("out").exists()


# -- search among directions ---------------------------------------------------------------------

AMONG = [*"search testbed --out out --seeds 1 --limit 6 --batch-size 6".split(), *TARGET]


def test_search_among_directions_shows_what_it_found_and_tests_it(run: Run):
    residual_direction("testbed").save("refusal.safetensors")
    arguments = [
        *"search testbed --directions refusal.safetensors --toward a --out out --seeds 1".split(),
        *"--target testbed-benign=refused --prices testbed-facts>=0.8 --limit 6".split(),
        *"--batch-size 6 --coefficients 0.5 --coefficients 1 --budget 2 --max-kl 5".split(),
    ]
    said = run(*arguments)
    assert said.code == 0
    result = DirectionResult.from_json(Path("out/summary.json").read_text())
    assert result.best.choice is not None
    assert f"found: {result.best.choice.words}; best.safetensors" in said.out
    assert "On the test prompts, once:" in said.out
    assert "refused (target)" in said.out
    assert "right (price)" in said.out
    assert f"moesteer: 2 searches of {result.tried} choices on 6 prompts" in said.err
    assert (result.max_kl, result.budget, result.coefficients) == (5, 2, (0.5, 1))
    found = Profile.load("out/best.safetensors")
    assert found.evidence is not None
    assert found.evidence.command.startswith("moesteer direction && moesteer search testbed")
    again = run(*arguments)
    assert (again.code, again.out) == (0, said.out)
    shown = run("report", "out", "--out", "page.html")
    assert shown.code == 0
    assert "Which direction, and how strongly" in Path("page.html").read_text()
    evaluated = run(
        *"evaluate testbed --with out/best.safetensors --out other --seeds 1 --limit 3".split(),
        *"--tasks testbed-benign --tasks testbed-facts".split(),
    )
    assert evaluated.code == 0
    assert f"fired: steered (best.safetensors): {found.directions[0].words}" in evaluated.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--directions", "gone.safetensors"], "gone.safetensors: there is no such profile"),
        (["--directions", "planted.safetensors"], "holds no candidates to search among"),
        (["--directions", "d", "--pairs", "p"], "--pairs is for a search among experts, not among"),
        (["--directions", "d", "--rankings", "p"], "--rankings is for a search among experts"),
        (["--directions", "d", "--optimiser", "optuna"], "--optimiser is for a search among expe"),
        (["--directions", "d", "--seed", "3"], "--seed is for a search among experts"),
        (["--pairs", "p", "--coefficients", "3"], "--coefficients is for a search among --directi"),
        (["--pairs", "p", "--methods", "one"], "--methods is for a search among --directions"),
        (["--pairs", "p", "--others", "3"], "--others is for a search among --directions; give"),
    ],
)
def test_mixed_searches_are_refused(run: Run, arguments: list[str], message: str):
    said = run(*AMONG, "--toward", "a", *arguments)
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err
    assert not Path("out").exists()
