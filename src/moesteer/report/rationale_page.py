"""What `moesteer rationale` prints: accuracy first, then which rationales people share, and which
the model's label hangs on."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.rationale.measures import ACCURACY, RANDOM
from moesteer.rationale.summary import Change, Difference, Mean, Summary
from moesteer.report.comparison_page import p_words
from moesteer.report.rationale_words import (
    ALIGNED,
    FAITHFUL,
    against_random,
    doubts,
    greyed,
    groups,
    is_share,
    measured,
    name_of,
    shown_arms,
    texts_measured,
)

READING = """\
Means over instances with 95 % bootstrap intervals; accuracy with Wilson's. Attributed methods
choose the units that come nearest to as many tokens as people marked, prompted ones those that the
model named; random: as many tokens by lot. Sufficiency is better where it is lower, everything else
where it is higher. p: sign flips by instance, adjusted over methods (Holm). Said: how probable all
labels' words are together as the reply, the median. `moesteer report` tells more.\
"""
SHOWN = ("f1", "flip")
"""The measures whose differences are printed; the report has them all."""
PLAIN = ("precision", "recall", "iou", "flip_right", "flip_wrong")
"""The measures that are printed without their intervals, which the report has."""


def rationale_page(summary: Summary) -> RenderableType:
    """Accuracy and labels, alignment and faithfulness of each arm, differences and counts."""
    parts: list[RenderableType] = [accuracy_table(summary), labels_table(summary)]
    if said := list(doubts(summary)):
        parts.append(Text("\n".join(said), "yellow"))
    for arm in shown_arms(summary):
        several = f", {arm}" if len(summary.arms) > 1 else ""
        for title, measures in (
            (f"alignment with people{several}", ALIGNED),
            (f"faithfulness{several}", tuple(m for m in FAITHFUL[1:] if not m.endswith("_area"))),
            (f"where the rationale lies{several}", texts_measured(summary)),
        ):
            if there := measured(summary, arm, measures):
                parts.append(means_table(summary, arm, title, there))
        parts += _differences_table(summary, arm, f"against random units{several}")
    parts += _changes_tables(summary)
    if summary.prompted:
        parts.append(prompted_table(summary))
    parts.append(Text(READING, "dim"))
    return Group(*(piece for part in parts for piece in (part, Text(""))))


def finetune_page(epochs: Sequence[tuple[int, Summary]]) -> RenderableType:
    """Accuracy, F1 and flip rate of every method after each epoch; of epochs' first arms."""
    parts: list[RenderableType] = []
    for measure in ("f1", "flip"):
        table = _table(f"{name_of(measure)} after epoch", [str(epoch) for epoch, _ in epochs])
        arms = [(summary, summary.arms[0]) for _, summary in epochs]
        accuracies = [_spread(arm.accuracy, arm.low, arm.high, ACCURACY) for _, arm in arms]
        table.add_row(name_of(ACCURACY), *accuracies)
        table.add_row()
        for method in epochs[0][1].methods if epochs else ():
            cells = [
                _cell(summary.mean(arm.name, method, measure), greyed(summary, arm.name))
                for summary, arm in arms
            ]
            table.add_row(method, *cells)
        parts += [table, Text("")]
    for epoch, summary in epochs:
        parts += [Text(f"epoch {epoch}, {words}", "yellow") for words in doubts(summary)]
    return Group(*parts)


def accuracy_table(summary: Summary) -> Table:
    """A row an arm: how often the label is right, beside saying the commonest label always."""
    table = _table(
        "labels", ["instances", "right", name_of(ACCURACY), "commonest label alone", "said"]
    )
    for arm in summary.arms:
        accuracy = _spread(arm.accuracy, arm.low, arm.high, ACCURACY)
        said = f"{arm.mass:.0%}" if arm.mass >= 0.01 else f"{arm.mass:.0e}"
        row = (f"{arm.n:,}", f"{arm.right:,}", accuracy, f"{arm.majority:.0%}", said)
        table.add_row(arm.name, *row)
    return table


