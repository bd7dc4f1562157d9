"""What `moesteer direction`, `aim` and `show` print of a profile with directions to choose from."""

from collections.abc import Callable, Mapping

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.direction import Candidates
from moesteer.directions.candidates import used
from moesteer.profile import Profile
from moesteer.report.terminal import expert_table, profile_facts

LEGEND = {
    "bypass": "log-odds of the behaviour on A's prompts while the direction is ablated",
    "induce": "on B's while it is added",
    "kl": "what its ablation changes on B's, in nats",
}
"""What the scores are that say by themselves too little."""


COLUMNS = {
    "norm": "norm",
    "bypass": "bypass",
    "induce": "induce",
    "kl": "KL",
    "routing": "first A − B",
    "routing_top_k": "in top-k A − B",
    "probability_a": "p in A",
    "probability_b": "p in B",
}
"""Scores that have a column, and its heading."""


def direction_page(profile: Profile, top: int) -> RenderableType:
    """What the profile does, what its directions were measured on, and the `top` best of them."""
    candidates = profile.candidates
    assert candidates is not None
    parts: list[RenderableType] = [profile_facts(profile)]
    if profile.evidence is not None and "refusal_tokens" in profile.evidence.settings:
        parts.append(_measured(profile.evidence.settings))
    if profile.scores is not None:
        parts += [Text(""), expert_table(profile, top)]
    parts += [Text(""), candidates_table(profile, top)]
    legend = [f"{name}: {words}" for name, words in LEGEND.items() if name in candidates.scores]
    if legend:
        parts.append(Text("; ".join(legend), "dim"))
    return Group(*parts)


def _measured(settings: Mapping[str, bool | int | float | str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for side in "ab":
        counts = [
            f"{settings[f'{part}_{side}_kept']} of {settings[f'{part}_{side}']} to {purpose}"
            for part, purpose in (("fit", "fit on"), ("validate", "choose on"))
        ]
        sign = "above" if side == "a" else "below"
        words = f"{', '.join(counts)} have a score {sign} 0"
        table.add_row(f"prompts of {side.upper()}", f"{settings[f'prompts_{side}']}; {words}")
    table.add_row("score", f"log-odds that a reply begins with {settings['refusal_tokens']}")
    table.add_row(
        "positions",
        f"the last {settings['positions']};"
        f" {settings['after_instruction']} come after the instruction",
    )
    if "max_kl" in settings:
        table.add_row(
            "chosen by",
            f"the lowest bypass with KL ≤ {settings['max_kl']:g}, induce ≥"
            f" {settings['min_induce']:g}, layer < {settings['max_layer']:g} of all",
        )
    return table


def candidates_table(profile: Profile, top: int) -> RenderableType:
    """The `top` best candidates, and those that are used: a column a score.

    Of an expert's directions only the longest, unless another is used.
    """
    candidates = profile.candidates
    assert candidates is not None
    of_experts = candidates.kind != "residual"
    names = [name for name in COLUMNS if name in candidates.scores]
    kept = candidates.scores.get("kept", np.zeros(len(candidates)))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("layer", *["expert"] * of_experts, "position", *names, ""):
        title = COLUMNS.get(heading, heading)
        table.add_column(title, justify="right" if heading else "left")
    in_use = used(profile)
    order = _best_first(candidates)
    for number in sorted({*order[:top], *in_use}, key=_rank(candidates)):
        marks = ["kept"] * bool(kept[number]) + ["used"] * (number in in_use)
        table.add_row(
            str(candidates.layer[number]),
            *[str(candidates.expert[number])] * of_experts,
            str(candidates.position[number] or "mean"),
            *(f"{candidates.scores[name][number]:.4g}" for name in names),
            ", ".join(marks),
            style="bold" if number in in_use else "",
        )
    left = len(candidates) - table.row_count
    return Group(table, Text(f"and {left} more, in the file", "dim")) if left else table


def _rank(candidates: Candidates) -> Callable[[int], tuple[float, float]]:
    """Lowest bypass first, or the largest difference of routing; then the longest."""
    scores = candidates.scores
    norm = np.linalg.norm(candidates.vector, axis=1)
    first = -norm
    if "bypass" in scores:
        first = scores["bypass"]
    elif "routing" in scores:
        first = -np.abs(scores["routing"])
    return lambda number: (float(first[number]), -float(norm[number]))


def _best_first(candidates: Candidates) -> list[int]:
    """Candidates by rank, of each expert the first."""
    order = sorted(range(len(candidates)), key=_rank(candidates))
    if candidates.kind == "residual":
        return order
    first: dict[tuple[int, int], int] = {}
    for number in order:
        whose = int(candidates.layer[number]), int(candidates.expert[number])
        first.setdefault(whose, number)
    return list(first.values())
