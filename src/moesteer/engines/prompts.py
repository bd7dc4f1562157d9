"""What engines check of the prompts that they are given."""

from collections.abc import Sequence

from moesteer.errors import MoesteerError
from moesteer.model_facts import ModelFacts
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


def check_projection(
    texts: Sequence[Sequence[int]],
    layer: int,
    position: int,
    vector: Sequence[float],
    facts: ModelFacts,
) -> None:
    """Raise MoesteerError, with its number, at the first text without a token at this position; for
    a layer that the model does not have; and for a vector that is not as wide as its stream."""
    if position > -1:
        raise MoesteerError(f"position {position} is not counted from the end; −1 is the last.")
    for number, ids in enumerate(texts, start=1):
        if len(ids) < -position:
            raise MoesteerError(
                f"text {number} has {len(ids)} tokens, and none at position {position}."
            )
    if not 0 <= layer < facts.decoder_layers:
        raise MoesteerError(
            f"{facts.id} has no layer {layer}; it has layers 0–{facts.decoder_layers - 1}."
        )
    if len(vector) != facts.hidden:
        raise MoesteerError(
            f"a vector has {len(vector)} numbers, but the hidden states of {facts.id} have"
            f" {facts.hidden}."
        )
