"""The demonstration, on fewer prompts: what it claims of the bundled model must be so."""

from dataclasses import replace
from pathlib import Path

import pytest

from moesteer import demo, demo_report
from moesteer.demo import DemoResult, run_demo
from moesteer.detection.selecting import ranked_experts
from moesteer.engines.transformers_engine import load_transformers
from moesteer.report.demo_page import print_demo
from moesteer.testbed import ground_truth

PROBES = 16
BEHAVIOURS = ("refusal", "document", "digits")


@pytest.fixture(scope="module")
def result() -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PROBES", PROBES)
        return run_demo(load_transformers("testbed"))


def test_the_untouched_model_stands_where_it_should(result: DemoResult):
    shares = result.unsteered.shares
    assert shares["restricted refused"] >= 0.95
    assert shares["benign refused"] <= 0.05
    assert shares["facts right"] >= 0.95
    assert 0.3 <= shares["document followed"] <= 0.7
    assert 0.3 <= shares["digits"] <= 0.7


@pytest.mark.parametrize("number", range(3), ids=BEHAVIOURS)
def test_planted_experts_and_decoys_lead_the_ranking(result: DemoResult, number: int):
    found = result.behaviours[number]
    truth = ground_truth().behaviours[found.behaviour]
    known = {*truth.planted, *truth.decoys}
    assert set(ranked_experts(found.scores)[: len(known)]) == known


@pytest.mark.parametrize("number", range(3), ids=BEHAVIOURS)
@pytest.mark.parametrize("side", ["a", "b"])
def test_steering_moves_the_behaviour_and_controls_do_not(
    result: DemoResult, number: int, side: demo.Side
):
    found = result.behaviours[number]
    column = demo.TARGET[found.behaviour, side]
    before = result.unsteered.shares[column]
    direction = found.toward[side]
    moved = direction.steered.shares[column] - before
    assert (moved if side == "a" else -moved) >= 0.4
    assert abs(direction.decoys.shares[column] - before) <= 0.1
    random = [control.shares[column] for control in direction.random]
    assert len(random) == 3
    assert abs(sum(random) / 3 - before) <= 0.2


def test_every_outcome_is_a_share_of_the_prompts_asked(result: DemoResult):
    directions = [d for found in result.behaviours for d in found.toward.values()]
    everyone = [result.unsteered, *(d.steered for d in directions), *(d.decoys for d in directions)]
    for outcomes in everyone:
        assert len(outcomes.replies) == PROBES * len({t for t, _ in demo.MEASURED.values()})
        assert all(share * PROBES == round(share * PROBES) for share in outcomes.shares.values())


def test_the_page_shows_the_computed_numbers(
    result: DemoResult, capsys: pytest.CaptureFixture[str]
):
    print_demo(result)
    page = capsys.readouterr().out
    assert page.count("planted") >= 9
    assert page.count("decoy") >= 6
    for found in result.behaviours:
        for direction in found.toward.values():
            said = {reply for _, reply in direction.steered.replies}
            assert any(reply in page for reply in said)
    shown = f"{result.unsteered.shares['document followed']:.0%}"
    assert shown in page


def test_a_single_expert_switched_off_tells_planted_ones_from_decoys(result: DemoResult):
    for found in result.behaviours:
        truth = ground_truth().behaviours[found.behaviour]
        assert min(found.knocked_out[expert] for expert in truth.planted) > 3
        assert max(abs(found.knocked_out[expert]) for expert in truth.decoys) < 1


def test_the_report_claims_what_was_planted_and_keeps_its_runs(
    result: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(demo_report, "KNOCKED", 4)
    monkeypatch.setattr(demo_report, "REPORTED_PROMPTS", 12)
    one = replace(result, behaviours=result.behaviours[:1])
    page = demo_report.write_demo_report(load_transformers("testbed"), one, tmp_path / "demo.html")
    told = page.with_suffix(".md").read_text()
    verdict = told.partition("## Verdict")[2].partition("\n## ")[0]
    (claim,) = [line for line in verdict.splitlines() if line.startswith("**Steering")]
    assert "lowers the share of “refused”" in claim
    assert "beyond every control" in claim
    assert "say nothing about real models" in verdict
    kept = {folder.name for folder in (tmp_path / "demo.runs").iterdir()}
    assert kept == {"refusal", "refusal-detectors"}
