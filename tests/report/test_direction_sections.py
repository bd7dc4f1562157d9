"""What the sections on directions say, and what their figures show where."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import (
    directed,
    direction_search_run,
    evaluate_run,
    profile,
    writers_run,
)

from moesteer.direction import Direction
from moesteer.directions.candidates import used, within_thresholds
from moesteer.engines.evidence import DirectionEvidence, LayerEvidence
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.report.blocks import Block, Curve, Dot, Figure, Label, Paragraph, Rect, Table
from moesteer.report.comparison_page import comparison_page
from moesteer.report.direction_figures import by_layer, layer_map
from moesteer.report.direction_search_page import direction_search_page
from moesteer.report.directions_section import direction_blocks
from moesteer.report.figures import Series
from moesteer.report.page import gather
from moesteer.report.sections import report_of
from moesteer.report.terminal import evidence_lines, print_text, profile_facts
from moesteer.report.verdict import verdicts


def blocks(runs: list[Path], title: str) -> tuple[Block, ...]:
    sections = report_of(gather(runs)).sections
    return next(section.blocks for section in sections if section.title == title)


def rows(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def tables(found: tuple[Block, ...] | list[Block]) -> list[Table]:
    return [block for block in found if isinstance(block, Table)]


def figures(found: tuple[Block, ...] | list[Block]) -> list[Figure]:
    return [block for block in found if isinstance(block, Figure)]


# -- which directions ----------------------------------------------------------------------------


def test_the_table_says_operation_place_layers_norm_and_tokens():
    vector = (3.0, 4.0, 0.0)
    every = Direction(
        vector, tuple((layer, place) for layer in range(3) for place in ("input", "mlp")), "ablate"
    )
    several = Profile(
        directions=(
            every,
            Direction(vector, ((2, "attention"),), coefficient=-0.5, window="prompt"),
            Direction(vector, ((3, "mlp"),), coefficient=30.0, expert=7, window="generation"),
        )
    )
    (table,) = tables(direction_blocks(several))
    assert rows(table) == [
        [
            "1",
            "ablated",
            "what enters the layer, what the feed-forward part writes",
            "0–2 (3)",
            "–",
            "5",
            "all",
        ],
        ["2", "added", "what attention writes", "2", "−0.5", "5", "of the prompt"],
        [
            "3",
            "added",
            "what the feed-forward part writes, weighted by expert 7",
            "3",
            "+30",
            "5",
            "generated",
        ],
    ]


def test_candidates_are_mapped_by_layer_and_position_with_what_is_used():
    profile = directed()
    assert used(profile) == [3]
    assert within_thresholds(profile) == [3]
    (figure,) = figures(direction_blocks(profile))
    assert [drawing.title for drawing in figure.drawings] == ["bypass", "induce", "KL"]
    bypass = figure.drawings[0]
    cells = {m.told.partition(":")[0]: m for m in bypass.marks if isinstance(m, Rect) and m.told}
    assert len(cells) == 4
    last, first = cells["layer 3, position -1"], cells["layer 3, position -2"]
    assert (last.style, last.share) == ("cold", 0.5)
    assert (first.style, first.share) == ("warm", 1.0)
    assert last.x == first.x
    assert last.y > first.y
    assert cells["layer 1, position -1"].x < last.x
    signs = [m for m in bypass.marks if isinstance(m, Label) and m.text == "+"]
    assert len(signs) == 1
    assert last.x < signs[0].x < last.x + last.width
    assert rows(figure.table)[0] == ["3", "−1", "19.1", "−1.5", "1", "0.05", "used"]
    # After it by bypass, the lowest first.
    assert [row[3] for row in rows(figure.table)[1:]] == ["1", "2", "3"]


def test_thresholds_that_are_not_known_outline_nothing():
    profile = directed()
    assert profile.evidence is not None
    unsaid = replace(profile, evidence=replace(profile.evidence, settings={}))
    assert within_thresholds(unsaid) == []
    assert within_thresholds(Profile()) == []
    assert used(Profile()) == []


def test_candidates_of_experts_are_a_table():
    found = direction_blocks(directed("own"))
    assert figures(found) == []
    _, table = tables(found)
    assert table.headings == ("layer", "expert", "position", "norm", "routing", "kept", "role")
    assert rows(table)[0][:3] == ["3", "1", "mean"]
    assert rows(table)[0][-1] == "used"
    assert [row[4] for row in rows(table)] == ["0.6", "0.2", "−0.1", "0.05"]


def test_a_map_of_a_large_model_fits_the_page():
    cells = {
        (layer, position): (float(layer - 30), f"layer {layer}")
        for layer in range(61)
        for position in range(-5, 0)
    }
    drawing = layer_map("KL", "below", "about", cells, outlined={(3, -1)})
    assert drawing.width < 700
    assert sum(isinstance(m, Rect) and m.style == "found" for m in drawing.marks) == 1
    numbers = [m.text for m in drawing.marks if isinstance(m, Label) and m.anchor == "middle"]
    assert numbers == [str(n) for n in range(0, 61, 4)]


def test_profiles_with_the_same_directions_or_candidates_are_shown_once(tmp_path: Path):
    directed().save(tmp_path / "one.safetensors")
    directed().save(tmp_path / "two.safetensors")
    replace(directed(), directions=()).save(tmp_path / "three.safetensors")
    found = gather([tmp_path / f"{name}.safetensors" for name in ("three", "one", "two")])
    assert len(found.directions) == 1
    assert found.directions[0].directions
    alone = gather([tmp_path / "three.safetensors"])
    assert len(alone.directions) == 1
    page = report_of(alone)
    assert page.title.startswith("three.safetensors")


# -- the evaluation ------------------------------------------------------------------------------


def test_the_proof_and_the_verdict_speak_of_directions(tmp_path: Path):
    run = evaluate_run(tmp_path / "run", steered=directed())
    (page,) = gather([run]).evaluations
    proof = next(t for t in tables(blocks([run], "Outcomes")) if t.caption.startswith("Proof"))
    assert proof.headings[:3] == ("arm", "directions", "tokens a layer")
    assert rows(proof)[0][1] == directed().directions[0].words
    silent = replace(
        page.comparison,
        differences=tuple(
            replace(d, difference=0.0, low=-0.1, high=0.1, p=1.0, holm=1.0)
            for d in page.comparison.differences
        ),
    )
    (found,) = verdicts(silent)
    assert "nothing was found beyond random directions:" in found.finding
    both = replace(profile(), directions=directed().directions, model=directed().model)
    run = evaluate_run(tmp_path / "both", steered=both)
    proof = next(t for t in tables(blocks([run], "Outcomes")) if t.caption.startswith("Proof"))
    assert proof.headings[:4] == ("arm", "activated", "deactivated", "directions")


def test_the_terminal_names_directions_in_the_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = evaluate_run(tmp_path / "run", steered=directed())
    (page,) = gather([run]).evaluations
    print_text(comparison_page(page.comparison))
    said = capsys.readouterr().out
    words = directed().directions[0].words
    line = f"fired: steered (arm steered): {words}; 99 tokens a place; the stream moved as it"
    assert line in said
    assert "activated" not in said


def test_three_outcomes_have_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = evaluate_run(tmp_path / "run", steered=directed())
    (page,) = gather([run]).evaluations
    asked, *others = page.comparison.tasks
    three = replace(asked, outcomes=("yes", "no", "neither"))
    shares = tuple(
        replace(s, outcomes={"yes": s.count, "no": 0, "neither": s.n - s.count})
        if s.task == asked.name
        else s
        for s in page.comparison.shares
    )
    comparison = replace(page.comparison, tasks=(three, *others), shares=shares)
    print_text(comparison_page(comparison))
    said = [line.split() for line in capsys.readouterr().out.split("\n")]
    assert ["outcomes", "of", "towns", "yes", "no", "neither"] in said
    assert ["unsteered", "50%", "0%", "50%"] in said
    (run / "summary.json").write_text(comparison.to_json())
    found = [t for t in tables(blocks([run], "Outcomes")) if t.caption.startswith("All outcomes")]
    assert [t.headings for t in found] == [("arm", "yes", "no", "neither")]
    assert rows(found[0])[1][0] == "steered"
    assert [cell.value for cell in found[0].rows[1][1:]] == [1.0, 0.0, 0.0]


def test_facts_of_directions_in_the_terminal(capsys: pytest.CaptureFixture[str]):
    print_text(profile_facts(directed()))
    said = capsys.readouterr().out
    assert f"direction  {directed().directions[0].words}" in said
    assert "a positive coefficient steers towards a" in said
    assert "found by   difference of means, at reply, of pairs.jsonl" in said
    assert "rule" not in said
    dense = directed().model
    assert dense is not None
    print_text(profile_facts(replace(directed(), model=replace(dense, layers=()))))
    assert "routing    none: a dense model" in capsys.readouterr().out


def test_evidence_of_both_kinds_is_a_line_each():
    def moved(layer: int, measured: float, expert: int | None = None) -> DirectionEvidence:
        return DirectionEvidence("p", layer, "mlp", expert, "add", 9, measured, 2.0)

    left = [
        DirectionEvidence("p", layer, "input", None, "ablate", 9, layer / 1000, 0.0)
        for layer in range(4)
    ]
    layer = LayerEvidence("p", 1, 8, {0: 8}, {})
    assert evidence_lines([layer, moved(1, 1.98), *left, moved(2, 2.01, 5)]) == [
        "fired: p: layers 1; 8 tokens each; activated always selected, deactivated never",
        "fired: p: moved the mlp of layer 1 by 1.98 of 2, expert 5 of layer 2 by 2.01 of 2;"
        " 9 tokens each",
        "fired: p: ablated at 4 places; 9 tokens each; at most 0.30% of a token left",
    ]
    assert evidence_lines([moved(3, 2.0)]) == [
        "fired: p: moved the mlp of layer 3 by 2 of 2; 9 tokens"
    ]


# -- the search ----------------------------------------------------------------------------------

SEARCH = "Which direction, and how strongly"


def test_the_search_shows_what_was_judged_beside_its_controls(tmp_path: Path):
    found = blocks([direction_search_run(tmp_path / "run")], SEARCH)
    said = [block.text for block in found if isinstance(block, Paragraph)]
    assert said[0].startswith(
        "Chosen on the dev prompts: +30× expert 1 of layer 3, mean over positions. 4 choices were"
    )
    assert said[1] == "In controls no choice kept to the limits (seed 1)."
    score, routing = figures(found)
    assert [row[:5] for row in rows(score.table)] == [
        ["unsteered", "unsteered", "−4.00", "0.000", "0\N{NARROW NO-BREAK SPACE}%"],
        ["+30× expert 1 of layer 3, mean over positions", "chosen", "+4.00", "0.200",
         "90\N{NARROW NO-BREAK SPACE}%"],
        ["+10× expert 1 of layer 3, mean over positions", "judged", "+1.00", "0.100",
         "60\N{NARROW NO-BREAK SPACE}%"],
        ["+30× expert 1 of layer 1, mean over positions", "best of a control", "−2.00", "0.000",
         "25\N{NARROW NO-BREAK SPACE}%"],
    ]  # fmt: skip
    assert score.table.headings[4:] == (
        "towns: yes", "towns: no", "towns: neither", "sums: yes", "sums: no", "kept",
    )  # fmt: skip
    styles = [m.style for m in score.drawings[0].marks if isinstance(m, Dot)]
    assert sorted(styles) == ["control", "plain", "ring", "ring", "target", "target", "tried"]
    assert "of 1 choices it was not" in score.caption
    # At the best choice's coefficient: experts 1 and 0 of layer 3, and 1 of layer 1 (a control).
    assert [row[:5] for row in rows(routing.table)] == [
        ["3", "0", "+20.0", "over", "+9.000"],
        ["3", "1", "+60.0", "over", "+8.000"],
        ["1", "1", "−10.0", "below", "+2.000"],
    ]


def test_a_search_of_the_stream_has_no_routing(tmp_path: Path):
    found = blocks([direction_search_run(tmp_path / "run", "residual")], SEARCH)
    assert len(figures(found)) == 1
    asked = blocks([tmp_path / "run"], "What was asked")
    (table,) = tables(asked)
    (row,) = [row for row in rows(table) if row[0] == "search on dev"]
    assert row[1] == (
        "“yes” on towns, towards A; sums ≥ 0.8; KL ≤ 1; coefficients 10, 30; 4 choices, 2 judged"
    )


def test_a_direction_search_brings_its_profile_and_its_test(tmp_path: Path):
    page = gather([direction_search_run(tmp_path / "run")])
    assert [p.name for p in page.directions] == ["best.safetensors"]
    assert len(page.evaluations) == 1
    assert [run.folder.name for run in page.runs] == ["run"]
    (search,) = page.direction_searches
    assert len(search.trials) == 6
    (tmp_path / "run" / "summary.json").write_text('{"schema": 3}')
    with pytest.raises(MoesteerError, match="is a direction search of format 3"):
        gather([tmp_path / "run"])


def test_the_terminal_shows_the_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (search,) = gather([direction_search_run(tmp_path / "run")]).direction_searches
    print_text(direction_search_page(search.result))
    said = capsys.readouterr().out
    assert "found: +30× expert 1 of layer 3, mean over positions; best.safetensors" in said
    assert (
        "stage 1: 4 choices, KL at most 1; stage 2: the 2 best, within: sums at least 80%" in said
    )
    assert "seed 0: +30× expert 1 of layer 1, mean over positions" in said
    assert "seed 1: nothing within the limits, of 1" in said
    assert "yes 18, no 1, neither 1" in said


# -- writers -------------------------------------------------------------------------------------


def test_who_writes_it_is_said_shown_and_listed(tmp_path: Path):
    found = blocks([writers_run(tmp_path / "run")], "Who writes it?")
    (said,) = [block.text for block in found if isinstance(block, Paragraph)]
    space = "\N{NARROW NO-BREAK SPACE}"
    assert said == (
        f"By what is written up to the input of layer 2, position −1: attention, 75{space}% of the"
        f" direction; the strongest single writer is attention of layer 1, 65{space}%. By steering:"
        " attention. Projected out of what attention writes, the log-odds of the behaviour change"
        " by −4.00 nats; out of what the feed-forward parts write, by −0.50. Both say the same."
    )
    (figure,) = figures(found)
    curves = [m for m in figure.drawings[0].marks if isinstance(m, Curve)]
    assert sorted(len(curve.points) for curve in curves) == [1, 2]  # nothing is shared here
    told = [m.told for m in figure.drawings[0].marks if isinstance(m, Dot)]
    assert "routed experts, layer 1: +2.5; most by expert 1: +3" in told
    listed = rows(figure.table)
    assert [row[0] for row in listed[:6]] == [
        "embedding",
        "all of attention",
        "all of routed experts",
        "all of shared experts, dense",
        "attention of layer 1",
        "expert 1 of layer 1",
    ]
    assert listed[-1][:2] == ["total", "+10"]
    (ablated,) = tables(found)
    assert rows(ablated)[1] == [
        "what attention writes", "+1.00", "+0.50", "+1.50", "−4.00", "−4.50", "−3.50",
    ]  # fmt: skip


def test_lines_over_layers_show_zero_and_stay_within_the_drawing():
    series = [
        Series("one", "target", tuple((float(n), n - 20.0, "") for n in range(40))),
        Series("other", "price", tuple((float(n), 19.0, "") for n in range(40))),
    ]
    drawing = by_layer("t", "a", series, "up")
    points = np.array([p for m in drawing.marks if isinstance(m, Curve) for p in m.points])
    assert (points >= 0).all()
    assert points[:, 0].max() < drawing.width
    assert points[:, 1].max() < drawing.height
    names = [m for m in drawing.marks if isinstance(m, Label) and m.style.startswith("name")]
    assert abs(names[0].y - names[1].y) >= 15  # both end at 19


def test_writers_alone_make_a_report(tmp_path: Path):
    page = report_of(gather([writers_run(tmp_path / "run")]))
    assert page.title == "Who writes residual.safetensors? (made/model)"
    titles = [section.title for section in page.sections]
    assert titles == ["Verdict", "What was asked", "Who writes it?", "How to get this again"]
