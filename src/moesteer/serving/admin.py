"""Loading and removing profiles while the server runs, for whoever has the admin key.

    GET    /v1/moesteer/profiles          what is loaded
    PUT    /v1/moesteer/profiles/NAME     the body is the profile's file; 201, or 200 if replaced
    DELETE /v1/moesteer/profiles/NAME

Without an admin key there is nothing at these addresses. A file is checked as at the start.
"""

import asyncio
import hashlib
import hmac
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesteer.engines.vllm.names import NAME, NAME_RULE
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.model_facts import ModelFacts
from moesteer.profile import Profile
from moesteer.profile_fit import check_model
from moesteer.serving.asgi import Answer, Receive, Scope, header, path_of, read_body, refusal
from moesteer.serving.naming import short, unknown_name
from moesteer.serving.shelf import Shelf

ROOT = "/v1/moesteer"
PATH = f"{ROOT}/profiles"

LARGEST_FILE = 64 * 1024 * 1024
"""Bytes; a profile of a model with 100 layers of 512 experts has 3 MB of scores."""


class Admin:
    """Answers every request under `/v1/moesteer`."""

    def __init__(self, shelf: Shelf, facts: ModelFacts, key: str | None) -> None:
        self._shelf = shelf
        self._facts = facts
        self._key = None if key is None else _digest(key)
        self._one_at_a_time = asyncio.Lock()

    async def answer(self, scope: Scope, receive: Receive) -> None:
        """Always raises an Answer, unless the client has left."""
        if self._key is None:
            raise refusal(404, "This server was started without an admin key.")
        if not self._may(header(scope, "authorization")):
            raise refusal(
                401, "The admin key is missing or wrong.", **{"www-authenticate": "Bearer"}
            )
        path, method = path_of(scope), scope["method"]
        if path in (PATH, f"{PATH}/"):
            if method != "GET":
                raise _wrong_method(method, "GET")
            described = [describe(name, p) for name, p in self._shelf.profiles.items()]
            raise Answer(200, {"object": "list", "data": described})
        if not path.startswith(f"{PATH}/"):
            raise refusal(404, f"There is nothing at {short(path)}.")
        name = path[len(PATH) + 1 :]
        if not NAME.fullmatch(name):
            raise refusal(400, f"{short(name)} can't name a profile: {NAME_RULE}.")
        if method == "PUT":
            await self._put(name, scope, receive)
        elif method == "DELETE":
            async with self._one_at_a_time:
                self._known(name)
                self._shelf.remove(name)
            raise Answer(200, {"name": name, "deleted": True})
        elif method == "GET":
            raise Answer(200, describe(name, self._known(name)))
        else:
            raise _wrong_method(method, "GET, PUT, DELETE")

    async def _put(self, name: str, scope: Scope, receive: Receive) -> None:
        length = header(scope, "content-length")
        if length.isdigit() and len(length) < 20 and int(length) > LARGEST_FILE:
            raise refusal(
                413, f"A profile may have {LARGEST_FILE:,} bytes, not {length}.", connection="close"
            )
        content = await read_body(receive, LARGEST_FILE)
        if content is None:
            return  # half a file is no file
        try:
            profile = await asyncio.to_thread(read_profile, name, content)
            said = checked(profile, self._facts)
            async with self._one_at_a_time:
                replaced = name in self._shelf.profiles
                await self._shelf.put(name, profile)
        except MoesteerError as error:
            raise refusal(400, str(error)) from None
        raise Answer(200 if replaced else 201, {**describe(name, profile), "warnings": said})

    def _known(self, name: str) -> Profile:
        if name not in self._shelf.profiles:
            raise refusal(404, unknown_name(name, self._shelf.profiles))
        return self._shelf.profiles[name]

    def _may(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        assert self._key is not None
        return hmac.compare_digest(_digest(given), self._key) and scheme.lower() == "bearer"


def read_profile(name: str, content: bytes) -> Profile:
    """A profile from its file's bytes; MoesteerError, beginning with the name, if they are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile"
        path.write_bytes(content)
        try:
            return replace(Profile.load(path), name=name)
        except MoesteerError as error:
            raise MoesteerError(str(error).replace(str(path), name)) from None


def checked(profile: Profile, facts: ModelFacts) -> list[str]:
    """The warnings of `check_model`; MoesteerError where the profile does not fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MoesteerWarning)
        check_model(profile, facts)
    return [str(w.message) for w in caught if issubclass(w.category, MoesteerWarning)]


def describe(name: str, profile: Profile) -> dict[str, Any]:
    return {
        "name": name,
        "fingerprint": profile.fingerprint,
        "activated": [list(expert) for expert in profile.activated],
        "deactivated": [list(expert) for expert in profile.deactivated],
        "rule": profile.rule,
        "dose": profile.dose,
        "directions": [direction.words for direction in profile.directions],
        "toward": profile.toward,
        "gate": None if profile.gate is None else profile.gate.words,
    }


def _wrong_method(method: str, allowed: str) -> Answer:
    return refusal(405, f"{short(method)} is not one of {allowed}.", allow=allowed)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
