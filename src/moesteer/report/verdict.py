"""The verdict: what an evaluation found, in one sentence, by rules.

Perturbing a model changes its replies, whichever experts are perturbed. So an effect is claimed
only where all of this holds for the steered arm, against the unsteered one and against every pool
of controls:

    its 95 % interval leaves out zero,
    its p, adjusted over tasks (Holm), is below 0.05,
    it goes the same way as against the unsteered arm,
    and against a pool of seeds it is larger than one more seed would be (`reach_of_seeds`).

The first two speak of other prompts: with enough of them any two sets of experts differ. How far
sets of random experts lie apart is seen in their seeds alone, so at least one pool needs two.

Otherwise nothing was found beyond random experts, or random directions, and the sentence says so.
The sign-reversed arm is no control: it steers what was found, and so does one whose gate was taken
off. The price stands in the same
sentence: of all price tasks the one whose share falls most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesteer.evaluation.comparison import (
    STEERED,
    UNGATED,
    UNSTEERED,
    Comparison,
    Difference,
    TaskFacts,
    pool_of,
)
from moesteer.report.blocks import NARROW, percent, signs

ALPHA = 0.05
REVERSED = "reversed"
TESTBED = ("testbed", "testbed-twin", "testbed-reader", "testbed-expert", "testbed-attention")
SAYS_NOTHING = "The model was built for this. Its numbers say nothing about real models."


@dataclass(frozen=True)
class Found:
    """What was found on one target task; `against` are the pools the steered arm stood against.

    `short` names those of them beyond which it does not go: none of them, and it is `claimed`.
    """

    task: str
    claimed: bool
    against: tuple[str, ...]
    short: tuple[str, ...]
    finding: str
    price: str

    @property
    def sentence(self) -> str:
        """The finding and its price."""
        return f"{self.finding}; {self.price}."


def verdicts(comparison: Comparison) -> list[Found]:
    """One verdict a target task, in the order of the tasks; without a target, of every task."""
    targets = [task for task in comparison.tasks if task.role == "target"]
    return [_verdict(comparison, task) for task in targets or comparison.tasks]


def control_pools(comparison: Comparison) -> tuple[str, ...]:
    """The pools of arms that should not matter."""
    pools = dict.fromkeys(pool_of(arm.name) for arm in comparison.arms)
    return tuple(pool for pool in pools if pool not in (UNSTEERED, STEERED, REVERSED, UNGATED))


def is_beyond(difference: Difference, way: float) -> bool:
    """Whether a difference goes the given way (+1 or −1), beyond its interval and by Holm's p."""
    if difference.low is None or difference.high is None or difference.holm is None:
        return False
    end = difference.low if way > 0 else -difference.high
    return end > 0 and difference.holm < ALPHA


def reach_of_seeds(comparison: Comparison, task: str) -> dict[str, float]:
    """By pool of several seeds, how far from their mean one more seed's share may lie.

    Half the prediction interval of one more observation, t · sd · √(1 + 1/s) for s seeds (Hahn &
    Meeker 1991, Statistical Intervals), at 95 %, Bonferroni-adjusted over the targets. The standard
    deviation is that within pools, over all of them; empty where no pool has two known shares. It
    takes shares of sets for normal. Where one set in many does much and most do nothing, a few
    seeds may all do nothing, and the reach is then too short: more seeds tell.
    """
    import numpy as np
    from scipy.stats import t

    pools: dict[str, list[float]] = {pool: [] for pool in control_pools(comparison)}
    for share in comparison.shares:
        if share.task == task and share.share is not None and pool_of(share.arm) in pools:
            pools[pool_of(share.arm)].append(share.share)
    several = {pool: shares for pool, shares in pools.items() if len(shares) > 1}
    free = sum(len(shares) - 1 for shares in several.values())
    if not free:
        return {}
    variance = sum(float(np.var(shares)) * len(shares) for shares in several.values()) / free
    targets = sum(one.role == "target" for one in comparison.tasks) or len(comparison.tasks)
    quantile = float(t.ppf(1 - ALPHA / 2 / targets, free))
    return {
        pool: quantile * (variance * (1 + 1 / len(shares))) ** 0.5
        for pool, shares in several.items()
    }


def worst_price(comparison: Comparison) -> Difference | None:
    """The price task whose share falls most when steered; None where no price was measured."""
    prices = [
        comparison.difference(task.name, STEERED, UNSTEERED)
        for task in comparison.tasks
        if task.role == "price"
    ]
    known = [price for price in prices if price.difference is not None]
    return min(known, key=lambda d: (d.difference, d.low), default=None)


