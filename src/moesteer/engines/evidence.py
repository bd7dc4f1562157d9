"""What steering did, counted at the experts' input, and whether that proves it.

Every engine counts which experts the tokens of a profile selected. From the counts alone, without
trusting the code that steered, `check_fired` says whether the profile's promise was kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


def is_guarded(profile: Profile) -> bool:
    """Whether a profile promises the selection itself: the exact rule at full dose."""
    return profile.rule == "exact" and profile.dose == 1


def check_fired(profile: Profile, evidence: Iterable[LayerEvidence]) -> None:
    """Raise DidNotFire unless the evidence proves that the profile steered.

    The exact rule at full dose promises the selection, so each token must have obeyed. The
    paper's rule and a partial dose promise less: there, tokens must have passed.
    """
    for seen in evidence:
        where = f"{seen.profile} did not fire in layer {seen.layer}"
        if not seen.tokens:
            raise DidNotFire(
                f"{where}: no token passed its router while it was applied. Run the model"
                " inside the block, and compile it after steering, not before."
            )
        if is_guarded(profile) and not seen.obeyed:
            raise DidNotFire(f"{where}: {_disobeyed(seen)}")


def summed(evidence: Sequence[LayerEvidence]) -> list[LayerEvidence]:
    """Evidence of several batches, added up by profile and layer; profiles may share a name."""
    total: dict[tuple, LayerEvidence] = {}
    for seen in evidence:
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
