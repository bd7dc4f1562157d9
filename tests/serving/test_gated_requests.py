"""Gated profiles behind the middleware, against a stub of vLLM's app and of its workers."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from test_middleware import CHAT, KEY, POLITE, Stub
from test_watched_reply import REFERENCE, Counted

from moesteer.engines.vllm.payload import payload_of_probe
from moesteer.gate import DirectionProbe, Gate, RoutingProbe
from moesteer.profile import Profile
from moesteer.serving.asgi import Message
from moesteer.serving.gated import LIMITS
from moesteer.serving.naming import STEERABLE

ROUTING = RoutingProbe(((0, 1), (2, 5)), (1.0, -0.5))
WATCHING = DirectionProbe(1, -2, (0.6, 0.8))
BY_ROUTING = replace(POLITE, gate=Gate(ROUTING, 0.0), name="by routing")
BY_DIRECTION = replace(POLITE, gate=Gate(WATCHING, 0.0), name="by direction")
NAMES = {payload_of_probe(probe)["fingerprint"]: probe for probe in (ROUTING, WATCHING)}


@dataclass
class Gated(Stub):
    """Workers that count of a probe's request what `score` says; the rest as ever."""

    score: float | None = 1.0
    asked: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.setup.profiles |= {"gated": BY_ROUTING, "watched": BY_DIRECTION}
        names = self.state.engine_client.input_processor.moesteer
        names.add_probe = self.probes.__setitem__

    def _token(self, number: int, told: dict[str, str]) -> None:
        if told.get("moesteer") in NAMES:
            if self.score is not None:
                self.waiting[told["moesteer_key"]] = Profile(name=told["moesteer"])
            return
        super()._token(number, told)

    def _count(self, profile: Profile, layers: list[int]) -> dict[str, Any]:
        if profile.name not in NAMES:
            return super()._count(profile, layers) | {"watched": None}
        # Of 4 tokens: (0, 1) by as many as score, (2, 5) by none.
        selected = {layer: [0.0] * 8 for layer in layers}
        if 0 in layers:
            selected[0][1] = 4 * (self.score or 0.0)
        watched = self.score if 1 in layers and NAMES[profile.name] is WATCHING else None
        return {"tokens": 4, "selected": selected, "directed": [], "watched": watched}

    def bodies(self, path: str = CHAT) -> list[dict[str, Any]]:
        return [json.loads(body) for where, body in self.arrived if where == path]


@pytest.mark.parametrize(("name", "profile"), [("gated", BY_ROUTING), ("watched", BY_DIRECTION)])
@pytest.mark.parametrize("workers", [[[0, 1, 2]], [[0], [1], [2]], [[0, 1, 2], [0, 1, 2]]])
def test_an_open_gate_is_a_probe_and_then_the_steered_request(name, profile, workers) -> None:
    stub = Gated(workers=workers)
    asked = {"model": "tiny", "moesteer": name, "messages": [{"role": "user"}]}
    about_the_reply = {"n": 3, "stream": True, "max_tokens": 7, "min_tokens": 5, "logprobs": True}
    reply = stub.ask(body=asked | about_the_reply)
    assert reply.status == 200
    told = {k[11:]: v for k, v in reply.headers.items() if k.startswith("x-moesteer")}
    assert told == {
        "profile": name,
        "fingerprint": profile.fingerprint,
        "fired": "true",
        "gate": "open",
    }
    probe, steered = stub.bodies()
    extra = probe.pop("vllm_xargs")
    assert extra["moesteer"] in stub.probes
    assert NAMES[extra["moesteer"]] is profile.gate.probe
    assert probe == {
        "model": "tiny",
        "messages": [{"role": "user"}],
        "max_completion_tokens": 1,
    }
    ours = steered.pop("vllm_xargs")
    assert ours["moesteer"] == POLITE.fingerprint  # without the gate
    assert ours["moesteer_key"] != extra["moesteer_key"]
    assert steered == {"model": "tiny", "messages": [{"role": "user"}], **about_the_reply}


def test_a_shut_gate_is_a_probe_and_then_the_request_as_it_would_be_without_a_name() -> None:
    stub = Gated(score=-1.0)
    body = {"model": "tiny:gated", "messages": [], "stream": True, "vllm_xargs": {"other": 1}}
    reply = stub.ask(body=body)
    assert reply.status == 200
    assert reply.body == b'{"reply": true}'
    told = {k[11:]: v for k, v in reply.headers.items() if k.startswith("x-moesteer")}
    assert told == {
        "profile": "gated",
        "fingerprint": BY_ROUTING.fingerprint,
        "gate": "shut",
    }
    _, unsteered = stub.bodies()
    expected = {"model": "tiny", "messages": [], "stream": True, "vllm_xargs": {"other": 1}}
    assert unsteered == expected
    # Nothing of ours is left where nothing else was there
    stub.ask(body={"model": "tiny", "moesteer": "gated", "messages": []})
    assert stub.bodies()[-1] == {"model": "tiny", "messages": []}


