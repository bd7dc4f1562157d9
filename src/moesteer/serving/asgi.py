"""The few pieces of ASGI that the middleware needs: read a body, hand it on, answer in JSON."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Answer(Exception):  # noqa: N818 - it is not always an error that ends a request early
    """What a request is answered instead of going on."""

    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None):
        super().__init__(status)
        self.status = status
        self.body = body
        self.headers = headers or {}

    async def send(self, send: Send) -> None:
        content = json.dumps(self.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content))}
        await send(
            {
                "type": "http.response.start",
                "status": self.status,
                "headers": [(k.encode(), v.encode()) for k, v in (headers | self.headers).items()],
            }
        )
        await send({"type": "http.response.body", "body": content})


def refusal(status: int, message: str, param: str | None = None, **headers: str) -> Answer:
    """An error in OpenAI's shape, as its clients expect."""
    kinds = {401: "AuthenticationError", 404: "NotFoundError", 500: "InternalServerError"}
    error = {
        "message": message,
        "type": kinds.get(status, "BadRequestError"),
        "param": param,
        "code": status,
    }
    return Answer(status, {"error": error}, headers)


def header(scope: Scope, name: str) -> str:
    """A request's header, empty where there is none."""
    wanted = name.lower().encode()
    return next((v.decode("latin-1") for k, v in scope["headers"] if k.lower() == wanted), "")


def path_of(scope: Scope) -> str:
    """The path as routes see it: without the prefix under which a proxy shows the server."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


async def read_body(receive: Receive, limit: int | None = None) -> bytes | None:
    """The whole body; None where the client left before its end.

    Raises Answer (413) where it grows beyond `limit` bytes.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if limit is not None and size > limit:
            raise refusal(
                413, f"The body is over the limit of {limit:,} bytes.", connection="close"
            )
        if not message.get("more_body", False):
            return b"".join(parts)


def handed_on(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """Scope and receive of a request whose body was read, and perhaps replaced."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()  # what comes after the body: that the client has left

    others = [(k, v) for k, v in scope["headers"] if k.lower() not in _OF_THE_BODY]
    length = (b"content-length", str(len(body)).encode())
    return {**scope, "headers": [*others, length]}, again


_OF_THE_BODY = (b"content-length", b"transfer-encoding")
