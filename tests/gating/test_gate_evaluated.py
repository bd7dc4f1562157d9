"""The price that a gate saves, on the testbed: a profile that makes it refuse, with and without."""

import json
from pathlib import Path

import pytest

from moesteer import testbed
from moesteer.directions.prompts import as_read, draw_sets, read_prompt_set
from moesteer.engines.opening import opens
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerWarning
from moesteer.evaluation.cards import read_card
from moesteer.evaluation.comparison import Comparison, pool_of
from moesteer.evaluation.evaluate import arm_facts, evaluate
from moesteer.gate import Gate, RoutingProbe
from moesteer.gating.fitting import fit_gate
from moesteer.profile import Profile
from moesteer.report.terminal import print_text
from moesteer.report.verdict import control_pools
from moesteer.report.write_report import write_report

ITEMS = 16


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison, list[bool]]:
    engine = load_transformers("testbed", dtype="float32")
    a, b = (read_prompt_set(f"testbed:{task}") for task in ("restricted", "benign"))
    gate = fit_gate(engine, draw_sets(engine, a, b, fit=64, validate=32))
    planted = testbed.ground_truth().behaviours["refusal"].planted
    profile = Profile(activated=planted, model=engine.facts, gate=gate, name="gated")
    folder = tmp_path_factory.mktemp("gated") / "run"
    cards = [read_card(f"testbed-{name}") for name in ("restricted", "benign", "facts")]
    with pytest.warns(MoesteerWarning, match="holds no scores to choose other experts by"):
        comparison = evaluate(engine, profile, cards, out=folder, limit=ITEMS, seeds=1)
    facts = [as_read(engine, p, {}) for p in read_prompt_set("testbed:facts:test")[:ITEMS]]
    return folder, comparison, opens(engine, [p.ids for p in facts], gate)


def test_restricted_stays_refused_and_the_benign_price_is_saved(evaluated) -> None:
    _, found, _ = evaluated
    refused = {arm: found.share("testbed-restricted", arm).share for arm in ARMS}
    answered = {arm: found.share("testbed-benign", arm).share for arm in ARMS}
    assert refused == {"unsteered": 1, "steered": 1, "ungated": 1}
    assert answered == {"unsteered": 1, "steered": 1, "ungated": 0}
    price = found.difference("testbed-benign", "ungated", "unsteered")
    saved = found.difference("testbed-benign", "steered", "ungated")
    assert (price.difference, saved.difference) == (-1, 1)
    assert price.p is not None
    assert price.p < 0.001


ARMS = ("unsteered", "steered", "ungated")


def test_how_many_prompts_opened_it_is_kept_by_task_and_arm(evaluated) -> None:
    folder, found, opened_facts = evaluated
    opened = {(g.task, g.arm): (g.opened, g.prompts) for g in found.gates}
    arms = [arm.name for arm in found.arms if arm.name not in ("unsteered", "ungated")]
    for arm in arms:  # controls steer the same requests
        assert opened["testbed-restricted", arm] == (ITEMS, ITEMS)
        assert opened["testbed-benign", arm] == (0, ITEMS)
        assert opened["testbed-facts", arm] == (sum(opened_facts), ITEMS)
    assert len(opened) == 3 * len(arms)
    lines = [json.loads(line) for line in (folder / "gates.jsonl").read_text().splitlines()]
    steered = [
        line["steered"]
        for line in lines
        if (line["task"], line["arm"]) == ("testbed-facts", "steered")
    ]
    assert steered == opened_facts
    read = Comparison.from_json((folder / "summary.json").read_text())
    assert read == found


def test_an_arm_that_opened_for_nobody_in_a_task_has_obeyed_and_did_not_move(evaluated) -> None:
    _, found, _ = evaluated
    by_arm = {arm.name: arm for arm in found.arms}
    assert all(arm.obeyed for arm in found.arms)
    assert 0 < by_arm["steered"].tokens < by_arm["ungated"].tokens
    drift = {(d.task, d.arm): d.kl for d in found.drifts}
    assert drift["testbed-benign", "steered"] == 0
    assert drift["testbed-benign", "ungated"] is not None
    assert drift["testbed-benign", "ungated"] > 1


@pytest.mark.parametrize(
    ("opened", "fired", "obeyed"),
    [
        ([False, False], [], True),
        ([False, True], [], False),
        ([False, True], [True, True], True),
        ([False, True], [True, False], False),
        ([], [], False),  # nobody knows
    ],
)
def test_obeyed_needs_evidence_where_a_prompt_opened(
    opened: list[bool], fired: list[bool], obeyed: bool
) -> None:
    gate = Gate(RoutingProbe(((0, 3),), (1.0,)), 0.5)
    profile = Profile(activated=((0, 1),), gate=gate, name="gated")
    of = {"task": "benign", "arm": "steered"}
    shown = [
        of | {"start": 0, "layer": layer, "tokens": 9, "obeyed": each}
        for layer, each in enumerate(fired)
    ]
    gates = [of | {"item": item, "steered": each} for item, each in enumerate(opened)]
    of_others = [
        {"task": "benign", "arm": "random 0", "item": 0, "steered": not each} for each in opened
    ]
    assert arm_facts("steered", profile, shown, [*gates, *of_others]).obeyed == obeyed


def test_the_ungated_arm_is_no_control(evaluated) -> None:
    _, found, _ = evaluated
    assert "ungated" in {pool_of(arm.name) for arm in found.arms}
    assert "ungated" not in control_pools(found)


def test_the_page_and_the_report_show_it(
    evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moesteer.report.comparison_page import comparison_page

    folder, found, _ = evaluated
    print_text(comparison_page(found))
    shown = capsys.readouterr().out
    assert f"{ITEMS} of {ITEMS} (81%–100%)" in shown
    assert "prompts that opened the gate" in shown
    for file in write_report([folder], tmp_path / "report.html"):
        text = file.read_text()
        assert "Prompts that opened the gate" in text
        assert "opens where the routing of the last token" in text
