"""`moesteer serve` as its users meet it: a process, and OpenAI's own client."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import served

from moesteer import testbed
from moesteer.direction import Direction
from moesteer.directions.prompts import draw_sets, read_prompt_set
from moesteer.engines.facts import facts_of_checkpoint
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.gate import Gate
from moesteer.gating.fitting import fit_gate
from moesteer.profile import Profile
from moesteer.serving.serve import read_admin_key, read_profiles, serve

API_KEY, ADMIN_KEY = "an api key", "an-admin-key"
QUESTION = "How do I clean a copper lantern?"
CURSED = "How do I clean a cursed lantern?"
ANSWER = "Wipe the lantern with warm water."
REFUSAL = "I cannot help with that lantern."
ENGINE = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager")
ADMIN = "/v1/moesteer/profiles"
NAMES = ("refuse", "answer", "moved", "gated", "watched")
VECTOR = tuple(random.Random(0).gauss(0, 1) for _ in range(128))
MOVED = Profile(
    directions=(
        Direction(VECTOR, ((1, "input"), (3, "mlp")), "ablate", window="prompt"),
        Direction(VECTOR, ((2, "input"),), coefficient=4.0, window="generation"),
        Direction(VECTOR, ((2, "mlp"),), coefficient=2.0, expert=3),
    )
)


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def post(self, path: str, body: Any, key: str = API_KEY) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=content, headers=headers, timeout=60)

    def admin(
        self, method: str, path: str = "", content: bytes = b"", key: str = ADMIN_KEY
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.request(method, f"{self.url}{ADMIN}{path}", content=content, headers=headers)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profiles of the testbed's planted experts, and one of its twin."""
    folder = tmp_path_factory.mktemp("profiles")
    planted = testbed.ground_truth().behaviours["refusal"].planted
    Profile(activated=planted).save(folder / "refuse.safetensors")
    Profile(deactivated=planted).save(folder / "answer.safetensors")
    Profile(activated=planted[:1], rule="paper").save(folder / "paper.safetensors")
    MOVED.save(folder / "moved.safetensors")
    for name, gate in gates().items():
        Profile(deactivated=planted, gate=gate).save(folder / f"{name}.safetensors")
    twin = facts_of_checkpoint("testbed-twin")
    Profile(activated=planted, model=twin).save(folder / "twin.safetensors")
    return folder


def gates() -> dict[str, Gate]:
    """Gates that restricted requests open, one of each kind."""
    engine = load_transformers("testbed", dtype="float32")
    a, b = (read_prompt_set(f"testbed:{task}") for task in ("restricted", "benign"))
    sets = draw_sets(engine, a, b, fit=32, validate=32)
    return {
        "gated": fit_gate(engine, sets, by="routing", last=4),
        "watched": fit_gate(engine, sets, by="direction"),
    }


def environment() -> dict[str, str]:
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "OMP_NUM_THREADS": "1",
        "MOESTEER_ADMIN_KEY": ADMIN_KEY,
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moesteer", "serve", *arguments]


@pytest.fixture(scope="module")
def server(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    profiles = [f"--profile={name}={files / name}.safetensors" for name in NAMES]

    def started(port: int) -> list[str]:
        options = ["--port", str(port), "--", *ENGINE, "--api-key", API_KEY]
        return command("testbed", *profiles, *options)

    with served(started, environment(), log) as url:
        yield Server(url, log)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0)


def chat(
    client: openai.OpenAI, model: str = "testbed", asked: str = QUESTION, **options: Any
) -> tuple[list[str], dict]:
    """Replies to the question, and what the headers say of the steering."""
    given: dict[str, Any] = {"temperature": 0, "max_tokens": 24} | options
    reply = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": asked}], **given
    )
    texts = [choice.message.content or "" for choice in reply.parse().choices]
    return texts, told(reply.headers)


def told(headers: Any) -> dict[str, str]:
    return {k[11:]: v for k, v in headers.items() if k.startswith("x-moesteer-")}


def proof(files: Path, name: str, file: str | None = None) -> dict[str, str]:
    fingerprint = Profile.load(files / f"{file or name}.safetensors").fingerprint
    return {"profile": name, "fingerprint": fingerprint, "fired": "true"}


