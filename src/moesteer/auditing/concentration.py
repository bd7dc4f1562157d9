"""How concentrated is a behaviour: how unequally the losses of single experts take it away.

Intuition: a behaviour that hangs on three experts of thousands is lost with them; one that all
share a little is not. Of an expert's knock-out effect only what takes the behaviour away counts, so
that of n experts e = max(0, mean over pairs), and p = e / Σ e:

    Gini              Σ_i (2i − n − 1) e_(i) / (n Σ e), sorted upwards: 0 where all are alike,
                      (n − 1) / n where one has everything (Gini 1912; Dixon et al. 1987, Ecology
                      68, 1548–1551)
    effective number  exp(−Σ p ln p): as many equal experts would be as uncertain to guess, from 1
                      to n (Hill 1973, Ecology 54, 427–432, the number of order 1)
    share of the top  of the m largest in Σ e
    total             Σ e, in nats: of how much all that is the distribution

Intervals are percentiles over resampled pairs. Chance alone makes some of n means positive, and all
of them add to Σ e: with few pairs and many experts the effective number comes out too large, and
the interval, which adds the chance of resampling, larger still. So none of these numbers is read
alone, but beside the same of decisions that are not about the behaviour (see `importance.py`).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from moesteer.detection.significance import RESAMPLES
from moesteer.statistics.intervals import percentile_interval, resampled


@dataclass(frozen=True)
class Measure:
    """A number and its 95 % interval; None where no expert's loss takes anything away."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Concentration:
    """Of `experts` experts: the total in nats, Gini, effective number, and shares of the 1, 3 and
    10 largest."""

    experts: int
    total: Measure
    gini: Measure
    effective: Measure
    top_1: Measure
    top_3: Measure
    top_10: Measure


def concentration(effects: Float[np.ndarray, "pair expert"], *, seed: int = 0) -> Concentration:
    """The measures of knock-out effects in nats, with intervals over pairs."""
    pairs = len(effects)
    draws = resampled(pairs, RESAMPLES, np.random.default_rng(seed))
    mean, drawn = effects.mean(0), draws @ effects / pairs
    losses, redrawn = np.maximum(mean, 0), np.maximum(drawn, 0)

    def measure(values: Float[np.ndarray, "*some"], drawn: Float[np.ndarray, "*more"]) -> Measure:
        known = drawn[~np.isnan(drawn)]
        if np.isnan(values) or not len(known):
            return Measure(None, None, None)
        low, high = percentile_interval(known)
        return Measure(float(values), float(low), float(high))

    return Concentration(
        effects.shape[1],
        measure(np.asarray(losses.sum(-1)), redrawn.sum(-1)),
        measure(gini(losses), gini(redrawn)),
        measure(effective_number(losses), effective_number(redrawn)),
        *(measure(top_share(losses, m), top_share(redrawn, m)) for m in (1, 3, 10)),
    )


def gini(losses: Float[np.ndarray, "*some expert"]) -> Float[np.ndarray, "*some"]:
    """Gini's coefficient of what is at least 0; NaN where all of it is 0."""
    n = losses.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    with np.errstate(invalid="ignore"):
        return np.asarray((np.sort(losses, -1) * weights).sum(-1) / (n * losses.sum(-1)))


def effective_number(losses: Float[np.ndarray, "*some expert"]) -> Float[np.ndarray, "*some"]:
    """The exponential of Shannon's entropy of the shares; NaN where all of it is 0."""
    from scipy.special import entr

    with np.errstate(invalid="ignore"):
        return np.asarray(np.exp(entr(losses / losses.sum(-1, keepdims=True)).sum(-1)))


def top_share(losses: Float[np.ndarray, "*some expert"], m: int) -> Float[np.ndarray, "*some"]:
    """The share of the m largest in the sum; NaN where all of it is 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sort(losses, -1)[..., -m:].sum(-1) / losses.sum(-1))
