"""moesteer: find the experts of a Mixture-of-Experts model that carry a behaviour, steer them,
and prove what changed.

    engine = moesteer.load("testbed")
    pairs = moesteer.read_pairs("testbed:refusal")
    profile = moesteer.select(moesteer.detect(engine, pairs), activate=3, deactivate=0, toward="a")
    with moesteer.steer(engine.model, profile) as fired:
        engine.model.generate(...)
    print(fired)

Names are imported when first used, so that `import moesteer` stays light.
"""

from typing import TYPE_CHECKING

from moesteer.errors import DidNotFire, MoesteerError
from moesteer.version import __version__

if TYPE_CHECKING:
    from moesteer.contrast import ContrastPair, read_pairs
    from moesteer.detection.detect import detect
    from moesteer.detection.selecting import select_experts as select
    from moesteer.direction import Direction
    from moesteer.engines.transformers.steering import Steering, steer
    from moesteer.engines.transformers_engine import TransformersEngine
    from moesteer.engines.transformers_engine import load_transformers as load
    from moesteer.engines.vllm_engine import VllmEngine, load_vllm
    from moesteer.evaluation.cards import read_card
    from moesteer.evaluation.controls import random_control
    from moesteer.evaluation.evaluate import evaluate
    from moesteer.evaluation.search import search
    from moesteer.profile import Profile
    from moesteer.profile_combining import combine
    from moesteer.rationale.explain import Settings as RationaleSettings
    from moesteer.rationale.explain import explain
    from moesteer.rationale.instances import read_instances

_HOME = {
    "ContrastPair": "moesteer.contrast:ContrastPair",
    "read_pairs": "moesteer.contrast:read_pairs",
    "detect": "moesteer.detection.detect:detect",
    "select": "moesteer.detection.selecting:select_experts",
    "Direction": "moesteer.direction:Direction",
    "Steering": "moesteer.engines.transformers.steering:Steering",
    "steer": "moesteer.engines.transformers.steering:steer",
    "TransformersEngine": "moesteer.engines.transformers_engine:TransformersEngine",
    "load": "moesteer.engines.transformers_engine:load_transformers",
    "VllmEngine": "moesteer.engines.vllm_engine:VllmEngine",
    "load_vllm": "moesteer.engines.vllm_engine:load_vllm",
    "read_card": "moesteer.evaluation.cards:read_card",
    "evaluate": "moesteer.evaluation.evaluate:evaluate",
    "search": "moesteer.evaluation.search:search",
    "random_control": "moesteer.evaluation.controls:random_control",
    "Profile": "moesteer.profile:Profile",
    "combine": "moesteer.profile_combining:combine",
    "RationaleSettings": "moesteer.rationale.explain:Settings",
    "explain": "moesteer.rationale.explain:explain",
    "read_instances": "moesteer.rationale.instances:read_instances",
}

__all__ = [
    "ContrastPair",
    "DidNotFire",
    "Direction",
    "MoesteerError",
    "Profile",
    "RationaleSettings",
    "Steering",
    "TransformersEngine",
    "VllmEngine",
    "__version__",
    "combine",
    "detect",
    "evaluate",
    "explain",
    "load",
    "load_vllm",
    "random_control",
    "read_card",
    "read_instances",
    "read_pairs",
    "search",
    "select",
    "steer",
]


def __getattr__(name: str):
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'moesteer' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(module), attribute)
