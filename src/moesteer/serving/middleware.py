"""The middleware around vLLM's app: names in, headers out, profiles kept.

vLLM makes it from its import path, as with `--middleware`, in each of its API server processes; it
finds the engine and what `moesteer serve` was told in the app's state. Behind `--api-key` nothing
here speaks to who has no key, except to the admin, whose key is another one.
"""

import json
import os
import secrets
from typing import Any

from moesteer.engines.vllm.collected import check_described
from moesteer.errors import MoesteerError
from moesteer.serving.admin import ROOT, Admin
from moesteer.serving.asgi import (
    Answer,
    App,
    Receive,
    Scope,
    Send,
    handed_on,
    header,
    path_of,
    read_body,
    refusal,
)
from moesteer.serving.evidence import Collector, Workers
from moesteer.serving.gated import ask_gate, saying_shut, without_profile
from moesteer.serving.metrics import metrics
from moesteer.serving.models import PATH as MODELS
from moesteer.serving.models import answer_models
from moesteer.serving.naming import named_profile, with_profile
from moesteer.serving.proved_reply import ProvedReply, Steered
from moesteer.serving.setup import Setup, setup_of
from moesteer.serving.shelf import Shelf
from moesteer.serving.watched_reply import Watch

UPLOADS = ("multipart/form-data", "application/x-www-form-urlencoded")
"""Bodies that are no JSON and may be large: sound files. They pass as they come."""


class Middleware:
    """An ASGI app around another."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._behind_key: App = self._steer
        self._watch: Watch | None = None
        self._state: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._begin(scope, receive, send)
            return
        if scope["type"] != "http" or self._state is None:
            await self._app(scope, receive, send)
            return
        try:
            path = path_of(scope)
            if path == ROOT or path.startswith(f"{ROOT}/"):
                await self._admin.answer(scope, receive)
            else:
                await self._behind_key(scope, receive, send)
        except Answer as answer:
            await answer.send(send)

    async def _begin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take the server's profiles to the engine before the first request."""
        state = scope["app"].state
        setup = setup_of(state.args)
        try:
            await self._set_up(state, setup)
        except MoesteerError as error:
            setup.failure = str(error)
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await self._app(scope, receive, send)

    async def _set_up(self, state: Any, setup: Setup) -> None:
        client = state.engine_client
        names = getattr(client.input_processor, "moesteer", None)
        if names is None:
            raise MoesteerError(
                "vLLM did not load moesteer's plugin: is moesteer installed where vLLM runs, and"
                " is MOESTEER_DISABLE set?"
            )
        workers = Workers(client)
        for engine in await workers.call("moesteer_describe"):
            check_described(engine, setup.facts)
        self._shelf = Shelf(workers, names)
        for name, profile in setup.profiles.items():
            await self._shelf.put(name, profile)
        self._workers = workers
        self._collector = Collector(workers)
        if setup.watch is not None:
            self._watch = Watch(setup.watch, self._collector, metrics())
        self._admin = Admin(self._shelf, setup.facts, setup.admin_key)
        self._behind_key = behind_key(self._steer, state.args)
        self._state = state

    async def _steer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        if scope["method"] == "GET" and (path == MODELS or path.startswith(f"{MODELS}/")):
            await answer_models(self._app, scope, receive, send, self._shelf.profiles)
            return
        kind = header(scope, "content-type").partition(";")[0].strip().lower()
        if scope["method"] != "POST" or kind in UPLOADS:
            await self._app(scope, receive, send)
            return
        body = await read_body(receive)
        if body is None:
            return
        request, body = self._translated(path, body)
        if request is not None and request.profile.gate is not None:
            asked = (self._workers, scope, receive, send, request, body)
            is_open = await ask_gate(self._app, *asked)
            if is_open is None:
                return
            if not is_open:
                request, body, send = None, without_profile(body), saying_shut(send, request)
        if self._watch is not None:
            body, send = self._watch.over(path, body, send, steered=request is not None)
        scope, receive = handed_on(scope, receive, body)
        if request is None:
            await self._app(scope, receive, send)
            return
        reply = ProvedReply(send, request, self._collector)
        try:
            await self._app(scope, reply.watching(receive), reply)
        finally:
            reply.end()

    def _translated(self, path: str, body: bytes) -> tuple[Steered | None, bytes]:
        """The body for vLLM, untouched where it names no profile or is no JSON."""
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            return None, body
        models, profiles = self._models(), self._shelf.profiles
        name = named_profile(path, data, models, profiles)
        if name is None:
            return None, body
        request = Steered(name, profiles[name], secrets.token_hex(16))
        try:
            steering = request.profile.ungated.fingerprint
            told = with_profile(data, models, steering, request.key)
            return request, json.dumps(told).encode()
        except RecursionError:
            raise refusal(400, "The body is nested too deeply.") from None

    def _models(self) -> set[str]:
        served = self._state.openai_serving_models
        return {path.name for path in served.base_model_paths} | set(served.lora_requests)


def behind_key(app: App, args: Any) -> App:
    """The app behind vLLM's own check of `--api-key`, if there is one.

    This middleware stands outside of vLLM's, which would let it answer before the key is looked at.
    """
    keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
    if not keys:
        return app
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    return AuthenticationMiddleware(app, tokens=keys)  # pyright: ignore[reportArgumentType]
