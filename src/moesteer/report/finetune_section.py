"""What fine-tuning does to the reasons: accuracy, agreement and faithfulness after each epoch."""

from collections.abc import Sequence

from moesteer.rationale.measures import ACCURACY
from moesteer.rationale.summary import Summary
from moesteer.report.blocks import Block, Figure, Table, Warn, number, text
from moesteer.report.page import Finetuned
from moesteer.report.rationale_figures import accuracy_curve, epoch_curves
from moesteer.report.rationale_words import doubts, greyed, mean_cell, name_of


def finetune_blocks(run: Finetuned) -> list[Block]:
    """One figure over the epochs: accuracy, then F1 and flip rate of every method."""
    epochs = run.epochs
    drawings = [accuracy_curve(epochs), *(epoch_curves(epochs, m) for m in ("f1", "flip"))]
    blocks: list[Block] = [
        Warn(f"Epoch {epoch}, {words}") for epoch, summary in epochs for words in doubts(summary)
    ]
    wanted, last = run.run.settings.get("training", {}).get("epochs"), epochs[-1][0]
    if wanted is not None and last < wanted:
        blocks.append(Warn(f"Unfinished: {last} of {wanted} epochs; its command goes on with it."))
    blocks.append(
        Figure(
            "What fine-tuning changes",
            tuple(drawing for drawing in drawings if drawing is not None),
            "Epoch 0 is the model before. Hollow: flip rates that mean little. Lines of one colour"
            " look at the same: attention blue, gradients red, routing green, the model's own words"
            " violet, random units grey.",
            _epochs_table(epochs),
        )
    )
    return blocks


def _epochs_table(epochs: Sequence[tuple[int, Summary]]) -> Table:
    rows = []
    for epoch, summary in epochs:
        arm = summary.arms[0]
        pale = greyed(summary, arm.name)
        right = (number(arm.accuracy), number(arm.low), number(arm.high))
        for method in summary.methods:
            cells = (mean_cell(summary.mean(arm.name, method, m), pale) for m in ("f1", "flip"))
            rows.append((number(epoch, "d"), *right, text(method), *cells))
    headings = ("epoch", name_of(ACCURACY), "from", "to", "method", "F1", "flip rate")
    return Table("Accuracy, F1 and flip rate after each epoch", headings, tuple(rows))
