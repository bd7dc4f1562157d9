"""`moesteer lm-eval` end to end, and a model of moesteer's in the command `inspect`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from as_user import Run
from made_suites import FOLLOWING, documents, write_suite
from moesteer.chat import render_prompt
from moesteer.contrast import Message
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers_engine import load_transformers
from moesteer.harnesses import lm_eval_arms
from moesteer.harnesses.paired import SuiteComparison
from moesteer.profile import Profile

pytestmark = pytest.mark.filterwarnings("always::moesteer.errors.MoesteerWarning")

COUNT = 12
NEEDED = ("--include-path", "suite", "--out", "out")


@pytest.fixture(autouse=True)
def own_cache(
    in_tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    Profile(activated=FOLLOWING).save(in_tmp_path / "follow.safetensors")
    Profile(deactivated=FOLLOWING).save(in_tmp_path / "doubt.safetensors")
    write_suite(in_tmp_path / "suite", COUNT)


def accuracy_by_hand(profile: Profile | None) -> float:
    """How often the engine finds the following reply likelier than the other."""
    engine = load_transformers("testbed")
    better = 0
    for line in documents(COUNT):
        prompt = render_prompt([Message("user", line["prompt"])], engine.tokenizer)
        start = engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        readouts = []
        for side in ("a", "b"):
            ids = engine.tokenizer(prompt + line[side], add_special_tokens=False)["input_ids"]
            terms = tuple(Term(i, ids[i], 1.0) for i in range(len(start), len(ids)))
            readouts.append(Readout(tuple(ids), terms))
        a, b = engine.read(readouts, [profile])[0]
        better += a > b
    return better / COUNT


def test_planted_experts_move_the_accuracy_and_random_ones_do_not(
    run: Run, in_tmp_path: Path
) -> None:
    command = ("lm-eval", "testbed", *NEEDED, "--apply-chat-template", "--seeds", 2)
    said = run(*command, "--with", "follow.safetensors", "--tasks", "choice,spoken", "rolling")
    assert said.code == 0, said.err
    out = in_tmp_path / "out"
    found = SuiteComparison.from_json((out / "summary.json").read_text())
    assert [arm.name for arm in found.arms] == ["unsteered", "steered", "random 0", "random 1"]
    assert found.value("choice", "acc", "unsteered").value == accuracy_by_hand(None) == 0.5
    follow = Profile(activated=FOLLOWING)
    assert found.value("choice", "acc", "steered").value == accuracy_by_hand(follow) == 1.0
    gained = found.difference("choice", "acc", "steered", "random")
    assert (gained.n, gained.difference) == (COUNT, pytest.approx(0.5, abs=0.1))
    assert gained.low is not None
    assert gained.low > 0.15
    assert abs(found.difference("choice", "acc", "random", "unsteered").difference or 0) < 0.1
    spoken = found.difference("spoken", "exact_match", "steered", "unsteered")
    assert spoken.difference == pytest.approx(0.5)
    price = found.difference("rolling", "word_perplexity", "steered", "unsteered")
    assert price.low is not None
    assert price.difference is not None
    assert price.low < price.difference
    for arm in found.arms[1:]:
        assert (arm.obeyed, len(arm.activated)) == (True, 3)
        assert arm.tokens > 12 * 30  # at least every document's prompt
    for heading in ("unsteered", "random", "steered − unsteered", "steered − random"):
        assert heading in said.out
    assert "choice   acc ↑" in said.out
    assert "1.000 ± 0.000" in said.out
    assert "word_perplexity ↓" in said.out
    assert "fired: steered (follow.safetensors): +3 −0 experts" in said.out
    assert "moesteer: warning" not in said.err
    assert "Running loglikelihood" not in said.err  # lm-eval's bars are for a terminal
    raw = json.loads((out / "steered.json").read_text())
    assert len(raw["samples"]["choice"]) == COUNT
    assert raw["config"]["moesteer"]["fingerprint"] == follow.fingerprint

    # Other prompts in the arms that are still to come are noticed when they are compared.
    (out / "random-1.json").unlink()
    write_suite(in_tmp_path / "suite", COUNT - 2)
    said = run(*command, "--with", "follow.safetensors", "--tasks", "choice,spoken", "rolling")
    assert said.code == 2
    assert "random 1 answered other prompts of choice" in said.err
    said = run(*command, "--with", "doubt.safetensors", "--tasks", "choice,spoken", "rolling")
    assert "other settings: profile.activated was" in said.err


def test_an_interrupted_run_goes_on_at_the_arm_where_it_stopped(
    run: Run, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("lm-eval", "testbed", *NEEDED, "--with", "doubt.safetensors", "--tasks", "choice")
    command += ("--seeds", 1, "--limit", 6, "--batch-size", 4)
    asked = []
    evaluate = lm_eval_arms.evaluate

    def interrupted(lm: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(options["limit"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(lm, *arguments, **options)

    monkeypatch.setattr(lm_eval_arms, "evaluate", interrupted)
    said = run(*command)
    assert said.code == 130
    assert "it goes on from there" in said.err
    out = in_tmp_path / "out"
    before = (out / "unsteered.json").read_bytes()
    assert not (out / "steered.json").exists()
    said = run(*command)
    assert said.code == 0, said.err
    assert asked == [6] * 4  # unsteered, interrupted, steered, random: none twice
    assert (out / "unsteered.json").read_bytes() == before
    found = SuiteComparison.from_json((out / "summary.json").read_text())
    assert found.value("choice", "acc", "steered").value == 0
    assert found.value("choice", "acc", "steered").n == 6
    assert "without the model's chat template, which is lm-eval's default" in said.out
    again = run(*command)
    assert again.out == said.out
    assert len(asked) == 4


def test_without_a_control_it_says_so(run: Run) -> None:
    said = run(
        *("lm-eval", "testbed", *NEEDED, "--with", "follow.safetensors", "--tasks", "choice"),
        *("--seeds", 0, "--limit", 2, "--num-fewshot", 0),
    )
    assert said.code == 0
    assert "without a random control" in said.err
    assert "random" not in said.out.partition("Values are")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "none"], "no task 'none' among those of lm-eval"),
        (["--tasks", "choice", "--include-path", "gone"], "gone is no folder"),
        (["--tasks", "choice", "--limit", 0], "--limit is 0; it must be at least 1"),
        (["--tasks", "choice", "--engine", "vllm"], "moesteer serve MODEL --profile NAME=FILE"),
        (["--tasks", "choice", "--chat-option", "a=1"], "without --apply-chat-template"),
        (["--tasks", "broken"], "can't load broken: "),
    ],
)
def test_what_can_not_be_run_is_refused_before_the_work(
    refused: Run,
    in_tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list,
    message: str,
) -> None:
    known = lm_eval_arms.TaskManager

    def own_only(include_defaults: bool = False, **options: Any) -> Any:
        return known(include_defaults=False, **options)  # else: 10 s to list lm-eval's own

    monkeypatch.setattr(lm_eval_arms, "TaskManager", own_only)
    text = (in_tmp_path / "suite" / "choice.yaml").read_text()
    broken = text.replace("task: choice", "task: broken").replace("documents.jsonl", "gone.jsonl")
    (in_tmp_path / "suite" / "broken.yaml").write_text(broken)
    given = ["--out", "out", *([] if "--include-path" in arguments else NEEDED[:2])]
    said = refused("lm-eval", "testbed", "--with", "follow.safetensors", *given, *arguments)
    assert message in said.err


def test_a_missing_extra_is_named(refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("lm_eval", "moesteer.harnesses.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused(
        *("lm-eval", "testbed", *NEEDED, "--with", "follow.safetensors", "--tasks", "choice")
    )
    assert "pip install 'moesteer[lm-eval]'" in said.err


INSPECT_TASK = """\
import json

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@task
def following():
    lines = [json.loads(line) for line in open("suite/documents.jsonl")]
    samples = [Sample(line["prompt"], target=line["a"]) for line in lines]
    return Task(samples, solver=generate(), scorer=includes())
"""


def test_the_command_inspect_finds_the_provider(in_tmp_path: Path) -> None:
    (in_tmp_path / "following.py").write_text(INSPECT_TASK)
    command = [
        Path(sys.executable).parent / "inspect",
        "eval",
        "following.py",
        "--display",
        "plain",
    ]
    command += ["--model", "moesteer/testbed", "-M", "profile=follow.safetensors"]
    command += ["--max-tokens", "16", "--log-format", "json", "--log-dir", "logs"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "accuracy  1.000" in done.stdout
    (log,) = (in_tmp_path / "logs").glob("*.json")
    samples = json.loads(log.read_text())["samples"]
    assert len(samples) == COUNT
    told = [sample["output"]["metadata"]["moesteer"] for sample in samples]
    assert {one["fingerprint"] for one in told} == {Profile(activated=FOLLOWING).fingerprint}
    assert all(seen["obeyed"] and seen["tokens"] for one in told for seen in one["fired"])
