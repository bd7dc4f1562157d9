"""What `moesteer audit` prints: who carries it, the curve, and what restores it."""

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.auditing.audit import Audit
from moesteer.auditing.concentration import Concentration, Measure
from moesteer.auditing.importance import CHECKED, ExpertEffect, Importance
from moesteer.auditing.robustness import Point
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison, Share, pool_of
from moesteer.profile import Expert
from moesteer.report.audit_words import (
    cautions,
    choosing,
    halving,
    losing_verdict,
    naming,
    restoring_verdicts,
)
from moesteer.report.verdict import verdicts

READING = """\
Effects: what an expert's loss takes from the log-odds of A, in nats, where the replies part; sham:
the same of decisions between replies of one side, which are not about the behaviour; turned: pairs
that the model decides for A, and for B without it. Shares have Wilson's 95 % interval; of random
sets the mean and least–most. Importance was measured on other texts than the curve.\
"""

MEASURES = {
    "total": "total, nats",
    "gini": "Gini",
    "effective": "effective number",
    "top_1": "share of the first",
    "top_3": "share of the first 3",
    "top_10": "share of the first 10",
}
"""Fields of `Concentration`, in words."""


def audit_page(audit: Audit, marks: Mapping[Expert, str]) -> RenderableType:
    """All of it; `marks` adds a word to experts of which something is known."""
    verdict = losing_verdict(audit)
    parts: list[RenderableType] = [
        Text(f"“{audit.outcome}” on {audit.target}, {audit.model}", "bold"),
        Text(naming(audit)),
        Text(""),
        effects_table(audit.importance, marks),
        Text(""),
        concentration_table(audit.importance),
        Text(""),
        Text(halving(audit), "bold"),
        *([Text(verdict.sentence)] if verdict else []),
        Text(""),
        *([curve_table(audit), Text("")] if audit.curve else []),
        *restoring_parts(audit),
        Text(READING, "dim"),
        *(Text(f"note: {line}") for line in cautions(audit)),
    ]
    return Group(*parts)


def effects_table(found: Importance, marks: Mapping[Expert, str]) -> Table:
    """The experts of the largest effects, and all that are named."""
    table = _table("rank", "layer", "expert", "effect", "95 % interval", "q", "sham", "turned")
    for heading in ("held-out", "95 % interval"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for rank, expert in enumerate(listed(found), start=1):
        held = expert.held
        words = [role(expert), marks.get(expert.place, "")]
        table.add_row(
            str(rank),
            str(expert.layer),
            str(expert.expert),
            f"{expert.effect:+.2f}",
            f"{expert.low:+.2f} … {expert.high:+.2f}",
            f"{expert.q:.3f}" if expert.q >= 0.001 else "<0.001",
            f"{expert.sham:+.2f}",
            f"{expert.turned} of {found.going}",
            "–" if held is None else f"{held.effect:+.2f}",
            "–" if held is None else f"{held.low:+.2f} … {held.high:+.2f}",
            ", ".join(word for word in words if word),
            style="bold" if expert.named else "",
        )
    return table


def listed(found: Importance) -> list[ExpertEffect]:
    """The experts that are shown: those of the largest effects, and all that are named."""
    return [e for rank, e in enumerate(found.experts) if e.named or rank < CHECKED]


def role(expert: ExpertEffect) -> str:
    """Whether it is named, and whether that holds."""
    if not expert.named or expert.held is None:
        return ""
    return "named, holds" if expert.held.holds else "named, does not hold on held-out pairs"


def concentration_table(found: Importance) -> Table:
    """How unequal effects are, beside those on decisions that are not about the behaviour."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"of {found.behaviour.experts:,} experts' losses")
    for heading in ("behaviour", "95 % interval", "not about it", "95 % interval"):
        table.add_column(heading, justify="right")
    for field, words in MEASURES.items():
        cells = []
        for concentration in (found.behaviour, found.sham):
            cells += measure_cells(field, concentration)
        table.add_row(words, *cells)
    return table


def measure_cells(field: str, concentration: Concentration) -> tuple[str, str]:
    """A measure and its interval."""
    measure: Measure = getattr(concentration, field)
    if measure.value is None or measure.low is None or measure.high is None:
        return "–", "–"
    form = ".0%" if field.startswith("top") else ".2f"
    low, high = (format(end, form) for end in (measure.low, measure.high))
    return format(measure.value, form), f"{low} … {high}"


def curve_table(audit: Audit) -> Table:
    """A row a number lost: the target beside its controls, then the price."""
    first = audit.curve[0].comparison
    prices = [task.name for task in first.tasks if task.role == "price"]
    table = _table("lost", "important", "random", "least important", *prices, "beyond chance")
    intact = ["–"] * (4 + len(prices))
    intact[0] = share_words(first.share(audit.target, UNSTEERED))
    for number, name in enumerate(prices, start=3):
        intact[number] = share_words(first.share(name, UNSTEERED))
    table.add_row("0", *intact)
    for point in audit.curve:
        table.add_row(str(point.lost), *_curve_cells(audit, point, prices))
    return table


def _curve_cells(audit: Audit, point: Point, prices: list[str]) -> list[str]:
    comparison = point.comparison
    return [
        share_words(comparison.share(audit.target, STEERED)),
        pool_words(comparison, audit.target, "random"),
        pool_words(comparison, audit.target, "bottom"),
        *(share_words(comparison.share(name, STEERED)) for name in prices),
        "yes" if verdicts(comparison)[0].claimed else "no",
    ]


def restoring_parts(audit: Audit) -> Iterator[RenderableType]:
    """What was tried on dev, and what it does on test."""
    if not audit.curve:
        return
    yield Text("Restoring", "bold")
    yield Text(choosing(audit))
    for restored, (sentence, _) in zip(audit.restored, restoring_verdicts(audit), strict=True):
        tried = ", ".join(f"{one.activated}: {one.share:.0%}" for one in restored.tried)
        yield Text(sentence)
        yield Text(f"on dev, {restored.lost} lost, by number activated: {tried}", "dim")
    yield Text("")


def share_words(share: Share) -> str:
    """A share with Wilson's interval."""
    if share.share is None:
        return "unjudged"
    return f"{share.share:.0%} ({share.low:.0%}–{share.high:.0%})"


def pool_words(comparison: Comparison, task: str, pool: str) -> str:
    """The shares of a pool: of several their mean, least and most."""
    arms = [arm.name for arm in comparison.arms if pool_of(arm.name) == pool]
    shares = [comparison.share(task, arm) for arm in arms]
    known = [share.share for share in shares if share.share is not None]
    if len(known) < 2:
        return share_words(shares[0]) if shares else "–"
    return f"{sum(known) / len(known):.0%} [{min(known):.0%}–{max(known):.0%}]"


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
