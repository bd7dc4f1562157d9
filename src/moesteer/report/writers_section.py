"""Who writes it? What each part of the model adds along a direction, and what its loss changes."""

from moesteer.directions.shares import PARTS, Writer
from moesteer.report.blocks import (
    Block,
    Cell,
    Figure,
    Paragraph,
    Table,
    number,
    percent,
    signs,
    text,
)
from moesteer.report.direction_figures import by_layer
from moesteer.report.figures import Series
from moesteer.report.page import Written

NAMES = {
    "embedding": "embedding",
    "attention": "attention",
    "expert": "routed experts",
    "rest": "shared experts, dense",
}
WITHOUT = {
    "nothing": "nothing",
    "attention": "what attention writes",
    "mlp": "what the feed-forward parts write",
    "both": "what both write",
}
STYLES = {"attention": "price", "expert": "target", "rest": "price price2"}
STRONGEST = 20
"""Writers in the table, by size."""
SEEN = 0.005
"""A part is drawn where it writes at least this share of the total in some layer."""


def writer_blocks(written: Written) -> list[Block]:
    """The answer in a paragraph, a figure over layers with the writers, and the ablations."""
    return [Paragraph(_answer(written)), _figure(written), _ablation_table(written)]


def _answer(written: Written) -> str:
    result = written.result
    change = {found.what: number(found.change, "+.2f").text for found in result.ablated}
    most = max(result.parts, key=lambda part: part.share)
    one = max(result.writers, key=lambda writer: abs(writer.value))
    position = f"position {signs(str(result.position))}" if result.position else "on average"
    where = f"the input of layer {result.layer}, {position}"
    steered = {
        "attention": "attention",
        "mlp": "the feed-forward parts",
        None: "neither clearly more than the other",
    }[result.by_steering]
    by_writing = (
        f"By what is written up to {where}: {NAMES[most.part]}, {percent(most.share).text} of the"
        f" direction; the strongest single writer is {_name(one)}, {percent(one.share).text}."
    )
    by_steering = (
        f"By steering: {steered}. Projected out of what attention writes, the log-odds of the"
        f" behaviour change by {change['attention']} nats; out of what the feed-forward parts"
        f" write, by {change['mlp']}."
    )
    if result.by_steering is None:
        return f"{by_writing} {by_steering}"
    agree = (result.by_writing == "attention") == (result.by_steering == "attention")
    last = "Both say the same." if agree else "The two don't say the same."
    return f"{by_writing} {by_steering} {last}"


def _figure(written: Written) -> Figure:
    result = written.result
    series = []
    for part in ("expert", "attention", "rest"):
        layers = sorted({w.layer for w in result.writers if w.part == part and w.layer is not None})
        points = []
        for layer in layers:
            here = [w for w in result.writers if w.part == part and w.layer == layer]
            value = sum(w.value for w in here)
            told = f"{NAMES[part]}, layer {layer}: {number(value, '+.3g').text}"
            if part == "expert":
                best = max(here, key=lambda w: abs(w.value))
                told += f"; most by expert {best.expert}: {number(best.value, '+.3g').text}"
            points.append((float(layer), value, told))
        seen = any(abs(value) > SEEN * abs(result.total) for _, value, _ in points)
        if points and (seen or part in ("expert", "attention")):  # the two that are compared
            series.append(Series(NAMES[part], STYLES[part], tuple(points)))
    return Figure(
        f"Who writes it, layer by layer: {result.profile}",
        (
            by_layer(
                "What each part adds along the direction, A less B",
                f"Total {result.total:.3g}; {_parts_words(written)}.",
                series,
                "along the direction, A less B",
            ),
        )
        if series
        else (),
        f"What is written at the last prompt tokens, mean over {result.prompts_a} prompts of A less"
        f" that over {result.prompts_b} of B; all of it and the embedding add up to the total,"
        f" {signs(f'{result.total:.3g}')}.",
        _writers_table(written),
    )


def _parts_words(written: Written) -> str:
    parts = sorted(written.result.parts, key=lambda part: -part.share)
    return ", ".join(f"{NAMES[part.part]} {percent(part.share).text}" for part in parts)


def _writers_table(written: Written) -> Table:
    result = written.result
    shown = sorted(result.writers, key=lambda one: -abs(one.value))[:STRONGEST]
    parts = [part for name in PARTS for part in result.parts if part.part == name]
    rows = [
        _row(f"all of {NAMES[part.part]}" if part.part != "embedding" else "embedding", part)
        for part in parts
    ]
    rows += [_row(_name(one), one) for one in shown if one.part != "embedding"]
    total = (
        text("total"),
        number(result.total, "+.3g"),
        number(result.total_low, "+.3g"),
        number(result.total_high, "+.3g"),
        percent(1.0),
    )
    left = len(result.writers) - len(shown)
    more = f"; {left:,} weaker writers are left out" if left else ""
    return Table(
        f"What is written along the direction, A less B, with 95 % bootstrap intervals over"
        f" prompts{more}",
        ("writer", "along it", "from", "to", "share"),
        (*rows, total),
    )


def _row(name: str, writer: Writer) -> tuple[Cell, ...]:
    return (
        text(name),
        number(writer.value, "+.3g"),
        number(writer.low, "+.3g"),
        number(writer.high, "+.3g"),
        percent(writer.share),
    )


def _name(writer: Writer) -> str:
    if writer.layer is None:
        return NAMES[writer.part]
    if writer.expert is not None:
        return f"expert {writer.expert} of layer {writer.layer}"
    return f"{NAMES[writer.part]} of layer {writer.layer}"


def _ablation_table(written: Written) -> Table:
    rows = tuple(
        (
            text(WITHOUT[found.what]),
            number(found.score, "+.2f"),
            number(found.low, "+.2f"),
            number(found.high, "+.2f"),
            number(found.change, "+.2f"),
            number(found.change_low, "+.2f"),
            number(found.change_high, "+.2f"),
        )
        for found in written.result.ablated
    )
    headings = ("ablated from", "log-odds", "from", "to", "change", "from", "to")
    return Table(
        "The direction projected out of all layers' outputs: log-odds of the behaviour on A's"
        " prompts, with 95 % bootstrap intervals over prompts",
        headings,
        rows,
    )
