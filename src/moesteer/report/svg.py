"""A drawing as an SVG file of its own: light, without a script, the same marks as on the page."""

from dataclasses import replace

from moesteer.report.blocks import Dot, Drawing, Rect
from moesteer.report.html import read_template, templates


def svg_of(drawing: Drawing) -> str:
    """The file's text. What the page tells of a mark on hover is left out: images have none."""
    from markupsafe import Markup

    marks = [replace(m, told="") if isinstance(m, Rect | Dot) else m for m in drawing.marks]
    return (
        templates()
        .get_template("figure.svg.jinja")
        .render(drawing=drawing, marks=marks, style=Markup(read_template("figure.css")))
    )
