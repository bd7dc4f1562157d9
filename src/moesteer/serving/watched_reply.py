"""How a request's prompt was routed, in the headers of its reply and in the server's metrics.

Every request that generates is watched, steered or not. The workers keep how its prompt was routed
when it ran; the start of the reply is held back until they are asked, which can be done as soon as
its first token is there. Nothing is judged later: of a request that asks the model several times
(a response with the server's own tools), it is what ran by then.

    x-moesteer-watch     ok, alarm, or unknown where not all of the prompt was counted
    x-moesteer-drift     nats a layer
    x-moesteer-linked    share of the linked experts that was active, where some are watched

Of several prompts in one request, the headers say the worst. The reference is of unsteered
requests: of a steered one they say how far it is from these, and no rate of alarms holds.
"""

import json
import logging
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from moesteer.engines.vllm.collected import Prompted
from moesteer.engines.vllm.names import WATCH
from moesteer.monitoring.reference import Reference, Verdict
from moesteer.serving.asgi import Message, Send
from moesteer.serving.evidence import Collector
from moesteer.serving.naming import EXTRA, OPAQUE, STEERABLE

_log = logging.getLogger("vllm.moesteer")


class Metrics(Protocol):
    """Where verdicts are counted, apart for requests that ran under a profile."""

    def add(self, verdict: Verdict, steered: bool) -> None: ...


class Watch:
    """Judges what the workers tell of prompts, by a reference, and counts its verdicts."""

    def __init__(self, reference: Reference, collector: Collector, metrics: Metrics) -> None:
        self.reference = reference
        self._collector = collector
        self._metrics = metrics

    def over(self, path: str, body: bytes, send: Send, *, steered: bool) -> tuple[bytes, Send]:
        """The body for vLLM and the way of its reply, both as they were where nothing generates.

        `steered` says whether it runs under a profile.
        """
        if path not in STEERABLE:
            return body, send
        key = secrets.token_hex(16)
        watched, prompts = with_watch(body, key)
        return watched, WatchedReply(send, self, key, prompts, steered)

    async def verdict(self, found: Sequence[Prompted], prompts: int) -> Verdict:
        """Of all prompts of a request; unknown where fewer than `prompts` were counted whole."""
        verdicts = [judged(self.reference, one) for one in found]
        verdict = worst(verdicts) if 0 < prompts <= len(verdicts) else Verdict(0)
        raised = [one for one in verdicts if one.raised]
        return worst(raised) if raised else verdict

    async def prompts(self, key: str) -> Sequence[Prompted]:
        """Those that have run since the workers were asked last."""
        try:
            return (await self._collector.collect(key)).prompts
        except Exception as failure:  # a reply that is not watched is better than none
            _log.error("moesteer: a request can't be watched. The workers said: %r", failure)
            return ()

    def count(self, verdict: Verdict, steered: bool) -> None:
        self._metrics.add(verdict, steered)


class WatchedReply:
    """`send` of a watched request."""

    def __init__(self, send: Send, watch: Watch, key: str, prompts: int, steered: bool) -> None:
        self._send = send
        self._watch = watch
        self._key = key
        self._prompts = prompts
        self._steered = steered
        self._found: list[Prompted] = []
        self._held: list[Message] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            self._held = [message]
            return
        if not self._held:
            await self._send(message)
            return
        self._held.append(message)
        if self._prompts:
            self._found += await self._watch.prompts(self._key)
        if len(self._found) < self._prompts and message.get("more_body", False):
            return
        verdict = await self._watch.verdict(self._found, self._prompts)
        self._watch.count(verdict, self._steered)
        start, *bodies = self._held
        self._held = []
        await self._send({**start, "headers": [*start.get("headers", []), *headers_of(verdict)]})
        for body in bodies:
            await self._send(body)


def with_watch(body: bytes, key: str) -> tuple[bytes, int]:
    """The body with the key for the engine, and how many prompts are to run; as it was, and 0,
    where they can't be watched."""
    try:
        data = json.loads(body)
        if not isinstance(data, dict) or any(data.get(option) for option in OPAQUE):
            return body, 0
        extra = data.get(EXTRA) or {}
        if not isinstance(extra, dict):
            return body, 0  # vLLM's to refuse
        return json.dumps({**data, EXTRA: {**extra, WATCH: key}}).encode(), prompts_in(data)
    except (ValueError, RecursionError):
        return body, 0


def prompts_in(body: dict[str, Any]) -> int:
    """How many requests the engine will get of one body: its prompts, as often as replies."""
    prompt, replies = body.get("prompt"), body.get("n")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    times = replies if isinstance(replies, int) and replies > 0 else 1
    return (len(prompt) if isinstance(prompt, list) and several else 1) * times


def judged(reference: Reference, prompted: Prompted) -> Verdict:
    """What is to be said of one prompt; unknown where not all of its tokens were counted."""
    layers = reference.origin.model.layers
    if prompted.tokens != prompted.length or any(s.layer not in prompted.selected for s in layers):
        return Verdict(prompted.length)
    table = np.zeros(reference.selected.shape, dtype=np.int64)
    for row, shape in enumerate(layers):
        table[row, : shape.experts] = prompted.selected[shape.layer]
    return reference.judge(table, prompted.length)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of several: unknown where one is, else the largest drift and what any raised."""
    known = [one for one in verdicts if one.drift is not None]
    if not known or len(known) < len(verdicts):
        return Verdict(0)
    linked = [one.linked for one in known if one.linked is not None]
    return Verdict(
        max(one.tokens for one in known),
        max(one.drift for one in known if one.drift is not None),
        min(linked, default=None),
        tuple(sorted({score for one in known for score in one.raised})),
    )


def headers_of(verdict: Verdict) -> list[tuple[bytes, bytes]]:
    told = {"x-moesteer-watch": verdict.word}
    if verdict.drift is not None:
        told["x-moesteer-drift"] = f"{verdict.drift:.4f}"
    if verdict.linked is not None:
        told["x-moesteer-linked"] = f"{verdict.linked:.4f}"
    return [(name.encode(), value.encode()) for name, value in told.items()]
