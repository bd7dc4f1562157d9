"""Which experts: every score of a profile, and how certain it is."""

from moesteer.detection.selecting import experts_table, ranked_experts
from moesteer.profile import Profile
from moesteer.report.blocks import (
    Block,
    Cell,
    Figure,
    Table,
    Warn,
    number,
    percent,
    probability,
    text,
)
from moesteer.report.figures import (
    heat_map,
    volcano,
)

LISTED = 64
"""Experts in the table; the figure shows all."""


def expert_blocks(profile: Profile) -> list[Block]:
    """All scores as a heat map, beside their certainty, and as a table."""
    table = _experts_table(profile)
    figures: list[Block] = [
        Figure(
            f"Scores of all experts: {profile.name}",
            (heat_map(profile),),
            "A row a layer, a column an expert. Red goes with A, blue with B; outlined where"
            " q < 0.05; + activated, − deactivated.",
            _grid(profile),
        )
    ]
    if min(experts_table(profile, "p").values()) < 1:
        figures.append(
            Figure(
                f"Score against certainty: {profile.name}",
                (volcano(profile),),
                "An expert a dot: filled where q < 0.05, ringed where steered.",
                table,
            )
        )
        return figures
    untested = "Nothing tells how certain these scores are: no pairs to resample were kept."
    return [*figures, Warn(untested), table]


def _experts_table(profile: Profile) -> Table:
    low, high, q = (experts_table(profile, key) for key in ("low", "high", "q"))
    value, p = experts_table(profile, "value"), experts_table(profile, "p")
    in_a, in_b = experts_table(profile, "rate_a"), experts_table(profile, "rate_b")
    role = dict.fromkeys(profile.activated, "activated")
    role |= dict.fromkeys(profile.deactivated, "deactivated")
    ranked = ranked_experts(profile)
    chosen = [expert for place, expert in enumerate(ranked) if place < LISTED or expert in role]
    rank = {expert: place for place, expert in enumerate(ranked, start=1)}
    rows = tuple(
        (
            number(rank[e], "d"),
            number(e[0], "d"),
            number(e[1], "d"),
            number(value[e], "+.3f"),
            number(low[e], "+.3f"),
            number(high[e], "+.3f"),
            probability(p[e]),
            probability(q[e]),
            percent(in_a[e]),
            percent(in_b[e]),
            text(role.get(e, "")),
        )
        for e in chosen
    )
    headings = ("rank", "layer", "expert", "score", "from", "to", "p", "q", "in A", "in B", "role")
    shown = f"the {len(rows)} strongest and all steered of {len(ranked):,} experts"
    shown = shown if len(rows) < len(ranked) else f"all {len(ranked)} experts"
    return Table(f"Scores of {shown}, with 95 % intervals: {profile.name}", headings, rows)


def _grid(profile: Profile) -> Table:
    """The heat map in numbers: a row a layer."""
    assert profile.model is not None
    value = experts_table(profile, "value")
    widest = max(shape.experts for shape in profile.model.layers)
    rows = tuple(
        (
            number(shape.layer, "d"),
            *(
                number(value[shape.layer, e], "+.2f") if e < shape.experts else Cell("–")
                for e in range(widest)
            ),
        )
        for shape in profile.model.layers
    )
    headings = ("layer", *(str(expert) for expert in range(widest)))
    return Table(f"Scores by layer and expert: {profile.name}", headings, rows)