def warnings_of(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the verdicts: a sentence each."""
    said = [SAYS_NOTHING] if comparison.model in TESTBED else []
    if comparison.split != "test":
        said.append(
            f"{comparison.profile}: measured on the {comparison.split} prompts. What was chosen on"
            " prompts is better on them than on others; measure it once on test."
        )
    said += [
        f"{arm.name}: not every token obeyed the steering ({arm.note or 'no reason is known'})."
        for arm in comparison.arms
        if not arm.obeyed
    ]
    for found in verdicts(comparison):
        way = _way(comparison.difference(found.task, STEERED, UNSTEERED))
        if found.claimed and any(arm.name == REVERSED for arm in comparison.arms):
            other = comparison.difference(found.task, REVERSED, UNSTEERED)
            if is_beyond(other, way):
                said.append(
                    f"{found.task}: the sign-reversed profile moves the share the same way,"
                    f" {points(other)}; the sign of the steering does not decide it."
                )
    return said


def _verdict(comparison: Comparison, task: TaskFacts) -> Found:
    against = (UNSTEERED, *control_pools(comparison))
    differences = [comparison.difference(task.name, STEERED, pool) for pool in against]
    way = _way(differences[0])
    reach = reach_of_seeds(comparison, task.name)
    short = [
        d
        for d in differences
        if not is_beyond(d, way) or way * (d.difference or 0.0) <= reach.get(d.against, 0.0)
    ]
    claimed = not short and bool(reach)
    if claimed:
        finding = _claim(comparison, task, differences)
    else:
        finding = _no_claim(comparison, task, differences, short, reach)
    names = tuple(difference.against for difference in short)
    return Found(task.name, claimed, against, names, finding, _price_words(comparison))


def _way(difference: Difference) -> float:
    return 1.0 if (difference.difference or 0.0) >= 0 else -1.0


def _claim(comparison: Comparison, task: TaskFacts, differences: Sequence[Difference]) -> str:
    main, *controls = differences
    nearest = min(controls, key=lambda d: abs(d.difference or 0.0))
    verb = "raises" if _way(main) > 0 else "lowers"
    return (
        f"Steering ({comparison.profile}) {verb} the share of “{task.outcome}” on {task.name}"
        f" {_from_to(comparison, task)}, by {points(main)}, and beyond every control (the nearest:"
        f" {nearest.against}, {points(nearest)})"
    )


def _no_claim(
    comparison: Comparison,
    task: TaskFacts,
    differences: Sequence[Difference],
    short: Sequence[Difference],
    reach: Mapping[str, float],
) -> str:
    main = differences[0]
    others = _others(comparison)
    opening = f"On {task.name} nothing was found beyond {others}: "
    if main.difference is None:
        return opening + "no reply could be compared with the unsteered model's"
    moved = f"steering ({comparison.profile}) changes the share of “{task.outcome}”"
    moved += f" {_from_to(comparison, task)}, by {points(main)}"
    if main.difference == 0:
        share = percent(comparison.share(task.name, STEERED).share).text
        moved = f"steering ({comparison.profile}) leaves the share of “{task.outcome}” at"
        moved += f" {share}, {points(main)}"
    if main in short:
        return f"{opening}{moved}"
    if len(differences) == 1:
        return f"{opening}{moved}, and there are no controls to compare it with"
    if not short:
        return f"{opening}{moved}, and one seed does not tell how far {others} lie apart"
    least = min(short, key=lambda d: _way(main) * (d.difference or 0.0))
    words = f"steered less {least.against}: {points(least)}"
    if is_beyond(least, _way(main)):
        words += f"; one more seed may lie {100 * reach[least.against]:.0f} points from the others"
    return (
        f"{opening}{moved}, but that does not go beyond {_listed([d.against for d in short])}"
        f" ({words})"
    )


def _others(comparison: Comparison) -> str:
    """What the controls steer by: random experts, random directions, or both."""
    steered = next(arm for arm in comparison.arms if arm.name == STEERED)
    both = {"experts": steered.activated or steered.deactivated, "directions": steered.directions}
    return f"random {' and '.join(what for what, there in both.items() if there) or 'experts'}"


def _price_words(comparison: Comparison) -> str:
    prices = [task for task in comparison.tasks if task.role == "price"]
    worst = worst_price(comparison)
    if worst is None:
        return "no price measured"
    if worst.difference is not None and worst.difference >= 0:
        tasks = f"none of {len(prices)} price tasks falls" if len(prices) > 1 else "no price seen"
        if (worst.low, worst.high) == (0, 0):  # on no prompt
            return tasks
        return f"{tasks} (the least gain: {worst.task}, {points(worst)})"
    return f"the largest price is {points(worst)} on {worst.task}"


def _from_to(comparison: Comparison, task: TaskFacts) -> str:
    shares = [comparison.share(task.name, arm).share for arm in (UNSTEERED, STEERED)]
    before, after = (percent(share).text for share in shares)
    return f"from {before} to {after}"


def points(difference: Difference) -> str:
    """A difference in percentage points, with its interval and p."""
    d = difference
    if d.difference is None or d.low is None or d.high is None:
        return "not known"
    mean = signs(f"{100 * d.difference:+.0f}") + " points"
    if d.low == d.high:  # the bootstrap has no width where every prompt does the same
        return f"{mean} [the same on each of {d.n} prompts]"
    low, high = (signs(f"{100 * end:+.0f}") for end in (d.low, d.high))
    return f"{mean} [95{NARROW}%: {low}{NARROW}…{NARROW}{high}{_p_words(d.holm)}]"


def _p_words(p: float | None) -> str:
    if p is None:
        return ""
    sign, value = ("<", 0.001) if p < 0.001 else ("=", p)
    return f", p{NARROW}{sign}{NARROW}{value:.2g}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
