"""A report as one HTML file: no network, no fonts, a few lines of script, figures as inline SVG."""

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.report.blocks import (
    Cell,
    Commands,
    Curve,
    Dot,
    Exchange,
    Figure,
    Label,
    Lead,
    Line,
    Paragraph,
    Rect,
    Report,
    Shaded,
    Table,
    Warn,
)
from moesteer.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "template"

KINDS = {
    "cell": Cell,
    "commands": Commands,
    "curve": Curve,
    "dot": Dot,
    "exchange": Exchange,
    "figure": Figure,
    "label": Label,
    "lead": Lead,
    "line": Line,
    "paragraph": Paragraph,
    "rect": Rect,
    "shaded": Shaded,
    "table": Table,
    "warn": Warn,
}


def html_of(report: Report) -> str:
    """The whole page. Everything that comes from outside is escaped; only our script may run."""
    from markupsafe import Markup

    script = read_template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            report=report,
            style=Markup(read_template("figure.css") + read_template("page.css")),
            script=Markup(script),
            script_hash=digest,
            version=__version__,
        )
    )


def templates() -> "Environment":
    """What fills the templates, escaping everything that is put in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = _kind
    return environment


def read_template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _kind(thing: object) -> str:
    return next(name for name, form in KINDS.items() if isinstance(thing, form))
