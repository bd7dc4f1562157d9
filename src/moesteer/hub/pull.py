"""A profile from the Hub: fetched, checked, and only then kept."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from moesteer.errors import MoesteerError
from moesteer.files import sole_writer, write_atomically
from moesteer.hub.connection import PROFILE, connect, hub_errors
from moesteer.hub.publishing import check_repo
from moesteer.profile import Profile


@dataclass(frozen=True)
class Pulled:
    """A profile that was fetched, and the commit that it was fetched from."""

    profile: Profile
    commit: str


def pull(repo: str, out: str | Path, revision: str | None = None) -> Pulled:
    """Fetch the profile of a repository on the Hub and write it to `out`, as it is there.

    Nothing else is fetched, and nothing that came is run: the file is a profile that
    `Profile.load` takes, or `out` is left as it was. `revision` is a branch, tag or commit. Raises
    MoesteerError where there is no such repository or revision, no network, no permission, or no
    profile.
    """
    check_repo(repo)
    path, api = Path(out), connect()
    with sole_writer(path), TemporaryDirectory() as folder:
        with hub_errors(api, repo):
            info = api.model_info(repo, revision=revision)
            names = [file.rfilename for file in info.siblings or []]
            if PROFILE not in names:
                raise MoesteerError(
                    f"{repo} holds no profile: it has no {PROFILE}, only"
                    f" {', '.join(names[:5]) or 'nothing'}{' …' * (len(names) > 5)}."
                )
            file = Path(
                api.hf_hub_download(repo, PROFILE, revision=info.sha, local_dir=Path(folder))
            )
        try:
            profile = Profile.load(file)
        except MoesteerError as error:
            raise MoesteerError(f"{repo}: {str(error).replace(str(file), PROFILE)}") from None
        write_atomically(path, lambda temporary: shutil.copyfile(file, temporary))
    return Pulled(profile, str(info.sha))
