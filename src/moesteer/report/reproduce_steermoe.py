"""SteerMoE's tables and claims, made of what came of its road."""

from collections.abc import Iterator, Sequence

from moesteer.detection.selecting import experts_table, ranked_experts, scores_by_expert
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison
from moesteer.evaluation.judge_check import told
from moesteer.evaluation.search import SearchResult
from moesteer.report import reproduce_cells as cells
from moesteer.report.reproduce_cells import NOTHING, listed, number, text
from moesteer.report.verdict import verdicts
from moesteer.reproduce.outcome import Claim, Entry, Table
from moesteer.reproduce.papers import Ablation
from moesteer.reproduce.steermoe import ablation, fluency
from moesteer.reproduce.steermoe.ablation import Ablated
from moesteer.reproduce.steermoe.detection import Detected
from moesteer.reproduce.steermoe.fluency import WAYS, Activated
from moesteer.reproduce.steermoe.judging import Judged
from moesteer.reproduce.steermoe.numbers import FLUENT, Numbered, Numbers
from moesteer.reproduce.steermoe.outcomes import RATED, Steered
from moesteer.reproduce.steermoe.plan import PAPER, Aim

FALSE_DISCOVERIES = 0.05
ARMS = {"random": "random", "matched": "usage-matched", "bottom": "bottom-ranked"}
"""The pools of controls that stand in tables, by what they are called there."""


def steermoe_tables(result: object, bundled: bool) -> Iterator[Table | Claim]:
    """The tables and claims of one step's result."""
    match result:
        case Judged():
            yield _judges(result)
        case Detected():
            yield from _experts(result)
        case Numbers():
            yield from _numbers(result, bundled)
        case Steered():
            yield _outcomes(result, bundled)
            yield Claim(result.aim.key, verdict_words(result.comparison))
            if result.aim.key == "safe":
                yield from _benign(result.aim, result.comparison)
        case Ablated():
            yield from _ablated(result, bundled)
        case Activated():
            yield from _activated(result)
        case _:
            raise TypeError(f"{type(result).__name__} is no result of this road")


def _judges(found: Judged) -> Table:
    return Table(
        "Judges",
        "On replies of known outcome, as they are and changed one way at a time.",
        ("task", "judge", "what it sees"),
        tuple((text(n), text(check.judge), text(told(check))) for n, check in found.checks.items()),
    )


def _experts(found: Detected) -> Iterator[Table | Claim]:
    behaviour, scores = found.behaviour, found.scores
    seen = scores.evidence
    assert seen is not None
    value, q = scores_by_expert(scores), experts_table(scores, "q")
    differ = sum(one < FALSE_DISCOVERIES for one in q.values()) / len(q)
    sides = sorted((seen.tokens_a, seen.tokens_b))
    longer = sides[1] / max(sides[0], 1)
    strongest = ranked_experts(scores)[0]
    rows = {
        "contrast pairs": number(seen.pairs),
        "target tokens of A": number(seen.tokens_a),
        "target tokens of B": number(seen.tokens_b),
        "the longer side's tokens, for one of the shorter's": number(longer, ".1f"),
        "experts": number(len(value)),
        "share that differ between the sides (q < 0.05, by pair)": number(differ, ".0%"),
        f"largest |Δ|: layer {strongest[0]}, expert {strongest[1]}": number(
            abs(value[strongest]), ".3f"
        ),
        "rank correlation of split halves": number(seen.stability, ".2f"),
    }
    yield Table(
        f"Experts of {behaviour}",
        f"From {seen.source}. Pairs are resampled, never tokens.",
        ("", "measured"),
        tuple((text(name), entry) for name, entry in rows.items()),
        found.source,
    )
    if behaviour == "refusal":
        yield Claim("spans", f"{longer:.1f}×, of {seen.pairs} pairs")
        yield Claim("significant", f"{differ:.0%} by pair (q < 0.05)")


# -- how many ------------------------------------------------------------------------------------


def _numbers(found: Numbers, bundled: bool) -> Iterator[Table | Claim]:
    rows = []
    for numbered in found.of_aims:
        rows.append(_numbers_row(found, numbered, bundled))
        if numbered.aim.key == "unsafe":
            yield Claim("weakest", f"|Δ| = {rows[-1][5].text}, {numbered.aim.title}")
    about = "Activated/deactivated. left out: a layer has no room for more than k activated experts"
    about += ", where the authors' code drops a surplus in silence."
    if found.known and not found.of_paper:
        about += (
            f" The model is called like the paper's {found.known.name} but has another shape, so"
            " the paper's numbers were not used."
        )
    elif not found.of_paper:
        about += (
            " Chosen on dev prompts of the first task, within a share of fluent replies of"
            f" {FLUENT:.0%} where fluency is measured; the paper chose on the task itself and"
            " describes no held-out prompts."
        )
    headings = ("steered", "activated/deactivated", "left out", "from", "largest |Δ|")
    headings = (*headings, "smallest |Δ|")
    yield Table(
        "Numbers of experts",
        about,
        headings if bundled else (*headings, "paper"),
        tuple(rows),
    )
    searches = [_search_row(one.aim, one.searched) for one in found.of_aims if one.searched]
    if searches:
        yield Table(
            "How the numbers were chosen",
            "On dev, and once on test prompts. Control: the same search among experts ranked at"
            " random.",
            (
                *("steered", "outcome", "unsteered, dev", "found, dev", "control, dev"),
                *("unsteered, test", "found, test", "control, test", "found − control, test"),
            ),
            tuple(searches),
        )


