"""What steering did, and whether that proves it.

Every engine counts, at the experts' input, which experts the tokens of a profile selected, and
measures how far the residual stream moved along the profile's directions. From this alone, without
trusting the code that steered, `check_fired` says whether the profile's promise was kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from moesteer.direction import Operation, Place
from moesteer.errors import DidNotFire
from moesteer.profile import Profile


@dataclass(frozen=True)
class LayerEvidence:
    """What one profile did in one layer: how many of its tokens selected each steered expert."""

    profile: str
    layer: int
    tokens: int
    activated: dict[int, int]
    deactivated: dict[int, int]

    @property
    def obeyed(self) -> bool:
        """Each activated expert selected by all tokens, each deactivated one by none."""
        return all(n == self.tokens for n in self.activated.values()) and not any(
            self.deactivated.values()
        )


LEFT_OVER = 0.02
"""Of an engine that does not say how it rounds: bf16 keeps 8 bits of each number."""


def left_over(epsilon: float) -> float:
    """The share of a token's norm that an ablation may leave, in numbers of this precision.

    Each number is off by up to half of `epsilon` of itself, so that their sum along a unit vector
    is by at most as much of the norm (Cauchy–Schwarz). Twice that, and what sums in fp32 lose.
    """
    return epsilon + 1e-4


@dataclass(frozen=True)
class DirectionEvidence:
    """What one direction of a profile did at one site, of a profile's tokens in its window.

    Added: how far the tokens moved along it, on average, `measured` and `expected`, in the stream's
    units; `rounding` is how much of that the numbers' precision may swallow. Ablated: the largest
    share of a token's norm that is left along it, and 0; `allowed` is how much may be. Tokens that
    don't select an expert have nothing to be taken out of its output, and count. `number`: which
    direction of the profile.
    """

    profile: str
    layer: int
    place: Place
    expert: int | None
    operation: Operation
    tokens: int
    measured: float
    expected: float
    rounding: float = 0.0
    number: int = 0
    allowed: float = LEFT_OVER

    @property
    def obeyed(self) -> bool:
        """Whether the tokens did what was asked, up to rounding."""
        if self.operation == "ablate":
            return self.measured <= self.allowed
        allowed = MOVED * abs(self.expected) + self.rounding
        return abs(self.measured - self.expected) <= allowed


def rounding_share(epsilon: float, hidden: int) -> float:
    """How much of a token's norm rounding may move it along a line, in numbers of this precision.

    Each of the `hidden` numbers is off by up to half of `epsilon`, independently of the others.
    """
    return epsilon / 2 / hidden**0.5


MOVED = 0.1
"""A small vector added to a large stream is rounded more than that stream itself."""


def is_guarded(profile: Profile) -> bool:
    """Whether a profile promises the selection itself: the exact rule at full dose."""
    return profile.rule == "exact" and profile.dose == 1


def check_fired(profile: Profile, evidence: Iterable[LayerEvidence | DirectionEvidence]) -> None:
    """Raise DidNotFire unless the evidence proves that the profile steered.

    The exact rule at full dose promises the selection, so each token must have obeyed. The
    paper's rule and a partial dose promise less: there, tokens must have passed. A direction must
    have moved the tokens of its window as far as it says, or left nothing along it.
    """
    for seen in evidence:
        if isinstance(seen, DirectionEvidence):
            _check_direction(seen)
            continue
        where = f"{seen.profile} did not fire in layer {seen.layer}"
        if not seen.tokens:
            raise DidNotFire(
                f"{where}: no token passed its router while it was applied. Run the model"
                " inside the block, and compile it after steering, not before."
            )
        if is_guarded(profile) and not seen.obeyed:
            raise DidNotFire(f"{where}: {_disobeyed(seen)}")


def summed(
    evidence: Sequence[LayerEvidence | DirectionEvidence],
) -> list[LayerEvidence | DirectionEvidence]:
    """Evidence of several batches, added up by profile and layer; profiles may share a name."""
    total: dict[tuple, Any] = {}
    for seen in evidence:
        if isinstance(seen, DirectionEvidence):
            key = (seen.profile, seen.number, seen.layer, seen.place, seen.expert, seen.operation)
            total[key] = _both(total.get(key), seen)
            continue
        key = (seen.profile, seen.layer, tuple(seen.activated), tuple(seen.deactivated))
        before = total.get(key)
        if before is not None:
            seen = LayerEvidence(
                seen.profile,
                seen.layer,
                seen.tokens + before.tokens,
                {e: n + before.activated[e] for e, n in seen.activated.items()},
                {e: n + before.deactivated[e] for e, n in seen.deactivated.items()},
            )
        total[key] = seen
    return list(total.values())


def _both(before: DirectionEvidence | None, seen: DirectionEvidence) -> DirectionEvidence:
    if before is None or not before.tokens + seen.tokens:
        return seen
    tokens = before.tokens + seen.tokens

    def mean(one: float, other: float) -> float:
        return (one * before.tokens + other * seen.tokens) / tokens

    measured = (
        max(before.measured, seen.measured)
        if seen.operation == "ablate"
        else mean(before.measured, seen.measured)
    )
    return replace(
        seen,
        tokens=tokens,
        measured=measured,
        expected=mean(before.expected, seen.expected),
        rounding=mean(before.rounding, seen.rounding),
    )


def _check_direction(seen: DirectionEvidence) -> None:
    whose = "" if seen.expert is None else f" (expert {seen.expert})"
    where = f"{seen.profile} did not fire at the {seen.place} of layer {seen.layer}{whose}"
    if not seen.tokens:
        raise DidNotFire(
            f"{where}: no token of its window passed while it was applied. Run the model inside the"
            " block; a window of generated tokens needs a reply longer than one token."
        )
    if not seen.obeyed and seen.operation == "ablate":
        raise DidNotFire(
            f"{where}: up to {seen.measured:.2%} of a token's norm is left along what was ablated."
        )
    if not (isfinite(seen.measured) and isfinite(seen.expected)):
        raise DidNotFire(
            f"{where}: it moves tokens further than the model's numbers hold (to"
            f" {seen.measured:g}). Give a smaller coefficient, or --dtype float32."
        )
    if not seen.obeyed:
        raise DidNotFire(
            f"{where}: tokens moved by {seen.measured:.4g} along it, not by {seen.expected:.4g}."
        )


def _disobeyed(seen: LayerEvidence) -> str:
    missing = [e for e, n in seen.activated.items() if n < seen.tokens]
    present = [e for e, n in seen.deactivated.items() if n]
    parts = [
        f"activated expert {e} was selected by {seen.activated[e]} of {seen.tokens} tokens"
        for e in missing
    ] + [
        f"deactivated expert {e} was still selected by {seen.deactivated[e]} of {seen.tokens}"
        for e in present
    ]
    return "; ".join(parts) + "."
