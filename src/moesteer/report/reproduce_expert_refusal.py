"""The tables and claims of expert-aware refusal steering's road, made of what came of it."""

from collections.abc import Iterator, Mapping

from moesteer.directions.candidates import used
from moesteer.directions.writers import Writers
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison, pool_of
from moesteer.evaluation.direction_search import DirectionResult
from moesteer.evaluation.direction_trials import DirectionTrial
from moesteer.profile import Expert, Profile
from moesteer.report import reproduce_cells as cells
from moesteer.report.blocks import signs
from moesteer.report.reproduce_cells import NOTHING, number, text
from moesteer.report.verdict import verdicts
from moesteer.report.writers_page import PARTS, WITHOUT
from moesteer.reproduce.comparing import Estimate
from moesteer.reproduce.expert_refusal.direction import (
    DIRECTION,
    DirectionFound,
    DirectionSteered,
)
from moesteer.reproduce.expert_refusal.plan import DATA, PAPER
from moesteer.reproduce.expert_refusal.routing import EXPERTS, Routed, routing_of
from moesteer.reproduce.expert_refusal.searching import Search, Searched, words_of
from moesteer.reproduce.expert_refusal.tasks import in_order
from moesteer.reproduce.expert_refusal.writing import WRITERS, Written
from moesteer.reproduce.outcome import Claim, Entry, Table

SHOWN = 10
"""Experts that are shown though their routing is below the threshold."""


def expert_refusal_tables(result: object, bundled: bool) -> Iterator[Table | Claim]:
    """The tables and claims of one step's result."""
    match result:
        case DirectionFound():
            yield _direction_table(result.profile)
        case DirectionSteered():
            yield _three_outcomes("Refusal direction: three outcomes", result.comparisons)
            found = [one for c in result.comparisons.values() for one in verdicts(c)]
            yield Claim("residual", " ".join(one.sentence for one in found))
        case Written():
            yield from _written(result.writers)
        case Routed():
            yield _routing(result)
        case Searched():
            yield from _searched(result, bundled)
        case _:
            raise TypeError(f"{type(result).__name__} is no result of this road")


def _three_outcomes(title: str, comparisons: Mapping[str, Comparison]) -> Table:
    """A row a set of prompts and arm: how its replies fall into the three outcomes.

    Of the targets every arm; of the other prompts those that say what it costs.
    """
    rows: list[tuple[Entry, ...]] = []
    for name, comparison in comparisons.items():
        pools = list(dict.fromkeys(pool_of(arm.name) for arm in comparison.arms))
        for task in comparison.tasks:
            for arm in pools if task.role == "target" else (UNSTEERED, STEERED):
                rows.append(
                    (
                        text(task.name),
                        text(name if arm == STEERED else f"{name}: {arm}"),
                        *_shares(comparison, task.name, arm),
                        cells.difference(comparison, task.name, STEERED, arm),
                    )
                )
    tasks = {task.name: task.items for c in comparisons.values() for task in c.tasks}
    asked = ", ".join(f"{items} of {name}" for name, items in tasks.items())
    return Table(
        title,
        f"Prompts that no direction was found on: {asked}. Shares of all replies of an arm, or of a"
        " pool of arms. Last column: steered less this arm, in points of full answers, or, where"
        " refusal is added on harmless prompts, of refusals.",
        ("prompts", "arm", "refusal", "full answer", "non-response", "steered − this"),
        tuple(rows),
    )


def _shares(comparison: Comparison, task: str, arm: str) -> list[Entry]:
    """The three outcomes' shares of all replies of an arm or pool."""
    of_arm = [s for s in comparison.shares if s.task == task and pool_of(s.arm) == arm]
    replies = sum(share.n for share in of_arm)
    if not replies:
        return [NOTHING] * 3
    counts = [
        sum(share.outcomes.get(outcome, 0) for share in of_arm)
        for outcome in in_order(tuple(of_arm[0].outcomes))
    ]
    return [number(count / replies, ".0%") for count in counts]


