"""How well scores tell two sets of prompts apart, whatever the threshold: the area under the curve.

    AUC = P(score of A > score of B) + ½ P(equal)         (Mann and Whitney 1947)

over all pairs of a prompt of A and one of B; ½ is chance. Its interval is a 95 % percentile
bootstrap over prompts, each side drawn on its own; it has no width where the sides don't overlap.
"""

import numpy as np
from jaxtyping import Float

from moesteer.gate import AreaUnderCurve
from moesteer.statistics.intervals import percentile_interval, resampled

RESAMPLES = 2000


def area_under_curve(a: Float[np.ndarray, " a"], b: Float[np.ndarray, " b"]) -> float:
    """Of scores that are to be high, and of those that are to be low."""
    return float(_above(a, b).mean())


def auc_with_interval(
    a: Float[np.ndarray, " a"], b: Float[np.ndarray, " b"], seed: int
) -> AreaUnderCurve:
    """The same with its interval."""
    above, generator = _above(a, b), np.random.default_rng(seed)
    # How often each prompt is drawn, as shares: an AUC of a resample is a weighted mean.
    drawn_a, drawn_b = (resampled(n, RESAMPLES, generator) / n for n in above.shape)
    return spread(((drawn_a @ above) * drawn_b).sum(-1), float(above.mean()))


def spread(values: Float[np.ndarray, " value"], middle: float | None = None) -> AreaUnderCurve:
    """The middle 95 % of some AUCs, around their mean unless another `middle` is given."""
    low, high = percentile_interval(values)
    return AreaUnderCurve(
        float(values.mean()) if middle is None else middle, float(low), float(high)
    )


def _above(a: Float[np.ndarray, " a"], b: Float[np.ndarray, " b"]) -> Float[np.ndarray, "a b"]:
    """1 where a prompt of A scores above one of B, ½ where they are equal."""
    return (a[:, None] > b) + 0.5 * (a[:, None] == b)
