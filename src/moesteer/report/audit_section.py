"""An audit in the report: who carries the behaviour, the robustness curve, and what restores it."""

from collections.abc import Sequence
from dataclasses import replace

from moesteer.auditing.audit import Audit
from moesteer.auditing.importance import Importance
from moesteer.auditing.restoring import Restored
from moesteer.auditing.robustness import lost_words
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Share, pool_of
from moesteer.profile import Profile
from moesteer.report.audit_page import MEASURES, measure_cells, role
from moesteer.report.audit_words import (
    choosing,
    halving,
    losing_verdict,
    naming,
    place_words,
    restoring_verdicts,
)
from moesteer.report.blocks import (
    Block,
    Cell,
    Curve,
    Dot,
    Drawing,
    Figure,
    Label,
    Line,
    Mark,
    Paragraph,
    Table,
    number,
    percent,
    probability,
    signs,
    text,
)
from moesteer.report.figures import LEFT, Scale, apart, as_percent, drawn_axes, heat_map
from moesteer.report.page import Audited
from moesteer.report.verdict import verdicts


def audit_leads(audit: Audit) -> list[tuple[str, bool]]:
    """The sentences of the verdict, and whether each claims something."""
    verdict = losing_verdict(audit)
    losing = [] if verdict is None else [(f"{halving(audit)} {verdict.sentence}", verdict.claimed)]
    return [(naming(audit), bool(audit.importance.named)), *losing, *restoring_verdicts(audit)]


def audit_blocks(audited: Audited) -> list[Block]:
    """Effects, their concentration, the curve, and restoring."""
    audit = audited.result
    blocks: list[Block] = [
        _effects_figure(audit, audited.effects),
        _concentration(audit.importance),
    ]
    if audit.curve:
        blocks.append(_curve_figure(audit))
        blocks.append(Paragraph(choosing(audit)))
    if audit.restored:
        blocks += [_tried_table(audit.restored), *_restored_table(audit)]
    return [*blocks, *(Paragraph(note) for note in audit.notes)]


# -- effects -------------------------------------------------------------------------------------


def _effects_figure(audit: Audit, effects: Profile) -> Figure:
    found = audit.importance
    named = tuple(expert.place for expert in found.named)
    shown = replace(effects, activated=(), deactivated=named)
    rows = tuple(
        (
            number(expert.layer, "d"),
            number(expert.expert, "d"),
            number(expert.effect, "+.3f"),
            text(signs(f"{expert.low:+.3f} … {expert.high:+.3f}")),
            probability(expert.q),
            number(expert.sham, "+.3f"),
            Cell(f"{expert.turned} of {found.going}", expert.turned),
            number(None if expert.held is None else expert.held.effect, "+.3f"),
            text(
                "–"
                if expert.held is None
                else signs(f"{expert.held.low:+.3f} … {expert.held.high:+.3f}")
            ),
            text(role(expert)),
        )
        for expert in found.experts
    )
    headings = ("layer", "expert", "effect", "95 % interval", "q", "sham", "turned")
    return Figure(
        f"What the loss of each expert takes away: “{audit.outcome}”",
        (heat_map(shown),),
        f"Nats of log-odds of A, where the replies of {found.pairs:,} pairs part; red: its loss"
        " takes A away. Outlined where q < 0.05; − is named: beyond the"
        f" {found.reach:.2f} nats by which the loss of {place_words(found.reach_of)} moves"
        f" {found.shams:,} decisions that are not about the behaviour (sham).",
        Table(
            "Effects of losing each expert, in nats",
            (*headings, "held-out", "95 % interval", "role"),
            rows,
        ),
    )


def _concentration(found: Importance) -> Table:
    rows = tuple(
        (
            text(words),
            *(
                text(cell)
                for concentration in (found.behaviour, found.sham)
                for cell in measure_cells(field, concentration)
            ),
        )
        for field, words in MEASURES.items()
    )
    return Table(
        f"How concentrated the effects of {found.behaviour.experts:,} experts are, beside those on"
        " decisions that are not about the behaviour",
        ("measure", "behaviour", "95 % interval", "not about it", "95 % interval"),
        rows,
    )


