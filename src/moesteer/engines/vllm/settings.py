"""What an engine was started with, for moesteer: `additional_config={"moesteer": {…}}` of vLLM.

An engine whose config names moesteer was started to be steered: where that can't be, it refuses to
start. Without the entry the plugin is there all the same, but an engine that can't be steered runs
as if it were not, and only a request that names a profile is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moesteer.errors import MoesteerError

KEY = "moesteer"


@dataclass(frozen=True)
class Settings:
    """`profiles`: files by name, loaded at the start; `directions`: how many vectors the directions
    of a profile may have, 0 for an engine without them."""

    explicit: bool = False
    profiles: Mapping[str, str] = field(default_factory=dict)
    directions: int = 0


def settings_of(vllm_config: Any) -> Settings:
    """Read and check the entry; MoesteerError where it holds what is not known."""
    given = vllm_config.additional_config
    if not isinstance(given, dict) or KEY not in given:
        return Settings()
    entry = given[KEY]
    known = [f.name for f in fields(Settings) if f.name != "explicit"]
    if not isinstance(entry, dict) or set(entry) - set(known):
        raise MoesteerError(
            f'additional_config["{KEY}"] is {entry!r}; it must be an object with'
            f" {' and '.join(known)}."
        )
    profiles = entry.get("profiles", {})
    if not isinstance(profiles, dict) or not all(
        isinstance(text, str) for pair in profiles.items() for text in pair
    ):
        raise MoesteerError(
            f'additional_config["{KEY}"]["profiles"] is {profiles!r}; it must name a file for each'
            " profile."
        )
    directions = entry.get("directions", 0)
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 0:
        raise MoesteerError(
            f'additional_config["{KEY}"]["directions"] is {directions!r}; it must be how many'
            " vectors the directions of a profile may have."
        )
    return Settings(True, profiles, directions)


def with_room(given: Any, room: int) -> dict[str, Any]:
    """An `additional_config` that has room for directions, unless it names one itself."""
    entry = (given or {}).get(KEY) or {}
    return {**(given or {}), KEY: {"directions": room, **entry}}
