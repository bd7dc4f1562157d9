"""What a profile does to the model, or a gate's probe reads of it, as it travels to vLLM's workers:
numbers, words and bytes."""

import json
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import numpy as np

from moesteer.direction import Direction
from moesteer.engines.vllm.directions import check_possible
from moesteer.gate import DirectionProbe, Probe
from moesteer.profile import Profile
from moesteer.profile_fit import check_ungated


def payload_of(profile: Profile) -> dict[str, Any]:
    """Raises MoesteerError where the profile asks for what vLLM can't do, or has a gate: that is
    asked in the frontend, by an engine of moesteer's or by `moesteer serve`."""
    check_ungated(profile, "a vLLM engine that profiles are only loaded into")
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


def payload_of_probe(probe: Probe) -> dict[str, Any]:
    """A profile that does nothing, under which requests are counted as the probe needs it; with the
    vector that is watched, and what enters which layer, where it reads the stream."""
    payload = payload_of(Profile())
    does = {"kind": type(probe).__name__, **asdict(probe)}
    payload["fingerprint"] = f"probe-{sha256(json.dumps(does).encode()).hexdigest()[:16]}"
    if isinstance(probe, DirectionProbe):
        vector = np.array(probe.vector, dtype=np.float64).tobytes()
        payload["watched"] = {"layer": probe.layer, "vector": vector}
    return payload


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