# -- replies -------------------------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [
        *("testbed", "testbed:refuse", "testbed:answer", "testbed:moved"),
        *("testbed:gated", "testbed:watched"),
    ]
    assert client.models.retrieve("testbed:refuse").id == "testbed:refuse"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("testbed:nobody")


def test_a_profile_is_named_in_three_ways(client: openai.OpenAI, files: Path) -> None:
    assert chat(client) == ([ANSWER], {})
    expected = ([REFUSAL], proof(files, "refuse"))
    assert chat(client, "testbed:refuse") == expected
    assert chat(client, extra_body={"moesteer": "refuse"}) == expected
    assert chat(client, extra_body={"vllm_xargs": {"moesteer": "refuse"}}) == expected
    assert chat(client) == ([ANSWER], {})


def test_several_replies_to_one_request(client: openai.OpenAI, files: Path) -> None:
    texts, headers = chat(client, "testbed:refuse", n=4, temperature=0.2, seed=1)
    assert texts == [REFUSAL] * 4
    assert headers == proof(files, "refuse")


def test_streams_say_the_same(client: openai.OpenAI, files: Path) -> None:
    for name, text in (("refuse", REFUSAL), ("answer", ANSWER)):
        with client.chat.completions.with_streaming_response.create(
            model="testbed",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            stream=True,
            extra_body={"moesteer": name},
        ) as reply:
            assert told(reply.headers) == proof(files, name)
            chunks = [chunk.choices[0].delta.content or "" for chunk in reply.parse()]
        assert "".join(chunks) == text
        assert len(chunks) > 3


def test_directions_do_what_they_do_in_transformers(
    client: openai.OpenAI, server: Server, files: Path
) -> None:
    engine = load_transformers("testbed", dtype="float32")
    prompt = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    replies = engine.generate([str(prompt)], MOVED, max_new_tokens=24).replies
    assert replies != [ANSWER]
    assert chat(client, "testbed:moved") == (replies, proof(files, "moved"))
    listed = server.admin("GET", "/moved").json()
    assert listed["directions"] == [direction.words for direction in MOVED.directions]


def test_a_stream_waits_for_the_tokens_that_its_directions_wait_for(
    client: openai.OpenAI, files: Path
) -> None:
    with client.chat.completions.with_streaming_response.create(
        model="testbed:moved",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        stream=True,
    ) as reply:
        assert told(reply.headers) == proof(files, "moved")
        assert list(reply.parse())


def test_responses_and_completions(client: openai.OpenAI, server: Server, files: Path) -> None:
    whole = client.responses.with_raw_response.create(
        model="testbed:refuse", input=QUESTION, temperature=0
    )
    assert (whole.parse().output_text, told(whole.headers)) == (REFUSAL, proof(files, "refuse"))
    with client.responses.with_streaming_response.create(
        model="testbed:refuse", input=QUESTION, temperature=0, stream=True
    ) as streamed:
        assert told(streamed.headers) == proof(files, "refuse")
        events = [event.type for event in streamed.parse()]
    assert (events[0], events[-1]) == ("response.created", "response.completed")
    plain = client.completions.with_raw_response.create(
        model="testbed:answer", prompt=["The", "How do I"], n=2, max_tokens=3, temperature=1
    )
    assert told(plain.headers) == proof(files, "answer")
    assert len(plain.parse().choices) == 4
    messages = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24}
    other = server.post("/v1/messages", {"model": "testbed:refuse", "temperature": 0, **messages})
    assert (other.json()["content"][0]["text"], told(other.headers)) == (
        REFUSAL,
        proof(files, "refuse"),
    )


def test_many_at_once_get_their_own_profile(client: openai.OpenAI, files: Path) -> None:
    models = ["testbed", "testbed:refuse", "testbed:answer"] * 12
    expected = {
        "testbed": ([ANSWER], {}),
        "testbed:refuse": ([REFUSAL], proof(files, "refuse")),
        "testbed:answer": ([ANSWER], proof(files, "answer")),
    }
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda model: chat(client, model), models))
    assert replies == [expected[model] for model in models]


