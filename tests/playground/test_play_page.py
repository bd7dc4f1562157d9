"""What the page shows and answers, without a browser: panes, map, passwords, headers."""

import socket
import threading
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_profiles import MODEL, full
from moesteer.direction import Direction
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.playground.asking import Played, Step, ask
from moesteer.playground.conversation import Turn, rendered
from moesteer.playground.editing import begin, cycle, made
from moesteer.playground.heatmap import heat_map
from moesteer.playground.layout import choice
from moesteer.playground.panes import pane
from moesteer.playground.serve import (
    is_loopback,
    listen,
    read_password,
)
from moesteer.playground.streaming import Replies, Sampling, Token
from moesteer.profile import Profile


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder))


class Elements(HTMLParser):
    """Every element's tag and attributes, and the text of all."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def having(self, attribute: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.found if attribute in attributes]


# -- the map -------------------------------------------------------------------------------------


def test_each_expert_is_a_button_that_says_what_it_is():
    profile = full()
    assert profile.scores is not None
    buttons = Elements(heat_map(begin(profile, MODEL))).having("data-expert")
    assert [(b["data-layer"], b["data-expert"]) for b in buttons] == [
        (str(shape.layer), str(e)) for shape in MODEL.layers for e in range(shape.experts)
    ]
    labels = {(b["data-layer"], b["data-expert"]): b["aria-label"] or "" for b in buttons}
    assert labels["5", "2"].startswith("layer 5, expert 2: activated; score +")
    assert f"score {profile.scores.value[2, 2]:+.3f}" in labels["5", "2"]
    assert labels["2", "1"].startswith("layer 2, expert 1: deactivated; ")
    assert labels["2", "0"].startswith("layer 2, expert 0: untouched; ")
    text = heat_map(begin(profile, MODEL))
    assert text.count(">+</button>") == len(profile.activated)
    assert text.count(">−</button>") == len(profile.deactivated)


def test_a_map_without_scores_is_neutral_and_says_so():
    text = heat_map(begin(None, MODEL))
    assert "No scores here" in text
    assert "--s:" not in text
    assert "score" not in Elements(text).having("data-expert")[0]["aria-label"]  # pyright: ignore


def test_a_crowded_layer_is_marked():
    draft = begin(None, MODEL)
    for expert in range(3):
        draft = cycle(draft, (2, expert))
    assert "3 activated, k = 2" in heat_map(draft)
    assert heat_map(draft).count('<tr class="over">') == 1


def test_a_partial_dose_promises_no_selection():
    draft = begin(None, MODEL)
    assert "is selected by every token" in heat_map(draft)
    assert "promise no selection" in heat_map(replace(draft, dose=0.5))
    assert "promise no selection" in heat_map(begin(full(), MODEL))  # the paper's rule


def test_a_dense_model_has_no_map():
    dense = replace(MODEL, layers=(), router_norms=())
    assert "dense" in heat_map(begin(None, dense))


# -- the panes -----------------------------------------------------------------------------------

STEERED = Profile(((0, 1), (2, 5)), ((1, 0),), name="mine")
TOKENS = (
    Token(5, "Say", frozenset({(0, 1), (1, 0)})),
    Token(6, "", frozenset()),
    Token(7, " <b>é", frozenset({(0, 1), (2, 5)})),
    Token(8, ".", None),
)


def test_a_token_says_how_many_experts_it_selected_and_which():
    shown = Elements(pane(1, [], "Hm?", Replies((TOKENS, TOKENS)), STEERED))
    tokens = shown.having("data-told")
    assert [token["data-told"] for token in tokens] == [
        "token 1 “Say”: selected 1 of the 2 + experts (layer 0: 1);"
        " selected 1 of the 1 − experts (layer 1: 0)",
        "token 3 “<b>é”: selected 2 of the 2 + experts (layer 0: 1; layer 2: 5);"
        " selected 0 of the 1 − experts",
        "token 4 “.”: the model did not read it yet, or the reply was cut off behind it",
    ]
    assert [token.get("style") for token in tokens] == [
        "--up:50%;--down:100%",
        "--up:100%;--down:0%",
        None,
    ]
    assert "+ experts selected 3 of 6 times (50%)" in shown.text  # three tokens read, one unseen
    assert "− experts selected 1 of 3 times (33%)" in shown.text


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_is_said_is_text(asked: str, reply: str):
    turns = [Turn(asked, (reply, reply), asked)]
    shown = pane(1, turns, asked, Replies(((), (Token(1, reply, frozenset()),))), STEERED)
    known = {"h2", "div", "p", "span", "br"}
    assert {tag for tag, _ in Elements(shown).found} <= known
    assert {name for _, a in Elements(shown).found for name in a} <= {
        "class",
        "style",
        "data-told",
        "aria-live",
        "aria-label",
    }


def test_earlier_replies_are_not_marked():
    turns = [Turn("One?", ("a", "b"), "mine: 2 activated")]
    assert "data-told" not in pane(1, turns)
    assert "mine: 2 activated" in pane(1, turns)
    assert "mine: 2 activated" not in pane(0, turns)


# -- asking --------------------------------------------------------------------------------------


def asked(engine: TransformersEngine, turns: list[Turn], draft, **more) -> list[Step]:
    events = {"stop": threading.Event(), "alone": threading.Lock()}
    sampling = Sampling(more.pop("longest", 6))
    text = more.pop("text", "Tell me.")
    return list(ask(Played(engine), turns, draft, "mine", text, sampling, **events))


def test_each_side_goes_on_with_its_own_replies(engine: TransformersEngine):
    draft = cycle(begin(None, engine.facts), (2, 5))
    first, *_, last = asked(engine, [], draft)
    assert first.replies is None
    assert last.turn is not None
    assert last.turn.replies[0] != last.turn.replies[1]
    assert last.turn.steering == "mine: 1 activated"
    assert last.proof[0].startswith("fired: mine: layers 2; ")
    again = asked(engine, [last.turn], draft, text="And?")[-1]
    prompts, _ = rendered(engine, [last.turn], "And?", {}, 6)
    for prompt, reply in zip(prompts, last.turn.replies, strict=True):
        assert f"<|user|>Tell me.<|end|><|assistant|>{reply}<|end|><|user|>And?" in prompt
    profile = Profile(((2, 5),), name="mine")
    expected = engine.generate(prompts, [None, profile], max_new_tokens=6)
    assert again.turn is not None
    assert again.turn.replies == tuple(expected.replies)


def test_directions_are_shown_applied_and_kept(engine: TransformersEngine):
    width = engine.facts.hidden
    direction = Direction((1.0,) + (0.0,) * (width - 1), ((2, "input"),), coefficient=3.0)
    profile = Profile(directions=(direction,), name="pushed")
    draft = cycle(begin(profile, engine.facts), (1, 2))
    assert direction.words in unescape(choice(draft))
    assert made(draft, "mine").directions == (direction,)
    *_, last = asked(engine, [], draft)
    assert last.turn is not None
    assert last.turn.steering == "mine: 1 activated, 1 direction"
    assert [line.split(";")[0] for line in last.proof] == [
        "fired: mine: layers 1",
        "fired: mine: moved the input of layer 2 by 3 of 3",
    ]
    prompts, _ = rendered(engine, [], "Tell me.", {}, 6)
    expected = engine.generate(prompts, [None, made(draft, "mine")], max_new_tokens=6)
    assert last.turn.replies == tuple(expected.replies)


def test_nothing_steered_is_said(engine: TransformersEngine):
    *_, last = asked(engine, [], begin(None, engine.facts))
    assert last.turn is not None
    assert last.turn.replies[0] == last.turn.replies[1]
    assert "Nothing is steered" in last.proof[0]


def test_what_cannot_be_asked_is_refused(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
):
    draft = begin(None, engine.facts)
    with pytest.raises(MoesteerError, match="write a prompt"):
        asked(engine, [], draft, text=" \n")
    crowded = draft
    for expert in range(4):
        crowded = cycle(crowded, (1, expert))
    with pytest.raises(MoesteerError, match=r"4 experts are activated in layer 1 .* k = 3"):
        asked(engine, [], crowded)
    monkeypatch.setattr(engine, "max_tokens", 30)
    assert len(asked(engine, [], draft, longest=5000)[-1].replies.rows[0]) < 30  # pyright: ignore
    with pytest.raises(MoesteerError, match="fills the model's context of 30"):
        asked(engine, [Turn("What? " * 9, ("a", "b"), "")], draft)


# -- serving -------------------------------------------------------------------------------------


def test_another_host_needs_a_password(tmp_path: Path):
    file = tmp_path / "password"
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(MoesteerError, match=r"--password-file"):
            read_password(None, host)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        assert read_password(None, host) is None
    for content in ("", "\n", "  \nsecond"):
        file.write_text(content)
        with pytest.raises(MoesteerError, match="holds no password"):
            read_password(str(file), "0.0.0.0")
    with pytest.raises(MoesteerError, match="can't be read"):
        read_password(str(tmp_path / "none"), "0.0.0.0")
    file.write_text("open sesame\nmore")
    assert read_password(str(file), "0.0.0.0") == "open sesame"


def test_a_port_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MoesteerError, match=rf"127\.0\.0\.1:{port} can't be had: .*in use"):
            listen("127.0.0.1", port)
    for port in (-1, 65536):
        with pytest.raises(MoesteerError, match="from 0 to 65535"):
            listen("127.0.0.1", port)


def test_a_model_in_several_processes_is_refused(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page calls the model itself, and the other processes would be waited for for ever."""
    from moesteer.playground.page import build

    monkeypatch.setattr(engine.model, "_tp_size", 2)
    with pytest.raises(MoesteerError, match="split over 2 processes, and replies that grow"):
        build(Played(engine))
