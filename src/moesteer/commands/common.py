"""What commands share: the options of a model, its loading, and the checks before work starts."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.loading import DEFAULT, ModelOptions, load_engine

if TYPE_CHECKING:
    from moesteer.profile import Profile

__all__ = [
    "DEFAULT",
    "ModelOptions",
    "check_out",
    "command_line",
    "load_engine",
    "load_profile",
    "save_profile",
]


def load_profile(path: str | None) -> "Profile | None":
    from moesteer.profile import Profile

    return None if path is None else Profile.load(path)


def save_profile(profile: "Profile", out: str) -> None:
    from moesteer.files import sole_writer

    with sole_writer(Path(out)):
        profile.save(out)


def check_out(out: str, *inputs: str | None) -> None:
    """Refuse an output that can't be written, or that is one of the inputs, before the work."""
    from moesteer.files import check_writable

    check_writable(Path(out), *inputs)


def command_line() -> str:
    """What the user typed, to be kept beside what came of it."""
    return shlex.join(["moesteer", *sys.argv[1:]])
