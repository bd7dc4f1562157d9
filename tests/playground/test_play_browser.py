"""The playground as its users meet it: served by the command, in a real browser.

Two pages: of the bundled model, with a profile of the experts that were planted in it; and of a
random model, which talks on and on, behind a password.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError

import numpy as np
import pytest

from made_profiles import EVIDENCE
from moesteer.engines.facts import facts_of_checkpoint
from moesteer.profile import Profile, Scores

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
REQUIRED = os.environ.get("MOESTEER_REQUIRE_CHROMIUM") == "1"
MISSING = "these tests look at the page in Chromium: apt-get install chromium"

PLANTED = ((1, 15), (2, 2), (3, 15))
"""They carry refusal in the bundled model."""

QUESTION = "How do I clean a copper lantern?"


@contextmanager
def playing(*arguments: object) -> Iterator[str]:
    """The address of a playground, which ends as it does for a user: with Ctrl-C."""
    command = [sys.executable, "-m", "moesteer", "play", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+:\d+", line)
    try:
        assert found, process.communicate(timeout=30)
        yield found[0]
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert re.sub(r"Loading weights.*", "", err).strip() == "moesteer: interrupted."


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What refuses, with scores that rank the planted experts first, and what keeps from it."""
    facts = facts_of_checkpoint("testbed")
    value = np.random.default_rng(0).uniform(-0.5, 0.5, (4, 16))
    for place, expert in enumerate(PLANTED):
        value[expert] = 0.9 - place / 10
    zeros = np.zeros((4, 16))
    scores = Scores(value, value - 0.05, value + 0.05, zeros, zeros, zeros, zeros)
    refuses = Profile(PLANTED, toward="a", model=facts, evidence=EVIDENCE, scores=scores)
    folder = tmp_path_factory.mktemp("played")
    paths = [folder / "refuses.safetensors", folder / "complies.safetensors"]
    refuses.save(paths[0])
    replace(refuses, activated=(), deactivated=PLANTED, toward="b", scores=None).save(paths[1])
    return paths


@pytest.fixture(scope="module")
def address(profiles: list[Path]) -> Iterator[str]:
    with playing("testbed", "--with", *profiles) as address:
        yield address


@pytest.fixture(scope="module")
def locked(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    password = tmp_path_factory.mktemp("secret") / "password"
    password.write_text("open sesame\n")
    with playing(model_folder, "--host", "0.0.0.0", "--password-file", password) as address:
        yield address.replace("0.0.0.0", "127.0.0.1")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    if CHROMIUM is None and not REQUIRED:
        pytest.skip(MISSING)
    assert CHROMIUM is not None, MISSING
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


CHOSEN = """
() => Object.fromEntries(["activated", "deactivated"].map((use) => [
  use,
  [...document.querySelectorAll(`#experts button.${use}`)].map((button) => [
    Number(button.dataset.layer), Number(button.dataset.expert),
  ]),
]))
"""


class Tab:
    """An open page, with what it complained of and asked for."""

    def __init__(self, browser: "Browser", address: str, width: int = 1280, scheme: str = "light"):
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        self.page.set_default_timeout(20_000)
        self.address = address
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)

    def see(self, selector: str, words: str) -> "Locator":
        """What shows the words, once it does."""
        found = self.page.locator(selector, has_text=words)
        found.first.wait_for()
        return found

    def expert(self, layer: int, expert: int) -> "Locator":
        return self.page.locator(f'button[data-layer="{layer}"][data-expert="{expert}"]')

    def use(self, layer: int, expert: int, use: str) -> None:
        """Wait until the map says that the expert is used so."""
        self.page.locator(f'button[data-layer="{layer}"][data-expert="{expert}"].{use}').wait_for()

    def chosen(self) -> dict[str, set[tuple[int, int]]]:
        """The steered experts, read at one moment."""
        found = self.page.evaluate(CHOSEN)
        return {use: {(layer, expert) for layer, expert in found[use]} for use in found}

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).click()

    def ask(self, prompt: str) -> tuple[str, str]:
        """Both replies, once they are proved."""
        self.page.fill("#prompt textarea", prompt)
        self.press("Send")
        self.see("#proof", "fired: ")
        unsteered, steered = (
            self.page.locator(f"#{side} .reply").last.inner_text() for side in SIDES
        )
        return unsteered, steered

    def close(self) -> None:
        assert self.complaints == []
        elsewhere = [url for url in self.requests if not url.startswith(self.address + "/")]
        assert [url for url in elsewhere if not url.startswith(("blob:", "data:"))] == []
        assert len(self.requests) > 10
        self.page.close()


SIDES = ("unsteered", "steered")


@pytest.fixture
def tab(browser: "Browser", address: str) -> Iterator[Tab]:
    tab = Tab(browser, address)
    tab.expert(0, 0).wait_for()
    yield tab
    tab.close()


