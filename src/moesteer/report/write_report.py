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

    `sources` are run folders (evaluate, search, detectors, judge check) and profile files.
    `show_replies` shows those of tasks not marked harmless, too. Raises MoesteerError for sources
    that can't be read or are of different models, and for an `out` that can't be written.
    """
    page, beside = Path(out), Path(out).with_suffix(".md")
    if page.suffix not in (".html", ".htm"):
        raise MoesteerError(f"--out is {out}; a report is an HTML file: give a name in .html.")
    for path in (page, beside):
        for source in sources:
            check_writable(path, str(source))
    report = report_of(gather(sources), show_replies)
    write_text(page, html_of(report))
    write_text(beside, markdown_of(report))
    return page, beside