def _direction_table(direction: Profile) -> Table:
    """Which of the candidates was chosen, and by what."""
    candidates, seen = direction.candidates, direction.evidence
    assert candidates is not None
    (chosen,) = used(direction)
    settings = {} if seen is None else seen.settings
    scores = {name: float(values[chosen]) for name, values in candidates.scores.items()}
    rows = {
        "candidates": number(len(candidates)),
        "layer": number(int(candidates.layer[chosen])),
        "position": number(int(candidates.position[chosen])),
        "log-odds of refusal on restricted prompts, projected out": number(
            scores["bypass"], "+.2f"
        ),
        "log-odds of refusal on harmless prompts, added": number(scores["induce"], "+.2f"),
        "KL on harmless prompts, projected out": number(scores["kl"], ".4f"),
        **{
            f"{name} prompts fitted on, after the filter": text(
                f"{settings.get(f'fit_{side}_kept')} of {settings.get(f'fit_{side}')}"
            )
            for name, side in zip(DATA, "ab", strict=True)
        },
    }
    return Table(
        "Refusal direction",
        f"A refusal begins with {settings.get('refusal_tokens')}.",
        ("", "measured"),
        tuple((text(name), entry) for name, entry in rows.items()),
        DIRECTION,
    )


# -- who writes it -------------------------------------------------------------------------------


def _written(found: Writers) -> Iterator[Table | Claim]:
    yield from _writers_tables(found)
    attention = next(part for part in found.parts if part.part == "attention")
    without = next(one for one in found.ablated if one.what == "attention")
    change = _interval(without.change, without.change_low, without.change_high)
    yield Claim(
        "attention",
        f"attention writes {attention.share:.0%} of it; projected out of what attention writes, the"
        f" log-odds of refusal on restricted prompts change by {change.text}",
    )


def _writers_tables(found: Writers) -> Iterator[Table]:
    yield Table(
        "Who writes the refusal direction",
        f"Along its unit vector, restricted less harmless prompts, {found.prompts_a} and"
        f" {found.prompts_b} that it was not found on. A share may be negative, or above 1.",
        ("written by", "adds", "share"),
        tuple(
            (
                text(PARTS[part.part]),
                _interval(part.value, part.low, part.high),
                number(part.share, ".0%"),
            )
            for part in found.parts
        ),
        WRITERS,
    )
    yield Table(
        "Without what a part writes",
        "The direction projected out of what a part of every layer writes.",
        ("projected out of", "log-odds of refusal on restricted prompts", "change"),
        tuple(
            (
                text(WITHOUT[one.what]),
                _interval(one.score, one.low, one.high),
                _interval(one.change, one.change_low, one.change_high)
                if one.what != "nothing"
                else NOTHING,
            )
            for one in found.ablated
        ),
        WRITERS,
    )


def _interval(value: float, low: float, high: float) -> Entry:
    return cells.change_of(Estimate(value, low, high))


# -- routing -------------------------------------------------------------------------------------


def _routing(found: Routed) -> Table:
    profile = found.profile
    scores, model = profile.scores, profile.model
    assert scores is not None
    assert model is not None
    routing, kept = routing_of(profile), routing_of(profile, "kept")
    row_of = {shape.layer: row for row, shape in enumerate(model.layers)}
    shown = sorted(routing, key=lambda expert: (-kept[expert], -routing[expert]))
    rows = []
    for layer, expert in shown[: max(SHOWN, sum(map(int, kept.values())))]:
        at = row_of[layer], expert
        value, low, high = (float(table[at]) for table in (scores.value, scores.low, scores.high))
        rows.append(
            (
                text(_name((layer, expert))),
                number(float(scores.rate_a[at]), ".0%"),
                number(float(scores.rate_b[at]), ".0%"),
                cells.in_points(value, low, high),
                text("kept" if kept[layer, expert] else ""),
            )
        )
    return Table(
        "Refusal-specific routing",
        f"{sum(map(int, kept.values()))} of {len(kept)} experts are kept: first choice of at least"
        f" {found.threshold:g} percentage points more of restricted prompts' last 5 tokens than of"
        " harmless ones'.",
        ("expert", "restricted", "harmless", "difference, points", ""),
        tuple(rows),
        EXPERTS,
    )


def _name(expert: Expert) -> str:
    return "layer {}, expert {}".format(*expert)


# -- the search ----------------------------------------------------------------------------------


def _searched(found: Searched, bundled: bool) -> Iterator[Table | Claim]:
    yield _search_table(found.source, found.found)
    comparisons = {words_of(*key): result.test for key, result in found.found.items()}
    yield _three_outcomes("Directions of experts: three outcomes", comparisons)
    yield Claim("control", "; ".join(_control_words(*one) for one in found.found.items()))
    yield from _against_the_direction(found, bundled)
    yield from _detection_and_response(found)