def _search_row(aim: Aim, result: SearchResult) -> tuple[Entry, ...]:
    """What a search and its control found, on dev and on test."""
    controls = [found.best for found in result.controls if found.best is not None]
    trials = [result.unsteered, result.best, *controls[:1]]
    dev = [number(trial.values[result.target], ".0%") for trial in trials]
    arms = (UNSTEERED, STEERED, "search-matched")
    test = [cells.pool(result.test, result.target, arm) for arm in arms]
    apart = cells.difference(result.test, result.target, STEERED, "search-matched")
    outcome = f"{result.outcome} on {result.target}"
    none = [NOTHING] * (3 - len(dev))
    return (text(aim.title), text(outcome), *dev, *none, *test, apart)


def _numbers_row(found: Numbers, numbered: Numbered, bundled: bool) -> tuple[Entry, ...]:
    aim, chosen, result = numbered.aim, numbered.chosen, numbered.searched
    profile, value = chosen.profile, scores_by_expert(chosen.profile)
    sizes = [abs(value[e]) for e in (*profile.activated, *profile.deactivated)]
    left = f"{len(chosen.left_out)}"
    if chosen.short:
        left += f", and {chosen.short} that have no score of that sign"
    if result is None:
        how = f"the paper's for {found.known.name if found.known else aim.title}"
    else:
        how = f"{result.budget} tries on dev prompts of {result.target}"
    row = (
        text(aim.title),
        text(f"{len(profile.activated)}/{len(profile.deactivated)}"),
        text(left),
        text(how),
        number(max(sizes, default=None), ".3f"),
        number(min(sizes, default=None), ".3f"),
    )
    if bundled:
        return row
    if not (found.of_paper and found.known):
        return (*row, NOTHING)
    return (*row, text("{}/{}".format(*found.known.numbers[aim.key])))


# -- what it does, and what it costs -------------------------------------------------------------


def _outcomes(found: Steered, bundled: bool) -> Table:
    """A row a task: shares of all arms, and what steering changes, also beyond random experts."""
    aim, comparison = found.aim, found.comparison
    headings = ["task", "outcome", UNSTEERED, STEERED, *ARMS.values()]
    headings += ["steered − unsteered", "steered − random"]
    rows = []
    for task in comparison.tasks:
        row = [text(task.name), text(f"{task.outcome} ({task.role})")]
        row += [cells.pool(comparison, task.name, arm) for arm in (UNSTEERED, STEERED, *ARMS)]
        row += [
            cells.difference(comparison, task.name, STEERED, arm) for arm in (UNSTEERED, "random")
        ]
        rows.append(row)
        if task.name == RATED:  # on the paper's scale, too
            ratings = [cells.rating(found.ratings[arm]) for arm in (UNSTEERED, STEERED)]
            rest = [NOTHING] * (len(headings) - 4)
            rows.append([text(task.name), text("mean of (s − 1)/4"), *ratings, *rest])
    finding = PAPER.finding(aim.key)
    about = ""
    if not bundled:
        headings.append("paper")
        rows = [[*row, NOTHING] for row in rows]
        about = (
            f"The paper's column is empty: {PAPER.not_kept} were not noted here. Its figure,"
            f" {finding.figure}, is that of {finding.of}."
        )
    return Table(
        aim.title.capitalize(),
        " ".join([_about(comparison), about]).strip(),
        tuple(headings),
        tuple(map(tuple, rows)),
        aim.folder,
    )


def _about(comparison: Comparison) -> str:
    """How many prompts, what is steered, and what speaks against the numbers."""
    asked = listed([f"{task.items} of {task.name}" for task in comparison.tasks])
    notes = (f"Note: {note.rstrip('.')}." for note in comparison.notes)
    return " ".join([f"Prompts: {asked}. Steered: {comparison.profile}.", *notes])


def verdict_words(comparison: Comparison) -> str:
    """On how many targets an effect is claimed, and the sentence of the largest one.

    By the rules of `report/verdict.py`: beyond the unsteered model and beyond every control.
    """
    found = verdicts(comparison)
    size = {
        one.task: abs(comparison.difference(one.task, STEERED, UNSTEERED).difference or 0.0)
        for one in found
    }
    largest = max(found, key=lambda one: (one.claimed, size[one.task]))
    if len(found) == 1:
        return largest.sentence
    claimed = sum(one.claimed for one in found)
    return f"An effect beyond all controls on {claimed} of {len(found)} tasks. {largest.sentence}"


