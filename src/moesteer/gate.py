"""A gate: on which requests a profile steers.

Steering costs something on every request it is applied to. A profile with a gate steers a request
only if a probe of its prompt says that the request is of the kind that is to be steered:

    steered  ⇔  score(prompt) > threshold

The probe reads the unsteered prompt, all of it, the beginning of the reply that the chat template
writes included; then the request is steered whole, prompt and reply, or not at all. Two probes:

    routing      score = mean over tokens t of Σ_e w_e · [t selects expert e]
    direction    score = v·x, with x what enters a decoder layer at a place counted from the end

The idea is conditional activation steering (Lee et al. 2024, CAST, arXiv 2409.05907), which
compares what a layer puts out with a condition vector. What makes a probe, and chooses a
threshold: `moesteer.gating`.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moesteer.errors import MoesteerError

UNIT = 1e-6
"""How far a probe's vector may be from length 1."""


@dataclass(frozen=True)
class RoutingProbe:
    """How a prompt is routed: a weight for each of some experts, as (layer, expert).

    Read on the prompt's last `last` tokens, on all of them where it is None or they are fewer.
    """

    experts: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    last: int | None = None

    def __post_init__(self) -> None:
        if not self.experts or len(self.experts) != len(self.weights):
            raise MoesteerError(
                f"a gate's routing probe has {len(self.experts)} experts and {len(self.weights)}"
                " weights; it needs some, and a weight for each."
            )
        if len(set(self.experts)) < len(self.experts):
            raise MoesteerError("a gate's routing probe names an expert twice.")
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise MoesteerError("a gate's weights must be finite, and not all of them 0.")
        if self.last is not None and self.last < 1:
            raise MoesteerError(f"a gate reads the last {self.last} tokens; it needs 1 or more.")

    def span(self, tokens: int) -> tuple[int, int]:
        """Where the read tokens of a prompt of so many begin and end."""
        return max(0, tokens - (self.last or tokens)), tokens

    @property
    def words(self) -> str:
        where = "all tokens" if self.last is None else f"the last {self.last} tokens"
        where = "the last token" if self.last == 1 else where
        layers = sorted({layer for layer, _ in self.experts})
        return f"routing of {where} to {len(self.experts)} experts of layers {_listed(layers)}"


@dataclass(frozen=True)
class DirectionProbe:
    """A unit vector, as wide as the residual stream, and where it is read: what enters decoder
    layer `layer` at the prompt's token `position`, −1 being the last."""

    layer: int
    position: int
    vector: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.position > -1:
            raise MoesteerError(
                f"a gate reads position {self.position}; it is counted from the prompt's end, −1"
                " being its last token."
            )
        norm = math.sqrt(sum(number * number for number in self.vector))
        if not abs(norm - 1) <= UNIT:  # also where it is NaN
            raise MoesteerError(f"a gate's vector has norm {norm:.6g}; it must be a unit vector.")

    def span(self, tokens: int) -> tuple[int, int]:
        """Where the read token of a prompt of so many begins and ends; MoesteerError for a shorter
        one."""
        if tokens < -self.position:
            raise MoesteerError(
                f"a prompt has {tokens} tokens, and the gate reads position {self.position}."
            )
        return tokens + self.position, tokens + self.position + 1

    @property
    def words(self) -> str:
        return f"projection of what enters layer {self.layer} at position {self.position}"


Probe = RoutingProbe | DirectionProbe


@dataclass(frozen=True)
class Opened:
    """How many of some prompts opened a gate, of how many; `low` and `high`: Wilson's interval."""

    opened: int
    prompts: int
    low: float
    high: float


@dataclass(frozen=True)
class AreaUnderCurve:
    """How often a prompt that is to open a gate scores above one that is not, ties counting half;
    with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def words(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}–{self.high:.3f})"


@dataclass(frozen=True)
class GateEvidence:
    """Where a gate comes from: prompts it was fitted on, and what it did on the dev prompts.

    `opens` and `keeps_shut` count the dev prompts that open it, of those that are to and of those
    that are not; of the latter the threshold was to let in no more than the share `false_alarms`.
    `auc` is of the dev prompts. Beside it stand the mean and the middle 95 % of its values for
    probes that were fitted in the same way where all labels are `shuffled`, and for `random` ones:
    random experts or a random vector in the same place. `fit_opens` and `fit_keeps_shut` are how
    many prompts the probe was fitted on.
    """

    source: str
    data_hash: str
    fit_opens: int
    fit_keeps_shut: int
    false_alarms: float
    opens: Opened
    keeps_shut: Opened
    auc: AreaUnderCurve
    shuffled: AreaUnderCurve
    random: AreaUnderCurve
    seed: int
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True)
class Gate:
    """A probe and the score that a prompt must exceed; two are equal that the same prompts open."""

    probe: Probe
    threshold: float
    evidence: GateEvidence | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise MoesteerError(f"a gate's threshold is {self.threshold}; it must be finite.")

    @property
    def kind(self) -> Literal["routing", "direction"]:
        return "routing" if isinstance(self.probe, RoutingProbe) else "direction"

    @property
    def words(self) -> str:
        """What opens it, in a line."""
        return f"opens where the {self.probe.words} exceeds {self.threshold:.4g}"

    @property
    def does(self) -> dict[str, Any]:
        """What decides which prompts open it, and nothing else."""
        return {"kind": self.kind, **asdict(self.probe), "threshold": self.threshold}

    def opens(self, score: float) -> bool:
        """Whether a prompt with this score is steered; MoesteerError where there is none to go by.

        NaN is below every threshold: without a word, nothing would be steered.
        """
        if not math.isfinite(score):
            raise MoesteerError(
                f"a prompt's score at the gate is {score}: what the model computes of it is NaN or"
                " infinite. Load the model in another dtype (--dtype float32 or bfloat16)."
            )
        return score > self.threshold


def _listed(numbers: list[int]) -> str:
    ends = numbers if len(numbers) < 3 else [numbers[0], numbers[-1]]
    return ("…" if len(numbers) > 2 else ", ").join(map(str, ends))
