"""What each writer adds along a direction, and what its loss changes: means, with intervals.

    share of a writer = its Δ / Σ Δ,    Δ = mean over A's prompts − mean over B's

and the change of the score without the direction, prompt by prompt. Intervals are 95 % percentile
bootstraps over prompts, each side drawn on its own (Efron & Tibshirani 1993, chapter 13).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from moesteer.direction import Place
from moesteer.statistics.intervals import percentile_interval, resampled

RESAMPLES = 1000

Part = Literal["embedding", "attention", "expert", "rest"]
PARTS: tuple[Part, ...] = ("embedding", "attention", "expert", "rest")

ABLATED: dict[str, tuple[Place, ...]] = {
    "nothing": (),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "both": ("attention", "mlp"),
}
"""Of which outputs the direction is projected out, by name."""

Column = tuple[Part, int | None, int | None]
"""Part, layer and expert of a writer."""


@dataclass(frozen=True)
class Writer:
    """What one writer adds along the unit vector, A less B, in units of the stream.

    `layer` is None for the embedding and for all layers of a part together; `expert` for all but
    routed experts. `share` is of the total.
    """

    part: Part
    layer: int | None
    expert: int | None
    value: float
    low: float
    high: float
    share: float


@dataclass(frozen=True)
class Ablated:
    """Mean refusal score of A's prompts, in nats, with the direction projected out of `what`, and
    how far that is from nothing, prompt by prompt."""

    what: Literal["nothing", "attention", "mlp", "both"]
    score: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float


# -- what is written -----------------------------------------------------------------------------


def shares(
    a: Float[np.ndarray, "prompt_a writer"],
    b: Float[np.ndarray, "prompt_b writer"],
    columns: Sequence[Column],
    seed: int,
) -> tuple[tuple[Writer, ...], tuple[Writer, ...], tuple[float, float, float]]:
    """The parts, the writers, and the total with its interval, from what each adds per prompt."""
    draws_a, draws_b = (_draws(len(table), seed + n) for n, table in enumerate((a, b)))
    of_part = np.array([[column[0] == part for column in columns] for part in PARTS], dtype=float)
    # The writers, then the parts, then all of them.
    sums = np.concatenate([np.eye(len(columns)), of_part, np.ones((1, len(columns)))]).T
    # What is the same in all prompts is 0 then, and not what rounding leaves.
    a, b = a - a[:1], b - a[:1]
    value = (a.mean(0) - b.mean(0)) @ sums
    low, high = percentile_interval((draws_a @ a - draws_b @ b) @ sums)
    total = float(value[-1])
    named: list[Column] = [*columns, *((part, None, None) for part in PARTS)]
    found = tuple(
        Writer(*column, float(value[n]), float(low[n]), float(high[n]), _share(value[n], total))
        for n, column in enumerate(named)
    )
    writers, parts = found[: len(columns)], found[len(columns) :]
    return parts, writers, (total, float(low[-1]), float(high[-1]))


def _share(value: float, total: float) -> float:
    return float(value) / total if total else 0.0


def _draws(prompts: int, seed: int) -> Float[np.ndarray, "resample prompt"]:
    """How large a part each prompt is of each resample."""
    return resampled(prompts, RESAMPLES, np.random.default_rng(seed)) / prompts


# -- what its loss changes -----------------------------------------------------------------------


def ablations(scores: Float[np.ndarray, "what prompt"], seed: int) -> tuple[Ablated, ...]:
    """Mean scores with intervals, in the order of `ABLATED`, and changes against the first."""
    draws = _draws(scores.shape[1], seed)
    change = scores - scores[0]
    low, high = percentile_interval(draws @ scores.T)
    change_low, change_high = percentile_interval(draws @ change.T)
    return tuple(
        Ablated(
            what,  # pyright: ignore[reportArgumentType]
            float(scores[n].mean()),
            float(low[n]),
            float(high[n]),
            float(change[n].mean()),
            float(change_low[n]),
            float(change_high[n]),
        )
        for n, what in enumerate(ABLATED)
    )