def _benign(aim: Aim, comparison: Comparison) -> Iterator[Claim]:
    """What becomes of harmless requests."""
    for task in comparison.tasks:
        if task.name in ("harmless-100", "testbed-benign"):
            before, after = (
                cells.pool(comparison, task.name, arm).text for arm in (UNSTEERED, STEERED)
            )
            yield Claim("price", f"{task.name}, {aim.title}: {before} unsteered, {after} steered")


# -- the detectors, the numbers and the experts that should not matter ---------------------------


def _ablated(found: Ablated, bundled: bool) -> Iterator[Table | Claim]:
    paper = _ablation_of_paper()
    name, comparison, counts = found.task, found.comparison, found.counts
    apart = {count: cells.paired(one) for count, one in found.apart.items()}
    rows = [_ablation_row("unsteered", 0, comparison, name, UNSTEERED, NOTHING)]
    for (detector, count), arm in found.arms.items():
        beside = apart[count] if detector == "risk-difference" else NOTHING
        rows.append(_ablation_row(detector, count, comparison, name, arm, beside))
    for arm, words in ARMS.items():
        rows.append(_ablation_row(words, found.main[1], comparison, name, arm, NOTHING))
    headings = ("ranked by", "deactivated", found.outcome, "− unsteered", "− log-odds of as many")
    if not bundled:
        headings = (*headings, "paper")
        rows = [(*row, _paper_share(row, found.of_paper)) for row in rows]
    yield Table(
        "Detectors, counts and selection",
        " ".join([_about(comparison), _ablation_words(found, bundled)]),
        headings,
        tuple(rows),
        ablation.FOLDER,
    )
    said = [
        f"{detector}: {listed([_bare(comparison, name, found.arms[detector, n]) for n in counts])}"
        for detector in paper.shares
    ]
    differences = "; ".join(f"{count}: {apart[count].text}" for count in counts)
    before = _bare(comparison, name, UNSTEERED)
    counted = f"{listed([str(count) for count in counts])} experts deactivated, from {before}"
    yield Claim("detectors", f"{counted}. {'; '.join(said)}. Difference, {differences}")
    controls = "; ".join(
        f"{words} − unsteered {cells.difference(comparison, name, arm, UNSTEERED).text}"
        for arm, words in ARMS.items()
    )
    yield Claim("control", f"{found.main[1]} experts deactivated on {name}: {controls}")


def _ablation_of_paper() -> Ablation:
    assert PAPER.ablation is not None
    return PAPER.ablation


def _bare(comparison: Comparison, task: str, arm: str) -> str:
    found = comparison.share(task, arm).share
    return "–" if found is None else f"{found:.0%}"


def _ablation_row(
    ranked_by: str, count: int, comparison: Comparison, task: str, arm: str, apart: Entry
) -> tuple[Entry, ...]:
    return (
        text(ranked_by),
        number(count),
        cells.pool(comparison, task, arm),
        cells.difference(comparison, task, arm, UNSTEERED),
        apart,
    )


def _paper_share(row: Sequence[Entry], of_paper: bool) -> Entry:
    """The paper's share in percent, of the same detector and count."""
    paper = _ablation_of_paper()
    if not of_paper:
        return NOTHING
    count = int(row[1].value or 0)
    if row[0].text == "unsteered":
        return Entry(f"{paper.baseline}%", paper.baseline / 100)
    if row[0].text not in paper.shares or count not in paper.deactivated:
        return NOTHING
    share = paper.shares[row[0].text][paper.deactivated.index(count)]
    return Entry(f"{share}%", share / 100)


def _ablation_words(found: Ablated, bundled: bool) -> str:
    paper = _ablation_of_paper()
    said = []
    if not found.same_model:
        said.append(
            "The counts are the same shares of all experts as the paper's"
            f" {', '.join(map(str, paper.deactivated))} of {paper.model}."
        )
    if not found.of_paper and not bundled:
        said.append(
            f"The paper's column is empty: its figures are those of {paper.model} on {paper.task}."
        )
    elif found.of_paper:
        said.append("The paper names no change with random or bottom-ranked experts.")
    if bundled:
        said.append(
            "Deactivated away from the document: the testbed's experts were planted for it."
        )
    return " ".join(said)


# -- fluency -------------------------------------------------------------------------------------


def _activated(found: Activated) -> Iterator[Table | Claim]:
    comparison = found.comparison
    rows = []
    for count in found.numbers:
        shares = (cells.pool(comparison, found.task, found.arms[way, count]) for way in WAYS)
        rows.append((number(count), *shares, cells.paired(found.apart[count])))
    before = cells.pool(comparison, found.task, UNSTEERED).text
    outcome = found.outcome
    yield Table(
        "Activation against deactivation",
        f"{_about(comparison)} {outcome.capitalize()} unsteered: {before}. The numbers are a"
        " quarter, half and all of those that layers have room to activate.",
        ("experts", f"{outcome}, activated", f"{outcome}, deactivated", "difference"),
        tuple(rows),
        fluency.FOLDER,
    )
    said = "; ".join(f"{row[0].text}: {row[3].text}" for row in rows)
    yield Claim("fluency", f"Activated less deactivated, points of {outcome}. {said}")
