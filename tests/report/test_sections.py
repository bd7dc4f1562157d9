"""What the sections say: the right numbers in the right rows, and no more replies than wanted."""

from pathlib import Path

import pytest
from made_runs import all_runs, detectors_run, evaluate_run, judge_run, search_run, task

from moesteer.report.blocks import Block, Cell, Curve, Dot, Exchange, Figure, Table, number, signs
from moesteer.report.page import gather
from moesteer.report.sections import report_of


def blocks(runs: list[Path], title: str) -> tuple[Block, ...]:
    sections = report_of(gather(runs)).sections
    return next(section.blocks for section in sections if section.title == title)


def rows(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def table(found: tuple[Block, ...], caption: str) -> Table:
    return next(b for b in found if isinstance(b, Table) and b.caption.startswith(caption))


def figure(found: tuple[Block, ...], title: str) -> Figure:
    return next(b for b in found if isinstance(b, Figure) and b.title.startswith(title))


def test_the_evidence_holds_every_difference_of_a_target_and_one_of_a_price(tmp_path: Path):
    found = blocks([evaluate_run(tmp_path / "run")], "Outcomes")
    there = rows(table(found, "What the verdict stands on"))
    assert [row[:3] for row in there] == [
        ["towns", "steered less unsteered", "+50.0"],
        ["towns", "steered less random", "+50.0"],
        ["towns", "steered less bottom", "+50.0"],
        ["sums", "steered less unsteered", "+0.0"],
    ]
    everything = rows(table(found, "All differences"))
    # 4 pools against the unsteered arm, the steered arm against 3; two tasks
    assert len(everything) == 14


def test_the_proof_of_firing_names_every_steered_arm(tmp_path: Path):
    found = blocks([evaluate_run(tmp_path / "run")], "Outcomes")
    there = rows(table(found, "Proof"))
    assert [row[0] for row in there] == ["steered", "reversed", "random 0", "random 1", "bottom"]
    assert there[0][1:] == ["layer 1: 2", "layer 3: 0", "99", "every token", f"arm {there[0][0]}"]


def test_experts_stand_by_rank_with_their_role(tmp_path: Path):
    found = blocks(all_runs(tmp_path), "Which experts")
    there = rows(figure(found, "Score against certainty").table)
    assert there[0][:4] == ["1", "1", "2", "+0.800"]
    assert there[0][-1] == "activated"
    assert [row[-1] for row in there if row[-1]] == ["activated", "deactivated"]
    grid = rows(figure(found, "Scores of all experts").table)
    assert grid == [
        ["1", "+0.00", "+0.10", "+0.80", "−0.10"],
        ["3", "−0.40", "+0.00", "+0.20", "+0.00"],
    ]


def test_the_dose_curve_runs_from_the_unsteered_model_over_all_doses(tmp_path: Path):
    found = blocks([search_run(tmp_path / "run")], "How many experts")
    dose = figure(found, "Dose curve")
    assert [row[2] for row in rows(dose.table)] == ["0", "1", "2", "4"]
    assert [row[-1] for row in rows(dose.table)] == ["yes", "yes", "yes", "breaks a limit"]
    marks = dose.drawings[0].marks
    prices, target = (mark for mark in marks if isinstance(mark, Curve))
    assert (target.style, prices.style) == ("target", "price price1")
    assert [y for _, y in target.points] == [162, 136.4, 59.6, 34]  # 0.5, 0.6, 0.9, 1 on 290 … 34
    random = [m for m in marks if isinstance(m, Dot) and m.style == "control"]
    assert [m.told.partition(":")[0] for m in random] == ["search-matched random experts, towns"]


def test_controls_that_found_nothing_are_told(tmp_path: Path):
    found = blocks([search_run(tmp_path / "run")], "How many experts")
    assert any("no choice kept to the limits (seed 1)" in str(block) for block in found)


def test_the_front_stands_out_from_other_trials_and_controls(tmp_path: Path):
    found = blocks([search_run(tmp_path / "run")], "How many experts")
    front = figure(found, "Target against price")
    styles = [m.style for m in front.drawings[0].marks if isinstance(m, Dot)]
    assert styles.count("control") == 1
    assert styles.count("target") == 4
    assert styles.count("ring") == 2
    assert len(front.table.rows) == 5


def test_detectors_stand_beside_knock_out(tmp_path: Path):
    found = blocks([detectors_run(tmp_path / "run")], "Detectors against knock-out")
    assert rows(table(found, "Agreement")) == [
        ["knock-out", "+1.00", "+1.00", "2"],
        ["risk difference (top-k)", "−1.00", "−1.00", "2"],
        ["flat", "–", "–", "2"],
    ]
    scatter = figure(found, "Scores against")
    assert len(scatter.drawings) == 2  # every detector but knock-out itself
    assert rows(scatter.table)[1] == ["1", "1", "+2.000", "−4.000", "+0.000"]


def test_judges_stand_beside_their_checks(tmp_path: Path):
    found = blocks([evaluate_run(tmp_path / "run"), judge_run(tmp_path / "judge")], "Judges")
    there = rows(table(found, "Verdicts"))
    # 20 items × 6 arms: half of them yes, in the steered arm all
    assert there[0] == [
        "towns", "contains", "yes 70, no 50", "0", "right on 8 of 8 known replies; see below"
    ]  # fmt: skip
    seen = rows(table(found, "What the judges see"))
    assert [row[1] for row in seen] == ["unchanged", "negated"]
    assert [row[-1] for row in seen] == ["", "no better than a guess"]
    given = rows(table(found, "Outcomes that judges gave"))
    assert given == [
        ["towns", "yes", "yes", "8"],
        ["towns", "no", "yes", "6"],
        ["towns", "no", "no", "2"],
    ]


@pytest.mark.parametrize(("seen", "warned"), [(8, False), (5, False), (4, True), (0, True)])
def test_a_judge_at_chance_or_below_is_warned_of(tmp_path: Path, seen: int, warned: bool):
    runs = [evaluate_run(tmp_path / "run"), judge_run(tmp_path / "judge", seen=seen)]
    said = [block for block in blocks(runs, "Verdict") if "negated" in str(block)]
    assert bool(said) is warned


def test_outcomes_are_counted_before_and_after(tmp_path: Path):
    found = blocks([evaluate_run(tmp_path / "run")], "Replies before and after")
    assert rows(table(found, "Outcomes before")) == [
        ["towns", "yes", "yes", "10"],
        ["towns", "no", "yes", "10"],
        ["sums", "yes", "yes", "10"],
        ["sums", "no", "no", "10"],
    ]


def test_of_replies_a_few_are_shown_and_only_those_that_changed(tmp_path: Path):
    found = blocks([evaluate_run(tmp_path / "run")], "Replies before and after")
    shown = [block for block in found if isinstance(block, Exchange)]
    assert [block.prompt for block in shown] == ["towns 1?", "towns 3?", "towns 5?"]
    assert [outcome for _, _, outcome in shown[0].replies] == ["no", "yes"]


def test_several_evaluations_are_said_not_to_be_adjusted_for(tmp_path: Path):
    one = [evaluate_run(tmp_path / "one")]
    assert "evaluations here" not in str(blocks(one, "Verdict"))
    two = [*one, evaluate_run(tmp_path / "two", tasks=[task(), task("sums", "price")])]
    assert "not over the 2 evaluations here" in str(blocks(two, "Verdict"))


@pytest.mark.parametrize(
    ("written", "typeset"), [("-0.00", "0.00"), ("+0", "+0"), ("-1.5", "−1.5"), ("1e-05", "1e−05")]
)
def test_minus_signs_are_minus_signs(written: str, typeset: str):
    assert signs(written) == typeset


def test_a_number_is_sorted_by_its_value():
    assert number(-0.25, "+.1f") == Cell("−0.2", -0.25)
    assert number(None) == Cell("–")
