"""The tables and claims of the rationales' road, made of what came of it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moesteer.evaluation.comparison import UNSTEERED
from moesteer.rationale.measures import baseline_of
from moesteer.rationale.summary import Summary
from moesteer.report import reproduce_cells as cells
from moesteer.report.rationale_words import doubts, greyed
from moesteer.report.reproduce_cells import number, text
from moesteer.reproduce.outcome import Claim, Entry, Table
from moesteer.reproduce.rationales import ATTRIBUTED, PAPER, PROMPTED, Explained, Finetuned


def rationales_tables(result: object, bundled: bool) -> Iterator[Table | Claim]:
    """The tables and claims of one step's result."""
    match result:
        case Explained():
            yield from _explained(result, bundled)
        case Finetuned():
            yield from _finetuned(result)
        case _:
            raise TypeError(f"{type(result).__name__} is no result of this road")


# -- rationales ----------------------------------------------------------------------------------


def _explained(found: Explained, bundled: bool) -> Iterator[Table | Claim]:
    name, summary = found.name, found.summary
    yield _accuracy(f"Labels of {name}", summary, name)
    yield _methods(name, summary, bundled)
    apart = _against_prompted(name, summary)
    yield apart
    compared = sum(row[3] != cells.NOTHING for row in apart.rows)
    yield Claim(
        "counts", f"{name}: of {len(apart.rows)} pairs of methods, {compared} were compared"
    )
    arm = summary.arm(UNSTEERED)
    yield Claim(
        "accuracy",
        f"{name}: accuracy {arm.accuracy:.0%} ({100 * arm.low:.0f} … {100 * arm.high:.0f});"
        f" {arm.doubt or 'nothing speaks against its flip rates'}",
    )
    yield Claim("faithful", f"{name}: {_less_faithful(summary)}")


def _accuracy(title: str, summary: Summary, source: str) -> Table:
    """How often the label is right, beside saying the commonest one always."""
    arm = summary.arm(UNSTEERED)
    words = f"{arm.accuracy:.0%} ({100 * arm.low:.0f} … {100 * arm.high:.0f})"
    rows = {
        "instances": number(arm.n),
        "labelled rightly": Entry(words, arm.accuracy, arm.low, arm.high),
        "the commonest label alone": number(arm.majority, ".0%"),
        "how probable all labels are as the reply (median)": number(arm.mass, ".0%"),
        **{f"labelled {label}": number(count) for label, count in arm.predicted.items()},
    }
    return Table(
        title,
        " ".join(doubts(summary)),
        ("", "measured"),
        tuple((text(name), entry) for name, entry in rows.items()),
        source,
    )


def _methods(name: str, summary: Summary, bundled: bool) -> Table:
    """A row a method: agreement with people and flips, alone and less random words of its count."""
    pale = bool(greyed(summary, UNSTEERED))
    rows = []
    for method in summary.methods:
        against = baseline_of(method, summary.methods)
        row = [text(method)]
        row += [
            cells.mean(summary.mean(UNSTEERED, method, measure), pale and measure == "flip")
            for measure in ("tokens", "f1", "flip")
        ]
        row += [
            cells.change(
                summary.difference(UNSTEERED, measure, method, against), pale and measure == "flip"
            )
            for measure in ("f1", "flip")
        ]
        rows.append(row)
    headings = ("method", "tokens", "F1", "flip rate", "F1 − random", "flips − random")
    about = "Means over instances; p by sign flips, adjusted over methods (Holm)."
    if not bundled:
        headings = (*headings, "paper")
        rows = [[*row, cells.NOTHING] for row in rows]
        about += f" The paper's column is empty: {PAPER.not_kept} were not noted here."
    return Table(f"Rationales of {name}", about, headings, tuple(map(tuple, rows)), name)


