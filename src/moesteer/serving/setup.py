"""What `moesteer serve` hands to its middleware: it travels with vLLM's own arguments."""

from argparse import Namespace
from dataclasses import dataclass, field

from moesteer.model_facts import ModelFacts
from moesteer.monitoring.reference import Reference
from moesteer.profile import Profile

ATTRIBUTE = "moesteer"


@dataclass
class Setup:
    """`profiles` to begin with; `facts` of the model, which later ones must fit.

    Without `admin_key` nothing can be loaded or removed. `failure` is where the middleware leaves
    the reason if it can't begin. `watch` is what every request is judged by, if any are.
    """

    profiles: dict[str, Profile]
    facts: ModelFacts
    admin_key: str | None = field(default=None, repr=False)
    failure: str | None = None
    watch: Reference | None = None


def setup_of(args: Namespace) -> Setup:
    return getattr(args, ATTRIBUTE)
