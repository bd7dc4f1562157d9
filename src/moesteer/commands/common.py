"""What commands share: the options of a model, its loading, and the checks before work starts."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moesteer.engines.transformers_engine import TransformersEngine
    from moesteer.profile import Profile


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded and addressed.

    Parameters
    ----------
    revision
        Branch, tag or commit of the model.
    dtype
        auto, float32, bfloat16 or float16.
    device
        Device map for loading: auto, cpu, cuda:0, …
    chat_template
        A file with a chat template, for models without one.
    chat_option
        KEY=VALUE for the chat template, e.g. enable_thinking=false. May be repeated; a profile's
        own options hold otherwise.
    """

    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    chat_template: str | None = None
    chat_option: list[str] | None = None


DEFAULT = ModelOptions()


def load_engine(model: str, options: ModelOptions = DEFAULT) -> "TransformersEngine":
    from transformers.utils.logging import disable_progress_bar

    from moesteer.engines.transformers_engine import load_transformers
    from moesteer.records import read_text

    if not sys.stderr.isatty():
        disable_progress_bar()
    template = options.chat_template
    return load_transformers(
        model,
        revision=options.revision,
        dtype=options.dtype,
        device_map=options.device,
        chat_template=None if template is None else read_text(Path(template)),
    )


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