def test_what_is_watched_is_told_apart_by_what_it_ran_under(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = Counted()
    monkeypatch.setattr("moesteer.serving.middleware.metrics", lambda: counted)
    for name, score in ((None, 1.0), ("polite", 1.0), ("gated", 1.0), ("gated", -1.0)):
        stub = Gated(score=score)
        stub.setup.watch = REFERENCE
        named = {} if name is None else {"moesteer": name}
        reply = stub.ask(body={"model": "tiny", "messages": [], **named})
        assert "x-moesteer-watch" in reply.headers
    assert counted.steered == [False, True, True, False]  # a shut gate steers nothing


def test_a_profile_without_a_gate_asks_nothing_first() -> None:
    stub = Gated()
    reply = stub.ask(body={"model": "tiny", "moesteer": "polite"})
    assert len(stub.bodies()) == 1
    assert "x-moesteer-gate" not in reply.headers


def test_what_the_workers_are_told() -> None:
    stub = Gated()
    stub.ask(body={"model": "tiny"})
    loaded = [given[0] for name, given in stub.calls if name == "moesteer_load"]
    prints = [payload["fingerprint"] for payload in loaded]
    assert prints.count(POLITE.fingerprint) == 3  # itself, and twice without its gate
    assert BY_ROUTING.fingerprint not in prints
    assert set(NAMES) <= set(prints)
    (watching,) = [p for p in loaded if "watched" in p]
    assert watching["watched"]["layer"] == 1
    assert watching["experts"]["activated"] == watching["experts"]["deactivated"] == []


@pytest.mark.parametrize("path", STEERABLE)
def test_every_endpoint_is_asked_for_one_token(path: str) -> None:
    stub = Gated(score=-1.0)
    stub.ask(path, {"model": "tiny", "moesteer": "gated", "store": True, LIMITS[path]: 99})
    probe = stub.bodies(path)[0]
    assert probe[LIMITS[path]] == 1
    assert probe.get("store") is (False if path == "/v1/responses" else None)


@pytest.mark.parametrize(
    "body",
    [{"prompt": ["a", "b"]}, {"prompt": [[1, 2], [3]]}, {"prompt": [], "prompt_embeds": "…"}],
)
def test_several_prompts_are_refused(body: dict[str, Any]) -> None:
    stub = Gated()
    reply = stub.ask("/v1/completions", {"model": "tiny", "moesteer": "gated", **body})
    assert reply.status == 400
    assert "asked about one prompt" in reply.json["error"]["message"]
    assert stub.arrived == []


def test_what_vllm_says_of_a_wrong_prompt_is_handed_on() -> None:
    stub = Gated(score=None, status=400, stream=[b'{"error": ', b'"too long"}'])
    reply = stub.ask(body={"model": "tiny", "moesteer": "gated"})
    assert (reply.status, reply.body) == (400, b'{"error": "too long"}')
    assert len(stub.bodies()) == 1


def test_a_reply_of_the_probe_that_fails_is_no_matter_where_its_prompt_was_read() -> None:
    """One token may be too few for what vLLM makes of a reply, a call of a tool, say."""
    stub = Gated(status=500)
    original = stub._answer

    async def then_well(scope: Any, receive: Any, send: Any) -> None:
        await original(scope, receive, send)
        stub.status = 200

    stub.app._app = then_well
    stub.app._behind_key = stub.app._steer
    reply = stub.ask(body={"model": "tiny", "moesteer": "gated"})
    assert (reply.status, reply.headers["x-moesteer-gate"]) == (200, "open")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"score": None}, "no token was counted"),
        ({"score": float("nan")}, "score at the gate is nan"),
        ({"fault": "dead"}, "the engine is dead"),
    ],
)
def test_without_a_score_the_request_is_refused(broken: dict[str, Any], said: str) -> None:
    stub = Gated(**broken)
    reply = stub.ask(body={"model": "tiny", "moesteer": "gated"})
    assert reply.status == 500
    assert "The gate of 'gated' can't be asked" in reply.json["error"]["message"]
    assert said in reply.json["error"]["message"]
    assert len(stub.bodies()) == 1  # it ran neither steered nor unsteered


def test_a_client_that_leaves_meanwhile_is_not_answered() -> None:
    stub = Gated(score=None)
    asked: list[Message] = []

    async def says_nothing(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await Stub._answer(stub, scope, receive, send)
            return
        asked.append(await receive())

    stub.app._app = says_nothing
    assert stub.ask(body={"model": "tiny", "moesteer": "gated"}).messages == []
    assert len(asked) == 1


def test_a_gate_is_described() -> None:
    stub = Gated(admin_key="admin key")
    listed = stub.ask("/v1/moesteer/profiles", b"", "GET", KEY).json["data"]
    gates = {one["name"]: one["gate"] for one in listed}
    assert gates["polite"] is None
    assert gates["watched"] == Gate(WATCHING, 0.0).words
