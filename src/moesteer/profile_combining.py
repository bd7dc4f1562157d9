"""One profile of several."""

from dataclasses import replace

from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.profile_fit import check_model


def combine(*profiles: Profile) -> Profile:
    """One profile that does what all of them do; MoesteerError where they contradict.

    A profile has one gate, so that all of them must have the same, or none.
    """
    if not profiles:
        raise MoesteerError("there is nothing to combine: give at least one profile.")
    first, *others = profiles
    models = [profile.model for profile in profiles if profile.model is not None]
    # Rule and dose are of experts; a profile of directions alone has none of its own.
    with_experts = [p for p in profiles if p.steered_layers or not p.directions]
    ruled = with_experts[0] if with_experts else first
    for other in with_experts:
        if (other.rule, other.dose) != (ruled.rule, ruled.dose):
            raise MoesteerError(
                f"{ruled.name} (rule {ruled.rule}, dose {ruled.dose}) and {other.name} (rule"
                f" {other.rule}, dose {other.dose}) can't be combined; they steer differently."
            )
    for other in others:
        if other.chat_options != first.chat_options:
            raise MoesteerError(
                f"{first.name} and {other.name} were made with different chat options:"
                f" {first.chat_options} and {other.chat_options}."
            )
        _check_same_gate(first, other)
        if other.model is not None:
            check_model(other, models[0])
    merge = dict.fromkeys
    return replace(
        first,
        activated=tuple(merge(e for p in profiles for e in p.activated)),
        deactivated=tuple(merge(e for p in profiles for e in p.deactivated)),
        rule=ruled.rule,
        dose=ruled.dose,
        directions=tuple(merge(d for p in profiles for d in p.directions)),
        toward=None,
        model=models[0] if models else None,
        evidence=None,
        scores=None,
        candidates=None,
        name=" + ".join(p.name for p in profiles),
    )


def _check_same_gate(one: Profile, other: Profile) -> None:
    """Refuse to make one profile of two that steer on different requests."""
    if one.gate != other.gate:
        has = "another" if one.gate and other.gate else "one" if other.gate else "none"
        raise MoesteerError(
            f"{one.name} has {'a gate' if one.gate else 'no gate'} and {other.name} has {has}: they"
            " steer on different requests and can't be one profile. Combine them without gates,"
            " then put a gate on what comes of it (moesteer gate)."
        )
