"""moesteer beside nnsight and steering-vectors, in an environment of its own that has both.

The contest is `with_others.py`. moesteer itself needs neither package.
"""

from environments import environment, figures_of
from paired import Figure

PACKAGES = ("nnsight==0.8.1", "scikit-learn", "tqdm")
ALONE = ("steering-vectors==0.12.2",)
"""Asks for transformers 4, and runs on 5 all the same. repeng 0.4.0 does not import on numpy 2."""


def figures() -> list[Figure]:
    return figures_of("with_others.py", environment("benchmark-others", PACKAGES, ALONE))