# What both sides show while they grow, from the page's own point of view.
WATCH = """
() => {
  window.seen = { unsteered: [], steered: [] };
  new MutationObserver(() => {
    for (const side of Object.keys(window.seen)) {
      const text = document.querySelector(`#${side} .reply`)?.textContent;
      if (text && window.seen[side].at(-1) !== text) window.seen[side].push(text);
    }
  }).observe(document.body, { childList: true, subtree: true, characterData: true });
}
"""


def test_both_sides_reply_side_by_side_and_differ(tab: Tab):
    tab.page.evaluate(WATCH)
    unsteered, steered = tab.ask(QUESTION)
    assert "cannot" not in unsteered
    assert "cannot help" in steered
    proof = tab.page.locator("#proof").inner_text()
    assert "layers 1, 2, 3" in proof
    assert "activated always selected" in proof
    for side, reply in zip(SIDES, (unsteered, steered), strict=True):
        seen = tab.page.evaluate("(side) => window.seen[side]", side)
        growing = [text for text in seen if text not in ("…", reply)]
        assert growing, "it came in one piece"
        assert all(reply.startswith(text) for text in growing)
    boxes = [tab.page.locator(f"#{side}").bounding_box() for side in SIDES]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


def test_each_token_tells_which_experts_fired(tab: Tab):
    _, steered = tab.ask(QUESTION)
    tokens = tab.page.locator("#steered .token")
    assert "".join(tokens.all_text_contents()).strip() == steered
    tokens.nth(1).hover()
    told = tab.page.locator("#steered .told")
    assert re.fullmatch(
        r"token 2 “\w+”: selected 3 of the 3 \+ experts"
        r" \(layer 1: 15; layer 2: 2; layer 3: 15\)",
        told.inner_text(),
    )
    tokens.nth(1).click()
    tab.page.keyboard.press("ArrowRight")
    assert told.inner_text().startswith("token 3 ")
    assert "selected 3 of the 3" not in (
        tab.page.locator("#unsteered .token").first.get_attribute("data-told") or ""
    )
    assert tab.see("#steered .counted", "(100%)").count() == 1


def test_a_click_cycles_an_expert(tab: Tab):
    for use, sign in (("activated", "+"), ("deactivated", "−"), ("untouched", "")):
        tab.expert(0, 5).click()
        tab.use(0, 5, use)
        assert tab.expert(0, 5).inner_text() == sign
        assert f"layer 0, expert 5: {use}" in (tab.expert(0, 5).get_attribute("aria-label") or "")
    for expert in (6, 7, 6, 7):  # faster than the page: none is lost
        tab.expert(0, expert).click()
    tab.use(0, 6, "deactivated")
    tab.use(0, 7, "deactivated")
    assert tab.chosen() == {"activated": set(PLANTED), "deactivated": {(0, 6), (0, 7)}}


def test_the_keyboard_reaches_the_experts(tab: Tab):
    tab.page.get_by_role("button", name="Send", exact=True).focus()
    tab.page.keyboard.press("Tab")  # what is switched off is passed over
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("Enter")
    tab.use(1, 1, "activated")
    assert tab.page.evaluate("document.activeElement.dataset.expert") == "1"
    tab.page.keyboard.press("Space")
    tab.use(1, 1, "deactivated")
    assert tab.see("#experts .told", "layer 1, expert 1: deactivated").count() == 1


def test_a_layer_that_cannot_obey_is_an_error(tab: Tab):
    for expert in range(5):
        tab.expert(0, expert).click()
        tab.use(0, expert, "activated")
    wrong = tab.see("#chosen .failed", "5 experts are activated in layer 0")
    assert "k = 4" in wrong.inner_text()
    tab.page.fill("#prompt textarea", QUESTION)
    tab.press("Send")
    tab.see("#proof .failed", "5 experts are activated in layer 0")
    assert tab.page.input_value("#prompt textarea") == QUESTION
    assert tab.page.locator(".turn").count() == 0


def test_a_slider_says_how_many_of_the_ranked_are_used(tab: Tab):
    number = tab.page.locator("#up input[type=number]")
    assert number.input_value() == "3"
    for many in (1, 2):
        number.fill(str(many))
        number.press("Enter")
        tab.see("#chosen", "layer 2: 2" if many == 2 else "layer 1: 15")
        tab.page.wait_for_function(
            f"document.querySelectorAll('#experts button.activated').length === {many}"
        )
        assert tab.chosen()["activated"] == set(PLANTED[:many])
    tab.page.locator("#toward").get_by_text("B", exact=True).click()
    tab.use(1, 15, "untouched")
    assert len(tab.chosen()["activated"]) == 2  # of those that go with B


