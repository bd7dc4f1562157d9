"""Which profile a request names, and whether it may.

    {"model": "MODEL", "moesteer": "NAME", …}                     a field of the body
    {"model": "MODEL:NAME", …}                                    a part of the model's name
    {"model": "MODEL", "vllm_xargs": {"moesteer": "NAME"}, …}     vLLM's field for extensions

All three mean the same; two that differ are refused. A name is all that a client can give: no path,
no tensor, and none of the words by which this server and the engine talk to each other.
"""

from collections.abc import Collection, Mapping
from typing import Any

from moesteer.serving.asgi import refusal

FIELD = "moesteer"
EXTRA = "vllm_xargs"
EVIDENCE_KEY = "moesteer_key"

STEERABLE = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""The endpoints that hand `vllm_xargs` on to the engine, and whose replies can carry headers."""

SHOWN_NAMES = 20
SHOWN_LETTERS = 64

OPAQUE = {
    "use_beam_search": "beam search starts requests of its own, which carry no profile",
    "background": "the reply to a background request comes before anything is generated, so"
    " nothing would prove that the profile fired",
}


def named_profile(
    path: str, body: Any, models: Collection[str], known: Collection[str]
) -> str | None:
    """The profile that a request's JSON names, None if it names none; raises Answer (400) if wrong.

    `models` are the names the server goes by, `known` the loaded profiles.
    """
    if not isinstance(body, dict):
        return None
    refuse_internal(body)
    extra = body.get(EXTRA)
    given: list[object] = []
    if body.get(FIELD) is not None:
        given.append(body[FIELD])
    if isinstance(extra, dict) and FIELD in extra:
        given.append(extra[FIELD])
    _, of_model = split_model(body.get("model"), models)
    if of_model is not None:
        given.append(of_model)
    if not given:
        return None
    names = [_checked(name, known) for name in given]
    if len(set(names)) > 1:
        both = " and ".join(repr(name) for name in dict.fromkeys(names))
        raise refusal(400, f"The request names two profiles, {both}; a request has one.", FIELD)
    if path not in STEERABLE:
        raise refusal(400, f"Profiles steer {', '.join(STEERABLE)} only, not {short(path)}.", FIELD)
    for option, reason in OPAQUE.items():
        if body.get(option):
            raise refusal(400, f"{option} and a profile don't go together: {reason}.", option)
    if extra is not None and not isinstance(extra, dict):
        raise refusal(400, f"{EXTRA} must be an object.", EXTRA)
    return names[0]


def with_profile(body: dict[str, Any], models: Collection[str], engine_name: str, key: str) -> dict:
    """The body as vLLM understands it; the evidence is to be kept under `key`."""
    rest = {field: value for field, value in body.items() if field != FIELD}
    model, name = split_model(body.get("model"), models)
    if name is not None:
        rest["model"] = model
    extra = {**(body.get(EXTRA) or {}), FIELD: engine_name, EVIDENCE_KEY: key}
    return {**rest, EXTRA: extra}


def split_model(model: object, models: Collection[str]) -> tuple[str, str | None]:
    """MODEL and NAME of `MODEL:NAME`; the model as it is, and None, where no profile is named."""
    if not isinstance(model, str):
        return "", None
    if model not in models:
        for served in sorted(models, key=len, reverse=True):
            if model.startswith(f"{served}:"):
                return served, model[len(served) + 1 :]
    return model, None


def refuse_internal(body: Mapping[str, Any]) -> None:
    """Raise Answer (400) where a client uses the words that only this server may use.

    They are looked for in every endpoint, also where `SamplingParams` are given as they are.
    """
    params = body.get("sampling_params")
    places = [(EXTRA, body.get(EXTRA))]
    if isinstance(params, dict):
        places.append(("sampling_params.extra_args", params.get("extra_args")))
    for place, extra in places:
        for key in extra if isinstance(extra, dict) else ():
            if key.startswith(FIELD) and (key != FIELD or place != EXTRA):
                raise refusal(400, f"{place} may not hold {short(key)}.", place)


def unknown_name(name: str, known: Collection[str]) -> str:
    """What to say of a name that no loaded profile has."""
    listed = sorted(known)
    shown = ", ".join(listed[:SHOWN_NAMES])
    if len(listed) > SHOWN_NAMES:
        shown += f" and {len(listed) - SHOWN_NAMES} more"
    there = f"Loaded are: {shown}." if listed else "None is loaded."
    return f"No profile is named {short(name)}. {there}"


def short(text: str) -> str:
    """Quoted, and cut where somebody sent a novel."""
    return repr(text if len(text) <= SHOWN_LETTERS else text[:SHOWN_LETTERS] + "…")


def _checked(name: object, known: Collection[str]) -> str:
    if not isinstance(name, str):
        kind = _KINDS.get(type(name), "null")
        raise refusal(400, f"{FIELD} is {kind}; it must be the name of a loaded profile.", FIELD)
    if name not in known:
        raise refusal(400, unknown_name(name, known), FIELD)
    return name


_KINDS = {
    dict: "an object",
    list: "a list",
    bool: "a truth value",
    int: "a number",
    float: "a number",
}
