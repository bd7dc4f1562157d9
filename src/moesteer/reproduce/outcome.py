"""What came of a paper's road: its claims, its tables, and what was not run.

    summary.json    all of it, numbers as numbers
    tables.md       the same to be read

A number stands in a table as it stands in the summary of the run that it comes from; `Entry.value`
holds it unrounded.
"""

from dataclasses import dataclass
from pathlib import Path

from moesteer.summaries import as_json, from_json

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """What stands in a table: words, and for programs the number with its interval, if it has one.

    `pale`: it means little, and the table's text says why.
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    pale: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under headings, the first of which names the row; `about` says how to read it.

    `source` is the run that it is made of, within the folder; empty where there are several.
    """

    title: str
    about: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    source: str = ""

    def cell(self, row: str, heading: str, beside: str = "") -> Entry:
        """The entry under a heading, in the row of this name (and second cell, where it is
        given); KeyError where there is none."""
        for entries in self.rows:
            if entries[0].text == row and beside in ("", entries[1].text):
                return dict(zip(self.headings, entries, strict=True))[heading]
        raise KeyError(row)


@dataclass(frozen=True)
class Claim:
    """What was seen here of a finding of the paper's, by its key."""

    key: str
    seen: str


@dataclass(frozen=True)
class NotRun:
    """A step, or a part of one, that was not run, and what to bring so that it would be.

    `failed`: it was begun, and this came of it.
    """

    step: str
    missing: str
    failed: bool = False


@dataclass(frozen=True)
class Reproduction:
    """A whole road. `bundled`: of a model that comes with moesteer, whose numbers say nothing about
    real ones and are set beside no figure of the paper's."""

    paper: str
    model: str
    bundled: bool
    limit: int | None
    settings: tuple[str, ...]
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    not_run: tuple[NotRun, ...]
    runs: tuple[str, ...]

    def table(self, title: str) -> Table:
        """A table by its title; KeyError where there is none."""
        return {table.title: table for table in self.tables}[title]

    def to_json(self) -> str:
        """Everything as one JSON object, with the schema's number."""
        return as_json(self, SCHEMA)

    @classmethod
    def from_json(cls, text: str, where: str | Path = "summary.json") -> "Reproduction":
        """Read what `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        return from_json(cls, text, where, SCHEMA, "a reproduction")