def labels_table(summary: Summary) -> Table:
    """A row a label: how often people give it, and how often each arm does."""
    first = summary.arms[0]
    table = _table("instances by label", ["people", *(arm.name for arm in summary.arms)])
    for label, count in first.gold.items():
        said = [f"{arm.predicted.get(label, 0):,}" for arm in summary.arms]
        table.add_row(label, f"{count:,}", *said)
    return table


def means_table(summary: Summary, arm: str, title: str, measures: Sequence[str]) -> Table:
    """A row a method, a column a measure; random units stand below those they are beside."""
    table = _table(title, [name_of(measure) for measure in measures])
    pale = greyed(summary, arm)
    for number, (methods, random) in enumerate(groups(summary)):
        if number:
            table.add_row()
        for method in methods:
            table.add_row(method, *_means(summary, arm, method, measures, pale))
        for method in random:
            row = _means(summary, arm, method, measures, pale)
            table.add_row(Text("  random", "italic"), *row)
    return table


def _means(
    summary: Summary, arm: str, method: str, measures: Sequence[str], pale: frozenset[str]
) -> list[Text]:
    return [_cell(summary.mean(arm, method, measure), pale) for measure in measures]


def _differences_table(summary: Summary, arm: str, title: str) -> Iterator[Table]:
    pale = greyed(summary, arm)
    table = _table(title, [name_of(measure) for measure in SHOWN])
    for method in summary.methods:
        against = against_random(summary, method)
        found = [summary.difference(arm, measure, method, against) for measure in SHOWN]
        if any(found):
            table.add_row(method, *(_difference(difference, pale) for difference in found))
    if table.row_count:
        yield table


def _changes_tables(summary: Summary) -> Iterator[RenderableType]:
    """What changes from arm to arm, controls against others left out: accuracy and every method."""
    pairs = dict.fromkeys((c.arm, c.against) for c in summary.changes if c.arm != RANDOM)
    for arm, against in pairs:
        accuracy = summary.change(ACCURACY, "", arm, against)
        if accuracy is not None:
            yield Text.assemble(
                (f"{arm} − {against}: ", "bold"), "accuracy ", _difference(accuracy, frozenset())
            )
        pale = greyed(summary, arm, against)
        for measures in filter(None, (SHOWN, texts_measured(summary))):
            table = _table(f"{arm} − {against}", [name_of(measure) for measure in measures])
            for method in summary.methods:
                found = [summary.change(measure, method, arm, against) for measure in measures]
                if any(found) and not method.startswith(RANDOM):
                    table.add_row(method, *(_difference(change, pale) for change in found))
            if table.row_count:
                yield table


def prompted_table(summary: Summary) -> Table:
    """A row an arm and a way of asking: what became of the words that the model named."""
    headings = ["arm", "replies", "naming none", "cut off", "other label"]
    headings += ["words", "absent", "by stem only", "too many"]
    table = _table("words that the model named", headings)
    for found in summary.prompted:
        replies = (found.replies, found.empty, found.cut, found.otherwise)
        words = (found.words, found.absent, found.inflected, found.surplus)
        table.add_row(found.method, found.arm, *(f"{count:,}" for count in (*replies, *words)))
    return table


# -- cells ---------------------------------------------------------------------------------------


def _table(first: str, headings: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _cell(mean: Mean | None, pale: frozenset[str]) -> Text:
    if mean is None:
        return Text("–")
    if mean.measure == "tokens":
        return Text(f"{mean.value:.1f}")
    style = "dim" if mean.measure in pale else ""
    if mean.measure in PLAIN:
        return Text(_value(mean.value, mean.measure), style)
    return Text(_spread(mean.value, mean.low, mean.high, mean.measure), style)


def _value(value: float, measure: str) -> str:
    return f"{value:{'.0%' if is_share(measure) else '.2f'}}"


def _spread(value: float, low: float, high: float, measure: str) -> str:
    ends = (_value(end, measure).removesuffix("%") for end in (low, high))
    return f"{_value(value, measure)} ({' … '.join(ends)})"


def _difference(found: Difference | Change | None, pale: frozenset[str]) -> Text:
    if found is None:
        return Text("–")
    if not (found.difference or found.low or found.high):
        return Text("0")
    words = f"{found.difference:+.2f} ({found.low:+.2f} … {found.high:+.2f}) {p_words(found.holm)}"
    return Text(words, "dim" if found.measure in pale else "")
