"""Numbers to read off texts, said so that any engine can: sums of weighted log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moesteer.errors import MoesteerError
from moesteer.profile import Profile

if TYPE_CHECKING:
    from moesteer.chat import TokenisedConversation


@dataclass(frozen=True)
class Term:
    """`weight` · log P(`token` | the tokens before `position`), in nats; position 0 has none."""

    position: int
    token: int
    weight: float


@dataclass(frozen=True)
class Readout:
    """A number to read off one text: the sum of its terms.

    The log-odds of two words after a context, the mean log-probability of a reply, a perplexity:
    all are sums of weighted log-probabilities. A term's position is at most `len(ids)`: the token
    that would come next.
    """

    ids: tuple[int, ...]
    terms: tuple[Term, ...]


def mean_log_probability(conversation: "TokenisedConversation", weight: float = 1.0) -> Readout:
    """`weight` × mean log P of the target tokens, the very first token of a text left out.

    Raises MoesteerError where no token of the target is predicted.
    """
    places = [place for place, counts in enumerate(conversation.target) if counts and place]
    if not places:
        raise MoesteerError(
            f"a text of {len(conversation.ids)} tokens has no target token after the first, so"
            " nothing predicts its target."
        )
    share = weight / len(places)
    terms = tuple(Term(place, conversation.ids[place], share) for place in places)
    return Readout(conversation.ids, terms)


def check_readouts(readouts: Sequence[Readout], vocabulary: int, longest: int | None) -> None:
    """Raise MoesteerError, with its number, at the first readout that can't be read."""
    for number, readout in enumerate(readouts, start=1):
        if longest is not None and len(readout.ids) > longest:
            raise MoesteerError(
                f"readout {number} has {len(readout.ids)} tokens, over the model's context of"
                f" {longest}; shorten its text."
            )
        for term in readout.terms:
            if not 1 <= term.position <= len(readout.ids):
                raise MoesteerError(
                    f"readout {number} asks for position {term.position}; its text of"
                    f" {len(readout.ids)} tokens predicts positions 1 to {len(readout.ids)}."
                )
        words = (*readout.ids, *(term.token for term in readout.terms))
        if words and not 0 <= min(words) <= max(words) < vocabulary:
            raise MoesteerError(
                f"readout {number} has tokens from {min(words)} to {max(words)}; the model has"
                f" 0–{vocabulary - 1}."
            )


def reaching(profile: Profile, goes_on: bool) -> Profile:
    """The profile, less its directions of generated tokens where no text goes on after its prompt:
    they have nothing to do there, and there is nothing to prove."""
    directions = tuple(d for d in profile.directions if d.window != "generation")
    if goes_on or directions == profile.directions:
        return profile
    return replace(profile, directions=directions)
