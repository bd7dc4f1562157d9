"""Normalised pointwise mutual information: how much an expert and a side tell of each other.

    PMI(e, S) = log [ p(e, S) / (p(e) p(S)) ],   nPMI = PMI / −log p(e, S),
    score = nPMI(e, A) − nPMI(e, B)

p is over tokens drawn from either side with equal probability, p(A) = p(B) = ½, so that the longer
side doesn't set the base rate: with r₁ and r₂ the rates of the expert on A and B,
p(e, A) = r₁ / 2 and p(e) = (r₁ + r₂) / 2. nPMI is −1 where they never meet, 0 where they are
independent and 1 where one never comes without the other; the difference is in [−2, 2], and
positive means that the expert goes with A. RICE, arXiv 2505.14681, ranks experts by nPMI with
tokens of thought; the antisymmetric form is ours, for two sides. To every cell of the counts ½ is
added (shared by the sides' sizes), so that an expert met once on one side doesn't outrank all.
"""

import numpy as np

from moesteer.detection.resampling import corrected


def score(a1: np.ndarray, a2: np.ndarray, n1: np.ndarray, n2: np.ndarray) -> np.ndarray:
    """nPMI with A less nPMI with B; see the module for the formula."""
    a1, a2, n1, n2 = corrected(a1, a2, n1, n2)
    rate1, rate2 = a1 / n1, a2 / n2
    return _npmi(rate1, rate2) - _npmi(rate2, rate1)


def _npmi(rate: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.log(2 * rate / (rate + other)) / -np.log(rate / 2)
