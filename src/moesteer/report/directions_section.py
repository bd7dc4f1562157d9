"""Which directions: what a profile does to the residual stream, and what it was chosen among."""

from collections.abc import Sequence

import numpy as np

from moesteer.direction import Direction
from moesteer.directions.candidates import used, within_thresholds
from moesteer.profile import Profile
from moesteer.report.blocks import Block, Cell, Drawing, Figure, Paragraph, Table, number, text
from moesteer.report.direction_figures import layer_map

LISTED = 64
"""Candidates in the table; the figure shows all."""

MEASURED = {
    "bypass": "log-odds on A's prompts, ablated",
    "induce": "log-odds on B's prompts, added",
    "kl": "on B's prompts, ablated, nats",
}

WHERE: dict[str, str] = {
    "input": "what enters the layer",
    "attention": "what attention writes",
    "mlp": "what the feed-forward part writes",
}

TOKENS = {"all": "all", "prompt": "of the prompt", "generation": "generated"}

SIGN = (
    "A direction is the mean over prompts of A (with the behaviour) less the mean over prompts of"
    " B: a positive coefficient steers towards A, a negative one away from it; an ablation takes"
    " away what the tokens have of it."
)


def directions_blocks(profiles: Sequence[Profile]) -> list[Block]:
    """How to read directions, and each profile's."""
    blocks = [block for profile in profiles for block in direction_blocks(profile)]
    return [Paragraph(SIGN), *blocks] if blocks else []


def direction_blocks(profile: Profile) -> list[Block]:
    """What each direction does, where, how strongly; and all candidates with their scores."""
    blocks: list[Block] = []
    if profile.directions:
        headings = ("direction", "operation", "where", "layers", "coefficient", "norm", "tokens")
        rows = tuple(_row(place, one) for place, one in enumerate(profile.directions, start=1))
        blocks.append(Table(f"What is done to the residual stream: {profile.name}", headings, rows))
    if profile.candidates is not None and len(profile.candidates):
        blocks += _candidate_blocks(profile)
    return blocks


def _row(place: int, direction: Direction) -> tuple[Cell, ...]:
    places = dict.fromkeys(place for _, place in direction.sites)
    where = ", ".join(WHERE[place] for place in places)
    if direction.expert is not None:
        what = "weighted by" if direction.operation == "add" else "at the output of"
        where = f"{WHERE['mlp']}, {what} expert {direction.expert}"
    layers = sorted({layer for layer, _ in direction.sites})
    named = str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]} ({len(layers)})"
    added = direction.operation == "add"
    return (
        number(place, "d"),
        text("added" if added else "ablated"),
        text(where),
        text(named),
        number(direction.coefficient, "+g") if added else Cell("–"),
        number(direction.norm, ".4g"),
        text(TOKENS[direction.window]),
    )


def _candidate_blocks(profile: Profile) -> list[Block]:
    candidates = profile.candidates
    assert candidates is not None
    table = _candidates_table(profile)
    drawings = _maps(profile) if candidates.kind == "residual" else ()
    if not drawings:
        return [table]
    return [
        Figure(
            f"Candidates by layer and position: {profile.name}",
            drawings,
            "A column a layer, a row a position from the end of the prompt. Red is positive, blue"
            " negative; outlined where every threshold is kept, + is used. A good direction is blue"
            " in bypass, red in induce and grey in KL.",
            table,
        )
    ]


def _maps(profile: Profile) -> tuple[Drawing, ...]:
    """A map of each score that was measured."""
    candidates = profile.candidates
    assert candidates is not None
    places = list(zip(candidates.layer.tolist(), candidates.position.tolist(), strict=True))
    names = [name for name in MEASURED if name in candidates.scores]
    marked = {places[number] for number in used(profile)}
    outlined = {places[number] for number in within_thresholds(profile)}
    drawings = []
    for name in names:
        cells = {
            (layer, position): (
                float(candidates.scores[name][number]),
                f"layer {layer}, position {position}: "
                + ", ".join(f"{n} {candidates.scores[n][number]:+.3g}" for n in names),
            )
            for number, (layer, position) in enumerate(places)
        }
        least, most = (f(cells, key=lambda place: cells[place][0]) for f in (min, max))
        about = (
            f"{len(cells)} candidates; least {cells[least][0]:.3g} at layer {least[0]}, position"
            f" {least[1]}; most {cells[most][0]:.3g} at layer {most[0]}, position {most[1]}."
        )
        (title,) = _titles([name])
        drawings.append(
            layer_map(title, MEASURED[name], about, cells, marked=marked, outlined=outlined)
        )
    return tuple(drawings)


def _candidates_table(profile: Profile) -> Table:
    """The best candidates and those that are used: by bypass, or else by the first score's size."""
    candidates = profile.candidates
    assert candidates is not None
    scores = dict(candidates.scores)
    scores.setdefault("norm", np.linalg.norm(candidates.vector.astype(np.float64), axis=1))
    names = ["norm", *(name for name in scores if name != "norm")]
    key = scores["bypass"] if "bypass" in scores else -np.abs(next(iter(scores.values())))
    chosen = used(profile)
    order = [n for n in np.argsort(key, kind="stable").tolist() if n not in chosen]
    shown = [*chosen, *order[: max(0, LISTED - len(chosen))]]
    whose = candidates.kind != "residual"
    rows = tuple(
        (
            number(int(candidates.layer[n]), "d"),
            *([number(int(candidates.expert[n]), "d")] if whose else []),
            number(int(candidates.position[n]), "d") if candidates.position[n] else text("mean"),
            *(number(float(scores[name][n]), ".3g") for name in names),
            text("used" if n in chosen else ""),
        )
        for n in shown
    )
    headings = ("layer", *(["expert"] if whose else []), "position", *_titles(names), "role")
    all_of = f"{len(rows)} of {len(candidates):,}" if len(rows) < len(candidates) else "all"
    kinds = {
        "residual": "the residual stream",
        "forced": "experts, each forced in turn",
        "own": "experts' own outputs",
    }
    return Table(
        f"Candidates of {kinds[candidates.kind]}, {all_of}: {profile.name}", headings, rows
    )


def _titles(names: list[str]) -> list[str]:
    return ["KL" if name == "kl" else name for name in names]