# -- the curve -----------------------------------------------------------------------------------

WIDTH, HEIGHT = 600, 336


def _curve_figure(audit: Audit) -> Figure:
    first = audit.curve[0].comparison
    prices = [task.name for task in first.tasks if task.role == "price"]
    return Figure(
        f"Robustness: “{audit.outcome}” on {audit.target} against lost experts",
        (robustness_drawing(audit),),
        "Red: the most important experts lost, with Wilson's 95 % interval. Grey: as many random"
        " experts of the same layers, from the least seed to the largest. Dashed blue: the prices,"
        " with the important experts lost. Hollow: random sets and, dotted, the least important."
        + (" Green: what activating others restores." if _tests(audit) else ""),
        Table(
            "The robustness curve",
            (
                "lost",
                "important",
                "95 % interval",
                "random",
                "least important",
                *(f"{name}, important lost" for name in prices),
                "beyond chance",
            ),
            tuple(_curve_rows(audit, prices)),
        ),
    )


def _curve_rows(audit: Audit, prices: Sequence[str]) -> list[tuple[Cell, ...]]:
    first = audit.curve[0].comparison
    intact = first.share(audit.target, UNSTEERED)
    dash = Cell("–")
    shares = (percent(first.share(name, UNSTEERED).share) for name in prices)
    rows: list[tuple[Cell, ...]] = [
        (number(0, "d"), percent(intact.share), _ends(intact), dash, dash, *shares, dash)
    ]
    for point in audit.curve:
        comparison = point.comparison
        lost = comparison.share(audit.target, STEERED)
        randomly = [s.share for s in _pool(audit, point.lost, "random") if s.share is not None]
        mean = sum(randomly) / len(randomly) if randomly else None
        least = [s.share for s in _pool(audit, point.lost, "bottom")]
        rows.append(
            (
                number(point.lost, "d"),
                percent(lost.share),
                _ends(lost),
                percent(mean),
                percent(least[0] if least else None),
                *(percent(comparison.share(name, STEERED).share) for name in prices),
                text("yes" if verdicts(comparison)[0].claimed else "no"),
            )
        )
    return rows


def robustness_drawing(audit: Audit) -> Drawing:
    """Shares of the target over the number of lost experts, from 0, with bands and prices."""
    first = audit.curve[0].comparison
    most = audit.curve[-1].lost
    x, y = Scale(0, most * 1.04, LEFT, 450), Scale(0, 1, 290, 34)
    marks = drawn_axes(x, y, "experts lost", f"share of “{audit.outcome}”", up=as_percent)
    marks.append(Label(x.end, y.end - 12, "prices: share kept", "end", "quiet"))
    if audit.halved.value is not None:
        k50 = x(audit.halved.value)
        marks.append(Line(k50, y.start, k50, y.end, "before"))
        marks.append(Label(k50 + 6, y.start - 8, "k50", style="quiet"))
    ends: list[tuple[float, str, str]] = []
    lost = _line(audit, audit.target, STEERED)
    randomly = [(0, [s]) for s in [first.share(audit.target, UNSTEERED)]]
    randomly += [
        (p.lost, shares) for p in audit.curve if (shares := _pool(audit, p.lost, "random"))
    ]
    spread = [(k, [s.share for s in shares if s.share is not None]) for k, shares in randomly]
    spread = [(k, shares) for k, shares in spread if shares]
    marks.append(_band(x, y, [(k, min(some), max(some)) for k, some in spread], "control"))
    marks.append(_band(x, y, [(k, s.low, s.high) for k, s in lost], "target"))
    lines = [
        (task.name, f"price price{place}", _line(audit, task.name, STEERED))
        for place, task in enumerate(first.tasks)
        if task.role == "price"
    ]
    lines.append(("least important", "guesses", _line(audit, audit.target, "bottom")))
    lines.append((audit.target, "target", lost))
    for name, style, shares in lines:
        known = [(k, share) for k, share in shares if share.share is not None]
        points = tuple((x(k), y(share.share or 0)) for k, share in known)
        if points:
            marks.append(Curve(points, style))
            ends.append((points[-1][1], name, style))
        dot = "control" if style == "guesses" else style
        for (a, b), (k, share) in zip(points, known, strict=True):
            marks.append(Dot(a, b, 4, dot, _told(name, k, share)))
    if len(spread) > 1:
        means = [(k, sum(some) / len(some)) for k, some in spread]
        marks.append(Curve(tuple((x(k), y(mean)) for k, mean in means), "random"))
        ends.append((y(means[-1][1]), "random experts", "guesses"))
    for k, shares in randomly[1:]:
        marks += [
            Dot(x(k), y(share.share), 3, "control", _told(share.arm, k, share))
            for share in shares
            if share.share is not None
        ]
    for k, share in _tests(audit):
        marks.append(Line(x(k), y(share.low), x(k), y(share.high), "span routes"))
        marks.append(Dot(x(k), y(share.share or 0), 5, "routes", _told("restored", k, share)))
    ends.sort(key=lambda end: end[0])
    for at, (_, name, style) in zip(apart([end[0] for end in ends], 15), ends, strict=True):
        marks.append(Label(x.end + 6, at + 4, name, style=f"name {style}"))
    words = ", ".join(f"{k}: {percent(share.share).text}" for k, share in lost)
    about = f"With so many of the most important experts lost: {words}."
    return Drawing(f"Robustness of {audit.target}", about, WIDTH, HEIGHT, tuple(marks))


