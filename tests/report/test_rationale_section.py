"""How rationales are shown: what stands where, what is greyed, and what a text's words bear."""

import json
from dataclasses import asdict, replace
from functools import cache
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_rationales import MARKED, TEXTS, finetune_run, rationale_run, readings
from made_runs import facts
from rich.console import Console, RenderableType
from rich.text import Text

from moesteer.errors import MoesteerError
from moesteer.rationale.summary import Summary, summarise
from moesteer.report.blocks import (
    Block,
    Curve,
    Dot,
    Drawing,
    Figure,
    Label,
    Line,
    Paragraph,
    Report,
    Section,
    Shaded,
    Table,
    Warn,
)
from moesteer.report.finetune_section import finetune_blocks
from moesteer.report.html import html_of
from moesteer.report.markdown import escaped, markdown_of
from moesteer.report.page import Rationales, gather
from moesteer.report.rationale_figures import method_dots, share_curves, spread, styles_of
from moesteer.report.rationale_page import finetune_page, means_table, rationale_page
from moesteer.report.rationale_section import rationale_blocks
from moesteer.report.sections import report_of
from moesteer.runs import Run


@cache
def run(*arms: str, right: float = 0.8) -> Rationales:
    made = readings(arms=arms or ("unsteered",), right=right)
    return Rationales(Run(Path("made"), "rationale", {}, {}), summarise(made), made)


@cache
def blocks(*arms: str, right: float = 0.8) -> list[Block]:
    return rationale_blocks(run(*arms, right=right))


def tables(found: list[Block]) -> dict[str, Table]:
    """Tables, also those of figures, by the first words of their captions."""
    plain = [block for block in found if isinstance(block, Table)]
    drawn = [block.table for block in found if isinstance(block, Figure)]
    return {table.caption.partition(":")[0].partition(",")[0]: table for table in (*plain, *drawn)}


def column(table: Table, heading: str) -> dict[str, str]:
    place = table.headings.index(heading)
    return {row[0].text: row[place].text for row in table.rows}


def dots(drawing: Drawing) -> dict[str, Dot]:
    return {mark.told: mark for mark in drawing.marks if isinstance(mark, Dot)}


def printed(page: RenderableType) -> str:
    console = Console(width=220, file=StringIO())
    with console.capture() as capture:
        console.print(page)
    return capture.get()


# -- the section ---------------------------------------------------------------------------------


def test_accuracy_and_labels_stand_first():
    first, accuracy, labels = blocks()[:3]
    assert isinstance(first, Paragraph)
    assert isinstance(accuracy, Table)
    assert isinstance(labels, Table)
    (arm,) = run().summary.arms
    assert first.text.startswith(f"The label is right on {arm.right} of 30 instances")
    assert [cell.value for cell in accuracy.rows[0][1:3]] == [30, pytest.approx(arm.right / 30)]
    assert column(labels, "people") == dict.fromkeys(arm.gold, "10")
    assert column(labels, "unsteered") == {k: str(n) for k, n in arm.predicted.items()}


def test_methods_stand_above_the_random_units_of_their_count():
    table = tables(blocks())["Alignment with people"]
    assert [row[0].text for row in table.rows] == [
        "attention-mean",
        "saliency-l2",
        "input-x-gradient",
        "integrated-gradients",
        "occlusion",
        "gate-x-gradient",
        "random",
        "unbound",
        "random for unbound",
    ]
    assert table.apart == {6, 8}
    assert html_of(report(run())).count('<tr class="apart">') == 2 * 3
    mean = run().summary.mean("unsteered", "occlusion", "f1")
    assert mean is not None
    cell = table.rows[4][2]
    assert cell.value == mean.value
    assert cell.text.replace("\N{NARROW NO-BREAK SPACE}", "") == (
        f"{mean.value:.2f} ({mean.low:.2f}…{mean.high:.2f})"
    )
    assert column(table, "AUPRC")["unbound"] == "–"  # it names words and scores none


def report(made: Rationales) -> Report:
    return Report("made", (Section("Rationales", tuple(rationale_blocks(made))),))


def test_flip_rates_of_a_model_that_guesses_are_greyed_with_the_reason():
    sure, guessed = blocks(), blocks(right=0.2)
    assert not [block for block in sure if isinstance(block, Warn)]
    (warning,) = [block for block in guessed if isinstance(block, Warn)]
    assert "flip rates mean little and are greyed" in warning.text
    assert "always saying" in warning.text
    for found, grey in ((sure, False), (guessed, True)):
        table = tables(found)["Faithfulness"]
        for row in table.rows:
            pale = dict(zip(table.headings, (cell.pale for cell in row), strict=True))
            assert {name for name, is_pale in pale.items() if is_pale} == (
                {"flip rate", "where right", "where wrong"} if grey else set()
            )
    written = report(run(right=0.2))
    assert '<td class="number pale"' in html_of(written)
    flip = column(tables(guessed)["Faithfulness"], "flip rate")["occlusion"]
    assert f"| *{escaped(flip)}* |" in markdown_of(written)
    answer = guessed[0]
    assert isinstance(answer, Paragraph)
    assert "flip" not in answer.text


