"""What stands where on the page; what happens there: `page.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from moesteer.errors import MoesteerError
from moesteer.playground.conversation import SIDES
from moesteer.playground.editing import Draft, limits, made, remarks
from moesteer.playground.heatmap import heat_map
from moesteer.playground.panes import pane
from moesteer.report.terminal import named

TEMPLATES = Path(__file__).parent / "template"

HEADER = """\
# moesteer playground
Your prompt goes to **{model}** twice: as it is, and with experts activated (+) or deactivated (−).
Choose them in the map or by their scores, and see what changes.
"""


@dataclass(frozen=True)
class Parts:
    """The components of the page, and the two states of its tab: the draft and the turns."""

    draft: gr.State
    turns: gr.State
    sides: tuple[gr.HTML, gr.HTML]
    proof: gr.HTML
    prompt: gr.Textbox
    send: gr.Button
    stop: gr.Button
    again: gr.Button
    new: gr.Button
    which: gr.Dropdown
    toward: gr.Radio
    up: gr.Slider
    down: gr.Slider
    dose: gr.Slider
    chosen: gr.HTML
    longest: gr.Slider
    temperature: gr.Slider
    seed: gr.Number
    name: gr.Textbox
    save: gr.Button
    file: gr.JSON
    heat: gr.HTML


def lay_out(model: str, drafts: Sequence[Draft]) -> Parts:
    """Everything on the page, showing the first draft."""
    first = drafts[0]
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    gr.Markdown(HEADER.format(model=escape(model)))
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            with gr.Row(elem_id="sides", equal_height=True):
                unsteered, steered = (
                    gr.HTML(pane(number, []), js_on_load=script, elem_id=side)
                    for number, side in enumerate(SIDES)
                )
            proof = gr.HTML(elem_id="proof")
            prompt = gr.Textbox(
                label="Prompt",
                placeholder="Ask both sides something …",
                lines=2,
                max_lines=8,
                elem_id="prompt",
            )
            with gr.Row():
                send = gr.Button("Send", variant="primary", size="md", min_width=90)
                stop, again, new = (
                    gr.Button(words, interactive=False, size="md", min_width=width)
                    for words, width in (
                        ("Stop", 90),
                        ("Ask again", 110),
                        ("New conversation", 160),
                    )
                )
            gr.Markdown("## Experts")
            heat = gr.HTML(heat_map(first), js_on_load=script, elem_id="experts")
        with gr.Column(scale=3, min_width=300):
            which = gr.Dropdown(
                [(draft.base.name, number) for number, draft in enumerate(drafts)],
                value=0,
                label="Profile",
                visible=len(drafts) > 1,
                elem_id="which",
            )
            toward = gr.Radio(
                label="Steer toward",
                info="the sides of the contrast pairs that the scores come from",
                elem_id="toward",
                **toward_of(first),
            )
            up, down = (
                gr.Slider(step=1, label=label, elem_id=name, **slider_of(first, number))
                for number, (name, label) in enumerate(
                    [("up", "Activate the top, by score"), ("down", "Deactivate the top, by score")]
                )
            )
            dose = gr.Slider(0, 1, first.dose, step=0.05, label="Dose (1: full)", elem_id="dose")
            chosen = gr.HTML(choice(first), elem_id="chosen")
            with gr.Accordion("Sampling", open=False):
                longest = gr.Slider(1, 2048, 128, step=1, label="Most new tokens")
                temperature = gr.Slider(
                    0,
                    2,
                    0,
                    step=0.05,
                    label="Temperature",
                    info="0 is greedy; above, both sides draw with the same dice",
                )
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            name = gr.Textbox(name_of(first), label="Name", elem_id="name")
            save = gr.Button("Save profile", size="md", elem_id="save")
    return Parts(
        draft=gr.State(first),
        turns=gr.State([]),
        sides=(unsteered, steered),
        proof=proof,
        prompt=prompt,
        send=send,
        stop=stop,
        again=again,
        new=new,
        which=which,
        toward=toward,
        up=up,
        down=down,
        dose=dose,
        chosen=chosen,
        longest=longest,
        temperature=temperature,
        seed=seed,
        name=name,
        save=save,
        file=gr.JSON(visible=False),
        heat=heat,
    )


# -- what parts show of a draft ------------------------------------------------------------------


def toward_of(draft: Draft) -> dict[str, Any]:
    """Without scores nothing goes with either side; a direction's side is fixed."""
    return {
        "choices": [("A", "a"), ("B", "b")],
        "value": draft.toward,
        "visible": draft.base.scores is not None,
        "interactive": not (draft.base.directions and draft.base.toward),
    }


def slider_of(draft: Draft, number: int) -> dict[str, Any]:
    """Of the experts to activate (0) or to deactivate (1), by rank."""
    most = limits(draft)[number]
    value = (draft.ranked or (len(draft.activated), len(draft.deactivated)))[number]
    return {
        "minimum": 0,
        "maximum": max(most, 1),
        "value": min(value, most),
        "visible": draft.base.scores is not None,
    }


def name_of(draft: Draft) -> str:
    return draft.base.name.removesuffix(".safetensors")


def choice(draft: Draft) -> str:
    """Which experts and directions are chosen; what is wrong with that, or uncertain."""
    rows = [
        ("+ activated", named(draft.activated) or "none"),
        ("− deactivated", named(draft.deactivated) or "none"),
        *(("direction", direction.words) for direction in draft.base.directions),
    ]
    if draft.base.gate is not None:
        rows.append(("gate", draft.base.gate.words))
    facts = "".join(f"<dt>{escape(what)}</dt><dd>{escape(which)}</dd>" for what, which in rows)
    try:
        made(draft, name_of(draft))
        notes = "".join(plain(remark) for remark in remarks(draft))
    except MoesteerError as error:
        notes = failed(str(error))
    if draft.base.scores is not None and draft.ranked is None and not draft.is_base:
        notes += plain("Edited by hand; a slider begins with the ranking again.")
    return f"<dl>{facts}</dl>{notes}"


def plain(*lines: str) -> str:
    return "".join(f'<p class="quiet" role="status">{escape(line)}</p>' for line in lines)


def failed(line: str) -> str:
    return f'<p class="failed" role="alert">{escape(line)}</p>'
