"""Where a result comes from: the command that made it, when, and with which versions."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any


def installed_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("moesteer", "torch", "transformers", "tokenizers", "numpy", "scipy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def now() -> str:
    """The time in UTC, to the second, as in 2026-01-31T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def about(command: str) -> dict[str, Any]:
    """What a run tells of itself beside its settings."""
    return {"command": command, "versions": installed_versions(), "date": now()}
