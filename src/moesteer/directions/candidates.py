"""What is asked of candidates by more than one page: which are used, and which are good enough."""

import numpy as np

from moesteer.profile import Profile


def used(profile: Profile) -> list[int]:
    """The numbers of the candidates that are the profile's directions."""
    candidates = profile.candidates
    if candidates is None:
        return []
    found = []
    for direction in profile.directions:
        expert = -1 if direction.expert is None else direction.expert
        numbers = candidates.of_vector(direction.vector)
        found += [number for number in numbers if candidates.expert[number] == expert]
    return list(dict.fromkeys(found))


def within_thresholds(profile: Profile) -> list[int]:
    """The numbers of residual candidates that keep to the thresholds they were chosen by.

    None where the profile does not say which these were.
    """
    candidates, seen = profile.candidates, profile.evidence
    settings = {} if seen is None else seen.settings
    limits = [settings.get(name) for name in ("max_kl", "min_induce", "max_layer")]
    if (
        candidates is None
        or profile.model is None
        or not {"kl", "induce"} <= set(candidates.scores)
    ):
        return []
    if not all(isinstance(limit, int | float) for limit in limits):
        return []
    max_kl, min_induce, max_layer = (float(limit) for limit in limits if limit is not None)
    return np.flatnonzero(
        (candidates.scores["kl"] <= max_kl)
        & (candidates.scores["induce"] >= min_induce)
        & (candidates.layer < max_layer * profile.model.decoder_layers)
    ).tolist()
