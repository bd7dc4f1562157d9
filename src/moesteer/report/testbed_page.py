"""What `moesteer testbed` prints."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.report.terminal import named
from moesteer.testbed import GroundTruth, model_path

OPENING = """\
Two small Qwen3-MoE chat models (4 layers × 16 experts, 4 a token) of an invented world, trained
from nothing. In `testbed`, experts were planted that carry three behaviours, and decoys whose
routing goes with a behaviour though they do nothing for it. `testbed-twin` read the same text
without planting. Pairs: testbed:BEHAVIOUR[:fit|dev|test]. Numbers from these models say nothing
about real ones.\
"""


def testbed_page(truth: GroundTruth) -> RenderableType:
    """The bundled models, where they lie, and their ground truth."""
    places = Table.grid(padding=(0, 2))
    places.add_column(style="dim")
    places.add_row("testbed", str(model_path("planted")))
    places.add_row("testbed-twin", str(model_path("twin")))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("behaviour", "A", "B", "planted experts", "decoys"):
        table.add_column(heading)
    for name, behaviour in truth.behaviours.items():
        table.add_row(
            name, behaviour.a, behaviour.b, named(behaviour.planted), named(behaviour.decoys)
        )
    return Group(Text(OPENING), Text(""), places, Text(""), table)
