"""In the frontend: from the name in a request to the profile it means.

A request names a profile in `SamplingParams.extra_args["moesteer"]`. Here, before it leaves for the
engine core, the name is looked up and replaced by the profile's fingerprint, and the prefix cache
is told apart: blocks computed under one profile must not serve another. So a request goes on with
the profile that it began with, whatever its name comes to mean later.
"""

import re
from typing import Any

from moesteer.engines.vllm.settings import KEY, settings_of
from moesteer.errors import MoesteerError
from moesteer.gate import Probe
from moesteer.model_facts import ModelFacts
from moesteer.profile import Profile
from moesteer.profile_fit import check_model, check_ungated

EVIDENCE_KEY = "moesteer_key"
COUNT = "moesteer_count"
KEEP = "moesteer_keep"
WATCH = "moesteer_watch"
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
NAME_RULE = "a name has 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', '-', and no '.' in front"

SHOWN_NAMES = 20
SHOWN_LETTERS = 64


class Names:
    """The profiles that requests of one frontend may name.

    `internal` are the other extra arguments that its requests may carry, none where clients write
    them: a key of its own keeps a request's evidence apart; routing counts and hidden states take
    memory until they are fetched; `WATCH` is a key under which to keep how the prompt was routed.
    `probes` are gates', by the same kind of names: a request that
    names one is not steered, and counted where the probe reads its prompt.
    """

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.profiles: dict[str, Profile] = {}
        self.probes: dict[str, Probe] = {}
        self.internal: frozenset[str] = frozenset()
        self.facts: ModelFacts | None = None

    @classmethod
    def at_start(cls, vllm_config: Any) -> "Names":
        """Those the engine was started with; MoesteerError where one does not fit its model."""
        names, files = cls(), settings_of(vllm_config).profiles
        if files:
            from moesteer.engines.facts import facts_of_checkpoint

            model = vllm_config.model_config
            names.facts = facts_of_checkpoint(model.model, revision=model.revision, dense=True)
            for name, path in files.items():
                profile = Profile.load(path)
                check_model(profile, names.facts)
                check_ungated(profile, "a vLLM engine that profiles are only loaded into")
                names.add(name, profile)
        return names

    def add(self, name: str, profile: Profile) -> None:
        self.known[name] = profile.fingerprint
        self.profiles[name] = profile

    def add_probe(self, name: str, probe: Probe) -> None:
        self.known[name] = name
        self.probes[name] = probe

    def remove(self, name: str) -> None:
        del self.known[name], self.profiles[name]

    def resolve(self, request: Any) -> None:
        """Put the profile's fingerprint in the place of its name; ValueError if there is none.

        `request` is vLLM's EngineCoreRequest, with sampling parameters of its own.
        """
        params = request.sampling_params
        if params is None:
            return
        extra = dict(params.extra_args or {})
        ours = {key: extra.pop(key) for key in list(extra) if key.startswith(KEY)}
        if not ours:
            return
        unknown = sorted(set(ours) - {KEY} - self.internal)
        if unknown:
            raise _invalid(f"extra argument {_short(unknown[0])} is not known", KEY)
        name, key, count = (ours.get(k) for k in (KEY, EVIDENCE_KEY, COUNT))
        keep, watch = ours.get(KEEP, []), ours.get(WATCH)
        fingerprint = None if name is None else self._fingerprint(name)
        for word, value in ((EVIDENCE_KEY, key), (WATCH, watch)):
            if not isinstance(value, str | None):
                raise _invalid(f"{word} must be a string", word)
        if fingerprint is None and count is None and not keep and watch is None:
            params.extra_args = extra or None
            return
        tokens = len(request.prompt_token_ids or ())
        probe = None if fingerprint is None else self.probes.get(fingerprint)
        if probe is not None:
            count = {"counted": "top-k", "spans": [_span(probe, tokens)]}
        if probe is not None or watch is not None:
            params.skip_reading_prefix_cache = True  # cached tokens pass no router
        extra[KEY] = {
            "fingerprint": fingerprint,
            "key": key or fingerprint or request.request_id,
            "count": count,
            "keep": keep,
            "watch": watch,
            # Of a text that is read, the prompt ends before the first token that is asked for.
            "prompt": min(keep, default=tokens),
        }
        params.extra_args = extra
        if fingerprint is not None and probe is None:  # what a probe leaves there is unsteered
            request.cache_salt = f"{KEY}:{fingerprint}:{request.cache_salt or ''}"

    def _fingerprint(self, name: object) -> str:
        if not isinstance(name, str):
            raise _invalid(f"{KEY} must be the name of a loaded profile, a string", KEY)
        fingerprint = self.known.get(name)  # asked once: another thread may remove it
        if fingerprint is None:
            shown = ", ".join(list(self.known)[:SHOWN_NAMES])
            more = f" and {len(self.known) - SHOWN_NAMES} more"
            listed = shown + (more if len(self.known) > SHOWN_NAMES else "")
            raise _invalid(
                f"no profile is named {_short(name)}; "
                + (f"known: {listed}" if listed else "none is loaded"),
                KEY,
            )
        return fingerprint


def _span(probe: Probe, tokens: int) -> list[int]:
    try:
        return list(probe.span(tokens))
    except MoesteerError as error:
        raise _invalid(str(error).removesuffix("."), KEY) from None


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN_LETTERS else text[:SHOWN_LETTERS] + "…")


def _invalid(message: str, parameter: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(f"moesteer: {message}.", parameter=parameter)
