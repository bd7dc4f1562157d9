"""A reply to a steered request, held back until its evidence is there.

Headers come first, so the start of a reply waits: for the whole of a plain one, which is sent when
it is complete, and for the first chunk of a stream that comes after a token has passed the model
(some streams begin with chunks that only say that they begin, and some directions wait for tokens
that the model has written). The rest of a stream is looked at
when it has ended; where it tells against the profile, the log says so.
"""

import asyncio
import logging
from dataclasses import dataclass

from moesteer.profile import Profile
from moesteer.serving.asgi import Message, Receive, Send
from moesteer.serving.evidence import Collector, Count, is_telling, why_not_fired

HEADERS = ("x-moesteer-profile", "x-moesteer-fingerprint", "x-moesteer-fired")
GATE = "x-moesteer-gate"
"""Beside them where the profile has a gate: open, or shut, and then nothing was to fire."""

_log = logging.getLogger("vllm.moesteer")  # under vLLM's own logger, hence in its format
_running: set[asyncio.Task[None]] = set()


@dataclass(frozen=True)
class Steered:
    """A request under a profile: by which name, and under which key its evidence is kept."""

    name: str
    profile: Profile
    key: str


class ProvedReply:
    """`send` of a steered request."""

    def __init__(self, send: Send, request: Steered, collector: Collector) -> None:
        self._send = send
        self._request = request
        self._collector = collector
        self._held: list[Message] = []
        self._started = False
        self._done = False
        self._count = Count()
        self._fired = False
        self._left = False

    def watching(self, receive: Receive) -> Receive:
        """`receive` of the same request: where the client leaves, there may be nothing to prove."""

        async def watched() -> Message:
            message = await receive()
            self._left |= message["type"] == "http.disconnect"
            return message

        return watched

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] < 400:
                self._held = [message]
                self._started = True
                return
            self._done = True  # an error: nothing was generated
        if not self._held:
            await self._send(message)
            return
        self._held.append(message)
        ended = not message.get("more_body", False)
        seen, problem = await self._look()
        if not seen and not ended:
            return
        self._fired = problem is None
        if problem is not None and not self._left:
            _log.error("moesteer: a reply is marked as not fired. %s", problem)
        start, *bodies = self._held
        told = (self._request.name, self._request.profile.fingerprint, str(self._fired).lower())
        ours = [(k.encode(), v.encode()) for k, v in zip(HEADERS, told, strict=True)]
        if self._request.profile.gate is not None:
            ours.append((GATE.encode(), b"open"))
        await self._send({**start, "headers": [*start.get("headers", []), *ours]})
        for body in bodies:
            await self._send(body)
        self._held = []
        self._done = ended

    def end(self) -> None:
        """The app is through: look at what came after the start, without keeping anyone waiting."""
        if self._started and not self._done:
            task = asyncio.get_running_loop().create_task(self._look_again())
            _running.add(task)
            task.add_done_callback(_running.discard)

    async def _look(self) -> tuple[bool, str | None]:
        """Whether there is anything to go by, and what it tells against the profile."""
        try:
            self._count += await self._collector.collect(self._request.key)
        except Exception as failure:  # a reply without proof is better than none
            return True, f"The workers gave no evidence: {failure!r}"
        profile = self._request.profile
        return is_telling(profile, self._count), why_not_fired(profile, self._count)

    async def _look_again(self) -> None:
        _, problem = await self._look()
        if self._fired and problem is not None:
            _log.error("moesteer: a stream that began as fired went on otherwise. %s", problem)
