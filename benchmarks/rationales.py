"""Attribution against captum and inseq, in an environment of its own that has both.

The contest is `one_by_one.py`. moesteer itself needs neither package.
"""

from environments import environment, figures_of
from paired import Figure

PACKAGES = ("captum==0.9.0", "inseq==0.7.1")


def figures() -> list[Figure]:
    return figures_of("one_by_one.py", environment("benchmark-rationales", PACKAGES))
