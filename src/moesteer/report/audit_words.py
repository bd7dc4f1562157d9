"""What an audit found, in sentences: who carries a behaviour, what is left without them, and what
brings it back."""

from moesteer.auditing.audit import Audit
from moesteer.auditing.robustness import Point, lost_words
from moesteer.profile import Expert
from moesteer.report.blocks import NARROW, percent, signs
from moesteer.report.terminal import named
from moesteer.report.verdict import SAYS_NOTHING, TESTBED, Found, verdicts


def naming(audit: Audit) -> str:
    """Which experts carry the behaviour, beyond what, and whether it holds."""
    found = audit.importance
    elsewhere = (
        f"the loss of an expert ({place_words(found.reach_of)}) moves decisions that are not about"
        " it"
    )
    if not found.named:
        most = found.experts[0]
        return (
            f"No expert carries “{audit.outcome}” alone: the largest effect, {most.effect:.2f} nats"
            f" ({signs(f'{most.low:.2f} … {most.high:.2f}')}) of {place_words(most.place)}, does"
            f" not go beyond the {found.reach:.2f} by which {elsewhere}."
        )
    number, places = len(found.named), [expert.place for expert in found.named]
    holding = sum(expert.held is not None and expert.held.holds for expert in found.named)
    who = "1 expert carries" if number == 1 else f"{number} experts carry"
    each = "Its loss takes" if number == 1 else "The loss of each takes at least"
    held = f"all {number}" if holding == number > 1 else f"{holding} of {number}"
    return (
        f"{who} “{audit.outcome}”: {named(places)}. {each} {found.named[-1].effect:.2f} nats of it"
        f" away, beyond the {found.reach:.2f} by which {elsewhere};"
        f" on held-out pairs {'it holds' if holding == number == 1 else f'{held} hold'}."
    )


def halving(audit: Audit) -> str:
    """How many experts are to be lost until the share has halved, and the area between curves."""
    if not audit.curve:
        return "No expert's loss takes anything away: there is no curve."
    most, found = audit.curve[-1].lost, audit.halved
    intact = audit.curve[0].comparison.share(audit.target, "unsteered")
    if not intact.count:
        return f"None of the intact model's replies is “{audit.outcome}”: nothing can be lost."
    before = percent(intact.share).text
    share = f"The share of “{audit.outcome}” on {audit.target}, {before} intact,"
    if found.value is None:
        said = f"{share} does not fall by half with up to {most} lost"
        low = "" if found.low is None else f" (95{NARROW}%: from {found.low})"
    else:
        said = f"{share} has halved with {lost_words(found.value)}"
        high = f"beyond {most}" if found.high is None else found.high
        low = f" (k50 = {found.value}, 95{NARROW}%: {found.low} … {high})"
    if audit.area is None:
        return f"{said}{low}."
    area = audit.area
    points, *ends = (signs(f"{100 * value:.0f}") for value in (area.value, area.low, area.high))
    return (
        f"{said}{low}; on average over 0 to {area.most} lost experts it lies {points} points below"
        f" that with random experts lost ({' … '.join(ends)})."
    )


def point_told(audit: Audit) -> Point | None:
    """The point whose verdict is told: where the share has halved, or else the last."""
    if not audit.curve:
        return None
    by_number = {point.lost: point for point in audit.curve}
    return by_number[audit.halved.value or audit.curve[-1].lost]


def losing_verdict(audit: Audit) -> Found | None:
    """What losing so many does, by the rules of every evaluation."""
    point = point_told(audit)
    return None if point is None else verdicts(point.comparison)[0]


def choosing(audit: Audit) -> str:
    """Which loss was to be restored, and by what that was chosen."""
    if not audit.curve:
        return ""
    if audit.halved_on_dev is None:
        return (
            "On the dev prompts, as far as replies could be judged with every loss, the share does"
            f" not fall by half with up to {audit.curve[-1].lost} lost: nothing was to be restored."
        )
    return (
        f"Which loss is restored was read off the dev prompts, where the share of “{audit.outcome}”"
        f" has halved with {lost_words(audit.halved_on_dev)}; what comes back is measured on the"
        " test prompts, which chose nothing."
    )


def restoring_verdicts(audit: Audit) -> list[tuple[str, bool]]:
    """Of each loss: does activating other experts restore the behaviour, and is that claimed?"""
    said = []
    for restored in audit.restored:
        if restored.test is None:
            said.append(
                (
                    f"With {lost_words(restored.lost)}, activating others does not raise the share"
                    f" of “{audit.outcome}” on the dev prompts: nothing restores it.",
                    False,
                )
            )
        else:
            found = verdicts(restored.test)[0]
            said.append((found.sentence, found.claimed))
    return said


def cautions(audit: Audit) -> list[str]:
    """What a reader must know before believing it."""
    said = [SAYS_NOTHING] if audit.model in TESTBED else []
    found = audit.importance
    if not found.going:
        said.append(
            f"The model decides none of the {found.pairs} pairs for A: their decisions can't turn,"
            " and effects say little."
        )
    broken = [
        restored.lost
        for restored in audit.restored
        if restored.test is not None and not all(arm.obeyed for arm in restored.test.arms)
    ]
    broken += [p.lost for p in audit.curve if not all(arm.obeyed for arm in p.comparison.arms)]
    if broken:
        said.append(f"With {broken[0]} experts lost not every token obeyed the steering.")
    doubted = [note for point in audit.curve for note in point.comparison.notes]
    return [*said, *dict.fromkeys(doubted), *audit.notes]


def place_words(place: Expert) -> str:
    """An expert in words."""
    return f"expert {place[1]} of layer {place[0]}"
