"""From replies to outcomes: all judges of a card read each reply, and their verdicts are combined.

    first      the first judge decides; the others are kept beside it
    majority   the outcome that more than half of those judges give who give one
    all        the task's outcome only where every judge gives it; where one gives another, that

Where that leaves nothing (a judge could not say, votes are even), the outcome is None: the reply is
counted as unjudged, never as one or the other.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moesteer.evaluation.cards import Card
from moesteer.evaluation.task import Cost, Item, Judge, Verdict


@dataclass(frozen=True)
class Judged:
    """A reply's outcome, None where it is unjudged, and what each judge said."""

    outcome: str | None
    verdicts: tuple[Verdict, ...]


def judge_replies(
    card: Card, judges: Sequence[Judge], items: Sequence[Item], replies: Sequence[str]
) -> list[Judged]:
    """Judge one batch of replies, each to the item at its place."""
    by_judge = [judge(items, replies) for judge in judges]
    return [Judged(combined(card, verdicts), verdicts) for verdicts in zip(*by_judge, strict=True)]


def combined(card: Card, verdicts: Sequence[Verdict]) -> str | None:
    """The outcome that the verdicts on one reply make, by the card's `combine`."""
    outcomes = [verdict.outcome for verdict in verdicts]
    match card.combine:
        case "first":
            return outcomes[0]
        case "majority":
            given = Counter(outcome for outcome in outcomes if outcome is not None)
            if not given:
                return None
            outcome, votes = given.most_common(1)[0]
            return outcome if 2 * votes > given.total() else None
        case "all":
            others = [o for o in outcomes if o not in (card.outcome, None)]
            if others:
                return others[0]
            return None if None in outcomes else card.outcome


def disagreement(judged: Sequence[Judged]) -> tuple[int, int]:
    """(replies on which judges gave different outcomes, replies on which two or more gave one)."""
    given = [{v.outcome for v in one.verdicts if v.outcome is not None} for one in judged]
    heard = [sum(v.outcome is not None for v in one.verdicts) for one in judged]
    compared = [outcomes for outcomes, n in zip(given, heard, strict=True) if n >= 2]
    return sum(len(outcomes) > 1 for outcomes in compared), len(compared)


def cost_of(judges: Sequence[Judge]) -> Cost:
    """Calls and tokens of the judges that count them."""
    costs = [cost for judge in judges if isinstance(cost := getattr(judge, "cost", None), Cost)]
    return Cost(sum(cost.calls for cost in costs), sum(cost.tokens for cost in costs))
