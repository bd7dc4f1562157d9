"""The experts of a draft as a layer × expert grid of buttons, as HTML.

Colour says the score, as in reports: red goes with A, blue with B. What is steered has a sign and
a frame besides, and each button says all of it in words.
"""

from html import escape

from moesteer.detection.detectors import DETECTORS
from moesteer.engines.evidence import is_guarded
from moesteer.playground.editing import Draft, Use, crowded, scores_of, use_of
from moesteer.profile import Expert, Profile

SIGNS: dict[Use, str] = {"untouched": "", "activated": "+", "deactivated": "−"}
OVER = ' class="over"'


def heat_map(draft: Draft) -> str:
    """The grid with its legend; where nothing is routed, that it is so."""
    if not draft.layers:
        return '<p class="quiet">This model is dense: it has no experts to steer.</p>'
    scores = scores_of(draft)
    largest = max(map(abs, scores["value"].values())) or 1.0 if scores else 1.0
    widest = max(shape.experts for shape in draft.layers)
    wrong = crowded(draft)
    rows = []
    for shape in draft.layers:
        cells = [_cell(draft, (shape.layer, e), scores, largest) for e in range(shape.experts)]
        cells += ["<td></td>"] * (widest - shape.experts)
        why = wrong.get(shape.layer)
        rows.append(
            f'<tr{OVER if why else ""}><th scope="row">{shape.layer}</th>{"".join(cells)}'
            f'<td class="why">{escape(why or "")}</td></tr>'
        )
    numbers = "".join(f'<th scope="col">{expert}</th>' for expert in range(widest))
    return (
        f'<div class="wide"><table class="experts" aria-label="Experts: a row a layer">'
        f'<thead><tr><th scope="col">layer</th>{numbers}<td></td></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="told" aria-live="polite">Point at an expert, or walk with Tab and the arrow'
        f" keys. A click, Enter or Space: + activated, − deactivated, untouched.</p>"
        f'<p class="quiet">{_legend(draft, largest)}</p>'
    )


def _cell(
    draft: Draft, expert: Expert, scores: dict[str, dict[Expert, float]] | None, largest: float
) -> str:
    use = use_of(draft, expert)
    words = f"layer {expert[0]}, expert {expert[1]}: {use}"
    style = side = ""
    if scores is not None:
        value, low, high, q = (scores[key][expert] for key in ("value", "low", "high", "q"))
        words += f"; score {value:+.3f} ({low:+.3f} … {high:+.3f}), q {_small(q)}"
        side = " warm" if value > 0 else " cold"
        style = f' style="--s:{abs(value) / largest:.0%}"'
    return (
        f'<td><button class="{use}{side}" data-layer="{expert[0]}" data-expert="{expert[1]}"'
        f' aria-label="{words}"{style}>{SIGNS[use]}</button></td>'
    )


def _small(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.001 else "&lt;0.001"


def _legend(draft: Draft, largest: float) -> str:
    k = sorted({shape.top_k for shape in draft.layers})
    promise = (
        "+ is selected by every token, − by none"
        if is_guarded(Profile(rule=draft.base.rule, dose=draft.dose))
        else f"+ and − move the router's numbers (rule {draft.base.rule}, dose {draft.dose:g}) and"
        " promise no selection"
    )
    routing = f"Each token selects k = {', '.join(map(str, k))} experts a layer; {promise}."
    if draft.base.scores is None:
        return f"No scores here, so no colours: the experts are chosen by hand. {routing}"
    seen = draft.base.evidence
    found = ""
    if seen is not None:
        known = DETECTORS.get(seen.detector)
        title = known.title if known else seen.detector
        found = f" ({escape(title)} over {seen.pairs} pairs of {escape(seen.source)})"
    return (
        f'<b class="warm">Red</b>: more in A, <b class="cold">blue</b>: more in B; full colour is'
        f" a score of {largest:.2f}{found}. {routing}"
    )
