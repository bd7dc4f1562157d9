"""The Hub through huggingface_hub, and what its errors mean to the user.

Which Hub: HF_ENDPOINT. As whom: HF_TOKEN, or who logged in with `hf auth login`. Both are read by
huggingface_hub, as everywhere else.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moesteer.errors import MoesteerError
from moesteer.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

PROFILE = "profile.safetensors"
"""The name of the profile in a repository."""

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def connect() -> "HfApi":
    """The Hub's API; nothing is asked of it yet."""
    from huggingface_hub import HfApi

    return HfApi(library_name="moesteer", library_version=__version__)


@contextmanager
def hub_errors(api: "HfApi", repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises about a repository into a MoesteerError."""
    from huggingface_hub.errors import HfHubHTTPError

    # Of the HTTP library that this huggingface_hub uses, which changed between its versions.
    broken: type[Exception] = next(b for b in HfHubHTTPError.__mro__ if b.__name__ == "HTTPError")
    try:
        yield
    except MoesteerError:
        raise
    except (broken, OSError, RuntimeError, ValueError) as error:
        raise MoesteerError(_why(error, str(api.endpoint), repo)) from error


def _why(error: BaseException, endpoint: str, repo: str) -> str:
    from huggingface_hub import errors

    if "Invalid metadata" in str(error):
        told = " ".join(str(error).split()).rstrip(".")
        return f"{endpoint} does not take the card of {repo}: {told}."
    chain = list(_causes(error))
    for cause in chain:
        match cause:
            case errors.OfflineModeIsEnabled():
                return f"{endpoint} was not asked: offline mode is on. Unset HF_HUB_OFFLINE."
            case errors.GatedRepoError():
                return f"{repo} is gated: ask for access on its page at {endpoint}/{repo}."
            case errors.RevisionNotFoundError():
                return f"{repo} has no such revision: give a branch, a tag or a commit of it."
            case errors.RepositoryNotFoundError():
                return _not_found(endpoint, repo)
            case errors.HfHubHTTPError():
                return _answer(cause, endpoint, repo)
            case errors.FileMetadataError():
                return f"{endpoint} does not answer as a Hub does; is HF_ENDPOINT right?"
            case OSError(errno=errno.ENOSPC | errno.EDQUOT):
                return f"{repo} could not be fetched: the disk for temporary files is full."
    told = str(chain[-1]).split("\n")[0].rstrip(".") or type(chain[-1]).__name__
    if isinstance(error, RuntimeError | ValueError) and len(chain) == 1:
        return f"{endpoint} gave no answer that can be used for {repo}: {told}."
    return f"{endpoint} can't be reached: {told}. Is there a network, and is HF_ENDPOINT right?"


def _answer(error: "HfHubHTTPError", endpoint: str, repo: str) -> str:
    """What an answer other than 2xx means."""
    status = error.response.status_code
    told = (error.server_message or error.response.reason_phrase).split("\n")[0].rstrip(".")
    match status:
        case 401 if "Invalid credentials" not in told:  # what strangers are told of either
            return _not_found(endpoint, repo)
        case 401:
            return f"{endpoint} does not accept your token ({told}): {LOG_IN}, with one that holds."
        case 403:
            return f"you may not do this with {repo} ({told}): use a token that may write to it."
        case _:
            return f"{endpoint} answered {status} for {repo}: {told}."


def _not_found(endpoint: str, repo: str) -> str:
    return (
        f"{endpoint} has no repository {repo}, or it is private: check the name, and {LOG_IN} as"
        " someone who may read it."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