def test_steering_is_a_table_of_its_own_and_controls_have_changes_only():
    found = tables(blocks("unsteered", "steered", "random 0", "random 1"))
    table = found["Steered less unsteered"]
    assert table.headings == ("method", "F1", "flip rate", "in premise", "in hypothesis")
    change = run("unsteered", "steered", "random 0", "random 1").summary.change(
        "f1", "occlusion", "steered", "unsteered"
    )
    assert change is not None
    assert table.rows[4][1].value == change.difference
    arms = {row[0].text for row in found["Every change from arm to arm"].rows}
    assert arms == {"steered − unsteered", "random − unsteered", "steered − random"}
    assert not [caption for caption in found if "random 0" in caption]
    assert "Steered less unsteered" not in tables(blocks())


def test_differences_are_set_against_random_units_of_equal_count():
    table = tables(blocks())["Each method less as many random units"]
    against = {(row[0].text, row[1].text) for row in table.rows}
    assert ("occlusion", "random") in against
    assert ("unbound", "random for unbound") in against
    assert len(against) == 7
    others = tables(blocks())["Methods against each other"]
    assert not {row[1].text for row in others.rows} & {"random", "random for unbound"}


def test_what_the_model_named_is_counted():
    table = tables(blocks())["Words that the model named"]
    (row,) = table.rows
    named = [reading.named["unbound"] for reading in run().readings]
    assert [cell.value for cell in row[2:]] == [30, 0, 1, 2, sum(n.words for n in named), 30, 30, 0]


# -- texts ---------------------------------------------------------------------------------------


def texts_of(found: list[Block]) -> list[Shaded]:
    return [block for block in found if isinstance(block, Shaded)]


def test_the_first_texts_labelled_rightly_and_wrongly_are_shown():
    shown = [text.title for text in texts_of(blocks())]
    right = [r for r in run().readings if r.predicted == r.label][:2]
    wrong = [r for r in run().readings if r.predicted != r.label][:2]
    assert [title.partition(": ")[0] for title in shown] == [r.source for r in (*right, *wrong)]
    assert shown[0].endswith(", right")
    assert shown[2].endswith(f", wrong: {wrong[0].label}")


def test_words_bear_scores_and_marks():
    reading = run().readings[0]
    text = texts_of(blocks())[0]
    assert next(name for name, _ in text.lines) == "occlusion"
    assert "unbound" in dict(text.lines)
    for method, words in text.lines:
        assert "".join(word.text for word in words) == "premise: {}\nhypothesis: {}".format(
            *TEXTS[0]
        )
        units = [word for word in words if word.told]
        assert {word.text for word in units if word.human} == MARKED & {w.text for w in units}
        chosen = {n for n, word in enumerate(units) if word.chosen}
        assert chosen == set(reading.choices[method].units)
        if method in reading.scores:
            scores = reading.scores[method]
            largest = max(map(abs, scores))
            for word, score in zip(units, scores, strict=True):
                assert word.style == ("warm" if score >= 0 else "cold")
                assert word.share == pytest.approx(abs(score) / largest, abs=0.001)
                assert word.told.startswith(f"{word.text}: ")
        else:
            assert {word.share for word in units if not word.chosen} == {0.0}


def test_a_long_text_gives_way_to_a_shorter_one():
    made = run()
    units = made.readings[0].units * 20
    long = replace(made.readings[0], units=units)
    found = rationale_blocks(replace(made, readings=[long, *made.readings[1:]]))
    assert long.source not in [text.title.partition(": ")[0] for text in texts_of(found)]


def test_one_text_has_no_name_and_two_arms_have_a_line_each():
    made = run("unsteered", "steered")
    lines = dict(texts_of(rationale_blocks(made))[0].lines)
    assert list(lines)[:2] == ["occlusion, unsteered", "occlusion, steered"]
    assert len(lines) == 4
    one = [
        replace(
            reading,
            texts={"premise": reading.texts["premise"]},
            units=(units := tuple(u for u in reading.units if u[0] == "premise")),
            human=tuple(n for n in reading.human if n < len(units)),
        )
        for reading in made.readings
    ]
    (_, words), *_ = texts_of(rationale_blocks(replace(made, readings=one)))[0].lines
    assert "".join(word.text for word in words) == TEXTS[0][0]


