"""What `moesteer search` prints: what was found, its doses and rivals, and the test."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.evaluation.search import BEST, SearchResult
from moesteer.evaluation.trials import Trial
from moesteer.report.comparison_page import comparison_page


def search_page(result: SearchResult) -> RenderableType:
    """The choice, the dose curve, the Pareto front, what the controls found, and the test."""
    best = result.best
    aim = f"{result.target}: more {result.outcome}, towards {result.toward.upper()}"
    return Group(
        Text(aim, "bold"),
        Text(
            f"found: {best.activate} activated, {best.deactivate} deactivated by {best.detector};"
            f" {BEST}"
        ),
        Text(_limits(result)),
        Text(""),
        trials_table("dose, on dev", result, [result.unsteered, *result.dose]),
        Text(""),
        trials_table("no other is better in all", result, result.front),
        Text(""),
        controls_table(result),
        Text(""),
        Text("On the test prompts, once:", "bold"),
        comparison_page(result.test),
    )


def trials_table(title: str, result: SearchResult, trials: Sequence[Trial]) -> RenderableType:
    """A row a trial: the numbers, the share of each task's outcome, KL."""
    table = _table(title, result)
    for trial in trials:
        table.add_row(_numbers(trial), *_cells(trial), style="bold" if _is(trial, result) else "")
    return table


def controls_table(result: SearchResult) -> RenderableType:
    """What the same search found among randomly ranked experts."""
    table = _table("search-matched controls, on dev", result)
    for found in result.controls:
        name = f"random ranks {found.seed}"
        if found.best is None:
            table.add_row(f"{name}: nothing within the limits", style="dim")
        else:
            table.add_row(f"{name}: {_numbers(found.best)}", *_cells(found.best))
    return table


def _table(title: str, result: SearchResult) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(title)
    for task in result.unsteered.values:
        table.add_column(task, justify="right")
    table.add_column("KL", justify="right")
    return table


def _cells(trial: Trial) -> list[str]:
    return [*(f"{share:.0%}" for share in trial.values.values()), f"{trial.kl:.4f}"]


def _numbers(trial: Trial) -> str:
    return "unsteered" if not trial.detector else f"+{trial.activate} −{trial.deactivate}"


def _is(trial: Trial, result: SearchResult) -> bool:
    best = result.best
    return (trial.detector, trial.activate, trial.deactivate) == (
        best.detector,
        best.activate,
        best.deactivate,
    )


def _limits(result: SearchResult) -> str:
    limits = [f"{task} at least {least:.0%}" for task, least in result.prices.items()]
    if result.max_kl is not None:
        limits.append(f"KL at most {result.max_kl:g}")
    return f"within: {', '.join(limits) or 'no limits'}; {result.optimiser}, {result.budget} trials"
