"""Table cells of what runs found."""

from collections.abc import Sequence

from moesteer.evaluation.comparison import Comparison, Difference, Share, pool_of
from moesteer.rationale.summary import Change, Mean
from moesteer.rationale.summary import Difference as RationaleDifference
from moesteer.report.blocks import signs
from moesteer.report.comparison_page import p_words
from moesteer.report.rationale_words import value_words
from moesteer.reproduce.comparing import Estimate
from moesteer.reproduce.outcome import Entry

NOTHING = Entry("–")


def text(words: object) -> Entry:
    return Entry(str(words))


def number(value: float | None, form: str = ",.0f") -> Entry:
    return NOTHING if value is None else Entry(signs(format(value, form)), float(value))


# -- shares and differences of an evaluation -----------------------------------------------------


def share(found: Share) -> Entry:
    """A share with Wilson's interval: 62 % (39 … 82)."""
    if found.share is None:
        return Entry("unjudged")
    words = f"{found.share:.0%} ({100 * found.low:.0f} … {100 * found.high:.0f})"
    return Entry(words, found.share, found.low, found.high)


def pool(comparison: Comparison, task: str, arm: str) -> Entry:
    """The mean share of a pool of arms, and how far they lie apart: 50 % [48 – 52]."""
    of_pool = [s for s in comparison.shares if s.task == task and pool_of(s.arm) == arm]
    if len(of_pool) == 1:
        return share(of_pool[0])
    shares = [s.share for s in of_pool if s.share is not None]
    if not shares:
        return NOTHING
    mean, low, high = sum(shares) / len(shares), min(shares), max(shares)
    return Entry(f"{mean:.0%} [{100 * low:.0f} – {100 * high:.0f}]", mean, low, high)


def difference(comparison: Comparison, task: str, arm: str, against: str) -> Entry:
    """A difference of two pools in percentage points; a dash where one of them is not there."""
    found = [
        d for d in comparison.differences if (d.task, d.arm, d.against) == (task, arm, against)
    ]
    return points(found[0]) if found else NOTHING


def points(found: Difference) -> Entry:
    """A difference in percentage points with its interval and Holm's p."""
    if found.difference is None or found.low is None or found.high is None:
        return NOTHING
    return in_points(found.difference, found.low, found.high, found.holm)


def in_points(value: float, low: float, high: float, p: float | None = None) -> Entry:
    """Of shares from −1 to 1, in percentage points: +50 (+25 … +75) p = 0.016."""
    if not (value or low or high):
        return Entry("0", 0.0, 0.0, 0.0)
    mean, start, end = (round(100 * x) for x in (value, low, high))
    # The bootstrap has no width where every prompt does the same.
    spread = f"({start:+d} … {end:+d})" if low < high else "[the same on each prompt]"
    return Entry(f"{signs(f'{mean:+d} {spread}')} {p_words(p)}".rstrip(), value, low, high)


# -- comparisons that no run makes itself --------------------------------------------------------


def paired(found: Estimate | None) -> Entry:
    """A difference of shares, in percentage points."""
    return NOTHING if found is None else in_points(found.value, found.low, found.high, found.p)


def ratio(found: Estimate | None) -> Entry:
    """A share of an effect: 50% (20 … 80)."""
    if found is None:
        return NOTHING
    low, high = 100 * found.low, 100 * found.high
    words = signs(f"{found.value:.0%} ({low:.0f} … {high:.0f})")
    return Entry(words, found.value, found.low, found.high)


def change_of(found: Estimate | None) -> Entry:
    """What has a sign, a correlation or nats: +0.50 (+0.25 … +0.75)."""
    if found is None:
        return NOTHING
    words = signs(f"{found.value:+.2f} ({found.low:+.2f} … {found.high:+.2f})")
    return Entry(words, found.value, found.low, found.high)


def rating(found: Estimate | None) -> Entry:
    """A mean rating: 0.50 (0.25 … 0.75)."""
    if found is None:
        return NOTHING
    words = f"{found.value:.2f} ({found.low:.2f} … {found.high:.2f})"
    return Entry(words, found.value, found.low, found.high)


# -- of rationales -------------------------------------------------------------------------------


def mean(found: Mean | None, pale: bool = False) -> Entry:
    """A mean with its interval; pale where it means little."""
    if found is None:
        return NOTHING
    if found.measure == "tokens":
        return Entry(f"{found.value:.1f}", found.value, found.low, found.high)
    return Entry(value_words(found), found.value, found.low, found.high, pale)


def change(found: Change | RationaleDifference | None, pale: bool = False) -> Entry:
    """A difference with its interval and Holm's p."""
    if found is None:
        return NOTHING
    if not (found.difference or found.low or found.high):
        return Entry("0", 0.0, 0.0, 0.0, pale)
    words = signs(f"{found.difference:+.2f} ({found.low:+.2f} … {found.high:+.2f})")
    p = p_words(found.holm)
    return Entry(f"{words} {p}".rstrip(), found.difference, found.low, found.high, pale)


def listed(names: Sequence[str]) -> str:
    """ "a, b and c" of some names."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