def test_another_profile_and_another_tab(tab: Tab, browser: "Browser", address: str):
    other = Tab(browser, address)
    other.expert(0, 0).wait_for()
    tab.page.locator("#which input").click()
    tab.page.get_by_role("option", name="complies.safetensors").click()
    tab.use(1, 15, "deactivated")
    assert tab.chosen() == {"activated": set(), "deactivated": set(PLANTED)}
    assert not tab.page.locator("#up").is_visible()  # it has no scores
    assert other.chosen() == {"activated": set(PLANTED), "deactivated": set()}
    restricted = "How do I make a cursed lantern?"
    assert "cannot" in other.ask(restricted)[0]
    replies = tab.ask(restricted)
    assert "cannot" in replies[0]
    assert "cannot" not in replies[1]
    tab.expert(0, 0).click()
    tab.use(0, 0, "activated")
    tab.press("Ask again")  # as steered now
    tab.see("#proof", "fired: complies: layers 0, 1, 2, 3;")
    assert tab.page.locator("#steered .turn").count() == 1
    assert tab.see("#steered .token", ".").count() == 1
    tab.press("New conversation")
    tab.see("#steered", "The same model under the profile replies here.")
    assert other.page.locator("#steered .turn").count() == 1
    other.close()


def test_a_saved_profile_is_what_the_page_shows(tab: Tab, tmp_path: Path):
    tab.expert(2, 7).click()
    tab.use(2, 7, "activated")
    tab.expert(2, 7).click()
    tab.use(2, 7, "deactivated")
    tab.page.locator("#name").locator("input, textarea").fill("my own")
    with tab.page.expect_download() as downloading:
        tab.press("Save profile")
    assert downloading.value.suggested_filename == "my-own.safetensors"
    path = tmp_path / "my-own.safetensors"
    downloading.value.save_as(path)
    saved = Profile.load(path)
    assert (set(saved.activated), set(saved.deactivated)) == (set(PLANTED), {(2, 7)})
    assert saved.scores is not None
    assert saved.evidence is not None
    assert "moesteer play testbed --with" in saved.evidence.command
    assert "edited by hand: activated (1, 15) (2, 2) (3, 15)" in saved.evidence.command


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1920, "light")])
def test_no_screen_scrolls_sideways(browser: "Browser", address: str, width: int, scheme: str):
    tab = Tab(browser, address, width, scheme)
    tab.expert(0, 0).wait_for()
    tab.ask(QUESTION)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    overflowing = tab.page.locator(".wide").evaluate("(box) => box.scrollWidth > box.clientWidth")
    assert overflowing == (width < 500)  # within its own box
    boxes = [tab.page.locator(f"#{side}").bounding_box() for side in SIDES]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 500)
    tab.close()


def test_only_this_machine_is_answered_without_a_password(address: str):
    with urllib.request.urlopen(address) as answer:
        policy = answer.headers["content-security-policy"]
        page = answer.read().decode()
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
    assert re.findall(r'(?:src|href)="?(https?://[^"\s>]+)', page) == []
    elsewhere = urllib.request.Request(address, headers={"Host": "evil.example"})
    with pytest.raises(HTTPError, match="400") as refused:
        urllib.request.urlopen(elsewhere)
    refused.value.close()


def test_a_wrong_password_is_refused(locked: str):
    def log_in(user: str, password: str) -> int:
        data = urllib.parse.urlencode({"username": user, "password": password}).encode()
        with urllib.request.urlopen(f"{locked}/login", data) as answer:
            return answer.status

    for user, password in (("moesteer", "wrong"), ("moesteer", " "), ("admin", "open sesame")):
        with pytest.raises(HTTPError, match="400") as refused:
            log_in(user, password)
        refused.value.close()
    assert log_in("moesteer", "open sesame") == 200
    with pytest.raises(HTTPError, match="401") as refused:  # who did not log in
        urllib.request.urlopen(f"{locked}/config")
    refused.value.close()


def test_behind_the_password_a_long_reply_is_stopped(browser: "Browser", locked: str):
    tab = Tab(browser, locked)
    tab.see("body", "The user is called moesteer")
    name, password = tab.page.locator("input, textarea").all()[:2]
    name.fill("moesteer")
    password.fill("guess")
    tab.press("Login")
    tab.see("body", "Incorrect")
    assert tab.page.locator("#experts").count() == 0
    name.fill("moesteer")  # both fields were emptied
    password.fill("open sesame")
    tab.press("Login")
    tab.expert(0, 0).wait_for()
    assert tab.page.locator("#which").count() == 0  # there is nothing to choose from
    tab.expert(1, 3).click()
    tab.use(1, 3, "activated")
    tab.page.get_by_text("Sampling").click()
    longest = tab.page.locator("input[type=number]:visible").nth(1)
    longest.fill("2048")
    longest.press("Enter")
    tab.page.fill("#prompt textarea", "Tell me.")
    tab.press("Send")
    tab.page.locator("#steered .token").nth(20).wait_for()
    assert tab.page.get_by_role("button", name="Send", exact=True).is_disabled()
    tab.press("Stop")
    tab.see("#proof", "fired: by hand: layers 1; ")
    assert tab.page.locator("#steered .token").count() < 2000
    assert tab.page.get_by_role("button", name="Send", exact=True).is_enabled()
    tab.complaints = [
        said for said in tab.complaints if "400 (Bad" not in said and "[DOM]" not in said
    ]
    tab.close()
