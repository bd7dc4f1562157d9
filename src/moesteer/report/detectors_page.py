"""What `moesteer detectors` prints: who agrees with knock-out, and the experts it shows."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.detection.comparing import (
    EITHER,
    GRADIENT,
    KNOCK_IN,
    KNOCK_OUT,
    TITLES,
    DetectorComparison,
    cells,
)
from moesteer.detection.knocking import Cost
from moesteer.profile import Expert

WHAT = {
    "decision": "log P(A's token) − log P(B's token), in nats, where the sides part",
    "span": "mean log P of A's target − mean log P of B's, in nats",
}

NOTE = """\
ρ: rank correlation with knock-out over all experts that were knocked, of the scores and of their
sizes. Scores are positive for experts that go with A, or whose loss takes A away. A knock changes
every token, so a large change beside the pairs means damage, not a carrier.\
"""


def detectors_page(
    result: DetectorComparison, marks: Mapping[Expert, str], top: int = 10
) -> RenderableType:
    """How the detectors compare, and the `top` experts by the larger of both knocks."""
    heading = Text(f"{result.pairs} pairs; {WHAT[result.over]}")
    parts = [heading, Text(""), agreement_table(result), Text(""), knock_table(result, marks, top)]
    return Group(*parts, Text(""), Text(NOTE))


def cost_line(cost: Cost, layers: int) -> str:
    """What is about to be run, in a sentence."""
    where = "all layers" if cost.layers == layers else f"{cost.layers} of {layers} layers"
    return (
        f"knocking {where}: {cost.interventions:,} interventions; {cost.texts:,} forward passes of"
        f" one text, {cost.tokens:,} tokens (lower layers are run once where the model allows it)"
    )


def agreement_table(result: DetectorComparison) -> Table:
    """A line a detector; where experts were planted, who found them."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("detector")
    for name in ("ρ", "ρ of sizes", f"of its top {result.strongest}"):
        table.add_column(name, justify="right")
    if result.recovery:
        for name in ("planted found", "planted rank", "decoys rank"):
            table.add_column(name, justify="right")
    for name in result.scores:
        seen = result.agreement[name]
        row = [TITLES[name], _rho(seen.signed), _rho(seen.size), str(seen.shared)]
        if result.recovery:
            found = result.recovery[name]
            row += [f"{found.found} of {len(found.planted)}"]
            row += [_listed(found.planted), _listed(found.decoys)]
        table.add_row(*row)
    return table


def knock_table(result: DetectorComparison, marks: Mapping[Expert, str], top: int) -> Table:
    """The strongest experts: both knocks with intervals, the gradient, and what moved beside."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    headings = ["layer", "expert", "knock-out", "95 % interval", "knock-in", "95 % interval"]
    headings += ["gate gradient", *(f"{name}: out, in" for name in result.beside), ""]
    for name in headings:
        table.add_column(name, justify="right" if name else "left")
    size = np.abs(result.scores[EITHER].value)
    entered = [cell for cell in cells(result) if result.entered[cell[0], cell[2]]]
    for row, layer, expert in sorted(entered, key=lambda cell: -size[cell[0], cell[2]])[:top]:
        at = row, expert
        words = [str(layer), str(expert)]
        for name in (KNOCK_OUT, KNOCK_IN):
            found = result.scores[name]
            interval = f"{found.low[at]:+.2f} … {found.high[at]:+.2f}" if result.pairs > 1 else "–"
            words += [f"{found.value[at]:+.2f}", interval]
        words.append(f"{result.scores[GRADIENT].value[at]:+.2f}")
        words += [f"{t[0][at]:+.2f}, {t[1][at]:+.2f}" for t in result.beside.values()]
        table.add_row(*words, marks.get((layer, expert), ""))
    return table


def _rho(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
