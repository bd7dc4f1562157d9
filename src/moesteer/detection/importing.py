"""Published rankings as profiles: pooled counts, so scores without intervals."""

import hashlib
from pathlib import Path

import numpy as np

from moesteer.errors import MoesteerError
from moesteer.model_facts import UNKNOWN, LayerShape, ModelFacts
from moesteer.profile import Evidence, Profile, Scores
from moesteer.provenance import installed_versions
from moesteer.published_rankings import read_published_ranking


def profile_from_ranking(path: str, *, top_k: int, command: str = "") -> Profile:
    """The ranking as the scores of a profile, ready for `select_experts`.

    Such files hold pooled counts only: there are no examples to resample, so the interval is the
    score itself, p and q are 1, and the profile says so. Nor do they name their model: applied, the
    profile is checked by its layers, experts and k. Raises MoesteerError where the file isn't such
    a table.
    """
    ranking = read_published_ranking(path)
    layers = sorted(set(ranking.layer.tolist()))
    experts = int(ranking.expert.max()) + 1
    if not 1 <= top_k < experts:
        raise MoesteerError(f"--top-k is {top_k}; the ranking has {experts} experts a layer.")
    rows = np.searchsorted(layers, ranking.layer)
    cell = rows, ranking.expert
    value, rate_a, rate_b = (np.zeros((len(layers), experts)) for _ in range(3))
    rate_a[cell], rate_b[cell] = ranking.a1 / ranking.n1, ranking.a2 / ranking.n2
    value[cell] = ranking.risk_diff
    untested = np.ones_like(value)
    name = Path(path).name
    return Profile(
        model=ModelFacts(
            id=UNKNOWN,
            revision=None,
            model_type=UNKNOWN,
            config_hash=UNKNOWN,
            tokenizer_hash=UNKNOWN,
            family=UNKNOWN,
            layers=tuple(LayerShape(int(layer), experts, top_k) for layer in layers),
        ),
        evidence=Evidence(
            detector="risk-difference",
            counted="top-k",
            pairs=0,
            source=name,
            data_hash=hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            target="as published",
            tokens_a=int(ranking.n1.max()),
            tokens_b=int(ranking.n2.max()),
            seed=0,
            interval="none: a published ranking has no examples to resample, so p = q = 1",
            spans="as given",
            stability=None,
            versions=installed_versions(),
            command=command,
        ),
        scores=Scores(value, value, value, untested, untested, rate_a, rate_b),
        name=name,
    )
