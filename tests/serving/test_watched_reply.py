"""Replies of watched requests: what is said of them, and when, without vLLM."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from moesteer.engines.vllm.collected import Prompted, prompts_of
from moesteer.engines.vllm.names import WATCH
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.monitoring.reference import Origin, Reference, Verdict
from moesteer.serving.evidence import Count, counted
from moesteer.serving.watched_reply import Watch, judged, prompts_in, with_watch, worst

LAYERS = (LayerShape(0, 4, 2), LayerShape(2, 3, 1))
FACTS = ModelFacts("tiny", None, "tiny", "c0", "t0", "softmax", LAYERS)
REFERENCE = Reference(
    Origin(FACTS, "prompt", ((0, 1),), 0.5, (), 5, "here", "d0", {}, 0, {}, ""),
    np.array([[50, 50, 50, 50], [40, 40, 20, 0]]),
    np.full(5, 4),
    np.linspace(0.1, 0.5, 5),
    np.linspace(0.1, 0.5, 5),
)
ORDINARY = Prompted(4, 4, {0: [2, 2, 2, 2], 2: [2, 1, 1]})
STRANGE = Prompted(4, 4, {0: [4, 0, 4, 0], 2: [0, 0, 4]})
CHAT = "/v1/chat/completions"
START = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}


@dataclass
class Workers:
    """In the place of a Collector: what is told at each asking, by key or to anyone."""

    told: list[tuple[Prompted, ...]]
    asked: list[str] = field(default_factory=list)
    fault: bool = False

    async def collect(self, key: str) -> Count:
        self.asked.append(key)
        if self.fault:
            raise RuntimeError("the engine is dead")
        return Count(prompts=self.told.pop(0) if self.told else ())


@dataclass
class Counted:
    verdicts: list[Verdict] = field(default_factory=list)
    steered: list[bool] = field(default_factory=list)

    def add(self, verdict: Verdict, steered: bool) -> None:
        self.verdicts.append(verdict)
        self.steered.append(steered)


def reply(
    workers: Workers,
    body: dict[str, Any],
    chunks: int = 1,
    status: int = 200,
    steered: bool = False,
) -> tuple[dict[str, str], list[int], Counted]:
    """The headers of a reply of so many chunks, and after which of them anything was sent."""
    sent, when, metrics = [], [], Counted()

    async def send(message: Any) -> None:
        sent.append(message)

    async def answer() -> None:
        watch = Watch(REFERENCE, workers, metrics)  # pyright: ignore[reportArgumentType]
        _, passing = watch.over(CHAT, json.dumps(body).encode(), send, steered=steered)
        await passing({**START, "status": status})
        for number in range(chunks):
            content = str(number).encode()
            more = number < chunks - 1
            await passing({"type": "http.response.body", "body": content, "more_body": more})
            when.append(len(sent))

    asyncio.run(answer())
    assert b"".join(m.get("body", b"") for m in sent) == b"".join(
        str(number).encode() for number in range(chunks)
    )
    headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    assert headers.pop("a") == "b"
    return headers, when, metrics


def test_ordinary_and_strange_prompts() -> None:
    headers, _, metrics = reply(Workers([(ORDINARY,)]), {})
    ordinary = judged(REFERENCE, ORDINARY)
    assert headers == {
        "x-moesteer-watch": "ok",
        "x-moesteer-drift": f"{ordinary.drift:.4f}",
        "x-moesteer-linked": "0.5000",
    }
    assert metrics.verdicts == [ordinary]
    headers, _, _ = reply(Workers([(STRANGE,)]), {})
    assert (headers["x-moesteer-watch"], headers["x-moesteer-linked"]) == ("alarm", "0.0000")
    assert judged(REFERENCE, STRANGE).raised == ("drift", "linked")


@pytest.mark.parametrize("steered", [False, True])
def test_what_ran_under_a_profile_is_counted_apart(steered: bool) -> None:
    headers, _, counted = reply(Workers([(STRANGE,)]), {}, steered=steered)
    assert headers["x-moesteer-watch"] == "alarm"
    assert counted.steered == [steered]


def test_a_stream_waits_for_its_prompt_and_no_longer() -> None:
    workers = Workers([(), (ORDINARY,)])
    headers, when, metrics = reply(workers, {"stream": True}, chunks=4)
    assert headers["x-moesteer-watch"] == "ok"
    assert when == [0, 3, 4, 5]
    assert len(workers.asked) == 2
    assert len(metrics.verdicts) == 1


def test_unknown_never_ok() -> None:
    short = Prompted(9, 4, ORDINARY.selected)  # a part came from a cache
    half = Prompted(4, 4, {0: ORDINARY.selected[0]})  # a layer nobody spoke of
    unread = Prompted(4, 4, {0: [0, 0, 0, 0], 2: [2, 1, 1]})
    for workers in (
        *(Workers([(prompt,)]) for prompt in (short, half, unread)),
        Workers([]),
        Workers([], fault=True),
    ):
        headers, _, metrics = reply(workers, {}, chunks=2)
        assert headers == {"x-moesteer-watch": "unknown"}
        assert [verdict.word for verdict in metrics.verdicts] == ["unknown"]


def test_an_error_says_nothing() -> None:
    headers, _, metrics = reply(Workers([(ORDINARY,)]), {}, status=400)
    assert headers == {}
    assert metrics.verdicts == []


@pytest.mark.parametrize("option", ["use_beam_search", "background"])
def test_what_can_t_be_watched_is_unknown_at_once(option: str) -> None:
    workers = Workers([(ORDINARY,)])
    headers, when, _ = reply(workers, {option: True}, chunks=2)
    assert headers == {"x-moesteer-watch": "unknown"}
    assert when == [2, 3]
    assert workers.asked == []


def test_of_several_prompts_the_worst() -> None:
    several = {"prompt": ["a", "b", "c"]}
    for told, word in (
        ((ORDINARY, STRANGE, ORDINARY), "alarm"),
        ((ORDINARY, ORDINARY, ORDINARY), "ok"),
        ((ORDINARY, ORDINARY), "unknown"),
        ((ORDINARY, STRANGE), "alarm"),
        ((ORDINARY, ORDINARY, Prompted(9, 4, ORDINARY.selected)), "unknown"),
        ((ORDINARY, STRANGE, Prompted(9, 4, ORDINARY.selected)), "alarm"),
    ):
        headers, _, _ = reply(Workers([told]), several)
        assert headers["x-moesteer-watch"] == word
        if STRANGE in told:
            assert headers["x-moesteer-linked"] == "0.0000"
    assert worst([]).word == "unknown"


@pytest.mark.parametrize(
    ("body", "prompts"),
    [
        ({"messages": []}, 1),
        ({"n": 3}, 3),
        ({"prompt": "one"}, 1),
        ({"prompt": [4, 5, 6], "n": 2}, 2),
        ({"prompt": ["one", "two"], "n": 2}, 4),
        ({"prompt": [[4, 5], [6]]}, 2),
        ({"prompt": [], "n": None}, 1),
    ],
)
def test_how_many_prompts_will_run(body: dict[str, Any], prompts: int) -> None:
    assert prompts_in(body) == prompts


def test_the_key_travels_beside_what_is_there() -> None:
    body = {"model": "m", "vllm_xargs": {"moesteer": "p", "other": 1}}
    told, prompts = with_watch(json.dumps(body).encode(), "a key")
    assert json.loads(told) == {"model": "m", "vllm_xargs": {**body["vllm_xargs"], WATCH: "a key"}}
    assert prompts == 1
    for untouched in (b"no json", b"[1]", b'{"vllm_xargs": [1]}', b"[" * 9999):
        assert with_watch(untouched, "a key") == (untouched, 0)


def test_other_endpoints_pass_as_they_are() -> None:
    async def send(message: Any) -> None: ...

    watch = Watch(REFERENCE, Workers([]), Counted())  # pyright: ignore[reportArgumentType]
    assert watch.over("/v1/embeddings", b"{}", send, steered=False) == (b"{}", send)


def test_layers_of_a_pipeline_and_requests_of_several_engines() -> None:
    def told(layer: int, values: list[int], request: str = "r0") -> dict[str, Any]:
        nothing = {"tokens": 0, "selected": {}, "directed": [], "watched": None}
        prompt = {"length": 4, "tokens": 4, "selected": {str(layer): values}}
        return {"k": {**nothing, "prompts": {request: prompt}}}

    first, second = told(0, [2, 2, 2, 2]), told(2, [2, 1, 1])
    assert prompts_of([first, second], "k") == [ORDINARY]
    assert prompts_of([first, second], "other") == []
    other = [told(0, [4, 0, 4, 0], "r1"), told(2, [0, 0, 4], "r1")]
    assert counted([[first, second], other], "k").prompts == (ORDINARY, STRANGE)
