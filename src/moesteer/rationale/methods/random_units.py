"""Random words: what every rationale must beat at an equal count, or it says nothing."""

import random

from moesteer.rationale.layout import Laid


def random_scores(laid: Laid, seed: int) -> tuple[float, ...]:
    """A number from 0 to 1 for each unit: the same for an instance and a seed, whatever was drawn
    for others before."""
    drawn = random.Random(f"random {seed} {laid.ids}")
    return tuple(drawn.random() for _ in laid.units)
