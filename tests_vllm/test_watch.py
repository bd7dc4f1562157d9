"""`moesteer serve --watch` as its users meet it: headers and metrics of every request."""

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import served

from moesteer import testbed
from moesteer.contrast import Message
from moesteer.directions.prompts import read_prompt_set
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.generate import Prompt
from moesteer.monitoring.reference import Reference, Verdict
from moesteer.monitoring.reference_file import load_reference
from moesteer.monitoring.watch import as_watched, fit_to_file, judged
from moesteer.profile import Profile
from moesteer.serving.serve import read_watch, serve

PLANTED = testbed.ground_truth().behaviours["refusal"].planted
ENGINE = ("--dtype", "float32", "--max-model-len", "256", "--max-num-batched-tokens", "64")
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Server:
    url: str

    def post(self, path: str, **body: Any) -> httpx.Response:
        body = {"model": "testbed", "temperature": 0, "max_tokens": 4} | body
        return httpx.post(self.url + path, json=body, timeout=60)

    def chat(self, asked: str, **body: Any) -> dict[str, str]:
        """What the headers of a reply say."""
        reply = self.post(CHAT, messages=[{"role": "user", "content": asked}], **body)
        assert reply.status_code == 200, reply.text
        return told(reply)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics").text
        told = r'^(moesteer_\w+\{steered="\w+"\}) (\S+)$'  # all but buckets
        found = re.findall(told, lines, flags=re.MULTILINE)
        return {name: float(value) for name, value in found}


def told(reply: httpx.Response) -> dict[str, str]:
    return {k[11:]: v for k, v in reply.headers.items() if k.startswith("x-moesteer-")}


@dataclass(frozen=True)
class Offline:
    """The same judged by transformers."""

    engine: TransformersEngine
    reference: Reference

    def headers(self, asked: str) -> dict[str, str]:
        text = as_watched(self.engine, Prompt((Message("user", asked),), "asked"), "prompt", {})
        return headers(judged(self.engine, [text], self.reference)[0])


def headers(verdict: Verdict) -> dict[str, str]:
    assert verdict.linked is not None
    return {
        "watch": verdict.word,
        "drift": f"{verdict.drift:.4f}",
        "linked": f"{verdict.linked:.4f}",
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    Profile(deactivated=PLANTED).save(folder / "answer.safetensors")
    return folder


@pytest.fixture(scope="module")
def offline(files: Path) -> Offline:
    """Ordinary are requests, restricted or not, and questions."""
    engine = load_transformers("testbed", dtype="float32")
    sources = [f"testbed:{t}:{s}" for t in ("restricted", "facts") for s in ("fit", "dev")]
    prompts = [prompt for source in sources for prompt in read_prompt_set(source)]
    reference = fit_to_file(
        engine,
        prompts,
        Profile(activated=PLANTED),
        out=str(files / "watch.safetensors"),
        over="prompt",
        false_alarms=0.05,
        chat_options=(),
        source="testbed",
        seed=0,
        command="",
    )
    return Offline(engine, reference)


@pytest.fixture(scope="module")
def server(files: Path, offline: Offline) -> Iterator[Server]:
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }

    def command(port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "moesteer", "serve", "testbed", "--port", str(port)),
            *("--profile", f"answer={files}/answer.safetensors"),
            *("--watch", f"{files}/watch.safetensors", "--", *ENGINE),
        ]

    with served(command, environment, files / "log") as url:
        yield Server(url)


def questions(task: str) -> list[str]:
    return [prompt.messages[-1].content for prompt in read_prompt_set(f"testbed:{task}:test")]


def test_the_same_scores_as_transformers_in_whatever_batch(
    server: Server, offline: Offline
) -> None:
    asked = [*questions("restricted")[:12], *questions("conflicts")[:6], *questions("benign")[:6]]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(server.chat, asked))
    assert said == [offline.headers(one) for one in asked]
    assert {one["watch"] for one in said} == {"ok", "alarm"}


def test_asked_again_nothing_comes_from_the_prefix_cache(server: Server, offline: Offline) -> None:
    long = " ".join(questions("facts")[:8])
    first = server.chat(long)
    assert first == server.chat(long) == offline.headers(long)
    assert server.chat(long, n=3, temperature=1) == first


def test_a_prompt_of_several_steps(server: Server, offline: Offline) -> None:
    long = " ".join(questions("facts")[:14])
    tokens = len(offline.engine.tokenizer(long)["input_ids"])
    assert tokens > 2 * 64
    assert server.chat(long) == offline.headers(long)


def test_silenced_experts_raise_the_drift(server: Server, offline: Offline) -> None:
    for asked in questions("restricted")[:4]:
        unsteered = server.chat(asked)
        steered = server.chat(asked, model="testbed:answer")
        assert unsteered["watch"] == "ok"
        assert steered["fired"] == "true"
        assert (steered["watch"], steered["linked"]) == ("alarm", "0.0000")
        assert float(steered["drift"]) > float(unsteered["drift"])


