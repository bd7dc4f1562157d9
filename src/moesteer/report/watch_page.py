"""What `moesteer watch` prints: the thresholds of a reference, and how many texts exceed them."""

from collections.abc import Sequence

from moesteer.monitoring.reference import Reference, Verdict
from moesteer.statistics.intervals import wilson_interval


def reference_lines(reference: Reference) -> list[str]:
    """What it was fitted on, and the thresholds by length."""
    origin = reference.origin
    lines = [
        f"{reference.name}: ordinary routing of {origin.model.id}, over {origin.over} tokens,"
        f" fitted on {origin.texts} texts of {origin.source}",
        f"At most {origin.false_alarms:.2%} false alarms; thresholds from {len(reference.tokens)}"
        " other texts:",
        "",
        "  tokens            texts   drift above" + "   linked share below" * bool(origin.linked),
    ]
    shortest, longest = 1, reference.tokens.max()
    borders = [*origin.borders, None]
    for border, size, limits in zip(borders, reference.bin_sizes, reference.limits, strict=True):
        lengths = f"{shortest} – {border}" if border else f"{shortest} and more"
        linked = "" if limits.linked is None else f"{_or_never(limits.linked):>21}"
        lines.append(f"  {lengths:<15}{size:>8}{limits.drift:>14.4f}{linked}")
        shortest = (border or 0) + 1
    lines += ["", f"The drift is in nats a layer. The longest of these texts has {longest} tokens."]
    if any(limits.linked == 0 for limits in reference.limits):
        lines.append(
            "never: ordinary texts select none of the linked experts, so that their silence says"
            " nothing."
        )
    return lines


def verdict_lines(verdicts: Sequence[Verdict], reference: Reference) -> list[str]:
    """How many raise an alarm, with a 95 % interval, beside how many do by chance."""
    known = [verdict for verdict in verdicts if verdict.word != "unknown"]
    if not verdicts:
        return []
    alarms = sum(verdict.word == "alarm" for verdict in known)
    low, high = wilson_interval(alarms, len(known))
    by_score = [
        f"{sum(score in verdict.raised for verdict in known)} by {words}"
        for score, words in (("drift", "their drift"), ("linked", "silent linked experts"))
        if score == "drift" or reference.origin.linked
    ]
    lines = [
        f"watch: {alarms} of {len(known)} texts raise an alarm ({_share(alarms, len(known))}, 95 %"
        f" interval {low:.0%} to {high:.0%}): {', '.join(by_score)}; of ordinary ones, at most"
        f" {reference.origin.false_alarms:.2%} do"
    ]
    if len(known) < len(verdicts):
        lines.append(f"watch: {len(verdicts) - len(known)} texts are unknown: they have no tokens")
    shortest, longest = reference.tokens.min(), reference.tokens.max()
    outside = sum(not shortest <= verdict.tokens <= longest for verdict in known)
    if outside:
        lines.append(
            f"watch: {outside} texts are shorter or longer than any of those that the thresholds"
            f" come from ({shortest} to {longest} tokens): nothing is promised of them"
        )
    return lines


def _share(count: int, n: int) -> str:
    return f"{count / n:.0%}" if n else "none"


def _or_never(limit: float) -> str:
    return f"{limit:.4f}" if limit else "never"
