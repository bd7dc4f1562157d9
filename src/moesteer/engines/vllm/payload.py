"""What a profile does to the model, as it travels to vLLM's workers: numbers, words and bytes."""

from dataclasses import asdict
from typing import Any

import numpy as np

from moesteer.direction import Direction
from moesteer.engines.vllm.directions import check_possible
from moesteer.profile import Profile


def payload_of(profile: Profile) -> dict[str, Any]:
    """Raises MoesteerError where the profile asks for what vLLM can't do."""
    check_possible(profile)
    experts = {
        "activated": [list(expert) for expert in profile.activated],
        "deactivated": [list(expert) for expert in profile.deactivated],
        "rule": profile.rule,
        "dose": profile.dose,
    }
    directions = [
        asdict(direction) | {"vector": np.array(direction.vector).tobytes()}
        for direction in profile.directions
    ]
    return {"fingerprint": profile.fingerprint, "experts": experts, "directions": directions}


def profile_from(payload: dict[str, Any]) -> Profile:
    """What `payload_of` was given, as far as it steers, named by its fingerprint."""
    experts = payload["experts"]
    return Profile(
        activated=tuple((layer, expert) for layer, expert in experts["activated"]),
        deactivated=tuple((layer, expert) for layer, expert in experts["deactivated"]),
        rule=experts["rule"],
        dose=experts["dose"],
        directions=tuple(
            Direction(
                **given
                | {
                    "vector": tuple(np.frombuffer(given["vector"]).tolist()),
                    "sites": tuple((layer, place) for layer, place in given["sites"]),
                }
            )
            for given in payload["directions"]
        ),
        name=payload["fingerprint"],
    )