def test_texts_in_both_formats():
    written = report(run())
    page, plain = html_of(written), markdown_of(written)
    assert "<u>playing</u></span>" in page
    assert "* occlusion: premise: " in plain
    words = dict(texts_of(blocks())[0].lines)["unbound"]
    both = next(word.text for word in words if word.chosen and word.human)
    assert f"***{both}***" in plain
    assert "<" not in plain


# -- figures -------------------------------------------------------------------------------------


def test_dots_stand_at_their_values_hollow_where_they_mean_little():
    summary = run().summary
    drawing = method_dots(summary, "f1", ["unsteered"])
    mean = summary.mean("unsteered", "occlusion", "f1")
    assert mean is not None
    (dot,) = [d for told, d in dots(drawing).items() if told.startswith("occlusion,")]
    ends = {
        mark.text: mark.x
        for mark in drawing.marks
        if isinstance(mark, Label) and mark.text in ("0", "1")
    }
    assert dot.x == pytest.approx(ends["0"] + mean.value * (ends["1"] - ends["0"]), abs=0.01)
    (span,) = [m for m in drawing.marks if isinstance(m, Line) and m.y1 == dot.y]
    assert span.x1 < dot.x < span.x2
    styles = {told.partition(",")[0]: d.style for told, d in dots(drawing).items()}
    assert styles["occlusion"] == "plain"
    assert styles["random"] == styles["random for unbound"] == "control"
    doubtful = method_dots(run(right=0.2).summary, "flip", ["unsteered"])
    assert {dot.style for dot in dots(doubtful).values()} == {"unsure"}


def test_curves_go_through_every_share():
    summary = run().summary
    drawing = share_curves(summary, "unsteered", "comprehensiveness")
    assert drawing is not None
    curves = [mark for mark in drawing.marks if isinstance(mark, Curve)]
    assert len(curves) == 7  # what is prompted has no order, so no curve
    assert {len(curve.points) for curve in curves} == {len(summary.shares)}
    names = [m for m in drawing.marks if isinstance(m, Label) and m.style.startswith("name")]
    heights = sorted(label.y for label in names)
    assert min(b - a for a, b in pairwise(heights)) >= 13.98
    assert max(heights) <= drawing.height
    assert share_curves(replace(summary, curves=()), "unsteered", "flip") is None


@given(
    st.lists(st.floats(0, 300), min_size=1, max_size=16),
    st.permutations(range(16)),
)
def test_names_keep_apart_and_near_their_lines(places: list[float], ranks: list[int]):
    found = spread(places, 14, 40, 280)
    assert all(40 - 0.01 <= at <= 280 + 0.01 for at in found)
    assert all(b - a >= 14 - 0.021 for a, b in pairwise(sorted(found)))
    order = sorted(range(len(places)), key=lambda n: places[n])
    assert [found[n] for n in order] == sorted(found)
    # no other arrangement in the same order is nearer
    other = sorted(40 + 240 * rank / 15 for rank in ranks[: len(places)])  # 16 apart

    def far(arranged: list[float]) -> float:
        return sum((at - places[n]) ** 2 for at, n in zip(arranged, order, strict=True))

    assert far(sorted(found)) <= far(other) + 1


def test_names_with_room_stay_where_their_lines_end():
    assert spread([200, 100, 150], 14, 0, 300) == [200, 100, 150]
    assert spread([100, 100], 14, 0, 300) == [93, 107]


def test_lines_of_one_kind_have_one_colour_and_are_told_apart():
    styles = styles_of(["attention-last", "attention-mean", "saliency-l1", "random", "top-var"])
    assert list(styles.values()) == ["attends", "attends dash1", "slopes", "guesses", "says"]


# -- runs ----------------------------------------------------------------------------------------


def test_a_run_becomes_a_section(tmp_path: Path):
    sources = [rationale_run(tmp_path / "run", asdict(facts()))]
    page = gather(sources)
    assert page.model == facts()
    assert page.rationales[0].readings == readings()
    written = report_of(page)
    assert written.title == "Rationales (made/model)"
    assert "Rationales" in [section.title for section in written.sections]
    asked = next(section for section in written.sections if section.title == "What was asked")
    (table,) = asked.blocks
    assert isinstance(table, Table)
    assert column(table, "value")["rationales"] == "30 instances; unit word; masking delete"


