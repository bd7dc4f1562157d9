"""moesteer inside vLLM: what steers and counts in its processes, and profiles for a plain `LLM`.

    llm = vllm.LLM("allenai/OLMoE-1B-7B-0924-Instruct")
    load_profile(llm, "polite", "polite.safetensors")
    llm.generate(prompts, SamplingParams(extra_args={"moesteer": "polite"}))
    print(*evidence(llm, "polite"), sep="\\n")

Requests name a profile or none, several in one batch. Loading a name anew replaces it for later
requests; those that run go on with the profile they began with.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesteer.errors import MoesteerError

if TYPE_CHECKING:
    from moesteer.engines.evidence import DirectionEvidence, LayerEvidence
    from moesteer.engines.vllm.names import Names
    from moesteer.model_facts import ModelFacts
    from moesteer.profile import Profile


def load_profile(llm: Any, name: str, profile: "Profile | str | Path") -> None:
    """Make a profile (or its file) known to a `vllm.LLM` under a name.

    Raises MoesteerError where the engine can't be steered, the profile does not fit its model or
    has a gate, or the name is no name.
    """
    from moesteer.engines.vllm.names import NAME, NAME_RULE
    from moesteer.profile import Profile
    from moesteer.profile_fit import check_model

    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise MoesteerError(f"{name!r} can't name a profile: {NAME_RULE}.")
    check_steerable(llm)
    loaded = profile if isinstance(profile, Profile) else Profile.load(profile)
    check_model(loaded, _facts_of(llm))
    send_profile(llm, loaded)
    names_of(llm).add(name, loaded)


def remove_profile(llm: Any, name: str) -> None:
    """Forget a name: later requests for it are refused."""
    _known(llm, name)
    names_of(llm).remove(name)


def profiles(llm: Any) -> "dict[str, Profile]":
    """The profiles that requests may name."""
    return dict(names_of(llm).profiles)


def evidence(llm: Any, name: str) -> "list[LayerEvidence | DirectionEvidence]":
    """What a profile did since it was loaded, or since this was last asked."""
    from moesteer.engines.vllm.collected import evidence_of, merged

    profile = _known(llm, name)
    by_worker = llm.collective_rpc("moesteer_collect", args=([profile.fingerprint],))
    return evidence_of(profile, *merged(by_worker, profile.fingerprint))


def send_profile(llm: Any, profile: "Profile") -> None:
    """Make a profile known to the workers; MoesteerError where they can't steer."""
    from moesteer.engines.vllm.payload import payload_of

    send(llm, payload_of(profile))


def send(llm: Any, payload: dict[str, Any]) -> None:
    """Make what a payload says known to the workers; MoesteerError where they can't take it."""
    check_plugin(llm)
    for refused in llm.collective_rpc("moesteer_load", args=(payload,)):
        if refused is not None:
            raise MoesteerError(f"this engine can't take the profile: {refused}")


def check_steerable(llm: Any) -> None:
    """Raise MoesteerError, with the reason, where a worker can't steer."""
    check_plugin(llm)
    for worker in llm.collective_rpc("moesteer_describe"):
        if worker["refused"] is not None:
            raise MoesteerError(f"this engine can't be steered: {worker['refused']}")


def names_of(llm: Any) -> "Names":
    """The frontend's names; MoesteerError where the plugin is not in this engine."""
    check_plugin(llm)
    return llm.llm_engine.input_processor.moesteer


def check_plugin(llm: Any) -> None:
    if not hasattr(llm.llm_engine.input_processor, "moesteer"):
        raise MoesteerError(
            "moesteer's plugin is not loaded in this engine: MOESTEER_DISABLE is set, VLLM_PLUGINS"
            " leaves it out, or this version of vLLM is not supported."
        )


def _facts_of(llm: Any) -> "ModelFacts":
    """The facts of the engine's checkpoint, read once."""
    names = names_of(llm)
    if names.facts is None:
        from moesteer.engines.facts import facts_of_checkpoint

        config = llm.llm_engine.model_config
        names.facts = facts_of_checkpoint(config.model, revision=config.revision, dense=True)
    return names.facts


def _known(llm: Any, name: str) -> "Profile":
    loaded = names_of(llm).profiles
    if name not in loaded:
        raise MoesteerError(f"no profile is named {name!r}; loaded: {', '.join(loaded) or 'none'}.")
    return loaded[name]
