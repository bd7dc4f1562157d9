"""A request that names a profile with a gate: its prompt is read before it runs.

The prompt goes through vLLM's own app, as any request, so that it is rendered by the same template:
unsteered, for one token that nobody reads. What the gate's probe reads of it is fetched from the
workers, and the request itself goes on under the profile or without it. Where the prompt can't be
read, the request is refused: it is never steered, or left alone, by default.
"""

import json
from typing import Any

from moesteer.engines.vllm.collected import score_of
from moesteer.engines.vllm.payload import payload_of_probe
from moesteer.gate import Gate
from moesteer.serving.asgi import App, Message, Receive, Scope, Send, handed_on, path_of, refusal
from moesteer.serving.evidence import Workers
from moesteer.serving.naming import EVIDENCE_KEY, EXTRA, FIELD
from moesteer.serving.proved_reply import GATE, HEADERS, Steered

LIMITS = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}
"""What each endpoint calls the longest reply."""

LEFT_OUT = frozenset(LIMITS.values()) | {
    *("min_tokens", "n", "best_of", "stream", "stream_options", "store", "request_id"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "echo", "include", "kv_transfer_params"),
}
"""What is about the reply, not about the prompt."""


async def ask_gate(
    app: App,
    workers: Workers,
    scope: Scope,
    receive: Receive,
    send: Send,
    request: Steered,
    body: bytes,
) -> bool | None:
    """Whether a request's prompt opens the gate of its profile; None where there is no more to do.

    That is where vLLM refuses the prompt, which the client is told, and where the client has left.
    `body` is what vLLM would be told to steer. Raises Answer where a request has several prompts
    (400), and where there is nothing to go by (500).
    """
    gate = request.profile.gate
    assert gate is not None
    asked = json.loads(body)
    _check_one_prompt(asked)
    replied: list[Message] = []

    async def keep(message: Message) -> None:
        replied.append(message)

    key = f"{request.key}-gate"  # what the request itself proves is kept apart
    probing = _probing(path_of(scope), asked, payload_of_probe(gate.probe)["fingerprint"], key)
    await app(*handed_on(scope, receive, json.dumps(probing).encode()), keep)
    try:
        opened = _decided(gate, await workers.call("moesteer_collect", [key]), key)
    except Exception as failure:
        raise refusal(500, f"The gate of {request.name!r} can't be asked: {failure}") from None
    if opened is not None or not replied:
        return opened
    if replied[0].get("status", 200) < 400:
        raise refusal(500, f"The gate of {request.name!r} can't be asked: no token was counted.")
    for message in replied:
        await send(message)
    return None


def without_profile(body: bytes) -> bytes:
    """The same request, unsteered."""
    told = json.loads(body)
    extra = {k: v for k, v in told.pop(EXTRA).items() if k not in (FIELD, EVIDENCE_KEY)}
    return json.dumps(told | ({EXTRA: extra} if extra else {})).encode()


def saying_shut(send: Send, request: Steered) -> Send:
    """`send` of a request whose prompt left the gate shut: nothing was to fire."""
    told = (request.name, request.profile.fingerprint)
    ours = [(k.encode(), v.encode()) for k, v in zip(HEADERS, told, strict=False)]
    ours.append((GATE.encode(), b"shut"))

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            message = {**message, "headers": [*message.get("headers", []), *ours]}
        await send(message)

    return sending


def _probing(path: str, body: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    """The request that is about the prompt alone; what it counts is kept under `key`."""
    asked = {field: value for field, value in body.items() if field not in LEFT_OUT}
    stored = {"store": False} if path == "/v1/responses" else {}
    extra = {**body[EXTRA], FIELD: name, EVIDENCE_KEY: key}
    return {**asked, **stored, LIMITS[path]: 1, EXTRA: extra}


def _decided(gate: Gate, engines: list[list[Any]], key: str) -> bool | None:
    """None where no engine's workers counted a token; with data parallelism, one has."""
    for workers in engines:
        score = score_of(gate.probe, workers, key)
        if score is not None:
            return gate.opens(score)
    return None


def _check_one_prompt(body: dict[str, Any]) -> None:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    if several or body.get("prompt_embeds") is not None:
        raise refusal(
            400,
            "A gate is asked about one prompt, as text or tokens: send a request for each.",
            "prompt",
        )
