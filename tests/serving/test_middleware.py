"""The middleware against a stub of vLLM's app and of its workers: what goes in, what comes out."""

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from moesteer.direction import Direction
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.profile import Profile
from moesteer.serving.asgi import Message
from moesteer.serving.middleware import Middleware
from moesteer.serving.naming import STEERABLE
from moesteer.serving.setup import Setup

LAYERS = tuple(LayerShape(layer, 8, 2) for layer in range(3))
FACTS = ModelFacts("tiny", None, "tiny", "c0ffee", "70ce", "softmax", LAYERS)
POLITE = Profile(activated=((0, 1),), deactivated=((2, 5),), name="polite")
RUDE = Profile(deactivated=((1, 3),), name="rude")
MOVED = Profile(
    directions=(
        Direction((3.0, 4.0), ((0, "mlp"), (2, "input"))),
        Direction((1.0, 0.0), ((1, "input"),), "ablate", window="generation"),
    ),
    name="moved",
)
FIRST = [[0, 0, "mlp", 7, 35.0, 35.0, 0.0], [0, 2, "input", 7, 34.9, 35.0, 0.0]]
THEN = [[1, 1, "input", 3, 0.0, 0.0, 0.001]]
CHAT = "/v1/chat/completions"
ADMIN = "/v1/moesteer/profiles"
KEY = {"authorization": "Bearer admin key"}


