"""What `moesteer testbed` prints."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.report.terminal import named
from moesteer.testbed import MODELS, GroundTruth, model_path

OPENING = """\
Five small Qwen3-MoE chat models (4 layers × 16 experts, 4 a token) of an invented world, trained
from nothing. In `testbed`, experts were planted that carry three behaviours, and decoys whose
routing goes with a behaviour though they do nothing for it. The others read the same text:
`testbed-twin` without planting, `testbed-reader` so, too, with three classification tasks,
`testbed-expert` and `testbed-attention` so that refusal is one direction of the residual stream,
which an expert or a layer's attention writes. Pairs: testbed:BEHAVIOUR[:fit|dev|test]; instances:
testbed:TASK[:fit|dev|test]. Numbers from these models say nothing about real ones.\
"""


def testbed_page(truth: GroundTruth) -> RenderableType:
    """The bundled models, where they lie, and their ground truth."""
    places = Table.grid(padding=(0, 2))
    places.add_column(style="dim")
    for name in MODELS:
        called = "testbed" if name == "planted" else f"testbed-{name}"
        places.add_row(called, str(model_path(name)))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("behaviour", "A", "B", "planted experts", "decoys"):
        table.add_column(heading)
    for name, behaviour in truth.behaviours.items():
        table.add_row(
            name, behaviour.a, behaviour.b, named(behaviour.planted), named(behaviour.decoys)
        )
    writers = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("model", "refusal is written by", "decoys"):
        writers.add_column(heading)
    for name, writer in truth.writers.items():
        place = "attention" if writer.expert is None else f"expert {writer.expert}"
        writers.add_row(f"testbed-{name}", f"{place} of layer {writer.layer}", named(writer.decoys))
    return Group(Text(OPENING), Text(""), places, Text(""), table, Text(""), writers)