def test_streams_and_other_endpoints(server: Server, offline: Offline) -> None:
    asked = questions("restricted")[0]
    expected = offline.headers(asked)
    messages = [{"role": "user", "content": asked}]
    for model, stream in (("testbed", expected), ("testbed:answer", {"watch": "alarm"})):
        body = {"model": model, "messages": messages, "stream": True}
        with httpx.stream("POST", f"{server.url}{CHAT}", json=body, timeout=60) as reply:
            assert told(reply) | stream == told(reply)
            assert "[DONE]" in reply.read().decode()
    assert told(server.post("/v1/responses", input=asked, max_output_tokens=4)) == expected
    assert told(server.post("/v1/messages", messages=messages)) == expected


def test_of_several_prompts_the_worst(server: Server, offline: Offline) -> None:
    template = offline.engine.tokenizer.apply_chat_template
    strange = next(q for q in questions("benign") if offline.headers(q)["watch"] == "alarm")
    near, far = (
        str(
            template([{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True)
        )
        for one in (questions("restricted")[0], strange)
    )
    ids = offline.engine.tokenizer(near, add_special_tokens=False)["input_ids"]
    alone = told(server.post("/v1/completions", prompt=near))
    assert alone["watch"] == "ok"
    assert told(server.post("/v1/completions", prompt=ids)) == alone
    assert told(server.post("/v1/completions", prompt=[ids])) == alone
    other = told(server.post("/v1/completions", prompt=far))
    assert other["watch"] == "alarm"
    twice = {"n": 2, "temperature": 1}
    for stream in (False, True):
        both = told(server.post("/v1/completions", prompt=[near, far], stream=stream, **twice))
        # What the alarming one is like; none is hidden behind another.
        assert both == other


def test_unknown_and_nothing_to_say(server: Server) -> None:
    messages = [{"role": "user", "content": "Tell me of it."}]
    searched = server.post(CHAT, messages=messages, use_beam_search=True, n=2)
    assert searched.status_code == 200
    assert told(searched) == {"watch": "unknown"}
    assert told(server.post(CHAT, messages=[])) == {}
    assert told(httpx.get(f"{server.url}/v1/models")) == {}
    assert told(server.post("/tokenize", prompt="How")) == {}
    ours = server.post(CHAT, messages=messages, vllm_xargs={"moesteer_watch": "mine"})
    assert ours.status_code == 400
    other = server.post(CHAT, messages=messages, vllm_xargs={"other": 1})
    assert told(other)["watch"] in ("ok", "alarm")


def test_metrics(server: Server) -> None:
    before = server.metrics()
    asked = questions("restricted")[1]
    said = [server.chat(asked), server.chat(asked)]
    steered = server.chat(asked, model="testbed:answer")
    server.post(CHAT, messages=[{"role": "user", "content": asked}], use_beam_search=True, n=2)
    after = server.metrics()
    rise = {name: round(after[name] - before[name], 4) for name in after}

    def risen(name: str) -> tuple[float, float]:
        """Of requests under no profile, and of those under one."""
        plain, steered = (f'moesteer_{name}{{steered="{of}"}}' for of in ("false", "true"))
        return rise[plain], rise[steered]

    assert risen("routing_drift_count") == (2, 1)
    ordinary = sum(float(one["drift"]) for one in said)
    assert risen("routing_drift_sum") == pytest.approx(
        (ordinary, float(steered["drift"])), abs=3e-4
    )
    assert risen("linked_share_count") == (2, 1)
    assert risen("watch_alarms_total") == (0, 1)
    assert risen("watch_unknown_total") == (1, 0)


def test_what_does_not_fit_is_refused_at_once(
    files: Path, offline: Offline, tmp_path: Path
) -> None:
    with pytest.raises(MoesteerError, match="testbed, whose weights differ"):
        serve(
            "testbed-twin",
            [],
            ["--dtype", "float32"],
            host="127.0.0.1",
            port=0,
            watch=str(files / "watch.safetensors"),
        )
    with pytest.raises(MoesteerError, match="no reference of `moesteer watch fit`"):
        read_watch(str(files / "answer.safetensors"))
    prompts = [
        Prompt(p.messages, p.source, {"reply": "No."}) for p in read_prompt_set("testbed:benign")
    ]
    out = str(tmp_path / "replies.safetensors")
    given = {"over": "reply", "false_alarms": 0.1, "chat_options": (), "source": "", "seed": 0}
    fit_to_file(offline.engine, prompts, None, out=out, command="", **given)
    assert load_reference(Path(out)).origin.over == "reply"
    with pytest.raises(MoesteerError, match="is of replies, and a server's headers come before"):
        read_watch(out)