def test_a_reading_that_is_none_is_named(tmp_path: Path):
    folder = rationale_run(tmp_path / "run", asdict(facts()))
    lines = (folder / "readings.jsonl").read_text(encoding="utf-8").splitlines()
    broken = json.loads(lines[2])
    broken["human"] = ["first"]
    lines[2] = json.dumps(broken)
    (folder / "readings.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(MoesteerError, match=r"readings\.jsonl:3: human\.0"):
        gather([folder])


def test_readings_that_are_fewer_than_the_summary_tells_are_refused(tmp_path: Path):
    folder = rationale_run(tmp_path / "run", asdict(facts()))
    lines = (folder / "readings.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "readings.jsonl").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    told, found = len(lines), len(lines) - 1
    with pytest.raises(MoesteerError, match=f"holds {found} readings, but summary.json.* {told}"):
        gather([folder])


def test_epochs_are_one_figure(tmp_path: Path):
    folder = finetune_run(tmp_path / "tuned", asdict(facts()))
    page = gather([folder])
    epochs = page.finetunes[0].epochs
    assert [epoch for epoch, _ in epochs] == [0, 1, 2, 3]
    section = next(s for s in report_of(page).sections if s.title == "Rationales")
    (figure,) = [block for block in section.blocks if isinstance(block, Figure)]
    assert [drawing.title for drawing in figure.drawings] == ["accuracy", "F1", "flip rate"]
    accuracy, _, flips = figure.drawings
    for epoch, summary in epochs:
        said = [told for told in dots(accuracy) if told.startswith(f"epoch {epoch}: accuracy")]
        assert f"{100 * summary.arms[0].accuracy:.0f}" in said[0]
        styles = {d.style for told, d in dots(flips).items() if f"epoch {epoch}:" in told}
        assert ("unsure" in styles) == (summary.arms[0].doubt is not None)
    assert len(figure.table.rows) == 4 * len(epochs[0][1].methods)
    warned = [block for block in section.blocks if isinstance(block, Warn)]
    assert len(warned) == sum(summary.arms[0].doubt is not None for _, summary in epochs)


def test_a_run_without_epochs_is_refused(tmp_path: Path):
    folder = finetune_run(tmp_path / "tuned", asdict(facts()))
    (folder / "epochs.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(MoesteerError, match=r"epochs\.jsonl holds no epoch"):
        gather([folder])


# -- the terminal --------------------------------------------------------------------------------


def test_the_page_begins_with_accuracy_and_says_everything():
    summary = run("unsteered", "steered", "random 0").summary
    said = printed(rationale_page(summary))
    assert said.startswith("labels")
    order = [
        "instances by label",
        "alignment with people, unsteered",
        "faithfulness, unsteered",
        "where the rationale lies, unsteered",
        "against random units, unsteered",
        "alignment with people, steered",
        "steered − unsteered: accuracy",
        "steered − random: accuracy",
        "words that the model named",
        "Means over instances",
    ]
    places = [said.index(words) for words in order]
    assert places == sorted(places)
    assert "alignment with people, random 0" not in said
    mean = summary.mean("steered", "occlusion", "f1")
    assert mean is not None
    assert f"{mean.value:.2f} ({mean.low:.2f} … {mean.high:.2f})" in said


def test_doubtful_flip_rates_are_dim_at_the_terminal():
    def dim(summary: Summary) -> set[str]:
        table = means_table(summary, "unsteered", "t", ["f1", "flip", "comprehensiveness"])
        return {
            str(column.header)
            for column in table.columns
            for cell in column.cells
            if isinstance(cell, Text) and cell.style == "dim"
        }

    assert dim(run().summary) == set()
    assert dim(run(right=0.2).summary) == {"flip rate"}
    assert "flip rates mean little" in printed(rationale_page(run(right=0.2).summary))
    assert "flip rates mean little" not in printed(rationale_page(run().summary))


def test_epochs_at_the_terminal():
    epochs = [(0, run(right=0.2).summary), (1, run().summary)]
    said = printed(finetune_page(epochs))
    assert said.index("F1 after epoch") < said.index("flip rate after epoch")
    for _, summary in epochs:
        assert f"{summary.arms[0].accuracy:.0%}" in said
    assert said.count("epoch 0, unsteered: flip rates mean little") == 1
    assert "epoch 1, unsteered: flip" not in said


def test_an_unfinished_fine_tuning_says_so(tmp_path: Path):
    folder = finetune_run(tmp_path / "run", asdict(facts()), epochs=2)
    (run,) = gather([folder]).finetunes

    def warnings_of(epochs: int) -> str:
        settings = {**run.run.settings, "training": {"epochs": epochs}}
        blocks = finetune_blocks(replace(run, run=replace(run.run, settings=settings)))
        return " ".join(block.text for block in blocks if isinstance(block, Warn))

    assert "Unfinished: 2 of 5 epochs" in warnings_of(5)
    assert "Unfinished" not in warnings_of(2)