def _line(audit: Audit, task: str, role: str) -> list[tuple[int, Share]]:
    """The shares of a role by number lost, from the intact model's."""
    found = [(0, audit.curve[0].comparison.share(task, UNSTEERED))]
    for point in audit.curve:
        shares = {(share.task, share.arm): share for share in point.comparison.shares}
        found += [(point.lost, shares[task, role])] if (task, role) in shares else []
    return found


def _pool(audit: Audit, lost: int, pool: str) -> list[Share]:
    comparison = next(point.comparison for point in audit.curve if point.lost == lost)
    return [s for s in comparison.shares if s.task == audit.target and pool_of(s.arm) == pool]


def _band(x: Scale, y: Scale, ends: Sequence[tuple[int, float, float]], style: str) -> Mark:
    upper = [(x(k), y(high)) for k, _, high in ends]
    lower = [(x(k), y(low)) for k, low, _ in reversed(ends)]
    return Curve((*upper, *lower), f"band {style}")


def _told(name: str, lost: int, share: Share) -> str:
    return (
        f"{name}, {lost} lost: {percent(share.share).text} ({percent(share.low).text} …"
        f" {percent(share.high).text}), {share.count} of {share.n}"
    )


def _ends(share: Share) -> Cell:
    return text(f"{percent(share.low).text} … {percent(share.high).text}")


# -- restoring -----------------------------------------------------------------------------------


def _tests(audit: Audit) -> list[tuple[int, Share]]:
    """By number lost, the share that was restored on the test prompts."""
    return [
        (restored.lost, share)
        for restored in audit.restored
        if restored.test is not None
        and (share := restored.test.share(audit.target, STEERED)).share is not None
    ]


def _tried_table(restored: Sequence[Restored]) -> Table:
    rows = tuple(
        (
            number(one.lost, "d"),
            number(tried.activated, "d"),
            percent(tried.share),
            text("chosen" if tried == one.best and one.best.activated else ""),
        )
        for one in restored
        for tried in one.tried
    )
    return Table(
        "Restoring, tried on dev: others are activated, those first that add most alone",
        ("lost", "activated", "share", ""),
        rows,
    )


def _restored_table(audit: Audit) -> list[Table]:
    found = []
    for restored in audit.restored:
        if restored.test is None:
            continue
        test = restored.test
        rows = tuple(
            (
                text({UNSTEERED: "lost", STEERED: "restored"}.get(arm.name, arm.name)),
                *(percent(test.share(task.name, arm.name).share) for task in test.tasks),
            )
            for arm in test.arms
        )
        found.append(
            Table(
                f"Restoring with {lost_words(restored.lost)}, {restored.best.activated} others"
                " activated, on the test prompts",
                ("arm", *(f"{task.name}: {task.outcome}" for task in test.tasks)),
                rows,
            )
        )
    return found
