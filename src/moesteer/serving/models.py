"""`/v1/models`: beside each model of vLLM's list, the model under each profile."""

import json
from collections.abc import Mapping
from typing import Any

from moesteer.profile import Profile
from moesteer.serving.asgi import Answer, App, Message, Receive, Scope, Send, path_of, refusal
from moesteer.serving.naming import short

PATH = "/v1/models"


async def answer_models(
    app: App, scope: Scope, receive: Receive, send: Send, profiles: Mapping[str, Profile]
) -> None:
    """Answer a request for the list, or for one model of it (`/v1/models/MODEL:NAME`)."""
    wanted = path_of(scope)[len(PATH) + 1 :]
    prefix = scope.get("root_path", "")
    start: Message = {}
    parts: list[bytes] = []

    async def keep(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    listing = {**scope, "path": prefix + PATH, "raw_path": (prefix + PATH).encode()}
    await app(listing, receive, keep)
    content = b"".join(parts)
    if not start:
        return
    if start["status"] != 200:  # not allowed to see it, perhaps
        await send(start)
        await send({"type": "http.response.body", "body": content})
        return
    listed = with_profiles(json.loads(content), profiles)
    if wanted:
        cards = {card["id"]: card for card in listed["data"]}
        if wanted not in cards:
            raise refusal(404, f"There is no model {short(wanted)}.", "model")
        listed = cards[wanted]
    raise Answer(200, listed)


def with_profiles(listed: dict[str, Any], profiles: Mapping[str, Profile]) -> dict[str, Any]:
    steered = [
        {
            **card,
            "id": f"{card['id']}:{name}",
            "parent": card["id"],
            "moesteer": {"profile": name, "fingerprint": profile.fingerprint},
        }
        for card in listed["data"]
        for name, profile in profiles.items()
    ]
    return {**listed, "data": [*listed["data"], *steered]}