@dataclass
class Stub:
    """A server whose app tells what arrived, and whose workers count as they are told to.

    `workers` are the layers that each has; `directed` is what they measured of directions.
    `stream` are the chunks of a reply; a token passes before the chunk of number `token_at`.
    """

    workers: list[list[int]] = field(default_factory=lambda: [[0, 1, 2]])
    engines: int = 1
    fault: str | None = None
    directed: list[list[Any]] = field(default_factory=list)
    stream: list[bytes] | None = None
    token_at: int = 0
    status: int = 200
    api_key: list[str] | None = None
    admin_key: str | None = None
    refused: str | None = None
    root_path: str = ""
    arrived: list[tuple[str, bytes]] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    loaded: dict[str, Profile] = field(default_factory=dict)
    waiting: dict[str, Profile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = SimpleNamespace(known={}, add=self._name)
        client = SimpleNamespace(
            input_processor=SimpleNamespace(moesteer=names),
            engine_core=SimpleNamespace(call_utility_all_async=self._call),
        )
        self.setup = Setup({"polite": POLITE, "rude": RUDE}, FACTS, self.admin_key)
        served = SimpleNamespace(
            base_model_paths=[SimpleNamespace(name="tiny"), SimpleNamespace(name="tiny:8b")],
            lora_requests={"adapter": None},
        )
        self.state = SimpleNamespace(
            args=Namespace(api_key=self.api_key, moesteer=self.setup),
            engine_client=client,
            openai_serving_models=served,
        )
        self.app = Middleware(self._answer)
        self.begun = False

    def _name(self, name: str, profile: Profile) -> None:
        self.loaded[name] = profile

    async def _call(self, method: str, *args: Any) -> list[list[Any]]:
        assert method == "collective_rpc"
        name, _, given, _ = args
        self.calls.append((name, given))
        await asyncio.sleep(0)
        if name == "moesteer_describe":
            told = [
                {"refused": self.refused, "layers": [[layer, 8, 2] for layer in layers]}
                for layers in self.workers
            ]
        elif name == "moesteer_load":
            told = [None for _ in self.workers]
        else:
            if self.fault == "dead":
                raise RuntimeError("the engine is dead")
            found = {key: self.waiting.pop(key) for key in given[0] if key in self.waiting}
            told = [
                {key: self._count(profile, layers) for key, profile in found.items()}
                for layers in self.workers
            ]
        nothing = [{} if name == "moesteer_collect" else one for one in told]
        return [told, *[nothing for _ in range(self.engines - 1)]]

    def _count(self, profile: Profile, layers: list[int]) -> dict[str, Any]:
        selected = {layer: [3] * 8 for layer in layers}
        for layer in layers:
            activated, deactivated = profile.experts_of(layer)
            for expert in activated:
                selected[layer][expert] = 7
            for expert in deactivated:
                selected[layer][expert] = 1 if self.fault == "disobeyed" else 0
        directed = [told for told in self.directed if told[1] in layers]
        return {"tokens": 7, "selected": selected, "directed": directed}

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if self.fault == "left":
            assert (await receive())["type"] == "http.disconnect"
        self.arrived.append((scope["path"], body))
        if scope["path"] == self.root_path + "/v1/models":
            cards = [{"id": name, "root": "folder"} for name in ("tiny", "tiny:8b")]
            await _send(send, 200, [json.dumps({"object": "list", "data": cards}).encode()])
            return
        lengths = [int(v) for k, v in scope["headers"] if k == b"content-length"]
        assert lengths in ([], [len(body)])
        chunks = self.stream or [b'{"reply": true}']
        told = _extra(body) if scope["path"].startswith(self.root_path + CHAT) else {}
        await _send(send, self.status, chunks, lambda n: self._token(n, told))

    def _token(self, number: int, told: dict[str, str]) -> None:
        counted = self.fault not in ("uncounted", "left")
        if number == self.token_at and "moesteer_key" in told and counted:
            self.waiting[told["moesteer_key"]] = self.loaded[told["moesteer"]]

    async def begin(self) -> list[Message]:
        self.begun = True
        return await _run(self.app, self._scope("lifespan"), [{"type": "lifespan.startup"}])

    def _scope(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "app": SimpleNamespace(state=self.state), **more}

    def ask(
        self,
        path: str = CHAT,
        body: Any = None,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        parts: list[Message] | None = None,
    ) -> "Reply":
        return asyncio.run(self._ask(path, body, method, headers, parts))

    async def _ask(
        self, path: str, body: Any, method: str, headers: dict[str, str] | None, parts: Any
    ) -> "Reply":
        if not self.begun:
            await self.begin()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json"} | (headers or {})
        scope = self._scope(
            "http",
            method=method,
            path=self.root_path + path,
            raw_path=b"",
            root_path=self.root_path,
            query_string=b"",
            headers=[(k.encode(), v.encode()) for k, v in given.items()],
        )
        sent = parts or [{"type": "http.request", "body": content, "more_body": False}]
        replied = await _run(self.app, scope, [*sent, {"type": "http.disconnect"}])
        await asyncio.sleep(0.01)  # what is looked at after the reply
        return Reply(replied)


class Reply:
    """What was sent, as a client sees it; status 0 where nothing was."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages
        start = messages[0] if messages else {"status": 0, "headers": []}
        self.status = start["status"]
        self.headers = {k.decode(): v.decode() for k, v in start.get("headers", [])}
        self.body = b"".join(m.get("body", b"") for m in messages[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return self.json["error"]["message"]

    @property
    def moesteer(self) -> dict[str, str]:
        return {k[11:]: v for k, v in self.headers.items() if k.startswith("x-moesteer")}


async def _run(app: Any, scope: dict[str, Any], given: list[Message]) -> list[Message]:
    sent: list[Message] = []
    waiting = list(given)

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def _send(
    send: Any, status: int, chunks: list[bytes], before: Callable[[int], None] = lambda _: None
) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    for number, chunk in enumerate(chunks):
        before(number)
        more = number + 1 < len(chunks)
        await send({"type": "http.response.body", "body": chunk, "more_body": more})


def _extra(body: bytes) -> dict[str, str]:
    try:
        return json.loads(body)["vllm_xargs"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


# -- naming a profile ----------------------------------------------------------------------------


def test_the_middleware_does_not_need_vllm() -> None:
    assert "vllm" not in sys.modules


@pytest.mark.parametrize(
    "body",
    [
        {"model": "tiny", "moesteer": "polite"},
        {"model": "tiny:polite"},
        {"model": "tiny", "vllm_xargs": {"moesteer": "polite"}},
        {"model": "tiny:polite", "moesteer": "polite", "vllm_xargs": {"moesteer": "polite"}},
    ],
)
@pytest.mark.parametrize("path", STEERABLE)
def test_all_ways_to_name_a_profile_reach_vllm_alike(path: str, body: dict) -> None:
    stub = Stub()
    stub.ask(path, {"messages": [1.5, "é"], **body})
    arrived = json.loads(stub.arrived[0][1])
    key = arrived["vllm_xargs"].pop("moesteer_key")
    assert arrived == {
        "messages": [1.5, "é"],
        "model": "tiny",
        "vllm_xargs": {"moesteer": POLITE.fingerprint},
    }
    assert len(key) == 32
    assert stub.loaded[POLITE.fingerprint].activated == POLITE.activated


def test_other_extra_arguments_are_kept_and_keys_differ() -> None:
    stub = Stub()
    body = {"model": "tiny:rude", "vllm_xargs": {"other": 3}}
    stub.ask(body=body)
    stub.ask(body=body)
    first, second = (_extra(content) for _, content in stub.arrived)
    assert first["other"] == 3
    assert first["moesteer_key"] != second["moesteer_key"]


@pytest.mark.parametrize(
    ("model", "served"), [("tiny:8b:rude", "tiny:8b"), ("adapter:rude", "adapter")]
)
def test_models_with_colons_and_adapters_take_profiles(model: str, served: str) -> None:
    stub = Stub()
    assert stub.ask(body={"model": model}).moesteer["profile"] == "rude"
    assert json.loads(stub.arrived[0][1])["model"] == served


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "tiny",  "messages": []}',
        b'{"model": "tiny:8b"}',
        b'{"model": "other:polite"}',
        b'{"model": 3, "moesteer": null}',
        b"[1, 2]",
        b"no JSON",
        b"",
        b"\xff\xfe\xfa",
        b"[" * 100_000,
        b"9" * 10_000,
    ],
)
def test_requests_that_name_none_pass_byte_for_byte(content: bytes) -> None:
    stub = Stub()
    reply = stub.ask(body=content)
    assert stub.arrived == [(CHAT, content)]
    assert (reply.status, reply.moesteer) == (200, {})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"moesteer": "nobody"}, "No profile is named 'nobody'. Loaded are: polite, rude."),
        ({"model": "tiny:nobody"}, "No profile is named 'nobody'. Loaded are: polite, rude."),
        ({"model": "tiny:"}, "No profile is named ''"),
        ({"moesteer": "../../etc/passwd"}, "No profile is named '../../etc/passwd'"),
        ({"model": "tiny:../polite"}, "No profile is named '../polite'"),
        ({"moesteer": "polite", "model": "tiny:rude"}, "two profiles, 'polite' and 'rude'"),
        ({"moesteer": "rude", "vllm_xargs": {"moesteer": "polite"}}, "two profiles"),
        ({"moesteer": {"activated": [[0, 1]]}}, "is an object"),
        ({"moesteer": ["polite"]}, "is a list"),
        ({"moesteer": 3}, "is a number"),
        ({"moesteer": True}, "is a truth value"),
        ({"vllm_xargs": {"moesteer": None}}, "is null"),
        ({"vllm_xargs": {"moesteer": {"fingerprint": "x"}}}, "is an object"),
        ({"vllm_xargs": {"moesteer_key": "k"}}, "vllm_xargs may not hold 'moesteer_key'"),
        ({"moesteer": "rude", "vllm_xargs": {"moesteer_count": 1}}, "'moesteer_count'"),
        ({"sampling_params": {"extra_args": {"moesteer": "rude"}}}, "may not hold 'moesteer'"),
        ({"moesteer": "rude", "vllm_xargs": ["x"]}, "vllm_xargs must be an object"),
        ({"moesteer": "rude", "use_beam_search": True}, "beam search"),
        ({"moesteer": "rude", "background": True}, "background"),
    ],
)
def test_wrong_names_are_refused(body: dict, said: str) -> None:
    stub = Stub()
    reply = stub.ask(body=body)
    assert (reply.status, stub.arrived) == (400, [])
    assert said in reply.error
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}


def test_long_names_and_long_lists_are_cut() -> None:
    stub = Stub()
    stub.setup.profiles = {f"profile-{number:03}": RUDE for number in range(300)}
    for body in ({"moesteer": "x" * 100_000}, {"model": "tiny:" + "x" * 100_000}):
        reply = stub.ask(body=body)
        assert reply.status == 400
        assert "profile-000" in reply.error
        assert "and 280 more" in reply.error
        assert len(reply.body) < 1000


def test_other_endpoints_take_no_profile() -> None:
    stub = Stub()
    for path in ("/tokenize", "/v1/embeddings", "/v1/chat/completions/", "/invocations"):
        reply = stub.ask(path, {"model": "tiny:rude"})
        assert reply.status == 400
        assert "only, not" in reply.error
    assert stub.arrived == []


def test_uploads_pass_without_being_kept() -> None:
    stub = Stub()
    parts: list[Message] = [
        {"type": "http.request", "body": b"x", "more_body": n < 2} for n in range(3)
    ]
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert stub.ask("/v1/audio/transcriptions", parts=parts, headers=headers).status == 200
    assert stub.arrived == [("/v1/audio/transcriptions", b"xxx")]


def test_a_client_that_leaves_in_the_middle_of_its_body_starts_nothing() -> None:
    stub = Stub()
    half = {"type": "http.request", "body": b'{"model": "tiny:rude"', "more_body": True}
    assert stub.ask(parts=[half]).messages == []
    assert stub.arrived == []


def test_a_prefix_of_the_path_is_taken_off() -> None:
    stub = Stub(root_path="/llm")
    assert stub.ask(body={"model": "tiny:rude"}).moesteer["fired"] == "true"
    listed = stub.ask("/v1/models", method="GET").json
    assert "tiny:rude" in [card["id"] for card in listed["data"]]


# -- the proof -----------------------------------------------------------------------------------


def test_a_reply_carries_profile_fingerprint_and_proof() -> None:
    reply = Stub().ask(body={"model": "tiny:polite"})
    told = {"profile": "polite", "fingerprint": POLITE.fingerprint, "fired": "true"}
    assert reply.moesteer == told
    assert reply.json == {"reply": True}


@pytest.mark.parametrize(
    ("workers", "engines"),
    [([[0, 1, 2], [0, 1, 2]], 1), ([[0, 1], [2]], 1), ([[0, 1, 2]], 3)],
    ids=["tensor parallel", "pipeline parallel", "data parallel"],
)
def test_evidence_of_several_workers_is_one(workers: list[list[int]], engines: int) -> None:
    stub = Stub(workers=workers, engines=engines)
    assert stub.ask(body={"model": "tiny:polite"}).moesteer["fired"] == "true"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("disobeyed", "deactivated expert 5 was still selected by 1 of 7"),
        ("uncounted", "no token of the request was counted"),
        ("dead", "the engine is dead"),
    ],
)
@pytest.mark.parametrize("stream", [None, [b"a", b"b", b"c"]])
def test_without_proof_the_header_says_so_and_the_log_why(
    fault: str, said: str, stream: list[bytes] | None, caplog: pytest.LogCaptureFixture
) -> None:
    reply = Stub(fault=fault, stream=stream).ask(body={"model": "tiny:polite"})
    assert (reply.status, reply.moesteer["fired"]) == (200, "false")
    assert reply.body in (b"abc", b'{"reply": true}')
    assert said in caplog.text


def test_a_layer_that_no_worker_counted_is_no_proof() -> None:
    stub = Stub(workers=[[0], [1]])
    stub.setup.facts = replace(FACTS, layers=LAYERS[:2])
    assert stub.ask(body={"model": "tiny:rude"}).moesteer["fired"] == "true"
    assert stub.ask(body={"model": "tiny:polite"}).moesteer["fired"] == "false"


@pytest.mark.parametrize("token_at", [0, 1, 3])
def test_a_stream_starts_with_the_first_chunk_that_has_proof(token_at: int) -> None:
    stub = Stub(stream=[b"a", b"b", b"c", b"d"], token_at=token_at)
    reply = stub.ask(body={"model": "tiny:rude", "stream": True})
    assert reply.moesteer["fired"] == "true"
    assert [message.get("body") for message in reply.messages] == [None, b"a", b"b", b"c", b"d"]
    asked = [given for name, given in stub.calls if name == "moesteer_collect"]
    # Once a chunk until there is proof, and once for the rest, unless there is none.
    assert len(asked) == token_at + (1 if token_at == 3 else 2)


@pytest.mark.parametrize("workers", [[[0, 1, 2]], [[0, 1], [2]]])
@pytest.mark.parametrize(
    ("directed", "fired", "said"),
    [
        (FIRST + THEN, "true", ""),
        (FIRST, "false", "no token of its window passed"),
        (FIRST[1:] + THEN, "false", "at the mlp of layer 0: no token"),
        ([[0, 0, "mlp", 7, 7.0, 35.0, 0.0], FIRST[1], *THEN], "false", "moved by 1 along it, not"),
    ],
)
def test_directions_are_proved_by_how_far_tokens_moved(
    workers: list[list[int]],
    directed: list,
    fired: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stub = Stub(workers=workers, directed=directed)
    stub.setup.profiles["moved"] = MOVED
    assert stub.ask(body={"model": "tiny:moved"}).moesteer["fired"] == fired
    assert said in caplog.text


def test_a_stream_waits_for_the_windows_of_its_directions() -> None:
    stub = Stub(stream=[b"a", b"b", b"c", b"d"], directed=FIRST)
    stub.setup.profiles["moved"] = MOVED
    collected = stub._call

    async def further(method: str, *args: Any) -> Any:
        result = await collected(method, *args)
        if args[0] == "moesteer_collect" and stub.directed == FIRST:
            stub.directed = THEN  # what passes after the first token
            stub.waiting[args[2][0][0]] = MOVED
        return result

    stub.state.engine_client.engine_core.call_utility_all_async = further
    assert stub.ask(body={"model": "tiny:moved", "stream": True}).moesteer["fired"] == "true"
    asked = [given for name, given in stub.calls if name == "moesteer_collect"]
    assert len(asked) == 3  # after each of two tokens, and once for the rest


def test_a_stream_that_stops_obeying_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    stub = Stub(stream=[b"a", b"b"])
    collected = stub._call

    async def later_disobeyed(method: str, *args: Any) -> Any:
        if args[0] == "moesteer_collect" and stub.fault is None:
            result = await collected(method, *args)
            stub.fault = "disobeyed"
            stub.waiting[args[2][0][0]] = RUDE
            return result
        return await collected(method, *args)

    stub.state.engine_client.engine_core.call_utility_all_async = later_disobeyed
    assert stub.ask(body={"model": "tiny:rude"}).moesteer["fired"] == "true"
    assert "went on otherwise" in caplog.text


def test_a_client_that_left_is_no_fault_of_the_profile(caplog: pytest.LogCaptureFixture) -> None:
    assert Stub(fault="left").ask(body={"model": "tiny:rude"}).moesteer["fired"] == "false"
    assert caplog.text == ""


def test_errors_carry_no_proof() -> None:
    stub = Stub(status=404)
    reply = stub.ask(body={"model": "tiny:rude"})
    assert (reply.status, reply.moesteer, reply.body) == (404, {}, b'{"reply": true}')
    assert "moesteer_collect" not in [name for name, _ in stub.calls]


def test_many_replies_share_a_call() -> None:
    stub = Stub()

    async def together() -> list[Reply]:
        await stub.begin()
        ask = (stub._ask(CHAT, {"model": "tiny:rude"}, "POST", None, None) for _ in range(20))
        return await asyncio.gather(*ask)

    assert {reply.moesteer["fired"] for reply in asyncio.run(together())} == {"true"}
    asked = [given[0] for name, given in stub.calls if name == "moesteer_collect"]
    assert sum(map(len, asked)) == 20
    assert len(asked) < 10


# -- models --------------------------------------------------------------------------------------


def test_models_are_listed_with_and_without_profiles() -> None:
    stub = Stub()
    listed = stub.ask("/v1/models", method="GET").json["data"]
    assert [card["id"] for card in listed] == [
        *("tiny", "tiny:8b", "tiny:polite", "tiny:rude", "tiny:8b:polite", "tiny:8b:rude")
    ]
    one = stub.ask("/v1/models/tiny:rude", method="GET").json
    assert one["moesteer"] == {"profile": "rude", "fingerprint": RUDE.fingerprint}
    assert (one["parent"], one["root"]) == ("tiny", "folder")
    assert stub.ask("/v1/models/tiny", method="GET").json["id"] == "tiny"
    missing = stub.ask("/v1/models/tiny:nobody", method="GET")
    assert (missing.status, missing.json["error"]["type"]) == (404, "NotFoundError")


# -- starting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"refused": "it routes in its own way"}, "it routes in its own way"),
        ({"workers": [[0, 2]]}, "routes otherwise in vLLM"),
    ],
)
def test_an_engine_that_cannot_be_steered_is_not_served(options: dict, said: str) -> None:
    stub = Stub(**options)
    (message,) = asyncio.run(stub.begin())
    assert message["type"] == "lifespan.startup.failed"
    assert said in (stub.setup.failure or "")


def test_without_the_plugin_nothing_is_served() -> None:
    stub = Stub()
    del stub.state.engine_client.input_processor.moesteer
    (message,) = asyncio.run(stub.begin())
    assert message["type"] == "lifespan.startup.failed"
    assert "plugin" in (stub.setup.failure or "")


# -- the admin -----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Any) -> bytes:
    """A profile that fits, as bytes of its file."""
    Profile(activated=((1, 2),), model=FACTS).save(tmp_path / "p.safetensors")
    return (tmp_path / "p.safetensors").read_bytes()


def test_without_an_admin_key_there_is_nothing(file: bytes) -> None:
    for method, path in (("GET", ADMIN), ("PUT", f"{ADMIN}/new"), ("DELETE", f"{ADMIN}/rude")):
        stub = Stub()
        assert stub.ask(path, file, method, KEY).status == 404
        assert stub.ask(body={"model": "tiny:new"}).status == 400
        assert stub.ask(body={"model": "tiny:rude"}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic admin key"},
        {"authorization": "admin key"},
        {"authorization": "Bearer admin key "},
        {"authorization": "Bearer " + "x" * 100_000},
        {"authorization": "Bearer \u00fc"},
    ],
)
def test_a_wrong_admin_key_is_refused(headers: dict[str, str], file: bytes) -> None:
    stub = Stub(admin_key="admin key")
    for method, path in (("GET", ADMIN), ("PUT", f"{ADMIN}/new"), ("DELETE", f"{ADMIN}/rude")):
        reply = stub.ask(path, file, method, headers)
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert len(stub.loaded) == 2


def test_profiles_come_and_go(file: bytes) -> None:
    stub = Stub(admin_key="admin key")
    put = stub.ask(f"{ADMIN}/new", file, "PUT", KEY)
    assert (put.status, put.json["activated"]) == (201, [[1, 2]])
    assert "can't be compared" in put.json["warnings"][0]  # neither side has norms here
    assert stub.ask(f"{ADMIN}/new", file, "PUT", KEY).status == 200
    used = stub.ask(body={"model": "tiny:new"})
    assert used.moesteer["fingerprint"] == put.json["fingerprint"]
    assert used.moesteer["fired"] == "true"
    listed = stub.ask(ADMIN, b"", "GET", KEY).json["data"]
    assert [entry["name"] for entry in listed] == ["polite", "rude", "new"]
    assert stub.ask(f"{ADMIN}/new", b"", "GET", KEY).json == listed[2]
    assert stub.ask(f"{ADMIN}/new", b"", "DELETE", KEY).status == 200
    assert stub.ask(f"{ADMIN}/new", b"", "DELETE", KEY).status == 404
    unknown = stub.ask(body={"model": "tiny:new"})
    assert unknown.error == "No profile is named 'new'. Loaded are: polite, rude."


def test_a_profile_that_is_taken_away_stays_with_requests_on_their_way() -> None:
    stub = Stub(admin_key="admin key", stream=[b"a", b"b", b"c"], token_at=2)

    async def session() -> list[Reply]:
        await stub.begin()
        running = stub._ask(CHAT, {"model": "tiny:rude"}, "POST", None, None)
        removal = stub._ask(f"{ADMIN}/rude", b"", "DELETE", KEY, None)
        return [*await asyncio.gather(running, removal)]

    running, removal = asyncio.run(session())
    assert (running.moesteer["fired"], running.body) == ("true", b"abc")
    assert removal.status == 200
    assert stub.ask(body={"model": "tiny:rude"}).status == 400


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *((name, 400) for name in ("../../etc", "..", ".", "a/b", "a b", "a:b", "é", "x" * 65)),
        *(("x" * 100_000, 400), ("", 405), ("x" * 64, 201), ("A.b-c_9", 201)),
    ],
)
def test_only_plain_names_are_taken(name: str, status: int, file: bytes) -> None:
    reply = Stub(admin_key="admin key").ask(f"{ADMIN}/{name}", file, "PUT", KEY)
    assert reply.status == status
    assert len(reply.body) < 500


def test_files_that_are_no_profile_or_do_not_fit_are_refused(file: bytes, tmp_path: Any) -> None:
    def saved(profile: Profile) -> bytes:
        profile.save(tmp_path / "other.safetensors")
        return (tmp_path / "other.safetensors").read_bytes()

    others = replace(FACTS, id="other", config_hash="0ther")
    for content, said in [
        (file[:-1], "not a readable profile"),
        (file[:4], "not a readable profile"),
        (b"", "not a readable profile"),
        (b"{}" * 50, "not a readable profile"),
        (saved(Profile(activated=((1, 2),), model=others)), "was made on other and does not fit"),
        (saved(Profile(activated=((7, 2),))), "names layer 7"),
        (saved(Profile(activated=((0, 1), (0, 2), (0, 3)))), "a token selects k = 2"),
    ]:
        stub = Stub(admin_key="admin key")
        reply = stub.ask(f"{ADMIN}/new", content, "PUT", KEY)
        assert reply.status == 400
        assert said in reply.error
        assert reply.error.startswith("new")
        assert len(stub.loaded) == 2


def test_half_an_upload_loads_nothing(file: bytes) -> None:
    stub = Stub(admin_key="admin key")
    half: Message = {"type": "http.request", "body": file[:100], "more_body": True}
    assert stub.ask(f"{ADMIN}/new", None, "PUT", KEY, [half]).messages == []
    assert stub.ask(body={"model": "tiny:new"}).status == 400


def test_uploads_are_limited(monkeypatch: pytest.MonkeyPatch, file: bytes) -> None:
    monkeypatch.setattr("moesteer.serving.admin.LARGEST_FILE", 1000)
    stub = Stub(admin_key="admin key")
    said = KEY | {"content-length": "1001"}
    assert stub.ask(f"{ADMIN}/new", b"", "PUT", said).status == 413
    part: Message = {"type": "http.request", "body": b"x" * 600, "more_body": True}
    assert stub.ask(f"{ADMIN}/new", None, "PUT", KEY, [part, part]).status == 413


def test_other_addresses_and_methods_of_the_admin() -> None:
    stub = Stub(admin_key="admin key")
    assert stub.ask("/v1/moesteer", b"", "GET", KEY).status == 404
    assert stub.ask("/v1/moesteer/other", b"", "GET", KEY).status == 404
    assert stub.ask(ADMIN, b"", "DELETE", KEY).status == 405
    reply = stub.ask(f"{ADMIN}/rude", b"", "POST", KEY)
    assert (reply.status, reply.headers["allow"]) == (405, "GET, PUT, DELETE")
    assert stub.arrived == []
