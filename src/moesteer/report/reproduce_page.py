"""What `moesteer reproduce` says: before it starts, and when it is through.

The same blocks become the page at the terminal and `tables.md`. A bundled model's numbers stand
beside no figure of a paper: what the paper reports then comes last, by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from moesteer.report.blocks import (
    Block,
    Cell,
    Paragraph,
    Report,
    Section,
    Table,
    Warn,
    text,
)
from moesteer.report.markdown import markdown_of
from moesteer.reproduce.outcome import Claim, Entry, NotRun, Reproduction
from moesteer.reproduce.outcome import Table as Made
from moesteer.reproduce.papers import Paper, PaperName, read_paper

if TYPE_CHECKING:
    from moesteer.reproduce.steps import Road, Walked

STANDS_IN = (
    "The model comes with moesteer and was built for this: its own tasks, pairs and prompts stand"
    " in for the paper's. Its numbers say nothing about real models, and nothing about the paper."
)
CLAIMED = (
    "Intervals are of 95 %. What is said to raise or lower a share does so beyond the unsteered"
    " model and beyond every control."
)
NOT_SEEN = "nothing: see what was not run"
APART = "Of other models and other tasks: none of it can be compared with the numbers above."


Tables = Callable[[object, bool], Iterator[Made | Claim]]
"""Tables and claims of a step's result; whether the model is a bundled one."""


def tables_of(paper: PaperName) -> Tables:
    """What makes a paper's tables."""
    match paper:
        case "steermoe":
            from moesteer.report.reproduce_steermoe import steermoe_tables as found
        case "expert-refusal":
            from moesteer.report.reproduce_expert_refusal import expert_refusal_tables as found
        case "rationales":
            from moesteer.report.reproduce_rationales import rationales_tables as found
    return found


def reproduction_of(walked: "Walked", tables: Tables) -> Reproduction:
    """The tables and claims of a road, claims in the paper's order."""
    road = walked.road
    made = [one for result in walked.results for one in tables(result, road.bundled)]
    order = [finding.key for finding in road.paper.findings]
    claims = [one for one in made if isinstance(one, Claim)]
    return Reproduction(
        road.paper.name,
        walked.model,
        road.bundled,
        road.limit,
        (*road.settings, walked.thinking),
        tuple(sorted(claims, key=lambda claim: order.index(claim.key))),
        tuple(one for one in made if isinstance(one, Made)),
        walked.not_run,
        walked.runs,
    )


def plan_page(road: "Road") -> RenderableType:
    """What will be run, in order, and what will not, with what is missing."""
    ready = RichTable.grid(padding=(0, 2))
    for number, step in enumerate(road.ready, start=1):
        ready.add_row(str(number), step.title, step.plan)
    parts: list[RenderableType] = [
        Text(f"{road.paper.title} on {road.model}", "bold"),
        *([Text(STANDS_IN)] if road.bundled else []),
        Text("will be run:"),
        Padding(ready, (0, 0, 0, 2)),
    ]
    if road.not_ready:
        lacking = RichTable.grid(padding=(0, 2))
        for one in road.not_ready:
            lacking.add_row(one.step, one.missing)
        parts += [Text("will not be run, for want of:"), Padding(lacking, (0, 0, 0, 2))]
    return Group(*parts, Text(""))


def reproduction_page(result: Reproduction) -> RenderableType:
    """Claims, tables and what was not run, for a terminal."""
    report = report_of(result)
    parts: list[RenderableType] = [Text(report.title, "bold")]
    for section in report.sections:
        parts += [Text(""), Text(section.title, "bold underline")]
        parts += [rendered(block) for block in section.blocks]
    return Group(*parts)


def tables_markdown(result: Reproduction) -> str:
    """The same as Markdown."""
    return markdown_of(report_of(result))


def report_of(result: Reproduction) -> Report:
    """The whole page, as blocks."""
    paper = read_paper(result.paper)
    sections = [
        Section("How it was run", tuple(_opening(result, paper))),
        Section("The paper's claims", tuple(_claims(result))),
        *(Section(table.title, tuple(_table(table))) for table in result.tables),
        Section("Not run", tuple(_not_run(result.not_run))),
    ]
    if result.bundled:
        sections.append(Section("What the paper reports", (Paragraph(APART), _findings(paper))))
    return Report(f"{paper.title} on {result.model}", tuple(sections))