def _search_table(source: Profile, found: Mapping[Search, DirectionResult]) -> Table:
    rows = []
    for (way, method), result in found.items():
        for name, trial, tried in (
            ("unsteered", result.unsteered, NOTHING),
            ("found", result.best, number(result.tried)),
            *((f"control {c.seed}", c.best, number(c.tried)) for c in result.controls),
        ):
            rows.append((text(words_of(way, method)), text(name), tried, *_trial(trial)))
    kept = [expert for expert, is_kept in routing_of(source, "kept").items() if is_kept]
    layers = [layer for layer, _ in kept]
    same = " No layer keeps two experts here, so both methods are the same."
    return Table(
        "Searches among directions of experts",
        "On dev prompts: how many choices were tried, the mean log-odds of refusal on the target's"
        " prompts, KL on the other prompts, and how the target's replies were judged. A control is"
        " the same search among experts below the routing threshold."
        + (same if len(set(layers)) == len(layers) else ""),
        ("steered", "search", "tried", "chosen", "log-odds", "KL", "judged"),
        tuple(rows),
    )


def _trial(trial: DirectionTrial | None) -> tuple[Entry, ...]:
    if trial is None:
        return (text("nothing within KL"), NOTHING, NOTHING, NOTHING)
    counted = next(iter((trial.outcomes or {}).values()), {})
    judged = ", ".join(f"{name} {count}" for name, count in counted.items() if count)
    return (
        text(signs(trial.choice.words) if trial.choice else "–"),
        number(trial.score, "+.2f"),
        number(trial.kl, ".3f"),
        text(judged or "–"),
    )


def _control_words(key: Search, result: DirectionResult) -> str:
    """The direction that was found less what the same search found below the threshold."""
    less = cells.difference(result.test, result.target, STEERED, "search-matched")
    return f"{words_of(*key)}: found − control {less.text} points of {result.outcome}"


def _against_the_direction(found: Searched, bundled: bool) -> Iterator[Table | Claim]:
    """How much of the refusal direction's effect a direction of experts has."""
    rows, said = [], []
    for (way, method), against in found.against.items():
        effects = cells.paired(against.direction), cells.paired(against.experts)
        share = cells.ratio(against.share)
        what = "full answers" if found.found[way, method].toward == "b" else "refusals"
        rows.append((text(words_of(way, method)), text(what), *effects, share))
        if method == "one":
            said.append(
                f"{way}: {share.text} of the refusal direction's effect ({effects[1].text} against"
                f" {effects[0].text} points of {what})"
            )
    if not rows:
        return
    headings = ("steered", "points of", "refusal direction", "experts", "share of its effect")
    about = (
        "Steered less unsteered on the same test prompts, with McNemar's p; a share only where the"
        " refusal direction itself has an effect beyond its interval."
    )
    if not bundled:
        headings, rows = (*headings, "paper"), [(*row, NOTHING) for row in rows]
        finding = PAPER.finding("single")
        about += (
            f" The paper's column is empty: {PAPER.not_kept} were not noted here. Its figure,"
            f" {finding.figure}, is {finding.of}."
        )
    yield Table("Experts against the refusal direction", about, headings, tuple(rows))
    if said:
        yield Claim("single", "; ".join(said))


def _detection_and_response(found: Searched) -> Iterator[Table | Claim]:
    """Do the experts whose routing differs more also steer more?"""
    routing = routing_of(found.source)
    rows, said = [], []
    for way, response in found.responses.items():
        effects, agree = response.effects, cells.change_of(response.agree)
        by_effect = sorted(effects, key=lambda expert: -effects[expert])
        first = max(effects, key=lambda expert: routing[expert])
        place = 1 + by_effect.index(first)
        rows.append(
            (
                text(way),
                number(len(effects)),
                agree,
                text(_name(first)),
                number(place),
                text(_name(by_effect[0])),
                number(100 * routing[by_effect[0]], "+.0f"),
            )
        )
        said.append(
            f"{way}: rank correlation of routing and effect {agree.text} over {len(effects)}"
            f" experts; that whose routing differs most is number {place} in effect"
        )
    if rows:
        yield Table(
            "Detection and response",
            "Over the experts that were tried alone, those of the controls too: the difference of"
            " routing (restricted less harmless) against the largest change of the log-odds of"
            " refusal, all at the coefficient that was chosen.",
            (
                *("steered", "experts", "rank correlation", "largest routing", "rank in effect"),
                *("largest effect", "its routing, points"),
            ),
            tuple(rows),
        )
        yield Claim("response", "; ".join(said))
