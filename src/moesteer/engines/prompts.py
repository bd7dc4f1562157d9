"""What engines check of the prompts that they are given."""

from collections.abc import Sequence

from moesteer.errors import MoesteerError
from moesteer.profile import Profile


def one_each(
    profiles: Profile | Sequence[Profile | None] | None, prompts: int
) -> list[Profile | None]:
    """A profile, or none, for each prompt."""
    if profiles is None or isinstance(profiles, Profile):
        return [profiles] * prompts
    if len(profiles) != prompts:
        raise MoesteerError(f"there are {prompts} prompts, but {len(profiles)} profiles.")
    return list(profiles)


def check_lengths(
    encoded: Sequence[Sequence[int]], max_new_tokens: int, longest: int | None
) -> None:
    """Raise MoesteerError, with its number, at the first prompt that is empty or too long."""
    for number, ids in enumerate(encoded, start=1):
        if not ids:
            raise MoesteerError(f"prompt {number} is empty.")
        if longest is not None and len(ids) + max_new_tokens > longest:
            raise MoesteerError(
                f"prompt {number} has {len(ids)} tokens; with {max_new_tokens} new ones that is"
                f" over the model's context of {longest}. Shorten it, or ask for fewer."
            )
