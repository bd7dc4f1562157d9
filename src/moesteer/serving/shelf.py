"""The profiles that a running server knows by name, and how more come to it.

The engine is told a profile by its fingerprint, never by its name: a name that is given another
profile, or taken away, while a request is on its way to the engine can't change what it means. Of
a profile with a gate the engine knows the two parts: what steers, and what the gate reads.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moesteer.engines.vllm.names import EVIDENCE_KEY, WATCH
from moesteer.engines.vllm.payload import payload_of, payload_of_probe
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.serving.evidence import Workers


class Shelf:
    """Profiles by name. `names` is the plugin's list in this process: what the engine resolves."""

    def __init__(self, workers: Workers, names: Any) -> None:
        self._workers = workers
        self._names = names
        names.internal = frozenset({EVIDENCE_KEY, WATCH})
        self._profiles: dict[str, Profile] = {}

    @property
    def profiles(self) -> Mapping[str, Profile]:
        return self._profiles

    async def put(self, name: str, profile: Profile) -> None:
        """Let requests name a profile, from now on or instead of another.

        Raises MoesteerError where the workers can't take it.
        """
        plain = profile.ungated
        await self._load(payload_of(plain))
        self._names.add(plain.fingerprint, replace(plain, scores=None, candidates=None))
        if profile.gate is not None:
            probe = payload_of_probe(profile.gate.probe)
            await self._load(probe)
            self._names.add_probe(probe["fingerprint"], profile.gate.probe)
        self._profiles[name] = profile

    async def _load(self, payload: dict[str, Any]) -> None:
        engines = await self._workers.call("moesteer_load", payload)
        refused = next((reason for workers in engines for reason in workers if reason), None)
        if refused is not None:
            raise MoesteerError(f"the engine can't be steered: {refused}")

    def remove(self, name: str) -> None:
        """No new request can name it; those that did go on, for the engine still knows it."""
        del self._profiles[name]
