"""Scores of many resamples at once.

Every score here is a function of sums over pairs. A resample weighs the pairs (how often it drew
each), so its sums are a product of weights and per-pair parts, and all resamples of a layer are one
matrix product. Layer by layer, so that memory stays that of one layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from moesteer.detection.counts import RoutingCounts

Parts = Callable[
    [Float[np.ndarray, "pair 2 expert"], Float[np.ndarray, "pair 2"]], tuple[np.ndarray, ...]
]
"""From one layer's counts and the target tokens to what is summed over pairs; each part is
[pair, expert], or [pair, 1] where it is the same for all experts."""

Score = Callable[..., np.ndarray]
"""From the sums of all parts, [resample, expert] or [resample, 1], to [resample, expert]."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A score of every expert, the ends of its interval, and what kind of interval that is."""

    value: Float[np.ndarray, "layer expert"]
    low: Float[np.ndarray, "layer expert"]
    high: Float[np.ndarray, "layer expert"]
    interval: str


def layer_scores(
    parts: Parts, score: Score, counts: RoutingCounts, weights: Float[np.ndarray, "resample pair"]
) -> Iterator[Float[np.ndarray, "resample expert"]]:
    """Scores of every resample, one layer after the other."""
    tokens = counts.tokens.astype(np.float64)
    for layer in range(counts.selected.shape[2]):
        selected = counts.selected[:, :, layer].astype(np.float64)
        yield score(*(weights @ part for part in parts(selected, tokens)))


def scores_of_all(
    parts: Parts, score: Score, counts: RoutingCounts
) -> Float[np.ndarray, "layer expert"]:
    """Scores from all pairs, each once."""
    once = np.ones((1, len(counts.tokens)))
    return np.concatenate(list(layer_scores(parts, score, counts, once)))


def halves(pairs: int, splits: int, seed: int) -> Float[np.ndarray, "split pair"]:
    """Random halves of the pairs, without replacement: 1 is in, 0 is out; an odd one is out."""
    generator = np.random.default_rng(seed)
    template = np.tile((np.arange(pairs) < pairs // 2).astype(np.float64), (splits, 1))
    return generator.permuted(template, axis=1)


def pooled(
    selected: Float[np.ndarray, "pair 2 expert"], tokens: Float[np.ndarray, "pair 2"]
) -> tuple[np.ndarray, ...]:
    """Parts of scores that pool all tokens of a side: a₁, a₂, n₁ and n₂ of each pair."""
    return selected[:, 0], selected[:, 1], tokens[:, :1], tokens[:, 1:]


def corrected(
    a1: np.ndarray, a2: np.ndarray, n1: np.ndarray, n2: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The pooled counts with one token more selected and one more not, shared by the sides' sizes.

    With sides of one size that is Haldane's ½ in each cell. Shared by size, an expert that was
    selected at one rate (never, or always) on both sides keeps equal rates: Sweeting, Sutton &
    Lambert 2004, Statistics in Medicine 23, "treatment arm" correction.
    """
    share1, share2 = n1 / (n1 + n2), n2 / (n1 + n2)
    return a1 + share1, a2 + share2, n1 + 2 * share1, n2 + 2 * share2
