"""The profiles that a running server knows by name, and how more come to it.

The engine is told a profile by its fingerprint, never by its name: a name that is given another
profile, or taken away, while a request is on its way to the engine can't change what it means.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moesteer.engines.vllm.names import EVIDENCE_KEY
from moesteer.engines.vllm.payload import payload_of
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.serving.evidence import Workers


class Shelf:
    """Profiles by name. `names` is the plugin's list in this process: what the engine resolves."""

    def __init__(self, workers: Workers, names: Any) -> None:
        self._workers = workers
        self._names = names
        names.internal = frozenset({EVIDENCE_KEY})
        self._profiles: dict[str, Profile] = {}

    @property
    def profiles(self) -> Mapping[str, Profile]:
        return self._profiles

    async def put(self, name: str, profile: Profile) -> None:
        """Let requests name a profile, from now on or instead of another.

        Raises MoesteerError where the workers can't take it.
        """
        engines = await self._workers.call("moesteer_load", payload_of(profile))
        refused = next((reason for workers in engines for reason in workers if reason), None)
        if refused is not None:
            raise MoesteerError(f"the engine can't be steered: {refused}")
        self._names.add(profile.fingerprint, replace(profile, scores=None, candidates=None))
        self._profiles[name] = profile

    def remove(self, name: str) -> None:
        """No new request can name it; those that did go on, for the engine still knows it."""
        del self._profiles[name]
