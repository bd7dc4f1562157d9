"""What a request does to the model, as it travels to vLLM's workers: numbers and words only.

Experts come from a profile; directions travel beside them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from moesteer.engines.vllm.directions import Direction, Window
from moesteer.profile import Profile


@dataclass(frozen=True)
class Intervention:
    """Experts and directions of one profile; directions hold for the tokens of `window`."""

    fingerprint: str
    experts: Profile
    directions: tuple[Direction, ...] = ()
    window: Window = "all"


def payload_of(
    profile: Profile, directions: Sequence[Direction] = (), window: Window = "all"
) -> dict[str, Any]:
    experts = {
        "activated": [list(expert) for expert in profile.activated],
        "deactivated": [list(expert) for expert in profile.deactivated],
        "rule": profile.rule,
        "dose": profile.dose,
    }
    payload: dict[str, Any] = {"fingerprint": profile.fingerprint, "experts": experts}
    if directions:
        payload |= {"directions": [asdict(d) for d in directions], "window": window}
        payload["fingerprint"] = sha256(json.dumps(payload).encode()).hexdigest()[:16]
    return payload


def intervention_from(payload: dict[str, Any]) -> Intervention:
    experts = payload["experts"]
    return Intervention(
        payload["fingerprint"],
        Profile(
            activated=tuple((layer, expert) for layer, expert in experts["activated"]),
            deactivated=tuple((layer, expert) for layer, expert in experts["deactivated"]),
            rule=experts["rule"],
            dose=experts["dose"],
            name=payload["fingerprint"],
        ),
        tuple(
            Direction(**{**given, "vector": tuple(given["vector"])})
            for given in payload.get("directions", ())
        ),
        payload.get("window", "all"),
    )
