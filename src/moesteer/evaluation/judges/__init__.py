"""Who judges replies: one file a kind of judge, and what a card calls it."""

from moesteer.evaluation.judges.base import Context, Settings
from moesteer.evaluation.judges.classifier import Classifier
from moesteer.evaluation.judges.endpoint import Endpoint
from moesteer.evaluation.judges.guard import Guard
from moesteer.evaluation.judges.matching import Contains, Exact, First, Pattern
from moesteer.evaluation.judges.perplexity import Perplexity
from moesteer.evaluation.judges.refusal import Refusal
from moesteer.evaluation.judges.repetition import Repetition
from moesteer.evaluation.judges.testbed import World

__all__ = ["KINDS", "Context", "Settings"]

KINDS: dict[str, type[Settings]] = {
    "exact": Exact,
    "contains": Contains,
    "first": First,
    "pattern": Pattern,
    "refusal": Refusal,
    "testbed": World,
    "repetition": Repetition,
    "perplexity": Perplexity,
    "classifier": Classifier,
    "guard": Guard,
    "endpoint": Endpoint,
}
"""A card's `kind` and the settings it takes; settings make the judge."""
