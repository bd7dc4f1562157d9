"""Directions of refusal in the bundled models, found once for all tests that ask for them."""

from functools import cache

from moesteer.directions.aiming import Aim
from moesteer.directions.experts import find_expert_directions
from moesteer.directions.prompts import PromptSets, draw_sets, read_prompt_set
from moesteer.directions.refusal import prepare_sets
from moesteer.directions.residual import find_residual_direction
from moesteer.directions.selection import Thresholds
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.profile import Profile


@cache
def bundled(name: str) -> TransformersEngine:
    return load_transformers(name)


@cache
def refusal_sets(name: str) -> PromptSets:
    a, b = (read_prompt_set(f"testbed:{task}") for task in ("restricted", "benign"))
    return prepare_sets(
        bundled(name), draw_sets(bundled(name), a, b, fit=32, validate=8), batch_size=32
    )


@cache
def residual_direction(name: str) -> Profile:
    """The one that brings refusal about, of all layers and the last two positions."""
    return find_residual_direction(
        bundled(name),
        refusal_sets(name),
        last=2,
        thresholds=Thresholds(max_kl=5.0, max_layer=1.0),
        aim=Aim(),
        batch_size=32,
        seed=0,
        source="the testbed's prompts",
        command="moesteer direction",
    )


@cache
def expert_directions(name: str) -> Profile:
    """Each expert's own output, for tokens routed to it."""
    return find_expert_directions(
        bundled(name),
        refusal_sets(name),
        last=5,
        kind="own",
        batch_size=32,
        source="the testbed's prompts",
        command="moesteer direction --experts",
    )