def _against_prompted(name: str, summary: Summary) -> Table:
    """Attributed less prompted rationales."""
    pale = bool(greyed(summary, UNSTEERED))
    rows = [
        (
            text(method),
            text(prompted),
            cells.change(summary.difference(UNSTEERED, "f1", method, prompted)),
            cells.change(summary.difference(UNSTEERED, "flip", method, prompted), pale),
        )
        for prompted in PROMPTED
        for method in ATTRIBUTED
    ]
    return Table(
        f"Attributed less prompted, {name}",
        "Flips are compared only where both were to choose as many tokens of every instance: at"
        " different counts the comparison is confounded (arXiv 2601.03089).",
        ("attributed", "prompted", "F1", "flip rate"),
        tuple(rows),
        name,
    )


def _less_faithful(summary: Summary) -> str:
    """Flips of each method less random words of its count, for neither stands on other counts."""
    said = []
    for method in (*ATTRIBUTED, *PROMPTED):
        against = baseline_of(method, summary.methods)
        found = cells.change(summary.difference(UNSTEERED, "flip", method, against))
        said.append(f"{method} {found.text}")
    doubt = summary.arm(UNSTEERED).doubt
    return f"flips beyond random: {'; '.join(said)}" + (
        f"; but flip rates mean little here, as {doubt}" if doubt else ""
    )


# -- fine-tuning ---------------------------------------------------------------------------------


def _finetuned(found: Finetuned) -> Iterator[Table | Claim]:
    name, compared, last = found.name, found.compared, found.epochs[-1][0]
    yield _by_epoch(name, found.epochs)
    rows = [
        (
            text(method),
            *(
                cells.change(compared.change(measure, method, f"epoch-{last}", "epoch-0"))
                for measure in ("f1", "flip")
            ),
        )
        for method in (*ATTRIBUTED, *PROMPTED)
    ]
    accuracy = cells.change(compared.change("accuracy", "", f"epoch-{last}", "epoch-0"))
    yield Table(
        f"What fine-tuning changed on {name}",
        f"After {last} epochs less before. Accuracy {accuracy.text}. Flips only where as many"
        " tokens were to be chosen both times.",
        ("method", "F1", "flip rate"),
        tuple(rows),
        f"{name}-finetuned",
    )
    for key, methods in (("finetuned-attributed", ATTRIBUTED), ("finetuned-prompted", PROMPTED)):
        said = "; ".join(
            f"{row[0].text} F1 {row[1].text}, flips {row[2].text}"
            for row in rows
            if row[0].text in methods
        )
        yield Claim(key, f"{name}, {last} epochs: {said}")


def _by_epoch(name: str, epochs: Sequence[tuple[int, Summary]]) -> Table:
    """A row an epoch: accuracy, then F1 and flip rate of every method."""
    methods = (*ATTRIBUTED, *PROMPTED)
    rows = []
    for epoch, summary in epochs:
        arm = summary.arms[0]
        pale = bool(greyed(summary, arm.name))
        words = f"{arm.accuracy:.0%} ({100 * arm.low:.0f} … {100 * arm.high:.0f})"
        row = [number(epoch), Entry(words, arm.accuracy, arm.low, arm.high)]
        for method in methods:
            for measure in ("f1", "flip"):
                found = summary.mean(arm.name, method, measure)
                row.append(
                    cells.NOTHING
                    if found is None
                    else number(found.value, ".2f" if measure == "f1" else ".0%")
                )
                row[-1] = replace(row[-1], pale=pale and measure == "flip")
        rows.append(tuple(row))
    headings = [f"{method}, {word}" for method in methods for word in ("F1", "flips")]
    noted = [f"Epoch {n}: {why}" for n, summary in epochs for why in doubts(summary)]
    return Table(
        f"Epochs on {name}",
        " ".join([f"{epochs[0][1].arms[0].n} instances, none of them trained on.", *noted]),
        ("epoch", "accuracy", *headings),
        tuple(rows),
        f"{name}-finetuned",
    )
