"""Rationales: which words people name, which the model's label hangs on, and what it says it used.

Accuracy and the balance of labels stand first: without them nothing else means much.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moesteer.evaluation.comparison import STEERED, UNSTEERED
from moesteer.rationale.measures import ACCURACY, RANDOM
from moesteer.rationale.summary import Change, Difference, Mean, Summary
from moesteer.report.blocks import (
    Block,
    Cell,
    Figure,
    Paragraph,
    Table,
    Warn,
    number,
    percent,
    probability,
    signs,
    text,
)
from moesteer.report.page import Rationales
from moesteer.report.rationale_figures import (
    method_dots,
    share_curves,
)
from moesteer.report.rationale_texts import text_blocks
from moesteer.report.rationale_words import (
    ALIGNED,
    FAITHFUL,
    TO,
    against_random,
    best,
    doubts,
    greyed,
    groups,
    mean_cell,
    measured,
    name_of,
    shown_arms,
    texts_measured,
    value_words,
)

CURVES = ("flip", "comprehensiveness", "sufficiency")


def rationale_blocks(run: Rationales) -> list[Block]:
    """Accuracy and labels, the methods beside each other, curves, texts, differences."""
    summary = run.summary
    arms = shown_arms(summary)
    blocks: list[Block] = [Paragraph(_answer(summary, arms[0])), *_labels(summary)]
    blocks += [Warn(words) for words in doubts(summary)]
    blocks += _steering_table(summary)
    blocks.append(_methods_figure(summary, arms))
    for arm in arms:
        for title, measures in (
            (f"Alignment with people, {arm}: means over instances, 95 % bootstrap", ALIGNED),
            (f"Faithfulness, {arm}: means over instances, 95 % bootstrap", FAITHFUL),
            (f"In which text the rationale lies, {arm}", texts_measured(summary)),
        ):
            if there := measured(summary, arm, measures):
                blocks.append(_means_table(summary, arm, title, there))
        blocks += _curves_figure(summary, arm)
    blocks += _prompted_table(summary)
    blocks += text_blocks(run, arms)
    blocks += _changes_table(summary)
    blocks += _differences_tables(summary, arms)
    return blocks


# -- in words ------------------------------------------------------------------------------------


def _answer(summary: Summary, arm: str) -> str:
    """Accuracy, then the methods that do best, beside random units."""
    facts = summary.arm(arm)
    sentences = [
        f"The label is right on {facts.right:,} of {facts.n:,} instances"
        f" ({percent(facts.accuracy).text}; the commonest label alone"
        f" {percent(facts.majority).text})."
    ]
    for measure, claim in (
        ("f1", "Most like people's words are those of"),
        ("flip", "The label hangs most on those of"),
    ):
        first, random = best(summary, arm, measure), summary.mean(arm, RANDOM, measure)
        if first is not None and measure not in greyed(summary, arm):
            beside = f"; random words {value_words(random)}" if random is not None else ""
            sentences.append(
                f"{claim} {first.method}: {name_of(measure)} {value_words(first)}{beside}."
            )
    return " ".join(sentences)


def _labels(summary: Summary) -> list[Block]:
    rows = tuple(
        (
            text(arm.name),
            number(arm.n, ",d"),
            percent(arm.accuracy),
            percent(arm.low),
            percent(arm.high),
            percent(arm.majority),
            number(arm.mass, ".2g"),
        )
        for arm in summary.arms
    )
    headings = (
        "arm",
        "instances",
        name_of(ACCURACY),
        "from",
        "to",
        "commonest label alone",
        "said",
    )
    by_label = tuple(
        (
            text(label),
            number(count, ",d"),
            *(number(arm.predicted.get(label, 0), ",d") for arm in summary.arms),
        )
        for label, count in summary.arms[0].gold.items()
    )
    return [
        Table("How often the label is right, with Wilson's 95 % interval", headings, rows),
        Table(
            "Instances by label: as people label them, and as the model does",
            ("label", "people", *(arm.name for arm in summary.arms)),
            by_label,
        ),
    ]


# -- methods -------------------------------------------------------------------------------------


def _methods_figure(summary: Summary, arms: Sequence[str]) -> Figure:
    rows = []
    for methods, random in groups(summary):
        for method in (*methods, *random):
            for arm in arms:
                means = [summary.mean(arm, method, measure) for measure in ("f1", "flip")]
                if any(mean is not None for mean in means):
                    ends = (cell for mean in means for cell in _ends(mean, greyed(summary, arm)))
                    rows.append((text(method), text(arm), *ends))
    headings = ("method", "arm", "F1", "from", "to", "flip rate", "from", "to")
    several = " Red: steered; black: unsteered." if len(arms) > 1 else ""
    return Figure(
        "Do people agree, and does the label hang on it?",
        tuple(method_dots(summary, measure, arms) for measure in ("f1", "flip")),
        "Left: how far the words are those that people marked. Right: how often the label changes"
        " without them. Hollow: as many random words. Methods that choose as many words as people"
        f" marked come first, then what the model named.{several}",
        Table("F1 and flip rate, with 95 % bootstrap intervals", headings, tuple(rows)),
    )


def _ends(mean: Mean | None, pale: frozenset[str]) -> tuple[Cell, ...]:
    if mean is None:
        return (text("–"), text("–"), text("–"))
    cells = (number(mean.value), number(mean.low), number(mean.high))
    return tuple(replace(cell, pale=mean.measure in pale) for cell in cells)


def _means_table(summary: Summary, arm: str, title: str, measures: Sequence[str]) -> Table:
    pale = greyed(summary, arm)
    rows: list[tuple[Cell, ...]] = []
    apart: list[int] = []
    for methods, random in groups(summary):
        for method in (*methods, *random):
            means = [summary.mean(arm, method, measure) for measure in measures]
            if method in random:
                apart.append(len(rows))
            rows.append((text(method), *(mean_cell(mean, pale) for mean in means)))
    headings = ("method", *map(name_of, measures))
    return Table(title, headings, tuple(rows), frozenset(apart))


def _curves_figure(summary: Summary, arm: str) -> Iterator[Figure]:
    drawings = [share_curves(summary, arm, measure) for measure in CURVES]
    if not any(drawings):
        return
    rows = []
    for method in summary.methods:
        for points in zip(*(summary.curve(arm, method, m) for m in CURVES), strict=True):
            cells = (mean_cell(point, greyed(summary, arm)) for point in points)
            rows.append((text(method), percent(points[0].share), *cells))
    yield Figure(
        f"More words, more change: {arm}",
        tuple(drawing for drawing in drawings if drawing is not None),
        "Flip rate and comprehensiveness: without a method's best words, the more the better."
        " Sufficiency: with nothing but them, the less the better. Lines of one colour look at the"
        " same: attention blue, gradients red, routing green, occlusion black, random units grey.",
        Table(
            f"What masking shares of the units changes, {arm}",
            ("method", "tokens", *map(name_of, CURVES)),
            tuple(rows),
        ),
    )


def _prompted_table(summary: Summary) -> list[Block]:
    rows = tuple(
        (
            text(found.method),
            text(found.arm),
            *(
                number(count, ",d")
                for count in (
                    found.replies,
                    found.empty,
                    found.cut,
                    found.otherwise,
                    found.words,
                    found.absent,
                    found.inflected,
                    found.surplus,
                )
            ),
        )
        for found in summary.prompted
    )
    headings = ("asked", "arm", "replies", "naming none", "cut off", "other label")
    headings += ("words", "absent", "by stem", "too many")
    caption = (
        "Words that the model named: of the replies, how many name none, are as long as allowed, or"
        " are to begin with the model's label and don't; of the words, how many are not in the"
        " texts, found by their stem only, or beyond the number asked for"
    )
    return [Table(caption, headings, rows)] if rows else []


# -- differences ---------------------------------------------------------------------------------


def _steering_table(summary: Summary) -> Iterator[Table]:
    """Whether steering changes the reasons: a row a method, the accuracy in the caption."""
    accuracy = summary.change(ACCURACY, "", STEERED, UNSTEERED)
    if accuracy is None:
        return
    measures = ("f1", "flip", *texts_measured(summary))
    pale = greyed(summary, STEERED, UNSTEERED)
    rows = tuple(
        (
            text(method),
            *(_change(summary.change(m, method, STEERED, UNSTEERED), pale) for m in measures),
        )
        for method in summary.methods
        if not method.startswith(RANDOM)
    )
    yield Table(
        f"Steered less unsteered, paired by instance, 95 % bootstrap; accuracy"
        f" {_change(accuracy, pale).text}",
        ("method", *map(name_of, measures)),
        rows,
    )


def _change(change: Change | None, pale: frozenset[str]) -> Cell:
    if change is None:
        return text("–")
    value, low, high = (f"{n:+.2f}" for n in (change.difference, change.low, change.high))
    words = signs(value) + f" ({signs(low)}{TO}{signs(high)})"
    return Cell(words, change.difference, pale=change.measure in pale)


def _changes_table(summary: Summary) -> list[Block]:
    rows = tuple(
        (
            text(f"{change.arm} − {change.against}"),
            text(change.method or "the label"),
            text(name_of(change.measure)),
            *_tested(change, greyed(summary, change.arm, change.against)),
        )
        for change in summary.changes
    )
    headings = ("arms", "method", "measure", "change", "from", "to", "p (Holm)")
    caption = "Every change from arm to arm, paired by instance, with 95 % bootstrap intervals"
    return [Table(caption, headings, rows)] if rows else []


def _differences_tables(summary: Summary, arms: Sequence[str]) -> Iterator[Table]:
    """Each method less random units, then the methods against each other."""
    headings = ("method", "against", "arm", "measure", "difference", "from", "to", "p (Holm)")
    for caption, random in (
        ("Each method less as many random units, paired by instance", True),
        ("Methods against each other, paired by instance", False),
    ):
        rows = tuple(
            (
                text(found.method),
                text(found.against),
                text(found.arm),
                text(name_of(found.measure)),
                *_tested(found, greyed(summary, found.arm)),
            )
            for found in summary.differences
            if found.arm in arms
            and (found.against == against_random(summary, found.method)) == random
        )
        if rows:
            yield Table(caption, headings, rows)


def _tested(found: Difference | Change, pale: frozenset[str]) -> tuple[Cell, ...]:
    cells = (
        number(found.difference, "+.3f"),
        number(found.low, "+.3f"),
        number(found.high, "+.3f"),
        probability(found.holm),
    )
    return tuple(replace(cell, pale=found.measure in pale) for cell in cells)
