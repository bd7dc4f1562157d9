"""The page, made of gradio: two replies side by side, and the profile that tells them apart.

Each browser tab has a draft and a conversation of its own; the model is one for all, and who asks
waits for those who asked before. Everything that decides is elsewhere: `editing.py` what a profile
becomes, `asking.py` what is replied, `layout.py` what stands where.
"""

import base64
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from moesteer.engines.transformers.splitting import check_whole
from moesteer.errors import MoesteerError
from moesteer.playground.asking import Played, ask
from moesteer.playground.conversation import Turn
from moesteer.playground.editing import Draft, begin, choose, cycle, saved
from moesteer.playground.heatmap import heat_map
from moesteer.playground.layout import (
    Parts,
    choice,
    failed,
    lay_out,
    name_of,
    plain,
    slider_of,
    toward_of,
)
from moesteer.playground.panes import pane
from moesteer.playground.streaming import Sampling

Updates = dict[Any, Any]
"""What becomes of the page's components."""

DOWNLOAD = """(file) => {
  if (!file?.data) return;
  const bytes = Uint8Array.from(atob(file.data), (c) => c.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""

QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}


def build(played: Played) -> gr.Blocks:
    """The page; nothing runs yet. MoesteerError for a model that is split over processes."""
    check_whole(played.engine.model, "replies that grow token by token")
    facts = played.engine.facts
    drafts = [begin(profile, facts) for profile in played.profiles] + [begin(None, facts)]
    with gr.Blocks(title=f"moesteer: {facts.id}", analytics_enabled=False) as page:
        parts = lay_out(facts.id, drafts)
        _wire_profile(parts, drafts, played.command)
        _wire_conversation(parts, played)
    return page


def _wire_profile(parts: Parts, drafts: Sequence[Draft], command: str) -> None:
    """Choosing a profile, its experts and its dose; saving it."""
    shown = [parts.draft, parts.heat, parts.chosen]

    def show(draft: Draft) -> Updates:
        return {parts.draft: draft, parts.heat: heat_map(draft), parts.chosen: choice(draft)}

    def sliders(draft: Draft) -> Updates:
        both = (parts.up, parts.down)
        return {one: gr.update(**slider_of(draft, number)) for number, one in enumerate(both)}

    def take(number: int) -> Updates:
        draft = drafts[number]
        begun = {parts.toward: gr.update(**toward_of(draft)), parts.dose: draft.dose}
        return show(draft) | sliders(draft) | begun | {parts.name: name_of(draft)}

    def rank(draft: Draft, toward: Any, activate: float, deactivate: float) -> Updates:
        return show(choose(draft, int(activate), int(deactivate), toward))

    def turn_round(draft: Draft, toward: Any, activate: float, deactivate: float) -> Updates:
        turned = choose(draft, int(activate), int(deactivate), toward)
        return show(turned) | sliders(turned)

    def clicks(draft: Draft, event: gr.EventData) -> Updates:
        for layer, expert in event.experts:
            draft = cycle(draft, (int(layer), int(expert)))
        return show(draft)

    def save(draft: Draft, name: str) -> Updates:
        try:
            file, data = saved(draft, name, command)
        except MoesteerError as error:
            return {parts.file: None, parts.proof: failed(str(error))}
        encoded = base64.b64encode(data).decode()
        return {
            parts.file: {"name": file, "data": encoded},
            parts.proof: plain(f"Saved as {file}, in the folder of your downloads."),
        }

    # One after the other, and none left out: each click changes what the one before it made.
    each: Any = QUIET | {"trigger_mode": "multiple", "concurrency_id": "editing"}
    last: Any = QUIET | {"trigger_mode": "always_last", "concurrency_id": "editing"}
    ranking = [parts.draft, parts.toward, parts.up, parts.down]
    sliding = [parts.up, parts.down]
    parts.which.input(
        take, parts.which, [*shown, *sliding, parts.toward, parts.dose, parts.name], **last
    )
    parts.toward.input(turn_round, ranking, [*shown, *sliding], **last)
    parts.up.input(rank, ranking, shown, **last)
    parts.down.input(rank, ranking, shown, **last)
    parts.dose.input(
        lambda draft, dose: show(replace(draft, dose=dose)),
        [parts.draft, parts.dose],
        shown,
        **last,
    )
    parts.heat.click(clicks, parts.draft, shown, **each)
    parts.save.click(save, [parts.draft, parts.name], [parts.file, parts.proof], **each).then(
        None, parts.file, None, js=DOWNLOAD, **QUIET
    )


def _wire_conversation(parts: Parts, played: Played) -> None:
    """Asking both sides, once more, or from the beginning; stopping them."""
    alone = threading.Lock()
    running: dict[str | None, threading.Event] = {}

    def panes(turns: Sequence[Turn]) -> Updates:
        return {side: pane(number, turns) for number, side in enumerate(parts.sides)}

    def buttons(busy: bool, turns: Sequence[Turn]) -> Updates:
        on = {parts.send: not busy, parts.stop: busy}
        on |= dict.fromkeys((parts.again, parts.new), bool(turns) and not busy)
        return {button: gr.update(interactive=active) for button, active in on.items()}

    def reply(
        who: str | None,
        turns: list[Turn],
        kept: list[Turn],
        draft: Draft,
        name: str,
        asked: str,
        sampling: Sampling,
    ) -> Iterator[Updates]:
        """Ask after `turns`; where that fails, `kept` are the turns that stay."""
        if who in running:  # by the Enter key, while the buttons are off
            yield {parts.prompt: asked}
            return
        stop = running[who] = threading.Event()
        failure = panes(kept) | buttons(False, kept) | {parts.prompt: asked}
        try:
            for step in ask(played, turns, draft, name, asked, sampling, stop=stop, alone=alone):
                now = {
                    side: pane(number, turns, asked, step.replies, step.profile)
                    for number, side in enumerate(parts.sides)
                }
                if step.turn is not None:
                    after = [*turns, step.turn]
                    done = {parts.turns: after, parts.proof: plain(*step.proof)}
                    yield now | buttons(False, after) | done
                elif step.replies is not None:
                    yield now | {parts.proof: plain("…")}
                else:  # the next prompt may be written meanwhile
                    waits = {parts.proof: plain("Waiting for the model …"), parts.prompt: ""}
                    yield now | buttons(True, turns) | waits
        except MoesteerError as error:
            yield failure | {parts.proof: failed(str(error))}
        except Exception:  # a defect of ours, which gradio tells of
            yield failure | {parts.proof: ""}
            raise
        finally:
            stop.set()
            del running[who]

    def send(
        turns: list[Turn],
        draft: Draft,
        name: str,
        longest: float,
        temperature: float,
        seed: float | None,
        asked: str,
        request: gr.Request,
    ) -> Iterator[Updates]:
        drawn = Sampling(int(longest), temperature, int(seed or 0))
        yield from reply(request.session_hash, turns, turns, draft, name, asked, drawn)

    def once_more(
        turns: list[Turn],
        draft: Draft,
        name: str,
        longest: float,
        temperature: float,
        seed: float | None,
        request: gr.Request,
    ) -> Iterator[Updates]:
        drawn = Sampling(int(longest), temperature, int(seed or 0))
        *before, last = turns
        yield from reply(request.session_hash, before, turns, draft, name, last.asked, drawn)

    def halt(request: gr.Request) -> None:
        if request.session_hash in running:
            running[request.session_hash].set()

    def forget() -> Updates:
        return panes([]) | buttons(False, []) | {parts.turns: [], parts.proof: ""}

    told = [*parts.sides, parts.proof, parts.prompt, parts.turns]
    told += [parts.send, parts.stop, parts.again, parts.new]
    given = [parts.turns, parts.draft, parts.name, parts.longest, parts.temperature, parts.seed]
    # Everyone may wait; the model is one at a time (`alone`).
    asking: Any = QUIET | {"concurrency_limit": None}
    gr.on([parts.send.click, parts.prompt.submit], send, [*given, parts.prompt], told, **asking)
    parts.again.click(once_more, given, told, **asking)
    parts.new.click(forget, None, told, **QUIET)
    parts.stop.click(halt, None, None, queue=False, **QUIET)