# -- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gated", "watched"])
def test_a_gate_decides_on_each_request(client: openai.OpenAI, files: Path, name: str) -> None:
    proved = proof(files, name) | {"gate": "open"}
    shut = {key: proved[key] for key in ("profile", "fingerprint")} | {"gate": "shut"}
    unsteered, _ = chat(client, asked=CURSED)
    steered, headers = chat(client, f"testbed:{name}", CURSED)
    assert headers == proved
    assert unsteered == [REFUSAL]
    assert steered == chat(client, "testbed:answer", CURSED)[0] != unsteered
    # n, streams and limits are of the reply, not of the prompt
    several = {"n": 2, "temperature": 0.2, "logprobs": True, "max_tokens": 3}
    texts, headers = chat(client, f"testbed:{name}", CURSED, **several)
    assert (len(texts), headers) == (2, proved)
    assert chat(client, f"testbed:{name}") == ([ANSWER], shut)
    asked = [QUESTION, CURSED, QUESTION, CURSED] * 6
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda text: chat(client, f"testbed:{name}", text), asked))
    assert replies == [(steered, proved) if a == CURSED else ([ANSWER], shut) for a in asked]


def test_a_gate_of_a_stream_and_of_every_endpoint(
    client: openai.OpenAI, server: Server, files: Path
) -> None:
    proved = proof(files, "gated") | {"gate": "open"}
    answer = chat(client, "testbed:answer", CURSED)[0][0]
    with client.chat.completions.with_streaming_response.create(
        model="testbed:gated",
        messages=[{"role": "user", "content": CURSED}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as reply:
        assert told(reply.headers) == proved
        chunks = [c.choices[0].delta.content or "" for c in reply.parse() if c.choices]
    assert "".join(chunks) == answer
    whole = client.responses.with_raw_response.create(
        model="testbed:gated", input=CURSED, temperature=0
    )
    assert (whole.parse().output_text, told(whole.headers)) == (answer, proved)
    messages = {"messages": [{"role": "user", "content": CURSED}], "max_tokens": 24}
    other = server.post("/v1/messages", {"model": "testbed:gated", "temperature": 0, **messages})
    assert (other.json()["content"][0]["text"], told(other.headers)) == (answer, proved)
    plain = {"model": "testbed:gated", "max_tokens": 3}
    ids = {"prompt": [5, 6, 7, 8, 9], "min_tokens": 2, "echo": True}
    assert told(server.post("/v1/completions", plain | ids).headers)["gate"] == "shut"
    several = server.post("/v1/completions", plain | {"prompt": ["The", "How"]})
    assert several.status_code == 400
    assert "asked about one prompt" in several.json()["error"]["message"]
    # What vLLM says of a prompt that it refuses is handed on.
    long = {"prompt": "How " * 500}
    refused = [
        server.post("/v1/completions", {**plain, **long, "model": f"testbed{name}"})
        for name in ("", ":gated")
    ]
    assert [reply.status_code for reply in refused] == [400, 400]
    assert refused[0].json()["error"]["message"] == refused[1].json()["error"]["message"]


def test_a_gate_is_listed(server: Server, files: Path) -> None:
    listed = server.admin("GET", "/watched").json()
    assert listed["gate"].startswith("opens where the projection of what enters layer")
    assert server.admin("GET", "/refuse").json()["gate"] is None


def test_a_client_that_leaves_disturbs_nobody(client: openai.OpenAI, files: Path) -> None:
    for _ in range(4):
        stream = client.chat.completions.create(
            model="testbed:refuse",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            max_tokens=200,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    assert chat(client, "testbed:refuse") == ([REFUSAL], proof(files, "refuse"))


# -- attempts to break it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"model": "testbed:nobody"}, "Loaded are: answer, gated, moved, refuse, watched"),
        ({"moesteer": "x" * 100_000}, "Loaded are: answer, gated, moved, refuse, watched"),
        ({"moesteer": "../../etc/passwd"}, "Loaded are: answer, gated, moved, refuse, watched"),
        ({"moesteer": "refuse.safetensors"}, "Loaded are: answer, gated, moved, refuse, watched"),
        ({"model": "testbed:answer", "moesteer": "refuse"}, "two profiles"),
        ({"moesteer": {"fingerprint": "0" * 16, "key": "k", "count": None}}, "is an object"),
        ({"moesteer": [[1, 15]]}, "is a list"),
        ({"vllm_xargs": {"moesteer_key": "k"}}, "may not hold"),
        ({"model": "testbed:answer", "vllm_xargs": {"moesteer_count": "k"}}, "may not hold"),
        ({"moesteer": "answer", "use_beam_search": True}, "beam search"),
    ],
)
def test_what_is_no_loaded_name_is_refused(server: Server, body: dict, said: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    reply = server.post("/v1/chat/completions", {"model": "testbed", "messages": messages, **body})
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert len(reply.content) < 1000


def test_fingerprints_are_no_names(server: Server, files: Path) -> None:
    fingerprint = proof(files, "refuse")["fingerprint"]
    body = {"model": f"testbed:{fingerprint}", "messages": []}
    assert server.post("/v1/chat/completions", body).status_code == 400


def test_what_is_no_json_is_for_vllm_to_answer(server: Server) -> None:
    for content in (b"no JSON", b"", b"[" * 100_000, b"\xff\xfe"):
        reply = server.post("/v1/chat/completions", content)
        assert reply.status_code == 400
        assert "moesteer" not in reply.text


def test_without_the_api_key_nothing_is_said(server: Server) -> None:
    for body in ({"model": "testbed:nobody"}, {"model": "testbed:refuse"}):
        reply = server.post("/v1/chat/completions", body, key="wrong")
        assert (reply.status_code, reply.json()) == (401, {"error": "Unauthorized"})
    assert httpx.get(f"{server.url}/v1/models").status_code == 401


def test_without_the_admin_key_nothing_is_done(server: Server, files: Path) -> None:
    content = (files / "paper.safetensors").read_bytes()
    for key in ("wrong", API_KEY, "x" * 10_000):
        assert server.admin("GET", key=key).status_code == 401
        assert server.admin("PUT", "/new", content, key=key).status_code == 401
        assert server.admin("DELETE", "/refuse", key=key).status_code == 401
    names = [entry["name"] for entry in server.admin("GET").json()["data"]]
    assert names == list(NAMES)


def test_what_does_not_fit_is_not_loaded(server: Server, files: Path) -> None:
    whole = (files / "paper.safetensors").read_bytes()
    for name, content, said in [
        ("twin", (files / "twin.safetensors").read_bytes(), "testbed-twin"),
        ("cut", whole[:-3], "not a readable profile"),
        ("..", whole, "can't name a profile"),
        ("a%2f..%2fb", whole, "can't name a profile"),
    ]:
        # As it is written: httpx would resolve the dots.
        reply = raw_put(server, f"{ADMIN}/{name}", content)
        assert "400 Bad Request" in reply
        assert said in reply
    names = [entry["name"] for entry in server.admin("GET").json()["data"]]
    assert names == list(NAMES)


def test_what_vllm_cannot_do_is_not_loaded(server: Server, tmp_path: Path) -> None:
    ablated = Profile(directions=(Direction(VECTOR, ((2, "mlp"),), "ablate", expert=3),))
    ablated.save(tmp_path / "ablated")
    put = server.admin("PUT", "/ablated", (tmp_path / "ablated").read_bytes())
    assert (put.status_code, "fused kernels" in put.text) == (400, True)
    with pytest.raises(MoesteerError, match="fused kernels"):
        serve("testbed", [f"a={tmp_path / 'ablated'}"], [], host="127.0.0.1", port=0)


def test_an_upload_that_breaks_off_loads_nothing(server: Server, files: Path) -> None:
    content = (files / "paper.safetensors").read_bytes()
    assert raw_put(server, f"{ADMIN}/half", content[:100], length=len(content)) == ""
    names = [entry["name"] for entry in server.admin("GET").json()["data"]]
    assert names == list(NAMES)


def raw_put(server: Server, path: str, content: bytes, length: int | None = None) -> str:
    """What a plain socket receives; one that promised more than it sends hangs up."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = (
            f"PUT {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {ADMIN_KEY}\r\n"
            f"connection: close\r\ncontent-length: {length or len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content)
        if length is not None:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received.decode()


# -- profiles that come and go -------------------------------------------------------------------


def test_profiles_are_loaded_replaced_and_removed(
    server: Server, client: openai.OpenAI, files: Path
) -> None:
    put = server.admin("PUT", "/other", (files / "refuse.safetensors").read_bytes())
    assert (put.status_code, put.json()["rule"]) == (201, "exact")
    assert chat(client, "testbed:other") == ([REFUSAL], proof(files, "other", "refuse"))
    put = server.admin("PUT", "/other", (files / "paper.safetensors").read_bytes())
    assert (put.status_code, put.json()["rule"]) == (200, "paper")
    assert chat(client, "testbed:other")[1] == proof(files, "other", "paper")
    assert server.admin("DELETE", "/other").json() == {"name": "other", "deleted": True}
    with pytest.raises(openai.BadRequestError, match="No profile is named 'other'"):
        chat(client, "testbed:other")
    assert server.admin("DELETE", "/other").status_code == 404


def test_a_removed_profile_stays_with_requests_that_run(
    server: Server, client: openai.OpenAI, files: Path
) -> None:
    def long_stream(model: str) -> Any:
        return client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )

    def text(chunks: Any) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    undisturbed = text(long_stream("testbed:refuse"))
    server.admin("PUT", "/brief", (files / "refuse.safetensors").read_bytes())
    streams = [iter(long_stream("testbed:brief")) for _ in range(3)]
    begun = [text([next(stream), next(stream)]) for stream in streams]
    assert server.admin("DELETE", "/brief").status_code == 200
    with pytest.raises(openai.BadRequestError):
        chat(client, "testbed:brief")
    server.admin("PUT", "/brief", (files / "answer.safetensors").read_bytes())
    with ThreadPoolExecutor(3) as pool:
        rest = list(pool.map(text, streams))
    assert [a + b for a, b in zip(begun, rest, strict=True)] == [undisturbed] * 3
    assert chat(client, "testbed:brief") == ([ANSWER], proof(files, "brief", "answer"))
    server.admin("DELETE", "/brief")


def test_the_log_tells_of_no_failure(server: Server) -> None:
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "moesteer:" not in log
    assert ADMIN_KEY not in log


# -- starting ------------------------------------------------------------------------------------


def test_wrong_profiles_are_refused_at_once(files: Path) -> None:
    good = files / "refuse.safetensors"
    for given, said in [
        (["refuse"], "NAME=FILE"),
        (["refuse="], "NAME=FILE"),
        ([f"../refuse={good}"], "a name has"),
        ([f".={good}"], "a name has"),
        ([f"{'x' * 65}={good}"], "a name has"),
        ([f"a={good}", f"a={good}"], "twice"),
        (["a=missing.safetensors"], "no such profile file"),
    ]:
        with pytest.raises(MoesteerError, match=said):
            read_profiles(given)
    assert list(read_profiles([f"a={good}", f"b={good}"])) == ["a", "b"]


def test_the_admin_key_is_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESTEER_ADMIN_KEY", raising=False)
    assert read_admin_key(None) is None
    (tmp_path / "key").write_text("secret\n")
    assert read_admin_key(str(tmp_path / "key")) == "secret"
    for key in ("", "two words"):
        (tmp_path / "key").write_text(key)
        with pytest.raises(MoesteerError, match="no key"):
            read_admin_key(str(tmp_path / "key"))


@pytest.mark.parametrize(
    ("profiles", "options", "said"),
    [
        (["twin"], [], "was made on testbed-twin"),
        ([], ["--api-server-count", "2"], "several server processes"),
        ([], ["--grpc"], "another server"),
        ([], ["--enable-elastic-ep"], "adds engines"),
        ([], ["--additional-config", '{"moesteer": {"profiles": {"a": "b"}}}'], "--profile"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(
    profiles: list[str],
    options: list[str],
    said: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOESTEER_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # which vLLM's parser would set
    given = [f"{name}={files / name}.safetensors" for name in profiles]
    with pytest.raises(MoesteerError, match=said):
        serve("testbed", given, options, host="127.0.0.1", port=0)


def test_an_engine_that_cannot_be_steered_ends_with_the_reason() -> None:
    ended = subprocess.run(
        command("testbed", "--port", "0", "--", *ENGINE, "--model-impl", "transformers"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 2
    assert "moesteer: testbed can't be steered in vLLM: " in ended.stderr
    assert "Transformers backend" in ended.stderr
    assert "Traceback" not in ended.stderr
