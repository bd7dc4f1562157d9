"""Detectors against knock-out: does what routing shows agree with what interventions show?"""

from moesteer.profile import Expert
from moesteer.report.blocks import (
    Block,
    Cell,
    Figure,
    Table,
    number,
    signs,
    text,
)
from moesteer.report.figures import (
    Series,
    scatter,
)
from moesteer.report.page import Detectors

KNOCK_OUT = "knock-out"
EITHER = "larger-knock"


def detector_blocks(detectors: Detectors) -> list[Block]:
    """How far each detector agrees with knock-out, as a table and expert by expert."""
    result = detectors.result
    recovered = any(scored.recovery for scored in result.detectors.values())
    headings = ["detector", "ρ", "ρ of sizes", f"of its top {result.strongest}"]
    headings += ["planted found", "planted rank", "decoys rank"] if recovered else []
    rows = []
    for scored in result.detectors.values():
        seen = scored.agreement
        row = [text(scored.title), number(seen.signed, "+.2f"), number(seen.size, "+.2f")]
        row.append(number(seen.shared, "d"))
        if recovered and scored.recovery is not None:
            found = scored.recovery
            row.append(Cell(f"{found.found} of {len(found.planted)}", found.found))
            row += [text(", ".join(map(str, ranks))) for ranks in (found.planted, found.decoys)]
        rows.append((*row, *[Cell("–")] * (len(headings) - len(row))))
    agreement = Table(
        f"Agreement with knock-out on {result.pairs:,} pairs ({result.over}): rank correlation of"
        " the scores and of their sizes",
        tuple(headings),
        tuple(rows),
    )
    return [agreement, *_knock_figure(detectors)]


def _knock_figure(detectors: Detectors) -> list[Block]:
    result = detectors.result
    knocked = result.detectors.get(KNOCK_OUT)
    if knocked is None or not knocked.scores:
        return []
    out = {(score.layer, score.expert): score for score in knocked.scores}
    others = {n: s for n, s in result.detectors.items() if n not in (KNOCK_OUT, EITHER)}
    drawings = []
    values: dict[Expert, list[Cell]] = {
        expert: [number(expert[0], "d"), number(expert[1], "d"), number(score.value, "+.3f")]
        for expert, score in out.items()
    }
    for name, scored in others.items():
        points: dict[str, list[tuple[float, float, str]]] = {"unsure": [], "target": []}
        there = {(score.layer, score.expert): score for score in scored.scores}
        for expert, knock in out.items():
            score = there.get(expert)
            values[expert].append(number(None if score is None else score.value, "+.3f"))
            if score is None:
                continue
            style = "target" if knock.q < 0.05 else "unsure"
            told = signs(
                f"layer {expert[0]}, expert {expert[1]}: {name} {score.value:+.3f}, knock-out"
                f" {knock.value:+.3f} ({knock.low:+.3f} … {knock.high:+.3f}), q {knock.q:.3f}"
            )
            points[style].append((score.value, knock.value, told))
        words = number(scored.agreement.signed, "+.2f").text
        drawings.append(
            scatter(
                f"{scored.title} against knock-out",
                f"Rank correlation {words}.",
                [Series(style, style, tuple(some)) for style, some in points.items() if some],
                (f"{scored.title}, ρ {words}", "knock-out, nats"),
                width=340,
            )
        )
    return [
        Figure(
            "Scores against what a knock-out changes",
            tuple(drawings),
            "An expert a dot; filled where knocking it out changes the decision (q < 0.05).",
            Table(
                "Scores of every knocked expert by detector",
                ("layer", "expert", KNOCK_OUT, *others),
                tuple(tuple(row) for row in values.values()),
            ),
        )
    ]
