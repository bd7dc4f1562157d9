"""How far a rationale agrees with the words that people marked.

    precision   the share of the rationale that people marked
    recall      the share of what people marked that is in the rationale
    F1          their harmonic mean, 2 · |both| / (|rationale| + |marked|)
    IoU         |both| / |either|
    AUPRC       Σ (Rᵢ − Rᵢ₋₁) · Pᵢ over the scores from the highest, a rationale of any size

All count tokens, as in the paper (Fayyaz et al. 2024, arXiv 2407.00219): a unit is worth its number
of tokens. AUPRC is average precision; units of equal score are taken together, so that their order
means nothing. Where a share is of nothing, it is 0: an empty rationale agrees with nobody.

At a rationale of as many tokens as people marked, precision, recall and F1 are one number; DeYoung
et al. 2020 (arXiv 1911.03429) hold IoU and AUPRC beside it.
"""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float, Int


def precision(chosen: Collection[int], human: Collection[int], tokens: Sequence[int]) -> float:
    """Share of the chosen units' tokens that people marked; 0 where none are chosen.

    chosen, human: numbers of units. tokens: how many tokens each unit has.
    """
    return _share(_both(chosen, human, tokens), _size(chosen, tokens))


def recall(chosen: Collection[int], human: Collection[int], tokens: Sequence[int]) -> float:
    """Share of the marked units' tokens that are chosen; 0 where none are marked."""
    return _share(_both(chosen, human, tokens), _size(human, tokens))


def f1(chosen: Collection[int], human: Collection[int], tokens: Sequence[int]) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is common to both."""
    sizes = _size(chosen, tokens) + _size(human, tokens)
    return _share(2 * _both(chosen, human, tokens), sizes)


def iou(chosen: Collection[int], human: Collection[int], tokens: Sequence[int]) -> float:
    """Tokens that are chosen and marked, of all that are either; 0 where there are none."""
    return _share(_both(chosen, human, tokens), _size({*chosen, *human}, tokens))


def auprc(scores: Sequence[float], human: Collection[int], tokens: Sequence[int]) -> float:
    """Average precision of the units' scores, one a unit; 0 where people marked none."""
    values = np.asarray(scores, dtype=float)
    sizes = np.asarray(tokens, dtype=np.int64)
    marked = np.zeros(len(sizes), dtype=np.int64)
    for unit in human:
        marked[unit] = sizes[unit]
    return _average_precision(values, marked, sizes)


def _average_precision(
    scores: Float[np.ndarray, " unit"],
    marked: Int[np.ndarray, " unit"],
    tokens: Int[np.ndarray, " unit"],
) -> float:
    if not marked.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    # After the last unit of each score, from the highest: what is chosen, and what of it is marked.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    chosen, right = np.cumsum(tokens[order])[ends], np.cumsum(marked[order])[ends]
    gained = np.diff(right, prepend=0)
    return float((gained * right / np.maximum(chosen, 1)).sum() / marked.sum())


def _both(chosen: Collection[int], human: Collection[int], tokens: Sequence[int]) -> int:
    return _size({*chosen} & {*human}, tokens)


def _size(units: Collection[int], tokens: Sequence[int]) -> int:
    return sum(tokens[unit] for unit in {*units})


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
