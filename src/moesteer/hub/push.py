"""A profile to the Hub: what is published is laid out in a folder, looked at, and then uploaded.

profile.safetensors    the profile, without paths
README.md              the model card
*.svg                  its figures
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.files import write_text
from moesteer.hub.card import card_of
from moesteer.hub.connection import LOG_IN, PROFILE, connect, hub_errors
from moesteer.hub.publishing import base_model_of, check_repo, is_bundled, published
from moesteer.profile import Profile
from moesteer.report.page import gather
from moesteer.runs import read_run

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

README = "README.md"
SHOWN = ("evaluate", "search", "direction search", "detectors")
"""The kinds of runs that a card shows."""


def lay_out(
    profile: str | Path,
    repo: str,
    folder: str | Path,
    *,
    runs: Sequence[str | Path] = (),
    base_model: str | None = None,
    license: str | None = None,
) -> Profile:
    """Write what would be published into a folder, made where it is missing; gives the profile.

    Raises MoesteerError where a run is none that a card can show, is not finished or is of another
    profile or model, and where the folder holds anything. Where the model's name on the Hub is not
    known, a MoesteerWarning says so.
    """
    check_repo(repo)
    loaded = Profile.load(profile)
    for run in runs:
        if (kind := read_run(run).kind) not in SHOWN:
            raise MoesteerError(
                f"{run} is a run of `{kind}`; a card shows runs of `evaluate`, `search` and"
                " `detectors`."
            )
    page = gather([profile, *runs])
    base = base_model_of(loaded, base_model)
    if base is None and not is_bundled(loaded):
        named = "no model" if loaded.model is None else f"{loaded.model.id}, no model of the Hub"
        warnings.warn(
            f"{profile} names {named}, so nobody finds it by its base model; say which it is by"
            " --base-model OWNER/NAME.",
            MoesteerWarning,
            stacklevel=2,
        )
    steering = published(loaded, base)
    card = card_of(steering, page, repo, base, license)
    path = _empty_folder(Path(folder))
    steering.save(path / PROFILE)
    write_text(path / README, card.readme)
    for name, image in card.images.items():
        write_text(path / name, image)
    return steering


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload what `lay_out` wrote, as one commit; gives the commit's address.

    The repository is made where it is missing, and otherwise must be one of a profile. Raises
    MoesteerError without a network, a login or permission, where the repository holds anything
    else, and where it is public although it should be `private`.
    """
    from huggingface_hub import CommitOperationAdd, get_token

    check_repo(repo)
    api = connect()
    if get_token() is None:
        raise MoesteerError(f"{api.endpoint} does not know who you are: {LOG_IN}.")
    files = sorted(Path(folder).iterdir())
    with hub_errors(api, repo):
        if api.repo_exists(repo):
            _check_existing(repo, api.model_info(repo), private)
        else:
            api.create_repo(repo, private=private)
        done = api.create_commit(
            repo,
            [CommitOperationAdd(path.name, path) for path in files],
            commit_message="Push a profile of moesteer",
        )
    return str(done.commit_url)


def _check_existing(repo: str, there: "ModelInfo", private: bool) -> None:
    """Refuse to write into a repository of something else, or into a public one unasked."""
    names = {file.rfilename for file in there.siblings or []} - {README, ".gitattributes"}
    if names and PROFILE not in names:
        raise MoesteerError(
            f"{repo} is no repository of a profile: it holds {min(names)}, and its {README} would"
            " be overwritten. Give a repository of its own."
        )
    if private and not there.private:
        raise MoesteerError(
            f"{repo} exists and is public; make it private on the Hub first, or give another name."
        )


def _empty_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise MoesteerError(f"{folder} is a file; give a folder.")
    if not folder.parent.is_dir():
        raise MoesteerError(f"{folder} can't be made: the folder {folder.parent} does not exist.")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise MoesteerError(f"{folder} can't be made: {error.strerror}.") from None
    if there := sorted(path.name for path in folder.iterdir()):
        raise MoesteerError(f"{folder} holds {there[0]}; give an empty folder.")
    return folder
