"""The judge behind an endpoint, against a server of our own on the loopback: good and bad days."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moesteer.contrast import Message
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import read_card
from moesteer.evaluation.judge_check import check_judges
from moesteer.evaluation.judges import Context, endpoint
from moesteer.evaluation.judges.endpoint import (
    Endpoint,
    parse_rating,
    parse_safety,
    scaled_rating,
)
from moesteer.evaluation.judging import cost_of
from moesteer.evaluation.task import Cost, Item
from moesteer.records import check_record
from moesteer.runs import read_run

Answer = Callable[[str, int], tuple[int, str]]
"""From what was asked and how often before: the HTTP status and the body."""


def said(text: str) -> tuple[int, str]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
    choice["message"]["content"] = text
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    return 200, json.dumps({**body, "usage": usage})


@contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[dict]]]:
    """A chat endpoint; yields its address and the requests it gets."""
    got: list[dict] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            with lock:
                before = sum(text == other["messages"][0]["content"] for other in got)
                got.append({**body, "key": self.headers["Authorization"], "path": self.path})
            status, reply = answer(text, before)
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(reply.encode())
            except BrokenPipeError:
                pass  # the client stopped waiting

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = False
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}/v1", got
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _quick_and_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "WAIT", 0.001)
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"MOESTEER_JUDGE_{name}", raising=False)
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


def judge(url: str, **more: object):
    settings = {
        "prompt": "Safe? {prompt} / {reply} ({kind})",
        "answer": "safety",
        "passed": "kept",
        "failed": "lost",
        "base_url": url,
        "model": "m",
        **more,
    }
    return check_record(Endpoint, settings, "card").judge(Context())


def ask(judge_: endpoint.Judge, replies: list[str]):
    asked = Item((Message("user", "How?"),), {"kind": "{x}"}, "made:1")
    return judge_([asked] * len(replies), replies)


def test_good(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESTEER_JUDGE_KEY", "k")
    with server(lambda text, _: said("unsafe\nS1" if "bad" in text else " **Safe**.")) as (
        url,
        got,
    ):
        judging = judge(url)
        verdicts = ask(judging, ["fine", "bad", "fine too", "bad {reply}"] * 3)
    assert [v.outcome for v in verdicts] == ["kept", "lost", "kept", "lost"] * 3
    assert cost_of([judging]) == Cost(12, 84)
    assert judging.name == "endpoint m"
    assert got[0]["messages"] == [{"role": "user", "content": "Safe? How? / fine ({x})"}]
    assert got[0]["temperature"] == 0
    assert got[0]["key"] == "Bearer k"
    assert got[0]["path"] == "/v1/chat/completions"


def test_where_and_which_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    with server(lambda *_: said("safe")) as (url, got):
        monkeypatch.setenv("MOESTEER_JUDGE_URL", url)
        monkeypatch.setenv("MOESTEER_JUDGE_MODEL", "another")
        assert ask(judge(url, base_url=None, model=None), ["x"])[0].outcome == "kept"
    assert got[0]["model"] == "another"


@pytest.mark.parametrize("missing", ["URL", "MODEL"])
def test_nowhere(monkeypatch: pytest.MonkeyPatch, missing: str):
    for name in {"URL", "MODEL"} - {missing}:
        monkeypatch.setenv(f"MOESTEER_JUDGE_{name}", "http://127.0.0.1:1/v1")
    with pytest.raises(MoesteerError, match=f"set MOESTEER_JUDGE_{missing}"):
        judge("", base_url=None, model=None)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_error_and_then_good(status: int):
    def answer(text: str, before: int) -> tuple[int, str]:
        return said("safe") if before >= 2 else (status, '{"error": {"message": "busy"}}')

    with server(answer) as (url, got):
        assert ask(judge(url), ["x"])[0].outcome == "kept"
    assert len(got) == 3


def test_one_reply_that_always_fails_is_unjudged():
    def answer(text: str, before: int) -> tuple[int, str]:
        return (500, '{"error": {"message": "sick"}}') if "ill" in text else said("unsafe")

    with server(answer) as (url, got):
        verdicts = ask(judge(url), ["ill", "well", "ill", "well"])
    assert [v.outcome for v in verdicts] == [None, "lost", None, "lost"]
    assert "no answer in 5 tries" in verdicts[0].note
    assert "sick" in verdicts[0].note
    assert len(got) == 2 * 5 + 2


def test_always_an_error():
    with server(lambda *_: (500, "{}")) as (url, got):
        with pytest.raises(MoesteerError, match=f"{url} never answered: no answer in 5 tries"):
            ask(judge(url), ["x"] * 50)
        assert len(got) == 15  # three replies, five times each
        with pytest.raises(MoesteerError, match="never answered"):
            ask(judge(url), ["x"])


def test_nobody_there():
    with socket.socket() as bound:  # a port that is taken, and where nobody listens
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        with pytest.raises(MoesteerError, match="never answered"):
            ask(judge(url), ["x", "y"])


@pytest.mark.parametrize(("status", "word"), [(401, "KEY"), (403, "KEY"), (404, "MODEL")])
def test_refused_for_good(status: int, word: str):
    with server(lambda *_: (status, '{"error": {"message": "you may not"}}')) as (url, got):
        with pytest.raises(MoesteerError, match=f"HTTP {status}.*MOESTEER_JUDGE_{word}"):
            ask(judge(url), ["x"] * 9)
        assert len(got) == 1


def test_a_filter_refuses_one_reply():
    def answer(text: str, before: int) -> tuple[int, str]:
        return (400, '{"error": {"message": "filtered"}}') if "odd" in text else said("safe")

    with server(answer) as (url, _):
        verdicts = ask(judge(url), ["even", "odd", "even"])
        assert [v.outcome for v in verdicts] == ["kept", None, "kept"]
        assert "filtered" in verdicts[1].note
        with pytest.raises(MoesteerError, match=r"never answered.*filtered"):
            ask(judge(url), ["odd"] * 4)


@pytest.mark.parametrize(
    "body", ["<html>gateway</html>", "{}", '{"choices": []}', '{"choices": [{}]}', "null", "[1]"]
)
def test_garbage_is_no_answer(body: str):
    def answer(text: str, before: int) -> tuple[int, str]:
        return (200, body) if "odd" in text else said("safe")

    with server(answer) as (url, _):
        verdicts = ask(judge(url), ["even", "odd"])
        assert [v.outcome for v in verdicts] == ["kept", None]
        assert "in 5 tries" in verdicts[1].note
        with pytest.raises(MoesteerError, match="never answered"):
            ask(judge(url), ["odd"])


def test_words_that_are_no_verdict():
    with server(lambda *_: said("It depends.")) as (url, _):
        (verdict,) = ask(judge(url), ["x"])
    assert verdict.outcome is None
    assert "It depends." in verdict.note


def test_slow():
    def answer(text: str, before: int) -> tuple[int, str]:
        if "slow" in text:
            time.sleep(0.15)
        return said("safe")

    with server(answer) as (url, _):
        verdicts = ask(judge(url, seconds=0.05), ["quick", "slow"])
    assert [v.outcome for v in verdicts] == ["kept", None]
    assert "timed out" in verdicts[1].note.lower()


def test_ratings():
    def answer(text: str, before: int) -> tuple[int, str]:
        return said(text.rpartition("/ ")[2][0])

    with server(answer) as (url, _):
        verdicts = ask(judge(url, answer="rating", at_least=4), list("12345"))
    assert [v.outcome for v in verdicts] == ["lost", "lost", "lost", "kept", "kept"]
    assert [v.score for v in verdicts] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("safe", "safe"),
        ("UNSAFE", "unsafe"),
        ("\n**Unsafe**: S3", "unsafe"),
        ("<think>is it unsafe?</think>\nsafe", "safe"),
        ("The reply is safe", None),
        ("not safe", None),
        ("safety", None),
        ("", None),
    ],
)
def test_parse_safety(text: str, word: str | None):
    assert parse_safety(text) == word


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("4", 4),
        (" **5** ", 5),
        ("Rating: 3/5", 3),
        ("score = 1.", 1),
        ("2.0", 2),
        ("<think>1 or 2</think> 4", 4),
        ("4.5", None),
        ("45", None),
        ("6", None),
        ("0", None),
        ("4 or 5", None),
        ("four", None),
        ("", None),
    ],
)
def test_parse_rating(text: str, rating: int | None):
    assert parse_rating(text) == rating


def test_scaled_rating():
    assert [scaled_rating(s) for s in (1, 2, 3, 4, 5)] == [0, 0.25, 0.5, 0.75, 1]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(MoesteerError, match=r"moesteer\[judge\]"):
        judge("http://127.0.0.1:1/v1")


def test_a_check_says_what_it_cost(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gold = [{"prompt": f"ask {i}", "reply": "All is well.", "outcome": "fluent"} for i in range(3)]
    Path("gold.jsonl").write_text("".join(json.dumps(line) + "\n" for line in gold))
    monkeypatch.setenv("MOESTEER_JUDGE_MODEL", "m")
    with server(lambda text, _: said("5" if "Reply: All is well.\n" in text else "1")) as (url, _):
        monkeypatch.setenv("MOESTEER_JUDGE_URL", url)
        card = read_card("fluency")
        check = check_judges(card, gold="gold.jsonl", out="checked")
        # Three as they were and three repeated; three words are too few to mix; three empty.
        assert (check.calls, check.tokens) == (9, 63)
        assert check.seconds > 0
        again = check_judges(card, gold="gold.jsonl", out="checked")
    assert (again.calls, again.tokens, again.seconds) == (9, 63, check.seconds)
    assert all(mode.share == 1 for mode in check.modes.values())
    records = read_run("checked").lines("verdicts")
    assert [record["verdicts"][0]["score"] for record in records] == [5] * 3 + [1] * 6
