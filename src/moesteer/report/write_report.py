"""From run folders and profiles to two files: an HTML page and the same in Markdown."""

from collections.abc import Sequence
from pathlib import Path

from moesteer.errors import MoesteerError
from moesteer.files import check_writable, write_text
from moesteer.report.html import html_of
from moesteer.report.markdown import markdown_of
from moesteer.report.page import gather
from moesteer.report.sections import report_of


def write_report(
    sources: Sequence[str | Path], out: str | Path, show_replies: bool = False
) -> tuple[Path, Path]:
    """Write the report of one model's results to `out` (.html), and its Markdown beside it.

    `sources` are run folders (evaluate, search, audit, detectors, writers, rationale, judge check)
    and profile files. `show_replies` shows those of tasks not marked harmless, too. Raises
    MoesteerError for sources that can't be read or are of different models, and for an `out` that
    can't be written.
    """
    page, beside = check_report(Path(out), *sources)
    report = report_of(gather(sources), show_replies)
    write_text(page, html_of(report))
    write_text(beside, markdown_of(report))
    return page, beside


def check_report(page: Path, *sources: str | Path) -> tuple[Path, Path]:
    """The page and the Markdown beside it; MoesteerError where one of them can't be written."""
    if page.suffix not in (".html", ".htm"):
        raise MoesteerError(f"{page}: a report is an HTML file; give a name in .html.")
    files = page, page.with_suffix(".md")
    for path in files:
        check_writable(path, *map(str, sources))
    return files
