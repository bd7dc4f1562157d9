"""Figures: marks stand where a ruler would put them."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import comparison, evaluate_run, facts, profile, task

from moesteer.evaluation.comparison import Comparison
from moesteer.model_facts import LayerShape
from moesteer.report.blocks import Curve, Dot, Label, Line, Rect
from moesteer.report.figures import (
    Scale,
    Series,
    curves,
    heat_map,
    outcome_dots,
    scatter,
    volcano,
)

THIN = "\N{NARROW NO-BREAK SPACE}"


def test_a_scale_maps_its_ends_and_its_middle():
    up = Scale(-1, 1, 300, 100)
    assert [up(-1), up(0), up(1), up(0.5)] == [300, 200, 100, 150]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_within(low: float, width: float):
    scale = Scale(low, low + width, 0, 100)
    span = scale.high - scale.low
    if span < 1e-9 * abs(low):
        return  # too near for floats to tell apart
    ticks = scale.ticks
    assert 2 <= len(ticks) <= 11
    slack = 1e-6 * span + 1e-11
    assert all(low - slack <= tick <= scale.high + slack for tick in ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 10, [0, 2, 4, 6, 8, 10]), (-1, 3, [-1, 0, 1, 2, 3])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]):
    assert Scale(low, high, 0, 1).ticks == ticks


# -- heat map ------------------------------------------------------------------------------------


def test_heat_map_cells_stand_at_layer_and_expert():
    drawing = heat_map(profile())
    cells = [mark for mark in drawing.marks if isinstance(mark, Rect) and mark.told]
    assert len(cells) == 8
    # 4 experts: cells of 34 px from x = 46, rows from y = 24
    assert [(c.x, c.y) for c in cells[:2]] == [(46, 24), (80, 24)]
    strongest = next(c for c in cells if c.told.startswith("layer 1, expert 2:"))
    assert (strongest.x, strongest.y, strongest.width) == (46 + 2 * 34, 24, 33)
    assert (strongest.style, strongest.share) == ("warm", 1.0)
    blue = next(c for c in cells if c.told.startswith("layer 3, expert 0:"))
    assert (blue.x, blue.y, blue.style, blue.share) == (46, 24 + 34, "cold", 0.5)
    zero = next(c for c in cells if c.told.startswith("layer 3, expert 1:"))
    assert zero.share == 0


def test_heat_map_says_score_interval_certainty_rates_counts_and_role():
    told = next(
        mark.told
        for mark in heat_map(profile()).marks
        if isinstance(mark, Rect) and "expert 2: +0.800" in mark.told
    )
    # rates 0.5 ± 0.4 of 100 and of 200 tokens
    assert told == (
        "layer 1, expert 2: +0.800 (+0.700 … +0.900); q < 0.001;"
        f" in A 90{THIN}% (90 of 100), in B 10{THIN}% (20 of 200); activated"
    )


def test_heat_map_outlines_what_was_found_and_marks_what_is_steered():
    drawing = heat_map(profile())
    outlined = [m for m in drawing.marks if isinstance(m, Rect) and m.style == "found"]
    assert [(m.x, m.y) for m in outlined] == [(46 + 68 + 1, 25), (47, 59)]  # q 0.0004 and 0.04
    signs = [(m.x, m.text) for m in drawing.marks if isinstance(m, Label) and "on" in m.style]
    assert signs == [(46 + 68 + 16.5, "+"), (46 + 16.5, "−")]


def test_experts_that_a_narrow_layer_lacks_are_neither_drawn_nor_counted():
    narrow = replace(facts(), layers=(LayerShape(1, 4, 2), LayerShape(3, 3, 2)))
    made = profile(narrow)
    assert made.scores is not None
    for key, array in vars(made.scores).items():
        array[1, 3] = 99 if key == "value" else 0  # certain, and larger than all others
    cells = [m for m in heat_map(made).marks if isinstance(m, Rect) and m.told]
    assert len(cells) == 7
    assert max(cell.share or 0 for cell in cells) == 1
    drawing = volcano(made)
    assert drawing.about.startswith("2 experts have q < 0.05")
    dots = [m for m in drawing.marks if isinstance(m, Dot) and m.told]
    assert len(dots) == 7
    assert min(dot.y for dot in dots) == pytest.approx(300 - 272 * 4 / 4.2, abs=0.01)


# -- volcano -------------------------------------------------------------------------------------


def test_volcano_dots_stand_at_score_and_log_p():
    dots = [m for m in volcano(profile()).marks if isinstance(m, Dot) and m.told]
    strongest = next(m for m in dots if m.told.startswith("layer 1, expert 2:"))
    # x: −0.864 … 0.864 on 46 … 560; y: 0 … 1.05 × 4 on 300 … 28
    assert strongest.x == pytest.approx(46 + 514 * (0.8 + 0.864) / 1.728, abs=0.01)
    assert strongest.y == pytest.approx(300 - 272 * 4 / 4.2, abs=0.01)
    assert strongest.style == "warm"
    unsure = next(m for m in dots if m.told.startswith("layer 1, expert 1:"))
    assert unsure.style == "unsure"
    assert unsure.y == pytest.approx(300 - 272 * -math.log10(0.5) / 4.2, abs=0.01)


def test_volcano_rings_what_is_steered():
    marks = volcano(profile()).marks
    rings = [(m.x, m.y) for m in marks if isinstance(m, Dot) and m.style == "ring"]
    dots = {m.told[:17]: (m.x, m.y) for m in marks if isinstance(m, Dot) and m.told}
    assert rings == [dots["layer 1, expert 2"], dots["layer 3, expert 0"]]


# -- outcomes ------------------------------------------------------------------------------------


def test_outcome_dots_stand_at_their_shares(tmp_path):
    made = Comparison.from_json((evaluate_run(tmp_path / "run") / "summary.json").read_text())
    marks = outcome_dots(made, made.tasks[0]).marks
    dots = {m.told.partition(":")[0]: m for m in marks if isinstance(m, Dot)}
    # shares 0 … 1 on 112 … 316; a row of 22 px a pool from y = 50
    assert (dots["unsteered"].x, dots["unsteered"].y) == (112 + 204 * 0.5, 50)
    assert (dots["steered"].x, dots["steered"].y) == (316, 72)
    assert (dots["random 0"].y, dots["random 1"].y) == (116 - 2.5, 116 + 2.5)
    assert dots["steered"].told.endswith("20 of 20")
    spans = [m for m in marks if isinstance(m, Line) and m.style == "span steered"]
    share = made.share("towns", "steered")
    assert spans[0].x1 == pytest.approx(112 + 204 * share.low, abs=0.01)


def test_arms_without_judged_replies_have_no_dot():
    made = comparison({task(): {}}, seeds=())
    assert not [m for m in outcome_dots(made, made.tasks[0]).marks if isinstance(m, Dot)]


# -- curves and scatter --------------------------------------------------------------------------


def test_curves_run_through_their_points():
    line = Series("towns", "target", ((0, 0.5, "none"), (10, 1.0, "ten")))
    drawing = curves("t", "a", [line], ("experts", "left", "right"), marked=5)
    (curve,) = [m for m in drawing.marks if isinstance(m, Curve)]
    # 0 … 10.4 on 46 … 470; shares 0 … 1 on 290 … 34
    assert curve.points == ((46, 162), (pytest.approx(46 + 424 / 1.04, abs=0.01), 34))
    (before,) = [m for m in drawing.marks if isinstance(m, Line) and m.style == "before"]
    assert before.x1 == before.x2 == pytest.approx(46 + 212 / 1.04, abs=0.01)


def test_names_of_curves_that_end_together_do_not_overlap():
    lines = [Series(name, "price", ((0, 1.0, ""), (1, 1.0, ""))) for name in ("a", "b", "c")]
    drawing = curves("t", "a", lines, ("experts", "left", "right"))
    places = [m.y for m in drawing.marks if isinstance(m, Label) and m.style.startswith("name")]
    assert sorted(b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)) == [
        15,
        15,
    ]


def test_scatter_has_room_around_its_points_and_lines_at_zero():
    points = Series("x", "target", ((-1, 0, "left"), (1, 10, "right")))
    drawing = scatter("t", "a", [points], ("x", "y"), rings=((1, 10, "best"),), width=560)
    left, right, ring = (m for m in drawing.marks if isinstance(m, Dot))
    # −1.12 … 1.12 on 46 … 546; −0.6 … 10.6 on 280 … 28
    assert left.x == pytest.approx(46 + 500 * 0.12 / 2.24, abs=0.01)
    assert right.y == pytest.approx(280 - 252 * 10.6 / 11.2, abs=0.01)
    assert (ring.x, ring.y, ring.style) == (right.x, right.y, "ring")
    zero = [m for m in drawing.marks if isinstance(m, Line) and m.style == "zero"]
    assert [m.x1 for m in zero if m.x1 == m.x2] == [296]
    assert [m.y1 for m in zero if m.y1 == m.y2] == [pytest.approx(280 - 252 * 0.6 / 11.2, abs=0.01)]


def test_scatter_of_a_single_point_has_a_width():
    drawing = scatter("t", "a", [Series("x", "target", ((1, 1, "it"),))], ("x", "y"))
    (dot,) = [m for m in drawing.marks if isinstance(m, Dot)]
    assert (dot.x, dot.y) == (296, 154)
