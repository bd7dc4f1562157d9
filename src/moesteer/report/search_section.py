"""How many experts: what a search found on dev, and what fewer, more and random ones do."""

from collections.abc import Sequence

from moesteer.evaluation.search import SearchResult, Trial
from moesteer.report.blocks import (
    Block,
    Cell,
    Figure,
    Paragraph,
    Table,
    number,
    percent,
    text,
)
from moesteer.report.figures import (
    Series,
    as_percent,
    curves,
    scatter,
)
from moesteer.report.page import Search


def search_blocks(search: Search) -> list[Block]:
    """What was chosen, the dose curve, and target against price."""
    result = search.result
    table = _trials_table(search)
    found = [control.best for control in result.controls if control.best is not None]
    none = [control.seed for control in result.controls if control.best is None]
    blocks: list[Block] = [
        Paragraph(
            f"Chosen on the dev prompts: {_choice(result.best)}, with {_values(result.best)}. The"
            " verdict stands on the test prompts, not on these."
        )
    ]
    if none:
        seeds = ", ".join(map(str, none))
        blocks.append(
            Paragraph(f"Among random experts no choice kept to the limits (seed {seeds}).")
        )
    blocks.append(_dose_figure(result, found))
    blocks.append(_front_figure(search, table))
    return blocks


def _dose_figure(result: SearchResult, found: Sequence[Trial]) -> Figure:
    trials = sorted((result.unsteered, *result.dose), key=_steered)
    lines = [
        Series(
            task,
            "target" if task == result.target else f"price price{place}",
            tuple((_steered(t), t.values[task], f"{task}: {_told(t)}") for t in trials),
        )
        for place, task in enumerate(result.unsteered.values)
    ]
    random = tuple(
        (
            _steered(trial),
            trial.values[result.target],
            f"search-matched random experts, {result.target}: {_told(trial)}",
        )
        for trial in found
    )
    rows = tuple(_trial_row(trial, result) for trial in trials)
    return Figure(
        f"Dose curve: {result.target} on dev",
        (
            curves(
                f"Dose curve: {result.target} and its prices",
                f"Shares at {len(trials)} numbers of experts; chosen: {_choice(result.best)}.",
                lines,
                ("experts steered", f"target: share of “{result.outcome}”", "prices: share kept"),
                marked=_steered(result.best),
                loose=(Series("random", "control", random),),
            ),
        ),
        "Solid: the target. Dashed: the prices. Hollow: the best that the same search found among"
        " randomly ranked experts.",
        Table(f"Dose curve: {result.target}", _trial_headings(result), rows),
    )


def _front_figure(search: Search, table: Table) -> Figure:
    result = search.result
    front = {_key(trial) for trial in result.front}

    def place(trial: Trial) -> tuple[float, float]:
        prices = [
            share - result.unsteered.values[task]
            for task, share in trial.values.items()
            if task != result.target
        ]
        return (min(prices) if prices else -trial.kl), trial.values[result.target]

    kinds: dict[str, list[tuple[float, float, str]]] = {
        style: [] for style in ("control", "unsure", "tried", "target")
    }
    for trial in search.trials:
        if trial.stage == "dose":
            continue
        style = "tried" if trial.allowed else "unsure"
        style = "control" if trial.control else "target" if _key(trial) in front else style
        who = "random experts" if trial.control else "search"
        kinds[style].append((*place(trial), f"{who}: {_told(trial)}"))
    series = [Series(style, style, tuple(points)) for style, points in kinds.items()]
    prices = len(result.unsteered.values) > 1
    across = "worst price: change of share" if prices else "−KL, nats a token"
    return Figure(
        f"Target against price: {result.target} on dev",
        (
            scatter(
                f"Pareto front: {result.target} against its price",
                f"{len(search.trials)} trials, {len(result.front)} on the front.",
                series,
                (across, f"share of “{result.outcome}”"),
                form=as_percent,
                rings=((*place(result.best), "chosen"), (*place(result.unsteered), "unsteered")),
            ),
        ),
        "Red: no other trial is better in the target and all prices at once. Grey: the other"
        " trials, thin where they break a limit. Hollow: the same search among random experts.",
        table,
    )


def _trials_table(search: Search) -> Table:
    rows = tuple(_trial_row(trial, search.result) for trial in search.trials)
    return Table("All trials of the search, on dev", _trial_headings(search.result), rows)


def _trial_headings(result: SearchResult) -> tuple[str, ...]:
    return ("stage", "ranking", "activated", "deactivated", *result.unsteered.values, "KL", "kept")


def _trial_row(trial: Trial, result: SearchResult) -> tuple[Cell, ...]:
    stage = f"random {trial.seed}" if trial.control else trial.stage
    return (
        text(stage),
        text(trial.detector or "–"),
        number(trial.activate, "d"),
        number(trial.deactivate, "d"),
        *(percent(trial.values.get(task)) for task in result.unsteered.values),
        number(trial.kl),
        text("yes" if trial.allowed else "breaks a limit"),
    )


def _steered(trial: Trial) -> int:
    return trial.activate + trial.deactivate


def _key(trial: Trial) -> tuple:
    return (trial.control, trial.seed, trial.detector, trial.activate, trial.deactivate)


def _choice(trial: Trial) -> str:
    if not trial.detector:
        return trial.stage
    numbers = f"{trial.activate} activated, {trial.deactivate} deactivated"
    return f"{numbers}, ranked by {trial.detector}"


def _values(trial: Trial) -> str:
    return ", ".join(f"{percent(share).text} on {task}" for task, share in trial.values.items())


def _told(trial: Trial) -> str:
    broken = "" if trial.allowed else "; breaks a limit"
    return f"{_choice(trial)}: {_values(trial)}; KL {trial.kl:.3f}{broken}"
