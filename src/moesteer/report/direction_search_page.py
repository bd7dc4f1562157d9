"""What `moesteer search --directions` prints: what was found, what was judged, and the test."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.evaluation.direction_search import BEST, DirectionResult
from moesteer.evaluation.direction_trials import DirectionTrial
from moesteer.report.comparison_page import comparison_page


def direction_search_page(result: DirectionResult) -> RenderableType:
    """The choice, all that were judged, what the controls found, and the test."""
    assert result.best.choice is not None
    aim = f"{result.target}: more {result.outcome}, towards {result.toward.upper()}"
    limits = [f"{task} at least {least:.0%}" for task, least in result.prices.items()]
    return Group(
        Text(aim, "bold"),
        Text(f"found: {result.best.choice.words}; {BEST}"),
        Text(
            f"stage 1: {result.tried:,} choices, KL at most {result.max_kl:g}; stage 2: the"
            f" {len(result.judged)} best, within: {', '.join(limits) or 'no limits'}"
        ),
        Text(""),
        _judged_table(result),
        Text(""),
        _controls_table(result),
        Text(""),
        Text("On the test prompts, once:", "bold"),
        comparison_page(result.test),
    )


def _judged_table(result: DirectionResult) -> RenderableType:
    table = _table("judged, on dev", result)
    table.add_row("unsteered", *_cells(result.unsteered))
    for trial in result.judged:
        assert trial.choice is not None
        is_best = trial.choice == result.best.choice
        style = "bold" if is_best else "" if trial.allowed else "dim"
        table.add_row(trial.choice.words, *_cells(trial), style=style)
    return table


def _controls_table(result: DirectionResult) -> RenderableType:
    """What the same search found among what should not matter."""
    table = _table("search-matched controls, on dev", result)
    for found in result.controls:
        if found.best is None or found.best.choice is None:
            words = f"seed {found.seed}: nothing within the limits, of {found.tried:,}"
            table.add_row(words, style="dim")
        else:
            table.add_row(f"seed {found.seed}: {found.best.choice.words}", *_cells(found.best))
    return table


def _table(title: str, result: DirectionResult) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(title)
    for heading in ("score", "KL", *(result.unsteered.outcomes or {})):
        table.add_column(heading, justify="right")
    return table


def _cells(trial: DirectionTrial) -> list[str]:
    kl = "–" if trial.kl is None else f"{trial.kl:.3f}"
    return [f"{trial.score:+.2f}", kl, *map(_outcomes, (trial.outcomes or {}).values())]


def _outcomes(counted: Mapping[str, int]) -> str:
    """ "refused 11, answered 14"; outcomes that no reply had are left out."""
    return ", ".join(f"{name} {count}" for name, count in counted.items() if count)
