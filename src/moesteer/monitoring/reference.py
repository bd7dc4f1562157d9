"""What ordinary routing looks like, and when a text is far from it.

A reference is made of texts that stand for ordinary use, in two halves: of one, how often each
expert was selected; of the other, the scores from which the thresholds come (`threshold.py`).

A text raises an alarm where its drift is above the threshold, or its linked share below its own:
drift is watched from above only (nobody is too ordinary), the linked share from below only (the
experts that a behaviour hangs on have fallen silent; that they are busier than usual shows that the
text calls for the behaviour, which is no attack on it).
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Num

from moesteer.errors import MoesteerError
from moesteer.model_facts import ModelFacts
from moesteer.monitoring.drift import linked_share, reference_shares, routing_drift
from moesteer.monitoring.threshold import bins_of, least_texts, threshold
from moesteer.profile import Expert, Profile
from moesteer.profile_fit import check_fits, check_model

Over = Literal["prompt", "reply"]
"""Whose tokens are watched: all of the rendered prompt, or the reply's."""

Score = Literal["drift", "linked"]


@dataclass(frozen=True)
class Origin:
    """What a reference is of: the model, the texts, and what was asked.

    `linked` are the experts that are watched for falling silent, none or some. `texts` is how many
    the shares are of; `borders` are the largest lengths, in tokens, of all bins but the last.
    """

    model: ModelFacts
    over: Over
    linked: tuple[Expert, ...]
    false_alarms: float
    borders: tuple[int, ...]
    texts: int
    source: str
    data_hash: str
    chat_options: dict[str, bool | int | float | str]
    seed: int
    versions: dict[str, str]
    command: str

    @property
    def rate(self) -> float:
        """Of false alarms by each score."""
        return rate_of_each(self.false_alarms, bool(self.linked))


@dataclass(frozen=True)
class Limits:
    """Of one bin of lengths: texts of more drift, or of a lower linked share, raise an alarm."""

    drift: float
    linked: float | None


@dataclass(frozen=True)
class Verdict:
    """What is said of a text: its scores, None where it is unknown, and which raise an alarm."""

    tokens: int
    drift: float | None = None
    linked: float | None = None
    raised: tuple[Score, ...] = ()

    @property
    def word(self) -> Literal["ok", "alarm", "unknown"]:
        if self.drift is None:
            return "unknown"
        return "alarm" if self.raised else "ok"


@dataclass(frozen=True, eq=False)
class Reference:
    """Selections of the texts that it was fitted on, and lengths and scores of the held-out ones.

    Raises MoesteerError where these can't be, or are too few for the rate of false alarms.
    """

    origin: Origin
    selected: Int[np.ndarray, "layer expert"]
    tokens: Int[np.ndarray, " text"]
    drift: Float[np.ndarray, " _text"]
    linked: Float[np.ndarray, " _text"]
    name: str = field(default="reference")

    def __post_init__(self) -> None:
        origin, layers = self.origin, self.origin.model.layers
        check_fits(Profile(activated=origin.linked, name="linked experts"), layers)
        if not layers or (self.selected < 0).any() or not self.selected.any(-1).all():
            raise MoesteerError("there are layers in which the reference's texts select nothing.")
        held_out = [self.tokens, self.drift, *[self.linked] * bool(origin.linked)]
        if len({len(values) for values in held_out}) != 1:
            raise MoesteerError("the held-out texts have scores of unequal numbers.")
        if list(origin.borders) != sorted(set(origin.borders)):
            raise MoesteerError(f"the borders of lengths, {origin.borders}, do not ascend.")
        check_enough(min(self.bin_sizes), origin.false_alarms, bool(origin.linked))

    @cached_property
    def shares(self) -> Float[np.ndarray, "layer expert"]:
        """Each expert's share of its layer's selections, smoothed."""
        return reference_shares(self.selected, self.origin.model.layers)

    @cached_property
    def limits(self) -> tuple[Limits, ...]:
        """The thresholds of each bin, the shortest texts first."""
        found = []
        for number in range(len(self.origin.borders) + 1):
            inside = np.array(self._bins) == number
            drift = threshold(self.drift[inside], self.origin.rate)
            linked = None
            if self.origin.linked:
                linked = -threshold(-self.linked[inside], self.origin.rate)
            found.append(Limits(drift, linked))
        return tuple(found)

    @property
    def bin_sizes(self) -> tuple[int, ...]:
        """How many held-out texts each bin has."""
        return tuple(np.bincount(self._bins, minlength=len(self.origin.borders) + 1).tolist())

    @property
    def _bins(self) -> list[int]:
        return bins_of(self.tokens, self.origin.borders)

    def judge(self, selected: Num[np.ndarray, "layer expert"], tokens: int) -> Verdict:
        """What is to be said of a text of so many tokens that selected each expert so often.

        Unknown where it has no tokens, or a layer saw fewer selections than tokens.
        """
        layers = self.origin.model.layers
        if not tokens or (selected.sum(-1) < tokens).any():
            return Verdict(tokens)
        drift = routing_drift(selected, self.shares)
        linked = None
        if self.origin.linked:
            linked = linked_share(selected, tokens, self.origin.linked, layers)
        limits = self.limits[bins_of([tokens], self.origin.borders)[0]]
        raised: list[Score] = ["drift"] * (drift > limits.drift)
        if linked is not None and limits.linked is not None and linked < limits.linked:
            raised.append("linked")
        return Verdict(tokens, drift, linked, tuple(raised))


def rate_of_each(false_alarms: float, linked: bool) -> float:
    """Of false alarms by each score, so that at most as many as asked for come from any."""
    return false_alarms / (2 if linked else 1)


def check_enough(held_out: int, false_alarms: float, linked: bool) -> None:
    """MoesteerError for a rate that nobody could ask for, or that needs more held-out texts."""
    if not 0 < false_alarms <= 0.5:
        raise MoesteerError(
            f"the rate of false alarms is {false_alarms:g}; it must be above 0, and at most 0.5."
        )
    least = least_texts(rate_of_each(false_alarms, linked))
    if held_out < least:
        possible = (2 if linked else 1) / (held_out + 1)
        lower = f", or a rate of {possible:.2g} or more" if possible <= 0.5 else ""
        raise MoesteerError(
            f"{held_out} held-out reference texts are too few for {100 * false_alarms:.3g} % false"
            f" alarms by {'two scores' if linked else 'one score'}, which needs {least} (half of"
            f" the texts that differ are held out). Give more texts{lower}."
        )


def check_reference(reference: Reference, model: ModelFacts) -> None:
    """Raise MoesteerError if the reference was made on another model, tokenizer or chat template.

    Other weights beside the same routers are a MoesteerWarning only.
    """
    made_on = reference.origin.model
    if made_on.tokenizer_hash != model.tokenizer_hash:
        raise MoesteerError(
            f"{reference.name} was made with another tokenizer or chat template than {model.id}"
            f" has now ({made_on.tokenizer_hash[:8]}… and {model.tokenizer_hash[:8]}…): its rate of"
            " false alarms would not hold. Fit it again."
        )
    check_model(Profile(model=made_on, name=reference.name), model)
