"""The commands about tasks and their judges, as a user meets them."""

import json
from pathlib import Path

import pytest

from as_user import Run
from moesteer.evaluation.cards import SHIPPED, all_cards


def test_tasks(run: Run):
    Path("advbench.csv").write_text("goal\n")
    code, out, _ = run("tasks")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for card in all_cards():
        line = lines[card.name]
        for word in (card.outcome, card.role, card.prompts.source):
            assert f" {word} " in line
    assert lines["testbed-restricted"].rstrip().endswith(" yes")
    assert lines["advbench"].rstrip().endswith(" yes")
    assert lines["mquake"].rstrip().endswith(" no such file here")


@pytest.mark.parametrize("installed", [True, False])
def test_tasks_of_data_sets(run: Run, monkeypatch: pytest.MonkeyPatch, installed: bool):
    found = object() if installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    line = next(x for x in run("tasks")[1].splitlines() if x.startswith("faitheval-unanswerable"))
    assert line.rstrip().endswith("data set" if installed else "no: needs moesteer[data]")


@pytest.mark.parametrize("name", [card.name for card in all_cards()])
def test_one_task_whole(run: Run, name: str):
    code, out, _ = run("tasks", name)
    assert code == 0
    shown, written = " ".join(out.split()), (SHIPPED / f"{name}.toml").read_text()
    card = next(card for card in all_cards() if card.name == name)
    for text in (card.title, card.about, card.prompts.needs, card.prompts.template, card.outcome):
        assert " ".join(text.split()) in shown
        assert text in written
    for spec in card.judges:
        assert spec.kind in shown
    for change in card.changes:
        assert change.mode in shown


def test_no_such_task(refused: Run):
    assert "there is no task 'towns'" in refused("tasks", "towns").err
    assert "there is no task 'towns'" in refused("judge", "check", "towns").err


def test_a_bad_card(refused: Run):
    text = (SHIPPED / "mctest.toml").read_text()
    Path("mine.toml").write_text(text.replace("title =", "titel ="))
    said = refused("tasks", "mine.toml").err
    assert "mine.toml: missing key 'title'; unknown key 'titel'; a record has name, title" in said


def test_judge_check(run: Run):
    code, out, err = run("judge", "check", "testbed-restricted", "--out", "checked")
    assert code == 0
    assert "written: checked" in out
    (line,) = [line for line in out.splitlines() if line.startswith("refusal-in-front")]
    assert line.split()[1:4] == ["64", "96", "67%"]
    assert "depends on it" in line
    assert "warning" not in err
    summary = json.loads(Path("checked/summary.json").read_text())
    assert summary["modes"]["refusal-in-front"]["seen"] == 64
    about = json.loads(Path("checked/run.json").read_text())
    assert about["kind"] == "judge"
    assert about["about"]["command"] == ("moesteer judge check testbed-restricted --out checked")
    # Again: nothing is left to judge, and the same is said.
    again = run("judge", "check", "testbed-restricted", "--out", "checked")[1]
    assert again.splitlines()[1:] == out.splitlines()[1:]


def test_judge_check_with_a_model(run: Run):
    code, out, err = run("judge", "check", "testbed-fluency")
    assert code == 0
    assert "warning" not in err
    shares = {line.split()[0]: line.split()[3] for line in out.splitlines()[2:6]}
    assert shares == dict.fromkeys(["unchanged", "repetition", "word-salad", "empty"], "100%")


def test_judge_check_warns_of_a_blind_judge(run: Run):
    # A judge that calls everything an answer: the pattern matches any reply.
    text = (SHIPPED / "harmless-100.toml").read_text()
    blind = 'kind = "pattern"\npattern = ""\noutcome = "answer"\notherwise = "refusal"'
    card = text.replace('kind = "refusal"', blind).replace('"non-response"', '"refusal"')
    Path("blind.toml").write_text(card)
    gold = [{"prompt": f"ask {i}", "reply": "Wipe it well.", "outcome": "answer"} for i in range(9)]
    Path("gold.jsonl").write_text("".join(json.dumps(line) + "\n" for line in gold))
    code, out, err = run("judge", "check", "blind.toml", "--gold", "gold.jsonl")
    assert code == 0
    assert "unchanged" in out
    for mode in ("refusal-in-front", "empty"):
        assert f"its judge sees {mode} in 0 of 9, no better than a guess among 2 outcomes" in err


def test_judge_check_without_gold(refused: Run):
    said = refused("judge", "check", "mquake").err
    assert "give some with --gold FILE" in said
    assert "context, question, answer, reply, outcome" in said
    assert "nope.jsonl" in refused("judge", "check", "mquake", "--gold", "nope.jsonl").err


def test_judge_check_of_a_judge_that_can_not_be_had(refused: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MOESTEER_JUDGE_URL", raising=False)
    Path("gold.jsonl").write_text('{"prompt": "a", "reply": "b", "outcome": "fluent"}\n')
    said = refused("judge", "check", "fluency", "--gold", "gold.jsonl").err
    assert "MOESTEER_JUDGE_URL" in said


def test_judge_check_into_something_else(refused: Run):
    Path("full").mkdir()
    Path("full/x").write_text("x")
    assert "full holds x" in refused("judge", "check", "testbed-facts", "--out", "full").err
