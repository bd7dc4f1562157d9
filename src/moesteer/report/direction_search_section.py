"""Which direction, and how strongly: what a search found on dev, and what its controls did."""

from collections.abc import Mapping, Sequence

from moesteer.evaluation.direction_choices import Choice
from moesteer.evaluation.direction_trials import DirectionTrial, share_of
from moesteer.profile import Expert
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
from moesteer.report.figures import Series, scatter
from moesteer.report.page import DirectionSearch


def direction_search_blocks(search: DirectionSearch) -> list[Block]:
    """What was chosen, what was judged, score against KL, and of experts routing against effect."""
    result = search.result
    assert result.best.choice is not None
    tried = f"{result.tried:,} choices were tried by the mean log-odds of the behaviour after"
    kept = f"the {len(result.judged)} best with KL ≤ {result.max_kl:g} were judged"
    blocks: list[Block] = [
        Paragraph(
            f"Chosen on the dev prompts: {signs(result.best.choice.words)}. {tried} the prompts of"
            f" {result.target}; {kept}. The verdict stands on the test prompts, not on these."
        )
    ]
    if none := [str(found.seed) for found in result.controls if found.best is None]:
        blocks.append(
            Paragraph(f"In controls no choice kept to the limits (seed {', '.join(none)}).")
        )
    blocks.append(_score_figure(search))
    if result.kind != "residual":
        blocks += _routing_figure(search)
    return blocks


# -- score and KL --------------------------------------------------------------------------------


def _score_figure(search: DirectionSearch) -> Figure:
    result = search.result
    judged = {trial.choice for trial in result.judged}
    kinds: dict[str, list[tuple[float, float, str]]] = {
        style: [] for style in ("control", "tried", "target")
    }
    for trial in search.trials:
        if trial.choice is None or trial.kl is None:
            continue
        style = "target" if trial.choice in judged else "tried"
        style = "control" if trial.choice.control is not None else style
        kinds[style].append((trial.kl, trial.score, _told(trial)))
    series = [Series(style, style, tuple(points)) for style, points in kinds.items()]
    before = (0.0, result.unsteered.score, f"unsteered: score {result.unsteered.score:+.2f}")
    series.append(Series("unsteered", "plain", (before,)))
    best = result.best
    unmeasured = sum(trial.kl is None for trial in search.trials if trial.choice is not None)
    return Figure(
        f"Score against KL: {result.target} on dev",
        (
            scatter(
                f"Stage 1: score against KL, {result.target}",
                f"{len(search.trials)} choices with those of controls; chosen:"
                f" {best.choice.words if best.choice else ''}.",
                series,
                ("KL of the next token, nats", "log-odds of the behaviour"),
                rings=(
                    (best.kl or 0.0, best.score, "chosen"),
                    (0.0, result.unsteered.score, "unsteered"),
                ),
            ),
        ),
        "Red: judged. Grey: over the KL limit. Hollow: the same search among what should not"
        f" matter. KL was measured from the best score downwards; of {unmeasured:,} choices it was"
        " not.",
        _judged_table(search),
    )


def _judged_table(search: DirectionSearch) -> Table:
    result = search.result
    tasks = result.unsteered.outcomes or {}
    names = [(task, outcome) for task, counted in tasks.items() for outcome in counted]
    controls = [found.best for found in result.controls if found.best is not None]
    rows = [
        _row(trial, names, "chosen" if trial.choice == result.best.choice else "judged")
        for trial in result.judged
    ]
    rows = [_row(result.unsteered, names, "unsteered"), *rows]
    rows += [_row(trial, names, "best of a control") for trial in controls]
    headings = ("choice", "role", "score", "KL", *(f"{t}: {o}" for t, o in names), "kept")
    return Table(
        f"Judged on dev, best score first: shares of outcomes: {result.target}",
        headings,
        tuple(rows),
    )


def _row(trial: DirectionTrial, names: Sequence[tuple[str, str]], role: str) -> tuple[Cell, ...]:
    counted: Mapping[str, Mapping[str, int]] = trial.outcomes or {}
    return (
        text(signs(trial.choice.words) if trial.choice else "unsteered"),
        text(role),
        number(trial.score, "+.2f"),
        number(trial.kl),
        *(percent(share_of(counted[task], outcome)) for task, outcome in names),
        text("yes" if trial.allowed else "breaks a limit"),
    )


# -- routing and effect --------------------------------------------------------------------------


def _routing_figure(search: DirectionSearch) -> list[Block]:
    """Of every expert that was tried alone: how its routing differs, and what its direction does.

    All at one coefficient, that of the best choice: the most that a position changes the score.
    """
    result, candidates = search.result, search.profile.candidates
    assert result.best.choice is not None
    if candidates is None or "routing" not in candidates.scores:
        return []
    routing: dict[Expert, float] = {
        (layer, expert): float(value)
        for layer, expert, value in zip(
            candidates.layer.tolist(),
            candidates.expert.tolist(),
            candidates.scores["routing"],
            strict=True,
        )
    }
    effects: dict[Expert, tuple[float, Choice]] = {}
    sign = 1 if result.toward == "a" else -1
    for trial in search.trials:
        choice = trial.choice
        if choice is None or choice.coefficient != result.best.choice.coefficient:
            continue
        if len(choice.experts) == 1:
            expert = choice.layer, choice.experts[0]
            change = trial.score - result.unsteered.score
            if expert not in effects or sign * change > sign * effects[expert][0]:
                effects[expert] = change, choice
    points: dict[str, list[tuple[float, float, str]]] = {"control": [], "target": []}
    rows = []
    for expert, (change, choice) in sorted(effects.items(), key=lambda one: -sign * one[1][0]):
        kept = choice.control is None
        told = signs(
            f"layer {expert[0]}, expert {expert[1]}: routing {100 * routing[expert]:+.0f} points,"
            f" score {change:+.2f}, at position {choice.position}"
        )
        points["target" if kept else "control"].append((100 * routing[expert], change, told))
        rows.append(
            (
                number(expert[0], "d"),
                number(expert[1], "d"),
                number(100 * routing[expert], "+.1f"),
                text("over" if kept else "below"),
                number(change, "+.3f"),
                number(choice.position, "d") if choice.position else text("mean"),
            )
        )
    if not rows:
        return []
    coefficient = signs(f"{result.best.choice.coefficient:+g}")
    headings = ("layer", "expert", "routing, points", "threshold", "score", "position")
    return [
        Figure(
            "Detection and response: routing against steering, expert by expert",
            (
                scatter(
                    f"Routing difference against steering effect, {result.target}",
                    f"{len(rows)} experts, each steered alone at {coefficient}×.",
                    [Series(style, style, tuple(some)) for style, some in points.items()],
                    ("routing, A less B, percentage points", "change of the log-odds"),
                ),
            ),
            "An expert a dot: red over the routing threshold, hollow below it (in a control). Were"
            " detection response, the dots would rise with the routing. A control tries no more"
            " choices than the search, so of its experts not every position: some would reach"
            " further.",
            Table(
                f"Each expert alone at {coefficient}×, at its best position", headings, tuple(rows)
            ),
        )
    ]


def _told(trial: DirectionTrial) -> str:
    assert trial.choice is not None
    who = "control: " if trial.choice.control is not None else ""
    judged = ""
    if trial.outcomes:
        first = next(iter(trial.outcomes.values()))
        judged = "; " + ", ".join(f"{name} {count}" for name, count in first.items())
    numbers = signs(f"{trial.choice.words}: score {trial.score:+.2f}, KL {trial.kl:.3g}")
    return f"{who}{numbers}{judged}"
