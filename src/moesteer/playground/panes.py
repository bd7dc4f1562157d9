"""What stands on either side of the page: the conversation, and what each new token selected."""

from collections.abc import Sequence
from html import escape

from moesteer.playground.conversation import SIDES, Turn
from moesteer.playground.streaming import Replies, Token
from moesteer.profile import Expert, Profile
from moesteer.report.terminal import named

NAMED = 12
"""Experts that are named of one token, at most."""


def pane(
    side: int,
    turns: Sequence[Turn],
    asked: str | None = None,
    replies: Replies | None = None,
    profile: Profile | None = None,
) -> str:
    """One side: what was said, and what is being asked and replied now.

    Only of what is said now each token is marked: earlier replies may have been steered otherwise.
    """
    said = [_turn(turn.asked, _plain(turn.replies[side]), _by(side, turn)) for turn in turns]
    tokens = replies.rows[side] if replies else ()
    below = ""
    if asked is not None:
        said.append(_turn(asked, _marked(tokens, profile), ""))
        below = _counted(tokens, profile)
    if not said:
        said = [f'<p class="quiet">{EMPTY[side]}</p>']
    return f'<h2 class="side">{TITLES[side]}</h2>{"".join(said)}{below}'


TITLES = ("Unsteered", "Steered")
EMPTY = ("The model as it is replies here.", "The same model under the profile replies here.")
HINT = "Point at a token, or walk there with Tab and the arrow keys, to see what it selected."


def _turn(asked: str, reply: str, by: str) -> str:
    return f'<div class="turn"><p class="asked">{escape(asked)}</p>{reply}{by}</div>'


def _plain(text: str) -> str:
    return f'<p class="reply">{escape(text)}</p>'


def _by(side: int, turn: Turn) -> str:
    return f'<p class="quiet">{escape(turn.steering)}</p>' if SIDES[side] == "steered" else ""


def _marked(tokens: Sequence[Token], profile: Profile | None) -> str:
    """A span a token; its bars say which share of the steered experts it selected."""
    if not tokens:
        return '<p class="reply waiting" aria-label="waiting">…</p>'
    spans = [_span(number, token, profile) for number, token in enumerate(tokens, start=1)]
    return f'<p class="reply tokens">{"".join(spans)}</p>'


def _span(number: int, token: Token, profile: Profile | None) -> str:
    if not token.text:  # an end token, or part of a character: it selects, but shows nothing
        return ""
    if profile is None or not profile.steered_layers:
        return escape(token.text)
    style = ""
    if token.selected is not None:
        up, down = (share(token, experts) for experts in (profile.activated, profile.deactivated))
        style = f' style="--up:{up:.0%};--down:{down:.0%}"'
    shown = token.text.strip() or repr(token.text)[1:-1]
    told = escape(f"token {number} “{shown}”: {words(token, profile)}")
    return f'<span class="token" data-told="{told}"{style}>{escape(token.text)}</span>'


def share(token: Token, experts: Sequence[Expert]) -> float:
    """Which share of these experts the token selected; 0 where there are none."""
    selected = token.selected or frozenset()
    return sum(expert in selected for expert in experts) / len(experts) if experts else 0.0


def words(token: Token, profile: Profile) -> str:
    """How many of the profile's experts a token selected, and which."""
    if token.selected is None:
        return "the model did not read it yet, or the reply was cut off behind it"
    parts = []
    for sign, experts in (("+", profile.activated), ("−", profile.deactivated)):
        if experts:
            found = [expert for expert in experts if expert in token.selected]
            which = f" ({named(found[:NAMED])}{' …' * (len(found) > NAMED)})" if found else ""
            parts.append(f"selected {len(found)} of the {len(experts)} {sign} experts{which}")
    return "; ".join(parts)


def _counted(tokens: Sequence[Token], profile: Profile | None) -> str:
    """How often this reply's tokens selected the profile's experts."""
    if profile is None or not profile.steered_layers:
        return ""
    read = [token for token in tokens if token.selected is not None]
    rows = []
    for name, experts, bar in (
        ("+ experts", profile.activated, "up"),
        ("− experts", profile.deactivated, "down"),
    ):
        if experts and read:
            selected = sum(len(t.selected.intersection(experts)) for t in read if t.selected)
            possible = len(read) * len(experts)
            rows.append(
                f'<span class="key {bar}">{name}</span> selected {selected} of {possible} times'
                f" ({selected / possible:.0%})"
            )
    return (
        f'<p class="told" aria-live="polite">{HINT}</p>'
        f'<p class="counted">{"<br>".join(rows) or "…"}</p>'
    )
