"""Log-odds ratio: how many times larger the odds of being selected are on A's tokens than on B's.

    log [ a₁ / (n₁ − a₁) ] − log [ a₂ / (n₂ − a₂) ]

a = target tokens whose top-k holds the expert, n = all target tokens of that side, pooled over the
pairs. A doubling counts the same for a rare expert as for a common one, which the risk difference
hardly sees; so rare experts rank higher, and noise with them. To every cell ½ is added (shared by
the sides' sizes), so that never and always stay finite. In nats; positive means that the expert
goes with A. SteerMoE's ablation, arXiv 2509.09660; Haldane 1956, Annals of Human Genetics 20.
"""

import numpy as np

from moesteer.detection.resampling import corrected


def score(a1: np.ndarray, a2: np.ndarray, n1: np.ndarray, n2: np.ndarray) -> np.ndarray:
    """The log-odds ratio; see the module for the formula."""
    a1, a2, n1, n2 = corrected(a1, a2, n1, n2)
    return np.log(a1 / (n1 - a1)) - np.log(a2 / (n2 - a2))