def _opening(result: Reproduction, paper: Paper) -> Iterator[Block]:
    if result.bundled:
        yield Warn(STANDS_IN)
    else:
        yield Paragraph(
            f"The paper's figures come from {paper.source}. Where none was noted for this model and"
            " task, the paper's cell is empty."
        )
    if result.limit is not None and not result.bundled:
        yield Warn(f"A trial: only the first {result.limit:,} of each set of prompts were used.")
    rows = tuple((text(name), text(rest.strip())) for name, _, rest in map(_split, result.settings))
    yield Table("settings of this run", ("setting", "value"), rows)


def _split(sentence: str) -> tuple[str, str, str]:
    return sentence.partition(":")


def _claims(result: Reproduction) -> Iterator[Block]:
    """Every claim of the paper, in its order: its figure, and what was seen here, if anything."""
    yield Paragraph(CLAIMED)
    rows: list[tuple[Cell, ...]] = []
    for finding in read_paper(result.paper).findings:
        seen = [claim for claim in result.claims if claim.key == finding.key]
        figure = finding.figure and f"{finding.figure} ({finding.of})"
        for number, words in enumerate([claim.seen for claim in seen] or [NOT_SEEN]):
            first = (finding.claim, figure or "–") if not number else ("", "")
            rows.append(tuple(map(text, (*first, words))))
    if result.bundled:
        rows = [(claim, seen) for claim, _, seen in rows]
        yield Table("seen on a bundled model", ("claim", "seen here"), tuple(rows))
    else:
        headings = ("claim", "the paper's figure (of)", "seen here")
        yield Table("the paper's figures, and what was seen here", headings, tuple(rows))


def _table(table: Made) -> Iterator[Block]:
    if table.about:
        yield Paragraph(table.about)
    rows = tuple(tuple(map(_cell, row)) for row in table.rows)
    caption = f"from {table.source}" if table.source else "from several runs"
    yield Table(caption, table.headings, rows)


def _cell(entry: Entry) -> Cell:
    return Cell(entry.text, entry.value, entry.pale)


def _not_run(absent: Sequence[NotRun]) -> Iterator[Block]:
    if not absent:
        yield Paragraph("Everything was run.")
        return
    failed, missing = ([one for one in absent if one.failed is was] for was in (True, False))
    if failed:
        yield Paragraph("Begun and not finished; mend the cause, and give the same command again.")
        yield Table("what was not finished", ("step", "why"), _reasons(failed))
    if missing:
        yield Paragraph("Bring what is missing and give the command again with it; the rest stays.")
        yield Table("what to bring", ("step", "what is missing"), _reasons(missing))


def _reasons(absent: Sequence[NotRun]) -> tuple[tuple[Cell, Cell], ...]:
    return tuple((text(one.step), text(one.missing)) for one in absent)


def _findings(paper: Paper) -> Table:
    rows = tuple(
        (
            text(one.claim),
            text(one.figure or "no figure noted"),
            text(f"{one.of} ({one.by})" if one.by else one.of),
        )
        for one in paper.findings
    )
    return Table(f"from {paper.source}", ("claim", "figure", "of"), rows)


# -- at a terminal -------------------------------------------------------------------------------


def rendered(block: Block) -> RenderableType:
    """A block for a terminal: paragraphs, warnings and tables, which are all there are here."""
    match block:
        case Paragraph():
            return Text(block.text)
        case Warn():
            return Text(block.text, "yellow")
        case Table():
            return _rich(block)
        case _:
            raise TypeError(f"{type(block).__name__} stands on no page of this kind")


def _rich(table: Table) -> RenderableType:
    found = RichTable(box=None, header_style="bold", pad_edge=False)
    for heading, right in zip(table.headings, table.numeric, strict=True):
        found.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        found.add_row(*(Text(cell.text, "dim" if cell.pale else "") for cell in row))
    return found
