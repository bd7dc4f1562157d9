"""What `moesteer writers` prints: who writes a direction, and what its loss changes."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.directions.shares import Ablated, Writer
from moesteer.directions.writers import Writers

PARTS = {
    "embedding": "embedding",
    "attention": "attention",
    "expert": "routed experts",
    "rest": "rest of the feed-forward parts",
}
WITHOUT = {
    "nothing": "nothing",
    "attention": "what attention writes",
    "mlp": "what feed-forward parts write",
    "both": "both",
}


def writers_page(result: Writers, top: int = 10) -> RenderableType:
    """The parts, the `top` strongest single writers, and the scores without each part."""
    at = f"position {result.position}" if result.position else "the last positions, averaged"
    heading = (
        f"what enters layer {result.layer} at {at}, along the direction of {result.profile}"
        f" (norm {result.norm:.4g}): {result.total:+.4g} more on {result.prompts_a} restricted"
        f" than on {result.prompts_b} harmless prompts"
        f" ({result.total_low:+.4g} … {result.total_high:+.4g})"
    )
    strongest = sorted(result.writers, key=lambda writer: -abs(writer.value))[:top]
    return Group(
        Text(heading),
        Text(""),
        writers_table(result.parts),
        Text(""),
        Text(f"the {len(strongest)} strongest of {len(result.writers)} writers"),
        writers_table(strongest),
        Text(""),
        ablations_table(result.ablated),
    )


def writers_table(writers: Sequence[Writer]) -> Table:
    """A line a writer: what it adds along the direction, and its share of the total."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("written by", "layer"):
        table.add_column(name)
    for name in ("adds", "95 % interval", "share"):
        table.add_column(name, justify="right")
    for writer in writers:
        table.add_row(
            name_of(writer),
            "" if writer.layer is None else str(writer.layer),
            f"{writer.value:+.4g}",
            f"{writer.low:+.4g} … {writer.high:+.4g}",
            f"{writer.share:.1%}",
        )
    return table


def name_of(writer: Writer) -> str:
    return PARTS[writer.part] if writer.expert is None else f"expert {writer.expert}"


def ablations_table(ablated: Sequence[Ablated]) -> Table:
    """A line an ablation: the refusal score of restricted prompts, and how far it moved."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("direction taken out of")
    for name in ("log-odds on restricted", "95 % interval", "change", "95 % interval"):
        table.add_column(name, justify="right")
    for found in ablated:
        change = [f"{found.change:+.2f}", f"{found.change_low:+.2f} … {found.change_high:+.2f}"]
        table.add_row(
            WITHOUT[found.what],
            f"{found.score:+.2f}",
            f"{found.low:+.2f} … {found.high:+.2f}",
            *(change if found.what != "nothing" else ["", ""]),
        )
    return table
