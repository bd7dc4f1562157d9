"""The Markdown report: verdict first, tables that GitHub reads, nothing that comes alive."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from made_runs import WICKED, all_runs, evaluate_run, task

from moesteer.report.blocks import Cell, Exchange, Report, Section, Table
from moesteer.report.markdown import LONGEST, escaped, fenced, markdown_of
from moesteer.report.page import gather
from moesteer.report.sections import report_of


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    runs = all_runs(tmp_path_factory.mktemp("runs"))
    return markdown_of(report_of(gather(runs)))


def outside_fences(words: str) -> list[str]:
    lines, fence = [], None
    for line in words.split("\n"):
        if fence is None and (opened := re.match(r"`{3,}", line)):
            fence = opened[0]
        elif fence is not None:
            fence = None if line == fence else fence
        else:
            lines.append(line)
    assert fence is None, "a fence is never closed"
    return lines


def test_the_verdict_comes_first(written: str):
    lines = [line for line in written.split("\n") if line]
    assert lines[0] == "# All towns (made/model)"
    assert lines[1] == "## Verdict"
    assert lines[2].startswith("**Steering (made.safetensors) raises the share")
    assert "no price seen" in lines[2]


def test_headings_step_down_one_by_one(written: str):
    levels = [len(m[0]) for line in outside_fences(written) if (m := re.match(r"#+(?= )", line))]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_every_section_is_there(written: str):
    titles = [line[3:] for line in outside_fences(written) if line.startswith("## ")]
    assert titles == [
        "Verdict",
        "What was asked",
        "Outcomes",
        "Which experts",
        "How many experts",
        "Which directions",
        "Which direction, and how strongly",
        "Who writes it?",
        "Rationales",
        "Detectors against knock-out",
        "Judges",
        "Replies before and after",
        "How to get this again",
    ]


def test_every_row_of_a_table_has_as_many_cells_as_its_head(written: str):
    tables = re.findall(r"(?:^\|.*\|$\n?)+", "\n".join(outside_fences(written)), re.MULTILINE)
    assert len(tables) > 10
    for table in tables:
        rows = table.strip().split("\n")
        assert re.fullmatch(r"\|(---:?\|)+", rows[1])
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert len(cells) == 1, rows[0]


def test_commands_seeds_and_versions_are_there(written: str):
    commands = "moesteer detect made/model --pairs pairs.jsonl\nmoesteer made by-hand"
    assert f"```sh\n{commands}\nmoesteer rationale made\n```" in written
    assert "2 seeds of controls, from 0" in written
    assert "moesteer 0" in written


def test_replies_stand_in_fences_and_nothing_outside_is_html(written: str):
    assert WICKED in written
    assert "<" not in "".join(outside_fences(written))


def test_a_judge_no_better_than_a_guess_is_warned_of(written: str):
    said = [line for line in written.split("\n") if line.startswith("> **Note.**")]
    assert any("sees “negated” in 2 of 8 replies, no better than a guess" in line for line in said)
    assert not any("never checked" in line for line in said)


def test_tasks_whose_judge_was_never_checked_are_named(tmp_path: Path):
    run = evaluate_run(tmp_path / "run", tasks=[task(check="never checked"), task("sums", "price")])
    written = markdown_of(report_of(gather([run])))
    assert "> **Note.** The judges of towns were never checked." in written


@pytest.mark.parametrize(
    ("words", "there"),
    [
        ("a|b", r"a\|b"),
        ("*a* _b_ `c`", r"\*a\* \_b\_ \`c\`"),
        ("<b>&amp;", "&lt;b\\>&amp;amp;"),
        ("[a](b)", r"\[a\](b)"),
        ("two\nlines", "two lines"),
    ],
)
def test_text_is_escaped(words: str, there: str):
    assert escaped(words) == there


def test_a_fence_is_longer_than_what_it_holds():
    assert fenced("a ```` b") == "`````\na ```` b\n`````"


def test_long_tables_are_cut_and_wide_ones_left_out():
    rows = tuple((Cell(f"row {i}"), Cell(str(i), i)) for i in range(LONGEST + 5))
    wide = Table("wide", tuple(map(str, range(30))), ((Cell("x"),) * 30,))
    section = Section("S", (Table("long", ("a", "b"), rows), wide))
    written = markdown_of(Report("R", (section,)))
    assert written.count("| row ") == LONGEST
    assert "5 more rows are on the HTML page." in written
    assert "wide: 30 columns, on the HTML page." in written


def test_an_exchange_shows_who_said_what():
    block = Exchange("towns", "Which?", (("unsteered", "This.", "yes"),))
    written = markdown_of(Report("R", (Section("S", (block,)),)))
    assert "towns, asked:\n\n```\nWhich?\n```\n\nunsteered (yes):\n\n```\nThis.\n```" in written
