"""What `moesteer lm-eval` prints: a row a metric, steered beside unsteered and the controls."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.evaluation.comparison import STEERED, UNSTEERED, compared, pool_of
from moesteer.harnesses.paired import Gap, Measure, SuiteComparison, Value
from moesteer.report.comparison_page import fired_line, p_words

READING = """\
Values are the harness's, ± its standard error; of several controls their mean and least–most. ↑:
more is better. Differences are paired by document, with a 95 % bootstrap interval over documents,
and, of documents that are right or wrong, an exact p adjusted over all rows (Holm); 0 alone: no
difference on any document; –: the number does not come out of single documents. They speak of other
documents, not of other random experts; how far these lie apart is seen in their least and most.\
"""


def harness_page(comparison: SuiteComparison) -> RenderableType:
    """The table, how to read it, and the proof of firing."""
    title = f"{comparison.profile} on {comparison.model}, {comparison.harness}"
    return Group(
        Text(title, "bold"),
        Text(""),
        measures_table(comparison),
        Text(""),
        Text(READING, "dim"),
        *(Text(line) for line in _below(comparison)),
    )


def measures_table(comparison: SuiteComparison) -> RenderableType:
    """A row a metric of a task; a column a pool of arms, and one for each difference."""
    arms = [arm.name for arm in comparison.arms]
    pools = list(dict.fromkeys(pool_of(arm) for arm in arms))
    pairs = compared(arms)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    table.add_column("documents", justify="right")
    for heading in [*pools, *(f"{arm} − {against}" for arm, against in pairs)]:
        style = "" if heading in (UNSTEERED, STEERED) or heading.startswith(STEERED) else "dim"
        table.add_column(heading, justify="right", style=style)
    before = ""
    for measure in comparison.measures:
        mine = [value for value in comparison.values if value.measure == measure]
        gaps = {(d.arm, d.against): d for d in comparison.differences if d.measure == measure}
        table.add_row(
            "" if measure.task == before else measure.task,
            _named(measure),
            f"{mine[0].n:,}",
            *(_value_cell([value for value in mine if pool_of(value.arm) == p]) for p in pools),
            *(_gap_cell(gaps[pair]) for pair in pairs),
        )
        before = measure.task
    return table


def _below(comparison: SuiteComparison) -> Iterator[str]:
    for arm in comparison.arms:
        if arm.name != UNSTEERED:
            yield fired_line(arm)
    for note in comparison.notes:
        yield f"note: {note}"


def _named(measure: Measure) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[measure.higher_is_better]
    through = "" if measure.filter == "none" else f" ({measure.filter})"
    return f"{measure.metric}{through}{arrow}"


def _value_cell(values: Sequence[Value]) -> str:
    numbers = [value.value for value in values]
    if len(numbers) > 1:
        mean = sum(numbers) / len(numbers)
        return f"{mean:.3f} [{min(numbers):.3f}–{max(numbers):.3f}]"
    error = values[0].stderr
    return f"{numbers[0]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _gap_cell(gap: Gap) -> str:
    if gap.difference is None or gap.low is None or gap.high is None:
        return "–"
    if not (gap.difference or gap.low or gap.high):
        return "0"
    words = f"{gap.difference:+.3f} ({gap.low:+.3f} … {gap.high:+.3f}) {p_words(gap.holm)}"
    return words.rstrip()
